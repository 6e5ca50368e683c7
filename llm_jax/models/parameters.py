"""Which parameters a model has, known without computing any, and that it is given no others."""

import functools

import jax
import jax.numpy as jnp
from flax.core import meta

from llm_jax.nn import ports, realized, weights
from llm_jax.nn.protocols import Axes, Model, ModelConfig, Params


@functools.lru_cache(maxsize=32)
def declared(config: ModelConfig) -> tuple[Params, Axes]:
    """Shapes and logical axes of the parameters of a model (stacked trees)."""
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    model = config.make()
    return weights.split_axes(jax.eval_shape(lambda k, i: model.init(k, i)["params"], jax.random.key(0), ids))


def check(model: Model, params: Params) -> None:
    """Refuses parameters that no module of the model reads; realized nodes count as what they become.

    Raises:
      ValueError: naming the path.
    """
    ports.check(declared(model.config)[0], realized.shapes(meta.unbox(params)))
