"""DeBERTa's disentangled attention equals transformers', with the gradients of its table and kernels."""

import jax
import numpy as np
import pytest
import torch
from tiny_models import random_params
from transformers import DebertaConfig
from transformers.models.deberta.modeling_deberta import DisentangledSelfAttention

from llm_jax.nn.attend import Mask
from llm_jax.nn.attention import Attention, AttentionConfig, View
from llm_jax.nn.relative_scores import Deberta, Distances

B, T, N, H, M = 2, 7, 2, 4, 3
D = N * H
RNG = np.random.default_rng(0)
BOUNDS = {"float32": 1e-5, "float64": 1e-10}


@pytest.mark.parametrize("dtype", BOUNDS)
def test_disentangled_attention(dtype, monkeypatch):
    if dtype == "float64":  # their scale is hard-wired to float32
        monkeypatch.setattr(torch, "float", torch.float64)
    x, table, draw = (RNG.normal(size=s).astype(dtype) for s in ((B, T, D), (2 * M, D), (B, T, D)))
    attention = Attention(AttentionConfig(D, N, N, H, positions=Deberta(M)))
    at = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    mask = Mask(at, at)
    params = random_params(attention, x, View(mask, positions=Distances(table)), dtype=dtype)
    params["out"]["kernel"] = np.eye(D, dtype=dtype)  # theirs ends before it

    theirs = DisentangledSelfAttention(
        DebertaConfig(
            hidden_size=D, num_attention_heads=N, relative_attention=True, max_relative_positions=M,
            pos_att_type=["c2p", "p2c"], attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0,
        )
    ).to(getattr(torch, dtype))  # fmt: skip
    kernel = lambda path: params[path]["kernel"] if path in params else params["relative"][path]["kernel"]
    fused = np.stack([kernel(n).T.reshape(N, H, D) for n in ("query", "key", "value")], axis=1)  # by heads
    give = lambda p, value: p.data.copy_(torch.from_numpy(np.ascontiguousarray(value)))
    give(theirs.in_proj.weight, fused.reshape(3 * D, D))
    give(theirs.pos_proj.weight, kernel("position_key").T)
    give(theirs.pos_q_proj.weight, kernel("position_query").T)
    torch.nn.init.zeros_(theirs.pos_q_proj.bias)
    their_x, their_table = (torch.from_numpy(a).requires_grad_() for a in (x, table))
    distance = torch.arange(T)[:, None] - torch.arange(T)[None, :]
    out, weights = theirs(
        their_x, torch.ones(B, 1, T, T), True, relative_pos=distance[None], rel_embeddings=their_table
    )
    (out * torch.from_numpy(draw)).sum().backward()

    def loss(params, x, table):
        view = View(mask.replace(causal=False), positions=Distances(table))
        y, _, shown = attention.apply({"params": params}, x, view, output_attentions=True)
        return jax.numpy.sum(y * draw), (y, shown)

    with jax.enable_x64(dtype == "float64"):
        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
        (_, (y, shown)), (grads, dx, dtable) = run(params, x, table)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=BOUNDS[dtype], atol=BOUNDS[dtype])
    close(y, out.detach())
    close(shown, weights.detach())
    close(dx, their_x.grad)
    close(dtable, their_table.grad)
    close(grads["relative"]["position_key"]["kernel"], theirs.pos_proj.weight.grad.T)
    close(grads["relative"]["position_query"]["kernel"], theirs.pos_q_proj.weight.grad.T)
