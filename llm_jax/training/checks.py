"""Which data fit an objective, checked before anything is tokenized.

Every public function raises ConfigError, naming the fields.
"""

from typing import TYPE_CHECKING

from llm_jax.config import ConfigError
from llm_jax.data import labeled
from llm_jax.objectives.labels import Labels
from llm_jax.objectives.masked_lm import MaskedLM
from llm_jax.objectives.objective import Objective
from llm_jax.objectives.seq2seq import Seq2Seq

if TYPE_CHECKING:
    from llm_jax.training.run_config import DataConfig, RunConfig


def _leave(data: "DataConfig", names: tuple[str, ...], message: str) -> None:
    """Refuses fields that the objective's rows do not read."""
    defaults = type(data)()
    for name in names:
        if getattr(data, name) != getattr(defaults, name):
            raise ConfigError(message.format(name=name))


def _text(data: "DataConfig", pairs: bool = False) -> None:
    """Refuses fields of labelled examples, and pairs without their fields."""
    if data.validation is not None:
        raise ConfigError("data.validation is of labelled examples: take objective Labels")
    if len(data.fields) not in (0, 2):
        raise ConfigError(f"data.fields={data.fields} must name a source and a target")
    if bool(data.fields) != pairs:
        raise ConfigError("data.fields and objective Seq2Seq(task='pairs') need each other")


def _unmasked(data: "DataConfig") -> None:
    message = "data.pairs and data.mask_copies are of masked models: take objective MaskedLM"
    _leave(data, ("pairs", "mask_copies"), message)


def causal(objective: Objective, config: "RunConfig") -> None:
    """Refuses options that do not fit text which is packed and may be cut anywhere."""
    del objective
    _text(config.data)
    _unmasked(config.data)


def stream(objective: Objective, config: "RunConfig") -> None:
    """Refuses options that do not fit text read as one stream."""
    causal(objective, config)
    message = "ELMo and XLNet read a stream of text: leave data.packing and data.segments"
    _leave(config.data, ("packing", "segments"), message)


def seq2seq(objective: Seq2Seq, config: "RunConfig") -> None:
    """Refuses options that do not fit pairs, or text from which pairs are made."""
    paired = objective.task == "pairs"
    _text(config.data, paired)
    message = "encoder-decoders read pairs or full rows: leave data.packing and data.segments"
    _leave(config.data, ("packing", "segments"), message)
    if paired and config.data.split != "hash":
        raise ConfigError("pairs are held out whole: take data.split=hash")
    _unmasked(config.data)


def masked(objective: MaskedLM, config: "RunConfig") -> None:
    """Full sentences, or pairs of them under a model that tells them apart."""
    data, model = config.data, config.model
    _text(data)
    message = "masked models read full sentences or pairs: leave data.packing and data.segments"
    _leave(data, ("packing", "segments"), message)
    if data.pairs != "none" and (model.num_token_types < 2 or (objective.pair and model.head != "pretraining")):
        raise ConfigError(f"data.pairs={data.pairs} needs model.num_token_types=2 and model.head='pretraining'")


def labels(objective: Labels, config: "RunConfig") -> None:
    """Labelled examples with the fields of their kind."""
    labeled.check_fields(objective.kind, config.data.fields)
    names = ("packing", "segments", "pairs", "mask_copies", "split")
    _leave(config.data, names, "labelled examples are rows of their own: leave data.{name}")
