"""Output layers: one head, and the losses by which a large vocabulary is paid for in part.

word2vec sums `logistic_loss` over pairs and noise words (negative sampling) or over the nodes of a tree (hierarchical
softmax), and `choice_loss` over a few drawn words; a language model with a `Head` does so by `sampled_softmax`. The
softmax over all words, in chunks, is `objectives.cross_entropy`.

Sources: sampled softmax with the log-q correction, Jean et al. 2015, https://arxiv.org/abs/1412.2007, eq. 8; negative
sampling, Mikolov et al. 2013, https://arxiv.org/abs/1310.4546, eq. 4; hierarchical softmax, the same, eq. 3.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from llm_jax.nn import weights

MASKED = -1e30  # logits of padded vocabulary entries; finite, so that max and subtraction stay finite


def padded_size(size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that holds `size`, so that a vocabulary axis divides over devices."""
    return -(-size // multiple) * multiple


class Head(struct.PyTreeNode):
    """The last matrix of a language model, as models return it in `Output.head`.

    Attributes:
      weight: `[D, V_padded]`, or `[V_padded, D]` where `transposed` (a tied table).
      bias: `[V_padded]` or None.
      vocab_size: V; entries behind it are padding.
      transposed: the layout of `weight`.
    """

    weight: Any
    bias: jax.Array | None
    vocab_size: int = struct.field(pytree_node=False)
    transposed: bool = struct.field(pytree_node=False, default=False)

    @property
    def padded_size(self) -> int:
        """Number of columns of `logits`."""
        return weights.shape_of(self.weight)[0 if self.transposed else 1]

    def logits(self, h: jax.Array, wide: bool = True) -> jax.Array:
        """`h[..., D]` to logits `[..., V_padded]`; padding holds -1e30 (the lowest number in float16).

        They are float32, or with `wide=False` and no bias in the dtype of the product: the same numbers.
        """
        w = weights.cast(self.weight, h.dtype)
        y = weights.matmul_t(h, w) if self.transposed else weights.matmul(h, w)
        if wide or self.bias is not None:
            y = weights.wide(y)
        if self.bias is not None:
            y = weights.add_bias(y, self.bias)
        if self.vocab_size == self.padded_size:
            return y
        real = jnp.broadcast_to(jnp.arange(self.padded_size) < self.vocab_size, y.shape)
        return jnp.where(real, y, max(MASKED, float(jnp.finfo(y.dtype).min)))

    def rows(self, ids: jax.Array) -> jax.Array:
        """Output embeddings of chosen vocabulary entries: `[*ids.shape, D]`."""
        return weights.take(self.weight if self.transposed else weights.dense(self.weight).T, ids)

    def some_logits(self, h_TD: jax.Array, ids_S: jax.Array) -> jax.Array:
        """Logits `[T, S]`, float32, of the chosen vocabulary entries `ids_S` only."""
        rows_SD = self.rows(ids_S)
        y = weights.wide(h_TD @ rows_SD.T.astype(h_TD.dtype))
        return y if self.bias is None else weights.add_bias(y, self.bias[ids_S])


class OutputLayer(nn.Module):
    """An output layer that owns its matrix (a tied one is the token table's).

    Attributes:
      vocab_size: V.
      pad_multiple: columns are padded to this multiple.
      use_bias: adds a bias.
      kernel_init: initialiser of the kernel.
    """

    vocab_size: int
    pad_multiple: int = 1
    use_bias: bool = False
    kernel_init: Callable[..., jax.Array] = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, h: jax.Array) -> Head:
        """The head for hidden states of the width of `h`."""
        columns = padded_size(self.vocab_size, self.pad_multiple)
        kernel = weights.parameter(self, "kernel", self.kernel_init, (h.shape[-1], columns), ("embed", "vocab"))
        bias = None
        if self.use_bias:
            bias = weights.parameter(self, "bias", nn.initializers.zeros, (columns,), ("vocab",))
        return Head(kernel, bias, self.vocab_size)


@jax.custom_jvp
def logistic_loss(scores: jax.Array) -> jax.Array:
    """Negative log-likelihood of a yes at probability `sigmoid(score)`; of a no, at `logistic_loss(-score)`.

    A binary decision of any output layer: a pair or a noise word of negative sampling, a node of a tree. Its slope is
    one exponential, where that of `jax.nn.softplus` computes the softplus again.
    """
    return jax.nn.softplus(-scores)


@logistic_loss.defjvp
def _logistic_slope(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (scores,), (change,) = primals, tangents
    return logistic_loss(scores), -jax.nn.sigmoid(-scores) * change


def choice_loss(chosen: jax.Array, others: jax.Array) -> jax.Array:
    """Negative log-likelihood of a softmax's choice.

    Args:
      chosen: score of what is chosen.
      others: log of the sum of the exponentials of all other scores, -inf or very low where there are none.
    """
    return jnp.logaddexp(chosen, others) - chosen


def sampled_softmax(
    h_TD: jax.Array, head: Head, labels_T: jax.Array, sampled_S: jax.Array, log_q_V: jax.Array
) -> jax.Array:
    """Negative log-likelihood `[T]` of the label among itself and the sampled entries.

    Args:
      h_TD: last hidden states.
      head: the output layer.
      labels_T: targets.
      sampled_S: entries drawn from the proposal, shared by all positions; those that equal a position's label are left
        out there.
      log_q_V: log of the expected count of each entry in `sampled_S`, subtracted from its logit, so that the
        estimate of the softmax's gradient is consistent. Zeros with `sampled_S = arange(V)` give the full softmax.
    """
    labels_T = labels_T.astype(jnp.int32)
    label_T = jnp.sum(h_TD * head.rows(labels_T), axis=-1)
    label_T = label_T if head.bias is None else label_T + head.bias[labels_T]
    label_T = label_T - log_q_V[labels_T]
    other_TS = head.some_logits(h_TD, sampled_S) - log_q_V[sampled_S][None, :]
    other_TS = jnp.where(sampled_S[None, :] == labels_T[:, None], MASKED, other_TS)
    return choice_loss(label_T, jax.nn.logsumexp(other_TS, axis=1))
