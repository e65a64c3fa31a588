"""Generation by vLLM, an extra."""
