"""Model FLOPs and the peaks they are held against."""

import math
from typing import Any

import jax

from llm_jax.nn import paths, weights
from llm_jax.parallel.chips import chip_of


def flops_per_token(params: Any, num_layers: int, length: int, attention_dim: int) -> float:
    """Model FLOPs per trained token: `6 P + 12 L T A`.

    P counts the parameters that multiply (all but embedding tables; a tied table counts, as the head uses it), T is
    the sequence length and A the width of the attention (heads times head size). 6 is 2 for the forward and 4 for the
    backward product; attention adds 2 * 2 * T * A per layer forward (scores and values), times 3, not halved for
    causality (Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, appendix B). Recomputation is not counted.
    """
    return 6.0 * multiplying(params) + 12.0 * num_layers * length * attention_dim


def attention_dim(config: Any) -> int:
    """A of `flops_per_token`, of a model's config: 0 where there is no attention."""
    count = getattr(config, "num_heads", 0)
    return count * (getattr(config, "head_dim", None) or config.model_dim // max(count, 1))


def multiplying(params: Any) -> int:
    """P of `flops_per_token`."""
    sizes = {p: math.prod(w.shape) for p, w in paths.flatten(params, weights.is_node)}
    tables = {"positions/embedding"} | ({"embed/embedding"} if any(p.startswith("head/") for p in sizes) else set())
    return sum(size for path, size in sizes.items() if path not in tables)


def peak_flops() -> float | None:
    """Peak of one device of this run, None where unknown (CPUs)."""
    chip = chip_of(jax.devices()[0].device_kind)
    return None if chip is None else chip.flops
