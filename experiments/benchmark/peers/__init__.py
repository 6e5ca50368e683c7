"""The peers' side: programs that measure other libraries, on the same sizes, batches and optimizers."""
