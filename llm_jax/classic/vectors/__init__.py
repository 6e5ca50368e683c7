"""Word vectors: from counts, by GloVe, by word2vec; and what they are measured by."""
