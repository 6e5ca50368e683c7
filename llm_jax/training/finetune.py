"""Fine-tuning a loaded model: wholly, by pattern, or with deltas over a float or int8 base; on text, chats, labels."""

import dataclasses
import logging
from typing import Any

import jax
from etils import epath

from llm_jax import config as configs
from llm_jax.data import chat, labeled
from llm_jax.delta import base as bases
from llm_jax.delta import describe, methods, node
from llm_jax.delta.lora import LoraConfig
from llm_jax.delta.methods import BitFitConfig, DeltaConfig, Ia3Config
from llm_jax.interop import Pretrained, pretrained
from llm_jax.models.elmo import ElmoConfig
from llm_jax.nn import weights
from llm_jax.nn.protocols import ModelConfig, Params
from llm_jax.objectives.labels import Labels
from llm_jax.parallel import processes
from llm_jax.training import labeled_examples
from llm_jax.training.run import Trained, train
from llm_jax.training.run_config import RunConfig
from llm_jax.training.trainable import partition

log = logging.getLogger(__name__)

HEAD = ("classifier", "pooler", "mix")  # what a head with labels adds; it trains beside deltas
EARLIER = ("attention/*/kernel", "mlp/*/kernel")  # LoRA's default before it had cross-attention


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """A fine-tuning run.

    Attributes:
      run: data, objective, optimizer, plan and training; its model is replaced by the loaded one, which has a head for
        the data's labels where the objective is `Labels`.
      lora: LoRA and its kin; None for none. Without any delta, `run.training.trainable` chooses what trains, or
        everything does. A head with labels trains beside deltas.
      base: what is kept of what does not train: `float` (as loaded), `bfloat16`, or `int8` (kernels under LoRA are
        quantized). What trains stays in float32.
      format: `text` (plain text) or `chat` (chats and instructions; the loss falls on the assistant's turns only).
      ia3: factors beside kernels; None for none.
      bitfit: biases; None for none.
      norms: scales and biases of all norms train.
      token_rows: numbers of rows of the token table that train.
    """

    run: RunConfig = RunConfig()
    lora: LoraConfig | None = LoraConfig()
    base: str = "float"
    format: str = "text"
    ia3: Ia3Config | None = None
    bitfit: BitFitConfig | None = None
    norms: bool = False
    token_rows: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Checks names."""
        if self.base not in bases.FORMS:
            raise ValueError(f"base={self.base!r} is not one of {', '.join(bases.FORMS)}")
        if self.format not in ("text", "chat"):
            raise ValueError(f"format={self.format!r} is neither text nor chat")
        if self.base == "int8" and self.lora is None:
            raise ValueError("a quantized base cannot train whole; give it LoRA")
        if self.base == "bfloat16" and self.delta.is_empty and self.run.training.trainable is None:
            raise ValueError("base='bfloat16' is of what does not train: give it a delta, or run.training.trainable")
        if self.format == "chat" and isinstance(self.run.objective, Labels):
            raise ValueError("format='chat' has no labels: leave format, or take another objective")

    @property
    def delta(self) -> DeltaConfig:
        """The deltas of the run."""
        return DeltaConfig(self.lora, self.ia3, self.bitfit, self.norms, self.token_rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**configs.to_dict(self), "run": self.run.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "FinetuneConfig":
        """Undoes `to_dict`."""
        rest = dict(values)
        run = RunConfig.from_dict(rest.pop("run", {}))
        return dataclasses.replace(configs.from_dict(cls, rest), run=run)


@dataclasses.dataclass(frozen=True)
class Finetuned:
    """Results of a fine-tuning run.

    Attributes:
      trained: state, model, tokenizer, evaluation.
      params: its parameters with their deltas, on the host of every process where they span processes.
      merged: plain parameters with everything folded in; None where a bias has no module to go to.
      bytes: sizes of the parameters, of what trains, and of the optimizer state.
      trainable: patterns of what trained; None where everything did.
    """

    trained: Trained
    params: Params
    merged: Params | None
    bytes: dict[str, int]
    trainable: tuple[str, ...] | None = None

    def describe(self) -> str:
        """Sizes on one line, after the list of weights with deltas."""
        sizes = ", ".join(f"{k} {v:,} bytes" for k, v in self.bytes.items())
        if not node.of(self.params):
            return sizes
        return f"{describe.describe(self.params, self.trainable or '*')}\n{sizes}"


def load(path: str, config: FinetuneConfig) -> Pretrained:
    """The model at a path, in float32; with a head for the labels of the training part where the objective is `Labels`.

    Raises:
      InteropError, CorpusError: one line.
    """
    objective = config.run.objective
    if not isinstance(objective, Labels):
        return pretrained.load(path, dtype="float32")
    examples, _ = labeled_examples.read(config.run.data, objective)
    labels = () if objective.kind == "choice" else labeled.names_of(examples, objective.kind, config.run.data.fields)
    return pretrained.load(path, dtype="float32", head=objective.head, labels=labels)


def adapt(params: Params, config: FinetuneConfig, key: jax.Array, trainable: tuple[str, ...] = ()) -> Params:
    """The parameters as they will train: the base in its form, with deltas attached."""
    return bases.adapt(params, config.delta, config.base, trainable, key)


def _stored(config: FinetuneConfig, loaded: Pretrained) -> dict[str, Any]:
    """What defines the run beside its `RunConfig`."""
    extra = {k: v for k, v in config.to_dict().items() if k != "run"}
    if config.lora is not None and config.lora.targets == weights.LAYER_KERNELS and loaded.config.reads != "source":
        # the same kernels where there is no cross-attention: runs that began with the earlier default resume
        extra["lora"] |= {"targets": list(EARLIER)}
    return extra


def run(
    loaded: Pretrained,
    config: FinetuneConfig,
    workdir: epath.PathLike,
    key: jax.Array,
    restore_step: int | None = None,
    accept_changed_data: bool = False,
    path: epath.PathLike | None = None,
) -> Finetuned:
    """Adapts and trains; resumes like any run. The parameters of `loaded` are taken over.

    Args:
      loaded: the model to begin with.
      config: of the run.
      workdir: see `run.train`.
      key: draws LoRA's matrices.
      restore_step: see `run.train`.
      accept_changed_data: see `run.train`.
      path: that `loaded` came from. Checkpoints of a run that trains a part then leave the frozen rest out, and the
        work directory refers to it there; without a path they hold everything.

    Raises:
      ValueError: and its kin, each with one line.
    """
    if loaded.tokenizer is None:
        raise ValueError("the model has no tokenizer")
    trainable = config.run.training.trainable
    if not config.delta.is_empty and trainable is None:
        head = HEAD if isinstance(config.run.objective, Labels) else ()
        beside = tuple(f"{name}/*" for name in head if name in loaded.params)
        adapted = jax.eval_shape(lambda params: adapt(params, config, key), loaded.params)
        trainable = (*methods.trainable(adapted, config.delta), *beside)
    training = dataclasses.replace(config.run.training, trainable=trainable)
    optimizer = config.run.optimizer
    if config.lora is not None and config.lora.ratio != 1:
        optimizer = dataclasses.replace(optimizer, rates=(*optimizer.rates, f"*/b={config.lora.ratio}"))
    chosen = dataclasses.replace(config.run, model=loaded.config, training=training, optimizer=optimizer)
    encode = chat.chats(loaded.tokenizer) if config.format == "chat" else None
    trained = train(
        chosen,
        workdir,
        params=loaded.params,
        tokenizer=loaded.tokenizer,
        encode=encode,
        kind=config.format,
        restore_step=restore_step,
        extra={"finetune": _stored(config, loaded)},
        extra_defaults={"finetune": FinetuneConfig().to_dict()},
        adapt=lambda params: adapt(params, config, key, trainable or ()),
        accept_changed_data=accept_changed_data,
        ahead=config.delta.changes_base,
        base=None if path is None or trainable is None else _base(loaded, config, trainable, path),
    )
    sizes = {
        "parameters": weights.bytes_of(trained.state.params),
        "trainable": weights.bytes_of(partition(trained.state.params, trainable)[0]),
        "optimizer state": weights.bytes_of(trained.state.opt_state),
    }
    params = processes.whole(trained.params)
    # small updates would vanish in a merged bfloat16
    wide = weights.cast(params, "float32") if config.base == "bfloat16" else params
    return Finetuned(trained, params, merged(wide), sizes, trainable)


def merged(params: Params) -> Params | None:
    """Plain parameters with every delta folded in; None where a bias has no module to go to."""
    if not node.of(params):
        return params
    try:
        return node.merge(params)
    except node.DeltaError as e:
        log.warning("no merged model: %s", e)
        return None


def _base(loaded: Pretrained, config: FinetuneConfig, trainable: tuple[str, ...], path: epath.PathLike) -> bases.Base:
    """The loaded model as the run refers to it."""
    labels = isinstance(config.run.objective, Labels)
    head = {"head": loaded.config.head, "labels": loaded.config.labels} if labels else {}
    return bases.Base(str(path), form=config.base, delta=config.delta, trainable=trainable, **head)


def can_save(model_config: ModelConfig) -> bool:
    """Whether some format but ours has a place for the model; ELMo's has none for a head."""
    return not isinstance(model_config, ElmoConfig) or model_config.head == "none"
