"""Compression: params -> params."""
