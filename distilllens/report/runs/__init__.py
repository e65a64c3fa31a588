"""Training runs, read: their record, progress, curves, differences."""
