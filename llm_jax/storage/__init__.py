"""Files, in and out; nothing here depends on a model."""
