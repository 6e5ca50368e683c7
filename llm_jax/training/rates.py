"""Learning rates that differ by parameter: factors by pattern and by depth.

    rates=("*/b=16", "classifier/*=10")     B of every LoRA learns 16 times as fast, the classifier 10 times
    layer_decay=0.9                         every layer learns 0.9 times as fast as the layer above it

A factor multiplies the whole update, weight decay included, as if the parameter had an optimizer of its own with that
learning rate. The optimizer's state stays as it is without factors.

Sources: Hayou et al. 2024 (LoRA+), https://arxiv.org/abs/2402.12354; Howard and Ruder 2018 (slower lower layers),
https://arxiv.org/abs/1801.06146; Clark et al. 2020 (ELECTRA), https://arxiv.org/abs/2003.10555. Layers are counted as
in BEiT (Bao et al. 2021, https://arxiv.org/abs/2106.08254); ELECTRA's code multiplies once more below the head.
"""

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import jax
import numpy as np
import optax

from llm_jax.delta.targets import layer_counts
from llm_jax.nn import paths
from llm_jax.nn.protocols import Params, Tree
from llm_jax.training.trainable import partition

Factors: TypeAlias = Mapping[str, float | np.ndarray]  # by path; float64 `[L]` where the layers of a stack differ
# what lies below the layers: tables, their norms and projections, and XLNet's first query
EMBEDDINGS = paths.matcher((r"re:(embed\w*|(\w+_)?positions|token_types|words)/.*", "re:query"))


def parse(texts: Iterable[str]) -> tuple[tuple[str, float], ...]:
    """(pattern, factor) of every text `pattern=factor`.

    Raises:
      ValueError: for another form, or a factor that is not positive and finite.
    """
    found = []
    for text in texts:
        pattern, equals, number = text.rpartition("=")
        try:
            factor = float(number)
        except ValueError:
            factor = 0.0
        if not (equals and pattern and 0 < factor < float("inf")):
            raise ValueError(
                f"rates hold {text!r}, which is not of the form pattern=factor with a positive factor "
                "(training.trainable chooses what does not learn at all)"
            )
        found.append((pattern, factor))
    return tuple(found)


def _by_depth(path: str, decay: float, counts: Mapping[str, int]) -> float | np.ndarray:
    if place := paths.layer_of(path):
        stack, number = place
        layers = np.arange(counts[stack]) if number is None else number
        return decay ** (counts[stack] - layers)
    return decay ** (max(counts.values(), default=0) + 1) if EMBEDDINGS(path) else 1.0


def factors_of(
    rates: Iterable[str], layer_decay: float, params: Params, trainable: str | Iterable[str] | None = None
) -> Factors:
    """The factor of every parameter that trains and whose factor is not 1.

    Args:
      rates: `pattern=factor` each, on paths; of several that match, the last decides.
      layer_decay: see `OptimizerConfig`; multiplies what `rates` say.
      params: all parameters of the run, stacked or not; abstract will do.
      trainable: patterns of what trains, None for everything.

    Raises:
      ValueError: if a pattern matches nothing that trains, or `layer_decay` changes nothing.
    """
    learning = [path for path, _ in paths.flatten(partition(params, trainable)[0])]
    by_pattern: dict[str, float] = {}
    for pattern, factor in parse(rates):
        try:
            by_pattern |= dict.fromkeys(paths.select(learning, pattern), factor)
        except ValueError as e:
            raise ValueError(f"optimizer.rates of what trains: {e}") from None
    counts = layer_counts(params)
    depth = {path: 1.0 if layer_decay == 1 else _by_depth(path, layer_decay, counts) for path in learning}
    if layer_decay != 1 and all(np.all(factor == 1) for factor in depth.values()):
        raise ValueError(f"optimizer.layer_decay={layer_decay} has no effect: nothing below the head trains")
    factors = {path: by_pattern.get(path, 1.0) * depth[path] for path in learning}
    return {path: factor for path, factor in factors.items() if np.any(factor != 1)}


def scaled(tx: optax.GradientTransformation, factors: Factors) -> optax.GradientTransformation:
    """`tx` whose updates are multiplied by the factors of their parameters; its state is that of `tx`."""
    if not factors:
        return tx

    def scale(path: str, update: jax.Array) -> jax.Array:
        if path not in factors:
            return update
        factor = np.asarray(factors[path], update.dtype)
        if not factor.ndim:
            return update * factor
        spread = np.expand_dims(factor, tuple(range(1, update.ndim)))
        space = jax.typeof(update).memory_space  # the host's, where the host computes the update
        return update * (spread if space == jax.memory.Space.Device else jax.device_put(spread, space))

    def update(updates: Params, state: Tree, params: Params | None = None) -> tuple[Params, Tree]:
        updates, state = tx.update(updates, state, params)
        return paths.map_with_path(scale, updates), state

    return optax.GradientTransformation(tx.init, update)
