"""Delta tuning by config: what is attached and what trains.

    config = DeltaConfig(lora=LoraConfig(rank=8), norms=True)
    params = methods.attach(params, config, jax.random.key(0))
    trainable = methods.trainable(params, config)       # patterns for `training.trainable`

Methods mix: each is attached around what is there already, IA3 and biases around a LoRA.

Sources: the modules of each method; Hu et al. 2023 for trained norms, https://arxiv.org/abs/2312.02120 (there
"LN tuning"), and peft's defaults where a paper gives none.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.compress import quantize
from llm_jax.delta import dora, lora, node, rows, targets
from llm_jax.delta.lora import LoraConfig
from llm_jax.delta.node import DeltaError
from llm_jax.delta.scaled import Biased, Scaled
from llm_jax.nn import paths, weights
from llm_jax.nn.protocols import Params

NORMS = ("*norm*/scale", "*norm*/bias")
BIASES = "*bias"


@dataclasses.dataclass(frozen=True)
class Ia3Config:
    """IA3: factors on outputs of attention's keys and values, and on inputs of the feed-forward's last kernel.

    Attributes:
      outputs: targets whose outputs are scaled, their biases too.
      inputs: targets whose inputs are scaled.
    """

    outputs: tuple[str, ...] = ("*attention/key/kernel", "*attention/value/kernel")
    inputs: tuple[str, ...] = ("mlp/down/kernel",)


@dataclasses.dataclass(frozen=True)
class BitFitConfig:
    """BitFit: all biases train. A kernel of `targets` that has none gets one.

    Attributes:
      targets: kernels that get a bias where their module has none.
    """

    targets: tuple[str, ...] = weights.LAYER_KERNELS


@dataclasses.dataclass(frozen=True)
class DeltaConfig:
    """Deltas on one model; each may be absent, and they mix.

    Attributes:
      lora: LoRA and its kin.
      ia3: factors.
      bitfit: biases.
      norms: scales and biases of all norms train.
      token_rows: numbers of rows of the token table that train.
    """

    lora: LoraConfig | None = None
    ia3: Ia3Config | None = None
    bitfit: BitFitConfig | None = None
    norms: bool = False
    token_rows: tuple[int, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether nothing is attached and nothing chosen."""
        return self == DeltaConfig()

    @property
    def changes_base(self) -> bool:
        """Whether LoRA starts out of decompositions of the base, which is then another one."""
        return self.lora is not None and self.lora.start != "zero"


def _of_all_layers(params: Params, chosen: tuple[str, ...], method: str) -> set[str]:
    """Paths of the targets, which may name no subset of the layers of a stack."""
    found = targets.resolve(params, chosen) if chosen else {}
    partial = [path for path, layers in found.items() if layers is not None]
    if partial:
        raise DeltaError(f"{method} takes all layers of {partial[0]}: leave layers[...] out of its targets, or unstack")
    return set(found)


def _scale(params: Params, chosen: tuple[str, ...], inputs: bool) -> Params:
    found = _of_all_layers(params, chosen, "IA3")

    def scaled(path: str, w: Any) -> Any:
        if path not in found:
            return w
        node.check_matrix(path, w, "IA3 scales kernels")
        if any(isinstance(x, Scaled) and x.inputs == inputs for x in node.layers_of(w)):
            raise DeltaError(f"{path} carries IA3 already; merge or detach it first")
        *lead, fan_in, fan_out = weights.shape_of(w)
        return Scaled(w, jnp.ones((*lead, fan_in if inputs else fan_out), jnp.float32), inputs)

    return paths.map_with_path(scaled, params, is_leaf=weights.is_node)


def attach_ia3(params: Params, config: Ia3Config = Ia3Config()) -> Params:
    """Puts factors of 1 on every target.

    Raises:
      DeltaError, ValueError: if a target matches nothing, is not a matrix, carries IA3 already, or names some layers of
        a stack.
    """
    return _scale(_scale(params, config.outputs, False), config.inputs, True)


def attach_bitfit(params: Params, config: BitFitConfig = BitFitConfig()) -> Params:
    """Puts a bias of 0 on every target whose module has none.

    Raises:
      DeltaError, ValueError: if a target matches nothing, is not a matrix, or names some layers of a stack.
    """
    found = _of_all_layers(params, config.targets, "BitFit")
    names = {path for path, _ in paths.flatten(params, weights.is_node)}

    def biased(path: str, w: Any) -> Any:
        if path not in found or f"{path.rpartition('/')[0]}/bias" in names:
            return w
        node.check_matrix(path, w, "biases go on kernels")
        *lead, _, fan_out = weights.shape_of(w)
        return Biased(w, jnp.zeros((*lead, fan_out), jnp.float32))

    return paths.map_with_path(biased, params, is_leaf=weights.is_node)


def attach_rows(params: Params, ids: tuple[int, ...]) -> Params:
    """Makes rows of the token table trainable.

    Raises:
      DeltaError: as `rows.attach`.
    """
    return weights.replace(params, "embed/embedding", lambda _, w: rows.attach(w, ids))


def attach(params: Params, config: DeltaConfig, key: jax.Array) -> Params:
    """Attaches all methods of a config, LoRA innermost.

    Args:
      params: stacked or unstacked; quantize them before.
      config: the methods.
      key: draws LoRA's A.

    Raises:
      DeltaError, ValueError: see each method.
    """
    if config.lora is not None:
        params = lora.attach(params, config.lora, key)
        params = dora.attach(params) if config.lora.dora else params
    if config.token_rows:
        params = attach_rows(params, config.token_rows)
    if config.bitfit is not None:
        params = attach_bitfit(params, config.bitfit)
    return params if config.ia3 is None else attach_ia3(params, config.ia3)


def trainable(params: Params, config: DeltaConfig) -> tuple[str, ...]:
    """Patterns of what trains, each of which matches something in `params`."""
    fields = {field for w in node.of(params).values() for d in node.layers_of(w) for field in d.trains}
    if config.lora is not None and config.lora.freeze_a:
        fields.discard("a")
    patterns = [f"*/{field}" for field in sorted(fields)]
    if config.bitfit is not None:
        patterns.append(BIASES)
    if config.norms:
        patterns += NORMS
    names = [path for path, _ in paths.flatten(params)]
    return tuple(p for p in patterns if any(map(paths.matcher(p), names)))


def quantized(params: Params, config: DeltaConfig) -> Params:
    """The kernels under LoRA in int8; everything else stays.

    Raises:
      DeltaError: without LoRA, which is what trains over a quantized base.
    """
    if config.lora is None:
        raise DeltaError("a quantized base needs lora: a kernel of integers cannot train")
    return quantize.quantize(params, tuple(targets.resolve(params, config.lora.targets)))
