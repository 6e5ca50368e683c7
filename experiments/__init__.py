"""Binaries: each parses flags, builds a few objects and calls the library."""
