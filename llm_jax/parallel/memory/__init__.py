"""State outside of a device's memory: on the host and on disk."""
