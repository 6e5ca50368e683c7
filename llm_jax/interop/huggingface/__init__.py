"""Configs and tensors in Hugging Face's names, both ways."""
