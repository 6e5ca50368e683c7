"""Encodings of positions without parameters in the layers: tables of rows, rotary angles, linear biases.

Sources: Vaswani et al. 2017, section 3.5, https://arxiv.org/abs/1706.03762; Su et al. 2021 (rotary),
https://arxiv.org/abs/2104.09864; Peng et al. 2023 (YaRN), https://arxiv.org/abs/2309.00071; Press et al. 2021
(ALiBi), https://arxiv.org/abs/2108.12409; Llama 3's rescaling as its checkpoints' `rope_scaling` defines it.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from llm_jax.nn.attend import Mask
from llm_jax.nn.attention import AttentionConfig, Positions, ScoreTerms
from llm_jax.nn.embedding import Embedding


def sinusoids(length: int, features: int) -> np.ndarray:
    """`[length, features]` float32: sines in even columns, cosines in odd ones (the paper's formula)."""
    angle = np.arange(length)[:, None] / 10000 ** (np.arange(0, features, 2) / features)[None, :]
    table = np.zeros((length, features))
    table[:, 0::2] = np.sin(angle)
    table[:, 1::2] = np.cos(angle)[:, : features // 2]
    return table.astype(np.float32)


def sinusoid_halves(distances: np.ndarray, features: int) -> np.ndarray:
    """`[*distances.shape, features]` float64 of any distances: the sines, then the cosines (Transformer-XL's order)."""
    angle = distances[..., None] / 10000 ** (np.arange(0, features, 2) / features)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """How a checkpoint stretches its rotary frequencies past the length it was trained on.

    Attributes:
      kind: `linear` (positions divided by `factor`), `llama3` or `yarn`.
      factor: context extension factor.
      original_length: context of pre-training, tokens (llama3, yarn).
      low_freq_factor: llama3: wavelengths above original_length / this are fully stretched.
      high_freq_factor: llama3: wavelengths below original_length / this stay as they are.
      beta_fast: yarn: rotations over the original context above which a dimension stays as it is.
      beta_slow: yarn: rotations below which a dimension is fully stretched.
      attention_factor: yarn: multiplies cosines and sines; None takes 0.1 ln(factor) + 1.
      truncate: yarn: round the two borders outward to whole dimensions.
    """

    kind: str
    factor: float
    original_length: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        """Checks the kind."""
        if self.kind not in ("linear", "llama3", "yarn"):
            raise ValueError(f"rotary scaling kind={self.kind!r} is not one of linear, llama3, yarn")


def rotary_frequencies(head_dim: int, theta: float, scaling: RotaryScaling | None = None) -> tuple[np.ndarray, float]:
    """Angular frequency of each of the H/2 pairs (float64), and the factor on cosines and sines."""
    if head_dim % 2:
        raise ValueError(f"rotary positions need an even head_dim, got {head_dim}")
    freq = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    if scaling is None:
        return freq, 1.0
    if scaling.kind == "linear":
        return freq / scaling.factor, 1.0
    if scaling.kind == "llama3":
        turns = scaling.original_length * freq / (2 * math.pi)
        keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        keep = np.clip(keep, 0, 1)
        return keep * freq + (1 - keep) * freq / scaling.factor, 1.0

    def border(rotations: float) -> float:
        """Dimension whose angle makes so many rotations over the original context."""
        return head_dim * math.log(scaling.original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = border(scaling.beta_fast), border(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 1e-3), 0, 1)
    factor = scaling.attention_factor
    factor = 0.1 * math.log(scaling.factor) + 1 if factor is None else factor
    return (1 - ramp) * freq + ramp * freq / scaling.factor, factor


def rotary_tables(
    positions_BT: jax.Array, freq: np.ndarray, factor: float = 1.0, dtype: jnp.dtype = jnp.float32
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines `[B, T, H/2]` of every position."""
    wide = jnp.promote_types(jnp.float32, dtype)
    angle = positions_BT[:, :, None].astype(wide) * jnp.asarray(freq, wide)[None, None, :]
    return (jnp.cos(angle) * factor).astype(dtype), (jnp.sin(angle) * factor).astype(dtype)


def rotate(x_BTNH: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates pair (i, i + H/2) of every head by its angle (the half-split layout of Hugging Face)."""
    cos, sin = (t[:, :, None, :].astype(x_BTNH.dtype) for t in tables)
    a, b = jnp.split(x_BTNH, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """`[N]` float32 slopes; for N no power of two the paper's interleaving."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(num_heads - power)]
    return np.asarray(slopes, np.float32)


def table(config: AttentionConfig, rows: int, features: int) -> Embedding:
    """The calling module's table `positions`, a row a position or distance."""
    init = nn.initializers.normal(config.init_std)
    return Embedding(rows, features, vocab_axis=None, table_init=init, name="positions")


@dataclasses.dataclass(frozen=True)
class Learned(Positions):
    """A learned row a position, added to the embeddings.

    Attributes:
      rows: positions that tokens may take.
      offset: rows before the first token's.
    """

    rows: int
    offset: int = 0

    @property
    def length(self) -> int | None:
        """See `Positions`."""
        return self.rows

    def embed(self, config: AttentionConfig, x_BTD: jax.Array, positions_BT: jax.Array, dtype: Any) -> jax.Array:
        """See `Positions`."""
        rows = table(config, self.rows + self.offset, x_BTD.shape[-1])
        return x_BTD + rows(positions_BT + self.offset, dtype)


@dataclasses.dataclass(frozen=True)
class Sinusoidal(Positions):
    """Sines and cosines of the position, added to the embeddings.

    Attributes:
      rows: positions that tokens may take.
      halves: all sines before all cosines (Marian), instead of one beside the other (the paper).
    """

    rows: int
    halves: bool = False

    scales_tokens: ClassVar[bool] = True

    @property
    def length(self) -> int | None:
        """See `Positions`."""
        return self.rows

    def embed(self, config: AttentionConfig, x_BTD: jax.Array, positions_BT: jax.Array, dtype: Any) -> jax.Array:
        """See `Positions`."""
        del config, dtype
        table_PD = sinusoids(self.rows, x_BTD.shape[-1])
        if self.halves:
            table_PD = np.concatenate([table_PD[:, 0::2], table_PD[:, 1::2]], axis=1)
        return x_BTD + jnp.asarray(table_PD, x_BTD.dtype)[positions_BT]


class Angles(struct.PyTreeNode):
    """What `Rotary` shares among layers: cosines and sines `[B, T, H/2]`."""

    cos_BTH: jax.Array
    sin_BTH: jax.Array


@dataclasses.dataclass(frozen=True)
class Rotary(Positions):
    """Queries and keys rotated by angles that grow with the position.

    Attributes:
      theta: base of the frequencies.
      scaling: how they are stretched; None for not at all.
    """

    theta: float = 10000.0
    scaling: RotaryScaling | None = None

    def shared(
        self, config: AttentionConfig, positions_BT: jax.Array, mask: Mask, cached: bool, dtype: jnp.dtype
    ) -> Angles:
        """See `Positions`."""
        del mask, cached
        freq, factor = rotary_frequencies(config.head_dim, self.theta, self.scaling)
        return Angles(*rotary_tables(positions_BT, freq, factor, jnp.promote_types(jnp.float32, dtype)))

    def rotate(self, x_BTNH: jax.Array, shared: Angles) -> jax.Array:
        """See `LayerPositions`."""
        return rotate(x_BTNH, (shared.cos_BTH, shared.sin_BTH))


@dataclasses.dataclass(frozen=True)
class Alibi(Positions):
    """Scores that fall linearly with the distance."""

    def scores(self, q_BTNH: jax.Array, k_BSKH: jax.Array, mask: Mask, cached: bool, shared: None) -> ScoreTerms:
        """See `LayerPositions`."""
        del k_BSKH, mask, cached, shared
        return ScoreTerms(slopes_N=jnp.asarray(alibi_slopes(q_BTNH.shape[2])))
