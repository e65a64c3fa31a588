"""From JSON lines to batches: records, prompts, tokens, order, collation, benchmarks."""
