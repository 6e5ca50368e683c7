"""Training: state, step, loop and what surrounds them. Submodules are imported one by one."""
