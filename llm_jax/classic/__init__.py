"""Before transformers: counts, n-grams, word vectors, and what was done with them."""
