"""Families by name, so that a config file or a checkpoint can say which model it holds.

What a family's tokens see of a text its config says as `reads`; objectives, rows and decoding ask for nothing else:
`causal` (those before), `both_sides`, `any_order` (those before in any order asked for), `characters` (words by their
characters, in both directions), `source` (an encoder-decoder: a source, and of the target those before).
"""

from typing import Any

from llm_jax import config as configs
from llm_jax.models.bert import BertConfig
from llm_jax.models.elmo import ElmoConfig
from llm_jax.models.gpt import GPTConfig
from llm_jax.models.llama import LlamaConfig
from llm_jax.models.t5 import T5Config
from llm_jax.models.transformer import TransformerConfig
from llm_jax.models.xlnet import XLNetConfig
from llm_jax.nn.protocols import ModelConfig

FAMILIES: dict[str, type] = {
    "gpt": GPTConfig,
    "llama": LlamaConfig,
    "bert": BertConfig,
    "transformer": TransformerConfig,
    "t5": T5Config,
    "elmo": ElmoConfig,
    "xlnet": XLNetConfig,
}


# fields of earlier versions that say nothing about the model any more
DROPPED = {"xlnet": ("both_ways",)}


def family_of(config: ModelConfig) -> str:
    """The name of a config's family."""
    return next(name for name, cls in FAMILIES.items() if type(config) is cls)


def to_dict(config: ModelConfig) -> dict[str, Any]:
    """JSON-ready, with the family's name."""
    return {"family": family_of(config), **configs.to_dict(config)}


def from_dict(values: dict[str, Any]) -> Any:
    """Undoes `to_dict`, also of earlier versions.

    Raises:
      ConfigError: on an unknown family or field.
    """
    rest = dict(values)
    name = rest.pop("family", None)
    if name not in FAMILIES:
        raise configs.ConfigError(f"model.family={name!r} is not one of {', '.join(FAMILIES)}")
    rest = {k: v for k, v in rest.items() if k not in DROPPED.get(name, ())}
    return configs.from_dict(FAMILIES[name], rest, "model")
