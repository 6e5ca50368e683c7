"""A model made ready to write tokens: what sampling and beam search share."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llm_jax.decoding import prefill
from llm_jax.models import parameters
from llm_jax.nn import paths, weights
from llm_jax.nn.protocols import Model, Params
from llm_jax.nn.realized import realize
from llm_jax.nn.stack import unstack


class Serving:
    """A checked model with its parameters as decoding reads them.

    Attributes:
      model: decoder, or encoder-decoder (whose prompt is the source).
      params: its parameters, unstacked; on a CPU its kernels are transposed also.
      stop_tokens: ids that end a row.
      banned: ids that the model's config keeps from being generated.
      context_length: most tokens (prompt and output) of a row.
      cache_dtype: dtype of keys and values.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        stop_tokens: Sequence[int] = (),
        context_length: int | None = None,
        cache_dtype: DTypeLike = jnp.float32,
    ) -> None:
        """Checks and lays out; compiles nothing.

        Args:
          model: a module with a decoder.
          params: stacked or unstacked.
          stop_tokens: ids that end a row.
          context_length: the model's own by default.
          cache_dtype: dtype of keys and values.

        Raises:
          ValueError: if the model cannot generate, or a parameter is read by no module of it.
        """
        prefill.check_generates(model)
        parameters.check(model, params)
        self.model, self.params = model, lay_out_params(realize(params))
        self.stop_tokens, self.banned = tuple(stop_tokens), tuple(getattr(model.config, "banned_ids", ()))
        self.context_length = context_length or model.config.context_length
        self.cache_dtype = cache_dtype


def lay_out_params(params: Params) -> Params:
    """Unstacked parameters; on a CPU kernels transposed also, where decoding is then up to twice as fast."""

    def transpose(path: str, x: jax.Array | weights.Weight) -> jax.Array | weights.Weight:
        if path.endswith("kernel") and isinstance(x, jax.Array) and x.ndim == 2 and _on_cpu(x):
            return weights.Transposed(x.T)
        return x

    return paths.map_with_path(transpose, unstack(params), is_leaf=weights.is_node)


def _on_cpu(x: jax.Array) -> bool:
    return all(device.platform == "cpu" for device in x.devices())
