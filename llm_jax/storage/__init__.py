"""Bytes in and out; no model is known here."""
