"""The cells of an evaluation, checkpoint × set × seed: planned, shared, kept, finished."""
