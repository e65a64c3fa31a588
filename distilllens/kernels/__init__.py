"""The mathematics of a step, fused: rows through both heads, chunk by chunk."""
