"""Text as numbers, and classifiers that need nothing else."""
