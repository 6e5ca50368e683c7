"""Delta tuning: a few added or chosen parameters train, the rest stays."""
