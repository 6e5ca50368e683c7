"""N-gram language models: counted, smoothed, stored, searched."""
