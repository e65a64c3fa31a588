"""A teacher that does not fit, or need not run: divided over processes, or read from disk."""
