"""Other people's checkpoints, both ways."""

from llm_jax.interop.names import InteropError
from llm_jax.interop.pretrained import Pretrained, load, save
from llm_jax.interop.work_directory import save as save_own

__all__ = ["InteropError", "Pretrained", "load", "save", "save_own"]
