"""Model FLOPs: by hand, and beside XLA's count of the gradient's program for every family and objective."""

import dataclasses

import counted_steps
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import ENCODER_DECODERS, ENCODERS, MODELS, V, abstract, model_params, padded_rows

from llm_jax.delta import dora, lora, node
from llm_jax.models.elmo import ElmoConfig
from llm_jax.models.xlnet import XLNetConfig
from llm_jax.nn import weights
from llm_jax.nn.stack import unstack
from llm_jax.nn.ties import tie
from llm_jax.objectives import masking
from llm_jax.objectives.bidirectional_lm import BidirectionalLM
from llm_jax.objectives.causal_lm import CausalLM
from llm_jax.objectives.masked_lm import MaskedLM
from llm_jax.objectives.permutation_lm import PermutationLM
from llm_jax.objectives.seq2seq import Seq2Seq
from llm_jax.training import flops

D, L, T, ROWS = 12, 2, 7, 3
TOKENS = ROWS * T
IDS = {"input_ids": jax.ShapeDtypeStruct((ROWS, T + 1), np.int32)}


def causal(config, params=None, trainable=None):
    objective = CausalLM(chunks=1)
    return flops.of_step(config, objective, model_params(config) if params is None else params, IDS, trainable)


@pytest.mark.parametrize(
    "name, rows, layer",
    [
        ("gpt2", V, 4 * D * D + 2 * 4 * D * D),
        ("gpt_untied_padded", 32, 4 * D * D + 2 * 4 * D * D),  # of two tables only the head multiplies
        ("llama", V, D * 12 + 2 * D * 4 + 12 * D + 3 * D * 10),
    ],
)
def test_decoders_by_hand(name, rows, layer):
    """6 FLOPs a number of a matrix and token; 12 T A a layer for scores and values."""
    config = MODELS[name]
    width = config.num_heads * (getattr(config, "head_dim", None) or D // config.num_heads)
    found, attention = causal(config), 12 * L * T * width
    assert found == (TOKENS * (2 * (rows * D + L * layer) + attention / 3),
                     TOKENS * (6 * (rows * D + L * layer) + attention), TOKENS * attention)  # fmt: skip
    assert found.useful(causal=True) == TOKENS * (6 * (rows * D + L * layer) + attention / 2)
    assert causal(config, unstack(model_params(config))) == found


def by_hand(model, objective, batch):
    """What `flops.of_step` counts of one row; the step has `ROWS`."""
    batch = {name: jax.ShapeDtypeStruct((ROWS, *shape), np.int32) for name, shape in batch.items()}
    params, _ = abstract(model.make(), np.zeros((1, 2), np.int32))
    return flops.of_step(model, objective.for_run(8, model, 3), params, batch)


@pytest.mark.parametrize("name", ["bert", "albert"])
def test_encoders_by_hand(name):
    """Whole rows through the layers and the head's square matrix, the vocabulary at masked positions only."""
    config = ENCODERS[name]
    d, f, layers, e = config.model_dim, config.hidden_dim, config.num_layers, config.embedding_dim or config.model_dim
    masked = masking.budget(T, MaskedLM().rate)
    numbers = T * layers * (4 * d * d + 2 * d * f) + T * d * e + masked * padded_rows(config) * e
    numbers += T * e * d if config.embedding_dim else 0  # the factored table's second half
    attention = layers * 2 * (2 * T * T * d)
    found = by_hand(config, MaskedLM(pair=0.0), {"input_ids": (T,)})
    assert found == (ROWS * (2 * numbers + attention), 3 * ROWS * (2 * numbers + attention), 3 * ROWS * attention)


@pytest.mark.parametrize("name, matrices", [("transformer", 2), ("t5", 2), ("t5_1.1", 3)])
def test_encoder_decoders_by_hand(name, matrices):
    """Cross-attention takes keys and values from source tokens, queries from target tokens."""
    config, targets = ENCODER_DECODERS[name], 5
    d, width = config.model_dim, config.num_heads * (getattr(config, "head_dim", None) or config.model_dim // 3)
    mlp = matrices * d * config.hidden_dim
    encoder = config.num_layers * T * (4 * d * width + mlp)
    decoder = config.num_decoder_layers * (targets * (6 * d * width + mlp) + T * 2 * d * width)
    numbers = encoder + decoder + targets * padded_rows(config) * d
    attention = config.num_layers * 2 * (2 * T * T * width)
    attention += config.num_decoder_layers * 2 * (2 * targets * (targets + T) * width)
    objective = Seq2Seq(end_id=1, start_id=0)
    found = by_hand(config, objective, {"input_ids": (T,), "attention_mask": (T,), "labels": (targets,)})
    assert found == (ROWS * (2 * numbers + attention), 3 * ROWS * (2 * numbers + attention), 3 * ROWS * attention)


def test_xlnet_by_hand():
    """The query stream has no keys and values; distances are encoded once for all rows, and have no gradient."""
    config = XLNetConfig(vocab_size=V, model_dim=D, num_layers=L, num_heads=3, hidden_dim=10, dropout=0.0)
    asked, distances = T, 2 * T  # so short a row has room for all that may be asked
    mlp = 2 * D * config.hidden_dim
    numbers = L * (T * (4 * D * D + mlp) + asked * (2 * D * D + mlp)) + asked * V * D
    by_distance = L * 2 * (T + asked) * distances * D  # with the encodings, which are not activations
    attention = L * 2 * (2 * (T + asked) * T * D)
    encoded = L * 2 * distances * D * D
    forward = ROWS * (2 * numbers + by_distance + attention)
    found = by_hand(config, PermutationLM(), {"input_ids": (T,)})
    assert found == (forward + encoded, 3 * forward + 2 * encoded, 3 * ROWS * attention)


def test_elmo_by_hand():
    """A word costs its characters' filters, a highway, and two LSTMs a layer; nothing attends."""
    config = ElmoConfig(
        vocab_size=11, max_characters=9, character_dim=3, widths=(1, 2, 4), filters=(2, 3, 4), num_highways=1,
        model_dim=6, hidden_dim=8, num_layers=3,
    )  # fmt: skip
    p, h, found_features = config.model_dim, config.hidden_dim, sum(config.filters)
    places = [(9 - width + 1) * width * 3 * count for width, count in zip(config.widths, config.filters, strict=True)]
    word = sum(places) + 2 * found_features**2 + found_features * p
    lstm = p * 4 * h + p * 4 * h + h * p  # input, recurrent, projection
    forward = ROWS * T * 2 * (word + 2 * 3 * lstm + 2 * config.vocab_size * p)
    batch = {"input_ids": (T + 1,), "character_ids": (T + 1, 9)}
    assert by_hand(config, BidirectionalLM(), batch) == (forward, 3 * forward, 0)


def test_shared_parameters_count_wherever_they_run():
    config = dataclasses.replace(MODELS["gpt2"], num_layers=3)
    ties = {"decoder/layers/attention/key": "decoder/layers/attention/query"}
    stored = tie(model_params(config), ties)
    assert flops.of_step(config, CausalLM(chunks=1), stored, IDS, ties=ties) == causal(config)


def test_a_shared_layer_counts_each_time_it_runs():
    config = dataclasses.replace(ENCODERS["albert"], num_layers=6, num_groups=1)
    batch = {"input_ids": jax.ShapeDtypeStruct((ROWS, T), np.int32)}
    count = lambda layers: (
        flops.of_step(
            *(c := dataclasses.replace(config, num_layers=layers), MaskedLM(pair=0.0, mask_id=3, vocab_size=V)),
            *(model_params(c), batch),
        ).total
    )
    assert count(6) - count(4) == count(4) - count(2) > 0


def test_a_frozen_base_costs_its_activations_gradients_only():
    config = dataclasses.replace(MODELS["gpt2"], num_layers=3)
    base = unstack(model_params(config))
    params = lora.attach(base, lora.LoraConfig(rank=2, targets=("mlp/*/kernel",)), jax.random.key(0))
    found = causal(config, params, lora.TRAINABLE)
    kernels, attention = 4 * D * D + 2 * 4 * D * D, 4 * T * D
    adapters, up = 2 * (2 * D + 2 * 4 * D), 4 * D * D  # of one layer
    # nothing before the first adapter has a gradient; that adapter's input has none either
    first = 2 * kernels + attention + 2 * (kernels - 4 * D * D - up) + 6 * adapters - 2 * 2 * D
    later = 4 * kernels + 3 * attention + 6 * adapters
    head = 4 * V * D
    assert found.total == TOKENS * (first + 2 * later + head)
    quantized = weights.replace(params, "attention/*/kernel", lambda path, w: jax.tree.map(jnp.int8, w))
    assert causal(config, quantized, lora.TRAINABLE).forward == found.forward


def test_lengths_of_columns_cost_rank_products_of_the_base():
    params = lora.attach(model_params(MODELS["llama"]), lora.LoraConfig(rank=2), jax.random.key(0))
    with_lora = causal(MODELS["llama"], params, lora.TRAINABLE)
    with_dora = causal(MODELS["llama"], dora.attach(params), dora.TRAINABLE)
    kernels = [w.shape[1:] for w in node.of(params).values()]
    assert len(kernels) == 7
    more = sum(L * (2 * 2 * i * o + 2 * 2 * 2 * (i + o)) for i, o in kernels)  # A^T W, A^T A and its product with B
    assert with_dora.forward - with_lora.forward == with_dora.total - with_lora.total == more


def test_loops_branches_and_stopped_gradients():
    x, w = jnp.ones((2, 4)), jnp.ones((4, 4))
    product = 2 * 2 * 4 * 4
    learns, reads = flops.Origin(learns=True), flops.Origin(reads=True)
    count = lambda fn: flops._count(fn, (w, x), [learns, reads])
    turns = lambda w, x: jax.lax.scan(lambda h, _: (h @ w, None), x, None, length=5)[0]
    assert count(turns) == (5 * product, 15 * product, 0)  # what a turn leaves learns, in the first one too
    assert count(lambda w, x: jax.lax.stop_gradient(x @ w) @ w).total == 4 * product
    assert count(lambda w, x: jax.lax.while_loop(lambda h: h.sum() < 9, lambda h: h @ w, x)).forward == product
    assert count(lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda: x, lambda: (x @ w) @ w)).forward == 2 * product
    assert count(lambda w, x: (x @ w, x @ x.T)[1]).forward == 2 * 2 * 2 * 4  # what nobody reads is not computed
    assert count(jax.checkpoint(lambda w, x: jnp.sin(x @ w) @ w)).forward == 2 * product
    kernel, image = jnp.ones((3, 5, 6)), jnp.ones((2, 9, 5))
    slide = lambda k, x: jax.lax.conv_general_dilated(x, k, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))
    assert flops._count(slide, (kernel, image), [learns, reads]).total == 2 * (2 * 2 * 7 * 6 * 3 * 5)


# what no test above derives; tests/parity/test_flops.py has all
@pytest.mark.parametrize("name", ["spans", "classes", "tags", "bert, its last norms alone", "cnn", "llama with DoRA"])
def test_other_objectives_beside_xla(name):
    """XLA's count has norms, masks and activations on top, and scores that are computed again."""
    found, lowered = counted_steps.counted(name)
    assert 0.9 < found.total / lowered.cost_analysis()["flops"] < 1


def test_the_peak_of_a_cpu_is_unknown():
    assert flops.peak_flops() is None
