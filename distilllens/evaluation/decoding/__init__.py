"""Text from a model: the loop, its caches, the samples."""
