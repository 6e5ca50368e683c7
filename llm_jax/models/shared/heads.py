"""What may stand on a model: language-model, classification, tagging, span and multiple-choice heads.

Sources: Devlin et al. 2019, sections 3.1 and 4, https://arxiv.org/abs/1810.04805; Liu et al. 2019 and Sanh et al. 2019
put the pooler's layer into the classifier, which is the same function. A decoder's classes are read at the last token,
which alone has seen the whole row: Radford et al. 2018, section 3.2.
"""

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Initializer

from llm_jax.models.shared.output import Output
from llm_jax.nn import weights
from llm_jax.nn.attention import dropout
from llm_jax.nn.embedding import Embedding
from llm_jax.nn.linear import Linear
from llm_jax.nn.norms import LayerNorm
from llm_jax.nn.output import MASKED, Head, OutputLayer, padded_size

HEADS = ("none", "masked_lm", "pretraining", "classification", "tokens", "span", "choice")
DECODER_HEADS = ("none", "lm", "classification", "tokens", "span")
LANGUAGE = ("lm", "masked_lm", "pretraining")  # these predict tokens, and no others do
POOLED = ("pretraining", "classification", "choice")


def check(head: str, heads: Collection[str]) -> None:
    """Refuses a head that a family lacks.

    Raises:
      ValueError: naming those that it has.
    """
    if head not in heads:
        raise ValueError(f"head={head!r} is not one of {', '.join(heads)}")


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
    kernel_init: Initializer

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


def label_logits(
    module: Any,
    output: Output,
    rate: float,
    train: bool,
    init: Initializer,
    attention_mask: jax.Array | None = None,
    use_bias: bool = True,
) -> jax.Array:
    """Float32 logits of a head with labels, from parameters `classifier` of the calling module.

    Args:
      module: the calling Linen module, whose config has `num_labels` and `head`: `classification` or `choice` (from the
        pooler's output), `tokens` or `span` (of every position).
      output: what stands below the head.
      rate: dropout before the classifier.
      train: whether dropout is on.
      init: initialiser of the kernel.
      attention_mask: `[B, T]`; no answer begins or ends in padding.
      use_bias: adds a bias.
    """
    kind = module.config.head
    x: Any = output.pooler_output if kind in POOLED else output.last_hidden_state
    features = {"choice": 1, "span": 2}.get(kind, module.config.num_labels)
    layer = Linear(features, ("embed", "labels"), use_bias, init, name="classifier")
    logits = weights.wide(layer(dropout(module, x, rate, train)))
    if kind == "span" and attention_mask is not None:
        return jnp.where(attention_mask[..., None] > 0, logits, MASKED)
    return logits


def last_states(h_BTD: Any, marked_BT: jax.Array) -> jax.Array:
    """The state at every row's last marked token, `[B, D]`; of a row without any its last."""
    last_B = h_BTD.shape[1] - 1 - jnp.argmax(marked_BT.astype(bool)[:, ::-1], axis=1)
    return jnp.take_along_axis(h_BTD, last_B[:, None, None], axis=1)[:, 0]


def on_decoder(
    module: Any, output: Output, input_ids: jax.Array, attention_mask: jax.Array | None, train: bool, init: Initializer
) -> Output:
    """A decoder's output with the logits of its labels, where its head has any.

    Classes are read at every row's last real token: the last that `attention_mask` lets through, or without a mask the
    last that is not `config.pad_id`. As in transformers they have no bias, and `head_dropout` is before the classes of
    tokens alone.
    """
    c = module.config
    if c.head in ("none", "lm"):
        return output
    if c.head == "classification":
        real = attention_mask
        if real is None:
            real = jnp.ones(input_ids.shape, bool) if c.pad_id is None else input_ids != c.pad_id
        output = output.replace(pooler_output=last_states(output.last_hidden_state, real))
    rate = c.head_dropout if c.head == "tokens" else 0.0
    use_bias = c.head != "classification"
    return output.replace(logits=label_logits(module, output, rate, train, init, attention_mask, use_bias))
