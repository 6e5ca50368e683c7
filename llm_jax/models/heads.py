"""What may stand on an encoder: language-model, classification, tagging, span and multiple-choice heads.

Sources: Devlin et al. 2019, sections 3.1 and 4, https://arxiv.org/abs/1810.04805; Liu et al. 2019 and Sanh et al. 2019
put the pooler's layer into the classifier, which is the same function.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from llm_jax.models.output import Output
from llm_jax.nn import weights
from llm_jax.nn.attention import dropout
from llm_jax.nn.embedding import Embedding
from llm_jax.nn.linear import Linear
from llm_jax.nn.norms import LayerNorm
from llm_jax.nn.output import Head, OutputLayer, padded_size

HEADS = ("none", "masked_lm", "pretraining", "classification", "tokens", "span", "choice")
POOLED = ("pretraining", "classification", "choice")


def mean_pool(h_BTD: jax.Array, attention_mask_BT: Any) -> jax.Array:
    """The mean state of every row's real tokens `[B, D]`, of length one: sentence-transformers' embedding.

    Source: Reimers and Gurevych 2019, section 3, https://arxiv.org/abs/1908.10084. An empty row gives zeros.
    """
    w_BT1 = jnp.asarray(attention_mask_BT, weights.wide(h_BTD).dtype)[..., None]
    mean_BD = jnp.sum(weights.wide(h_BTD) * w_BT1, axis=1) / jnp.maximum(jnp.sum(w_BT1, axis=1), 1)
    return mean_BD / jnp.maximum(jnp.linalg.norm(mean_BD, axis=-1, keepdims=True), 1e-12)


class MaskedLMHead(nn.Module):
    """A dense layer, an activation and a norm before the output layer.

    Attributes:
      features: E, width of the output layer's rows.
      activate: the activation.
      norm_eps: of the norm.
      kernel_init: initialiser of the kernels.
    """

    features: int
    activate: Callable[[jax.Array], jax.Array]
    norm_eps: float
    kernel_init: Callable[..., jax.Array]

    @nn.compact
    def __call__(self, h_BTD: jax.Array, tokens: Embedding, tied: bool) -> tuple[jax.Array, Head]:
        """(what the output layer multiplies `[B, T, E]`, the output layer)."""
        y = Linear(self.features, ("embed", "embed"), kernel_init=self.kernel_init, name="transform")(h_BTD)
        y = LayerNorm(self.norm_eps, name="norm")(self.activate(y))
        if not tied:
            layer = OutputLayer(
                tokens.vocab_size, tokens.pad_multiple, use_bias=True, kernel_init=self.kernel_init, name="output"
            )
            return y, layer(y)
        rows = padded_size(tokens.vocab_size, tokens.pad_multiple)
        return y, tokens.head(weights.parameter(self, "bias", nn.initializers.zeros, (rows,), ("vocab",)))


def label_logits(module: Any, kind: str, output: Output, rate: float, train: bool, init: Any) -> jax.Array:
    """Float32 logits of a head with labels, from parameters `classifier` of the calling module.

    Args:
      module: the calling Linen module, whose config has `num_labels`.
      kind: `classification` or `choice` (from the pooler's output), `tokens` or `span` (of every position).
      output: what the encoder returned.
      rate: dropout before the classifier.
      train: whether dropout is on.
      init: initialiser of the kernel.
    """
    x: Any = output.pooler_output if kind in POOLED else output.last_hidden_state
    features = {"choice": 1, "span": 2}.get(kind, module.config.num_labels)
    layer = Linear(features, ("embed", "labels"), kernel_init=init, name="classifier")
    return weights.wide(layer(dropout(module, x, rate, train)))
