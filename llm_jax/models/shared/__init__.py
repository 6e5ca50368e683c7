"""Parts that the model families share."""
