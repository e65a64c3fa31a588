"""The commands: each reads its arguments first, and only then loads what does the work."""
