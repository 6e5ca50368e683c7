"""The config of a run: everything that defines it, as one frozen dataclass with a JSON round trip."""

import dataclasses
from typing import Any

from llm_jax import config as configs
from llm_jax.data.rows.masked import PAIRS
from llm_jax.models import registry
from llm_jax.models.gpt import GPTConfig
from llm_jax.objectives.causal_lm import CausalLM
from llm_jax.objectives.objective import Objective
from llm_jax.parallel.plan import PlanConfig
from llm_jax.storage.text_files import check_encoding
from llm_jax.training import recipes
from llm_jax.training.loop import LoopConfig
from llm_jax.training.optimizers import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a run reads.

    Attributes:
      source: `stdlib`, a file, a folder, a glob, or several joined by commas.
      tokenizer: a `tokenizer.json` or a folder with one; None trains one on the training split.
      tokenizer_kind: kind of a trained tokenizer: bpe, wordpiece, unigram, char, word. It has the model's vocab_size
        entries.
      validation_share: share of the source that is held out.
      validation: held-out source of labelled examples, instead of a share.
      split: what is held out: `hash` (whole documents) or `tail` (the end of every document).
      packing: `stream` (rows cut anywhere) or `whole` (whole documents side by side, padded).
      segments: attention and labels do not cross documents, with packing `stream`.
      pairs: what masked models read: `none` (full sentences across documents), `next` (half of the second sentences
        come from another document) or `order` (half are swapped).
      mask_copies: masks of masked models: 0 masks anew at every visit, n gives every row n masks for good.
      text_field: field of records (JSON, tables, Parquet) that holds the text.
      fields: fields of records: source and target of pairs, or those of labelled examples in the order of
        `labeled.FIELDS`. Columns of a CoNLL file have numbers, those of CoNLL-U names.
      layout: how the files are written, where their names' endings do not say it: `text`, `jsonl`, `csv`, ... (all of
        `corpora.LAYOUTS`), or a regular expression that takes a line apart into named groups.
      encoding: encoding of files without a byte order mark: None for UTF-8, a name (`latin-1`, `cp1252`), or `replace`
        for UTF-8 with U+FFFD for bytes that are none.
      group: field of records; those that agree in it are held out together. `field:REGEX` compares only what the
        expression finds in it.
      cache: local folder for tokenized data; None takes the work directory's `tokens`.
      verify: a start reads and hashes all sources and the token cache, even where sizes and times did not change.
    """

    source: str = "stdlib"
    tokenizer: str | None = None
    tokenizer_kind: str = "bpe"
    validation_share: float = 0.02
    validation: str | None = None
    split: str = "hash"
    packing: str = "stream"
    segments: bool = False
    pairs: str = "none"
    mask_copies: int = 0
    text_field: str = "text"
    fields: tuple[str, ...] = ()
    layout: str | None = None
    encoding: str | None = None
    group: str | None = None
    cache: str | None = None
    verify: bool = False

    def __post_init__(self) -> None:
        """Checks names and ranges."""
        if self.packing not in ("stream", "whole"):
            raise ValueError(f"packing={self.packing!r} is neither stream nor whole")
        if self.pairs not in ("none", *PAIRS):
            raise ValueError(f"pairs={self.pairs!r} is not one of none, {', '.join(PAIRS)}")
        if self.mask_copies < 0:
            raise ValueError(f"mask_copies={self.mask_copies} must not be negative")
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"validation_share={self.validation_share} must lie in [0, 1)")
        check_encoding(self.encoding)

    @property
    def read_as(self) -> dict[str, Any]:
        """How the files are read, as `corpora.documents` takes it."""
        return {n: getattr(self, n) for n in ("text_field", "group", "layout", "encoding")}


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run.

    Attributes:
      model: the config of a family, see `models.registry`.
      data: what the run reads.
      objective: what it minimises, see `recipes.RECIPES`.
      optimizer: how parameters move.
      plan: how the run is divided over devices.
      training: how long it runs, and how often it reports and saves.
      ties: parameters that are shared, as `path=owner path` (see `nn.ties`); they are stored and trained once.
    """

    model: Any = GPTConfig()
    data: DataConfig = DataConfig()
    objective: Objective = CausalLM()
    optimizer: OptimizerConfig = OptimizerConfig()
    plan: PlanConfig = PlanConfig()
    training: LoopConfig = LoopConfig()
    ties: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; the model has its family, the objective its name."""
        chosen = {"model": registry.to_dict(self.model), "objective": recipes.to_dict(self.objective)}
        return {**configs.to_dict(self), **chosen}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunConfig":
        """Undoes `to_dict`; raises ConfigError on anything unknown."""
        rest = dict(values)
        model = registry.from_dict(rest.pop("model", {"family": "gpt"}))
        objective = recipes.from_dict(rest.pop("objective", {}))
        return dataclasses.replace(configs.from_dict(cls, rest), model=model, objective=objective)
