"""From text to batches. Submodules are imported one by one."""
