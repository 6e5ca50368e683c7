"""One file an experiment: what it reproduces, the command, the cost, the result."""
