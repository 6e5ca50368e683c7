"""LoRA in PEFT's format, both ways: the public name of `interop.huggingface.peft`."""

from llm_jax.interop.huggingface.peft import FILE as FILE
from llm_jax.interop.huggingface.peft import load as load
from llm_jax.interop.huggingface.peft import save as save
