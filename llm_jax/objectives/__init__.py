"""Training objectives: `prepare` and `score`, sums per term, never means."""
