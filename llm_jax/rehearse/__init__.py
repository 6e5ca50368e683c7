"""A run compiled for a machine that is not there: memory, communication, time."""
