"""Rows of fixed length, one file a kind of training."""
