"""Generating text with a functional cache."""
