"""Models whose attention is pruned."""
