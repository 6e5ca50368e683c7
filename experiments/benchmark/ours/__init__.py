"""Our side: programs that measure this library."""
