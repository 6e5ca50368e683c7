"""Files of word vectors, and such vectors in a model's token table."""
