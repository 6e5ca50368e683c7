"""Everything about tokenizers under one name: the class, reading folders, learning vocabularies."""

from llm_jax.data.sentencepiece import TokenizerError
from llm_jax.data.tokenizer import END_OF_TEXT, ROLES, Tokenizer, check_ids
from llm_jax.data.tokenizer_files import exists, load
from llm_jax.data.tokenizer_training import KINDS, MASKED_SPECIAL, Merge, blanks, replay_merges, train
from llm_jax.data.vocabularies import FamilyError

__all__ = [
    "END_OF_TEXT",
    "FamilyError",
    "KINDS",
    "MASKED_SPECIAL",
    "ROLES",
    "Merge",
    "Tokenizer",
    "TokenizerError",
    "blanks",
    "check_ids",
    "exists",
    "load",
    "replay_merges",
    "train",
]
