"""The embedded data set of small tasks."""
