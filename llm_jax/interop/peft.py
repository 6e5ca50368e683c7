"""Adapters in PEFT's format, both ways: `interop.huggingface.peft` by its public name, and a check of merged models."""

from llm_jax.interop.huggingface.peft import FILE as FILE
from llm_jax.interop.huggingface.peft import load as load
from llm_jax.interop.huggingface.peft import save as save
from llm_jax.interop.merged import merged_difference as merged_difference
