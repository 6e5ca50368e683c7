"""Every family of the registry, held to what all must do; adding a family is adding a row."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import ENCODER_DECODERS, ENCODERS, MODELS, V, abstract

from llm_jax import interop
from llm_jax.models import registry
from llm_jax.models.elmo import ElmoConfig
from llm_jax.models.xlnet import XLNetConfig
from llm_jax.nn import paths, weights
from llm_jax.nn.execution import Execution
from llm_jax.nn.stack import stack, unstack
from llm_jax.objectives.bidirectional_lm import BidirectionalLM
from llm_jax.objectives.causal_lm import CausalLM
from llm_jax.objectives.labels import Labels
from llm_jax.objectives.masked_lm import MaskedLM
from llm_jax.objectives.objective import total_loss
from llm_jax.objectives.permutation_lm import PermutationLM
from llm_jax.objectives.seq2seq import Seq2Seq

RNG = np.random.default_rng(0)
IDS = RNG.integers(1, V, (2, 9)).astype(np.int32)


class Row(NamedTuple):
    """A family: its config, its own objective, and a batch of that."""

    config: Any
    objective: Any
    batch: dict[str, Any]


PAIR = {"input_ids": IDS, "labels": IDS[:, :5]}
ELMO = ElmoConfig(
    vocab_size=V, max_characters=6, character_dim=3, widths=(1, 2), filters=(3, 4), num_highways=1, model_dim=12,
    hidden_dim=8, dropout=0.0,
)  # fmt: skip
XLNET = XLNetConfig(vocab_size=V, model_dim=12, num_layers=2, num_heads=3, hidden_dim=10, dropout=0.0)
masked = lambda config: dataclasses.replace(config, dropout=0.0, attention_dropout=0.0)
ROWS = {
    "gpt": Row(MODELS["gpt2"], CausalLM(chunks=2), {"input_ids": IDS}),
    "llama": Row(MODELS["qwen3"], CausalLM(), {"input_ids": IDS}),
    "bert": Row(masked(ENCODERS["bert"]), MaskedLM(mask_id=3, pair=0.0), {"input_ids": IDS}),
    "albert": Row(masked(ENCODERS["albert"]), MaskedLM(mask_id=3, pair=0.0), {"input_ids": IDS}),
    "transformer": Row(dataclasses.replace(ENCODER_DECODERS["marian"], dropout=0.0), Seq2Seq(), PAIR),
    "t5": Row(dataclasses.replace(ENCODER_DECODERS["t5_1.1"], dropout=0.0), Seq2Seq(task="spans"), {"input_ids": IDS}),
    "xlnet": Row(XLNET, PermutationLM(), {"input_ids": IDS}),
    "elmo": Row(
        ELMO, BidirectionalLM(), {"input_ids": IDS, "character_ids": RNG.integers(1, 261, (2, 9, 6), dtype=np.int32)}
    ),
}


HEADS = ("classification", "tokens", "span")


def with_labels(name, kind, **fields):
    """The family's row with a head of that kind in the place of its language model's."""
    config = dataclasses.replace(ROWS[name].config, head=kind, **fields)
    labels = {"classification": [0, 1], "tokens": IDS % 2, "span": [[0, 3], [2, 8]]}[kind]
    inputs = ROWS[name].batch.get("character_ids", IDS)
    return Row(config, Labels(kind), {"input_ids": inputs, "labels": np.array(labels)})


ROWS |= {
    "gpt, classes": with_labels("gpt", "classification"),
    "bert, spans": with_labels("bert", "span", head_dropout=0.0),
    "t5, tags": with_labels("t5", "tokens", head_dropout=0.0, decoder=False),
    "xlnet, classes": with_labels("xlnet", "classification", head_dropout=0.0),
    "elmo, tags": with_labels("elmo", "tokens", head_dropout=0.0, vocab_size=0),
}


def test_no_family_is_missing():
    assert {registry.family_of(row.config) for row in ROWS.values()} == set(registry.FAMILIES)


@pytest.fixture(params=ROWS)
def name(request):
    return request.param


@functools.cache
def started(name):
    """Initialised parameters, on the host."""
    model = ROWS[name].config.make()
    boxed = jax.jit(model.init)(jax.random.key(0), IDS)["params"]
    return jax.device_get(weights.split_axes(boxed)[0])


def loss_and_gradients(name, execution, prepare=lambda p: p):
    """Of the family's own objective; gradients stacked."""
    row = ROWS[name]
    model, objective = row.config.make(execution), row.objective.for_run(1, row.config, 3)

    def loss(params):
        prepared = objective.prepare(row.batch, jax.random.key(1))
        out = model.apply({"params": prepare(params)}, **prepared.inputs)
        return total_loss(objective, objective.score(out, prepared.targets), prepared.weights)

    value, grads = jax.jit(jax.value_and_grad(loss))(started(name))
    return float(value), jax.device_get(stack(grads))


@functools.cache
def plain(name):
    return loss_and_gradients(name, Execution())


def test_shapes_are_known_before_anything_is_computed(name):
    shapes, axes = abstract(ROWS[name].config.make(), IDS)
    real = started(name)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), real) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    is_axes = lambda a: isinstance(a, weights.Axes)
    assert jax.tree.map(lambda x: x.ndim, real) == jax.tree.map(len, axes, is_leaf=is_axes)


def test_its_own_objective_reaches_every_parameter(name):
    value, grads = plain(name)
    kind = getattr(ROWS[name].objective, "kind", None)
    choices = {None: V, "span": IDS.shape[1]}.get(kind, 2)
    assert 0.5 * np.log(choices) < value < 3 * np.log(choices)  # a new model knows nothing
    expected = dict.fromkeys(("bert", "albert"), {"pooler", "pair"})
    expected |= {"bert, spans": {"pooler"}, "xlnet, classes": {"query"}}
    silent = {p.split("/")[0] for p, g in paths.flatten(grads) if not np.any(g) and not p.endswith("key/bias")}
    if name.startswith("xlnet"):  # what only a second segment would use
        silent -= {"encoder"}
    assert silent <= expected.get(name, set()), silent


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if getattr(row.config, "head", None) not in HEADS])
def test_recomputation_and_unrolling_change_nothing(name):
    """Of layers, whatever head is above them."""
    value, grads = plain(name)
    again, same = loss_and_gradients(name, Execution(remat="full"), unstack)
    np.testing.assert_allclose(again, value, rtol=1e-5)
    for (path, a), b in zip(paths.flatten(grads), jax.tree.leaves(same), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6, err_msg=path)


def test_bfloat16_is_finite_and_near(name):
    row = ROWS[name]
    model, objective = row.config.make(Execution(dtype="bfloat16")), row.objective.for_run(1, row.config, 3)

    @jax.jit
    def loss(params):
        prepared = objective.prepare(row.batch, jax.random.key(1))
        out = model.apply({"params": weights.cast(params, jnp.bfloat16)}, **prepared.inputs)
        assert out.last_hidden_state.dtype == jnp.bfloat16
        return total_loss(objective, objective.score(out, prepared.targets), prepared.weights)

    np.testing.assert_allclose(loss(started(name)), plain(name)[0], rtol=0.05)


def test_configs_and_work_directories_come_back_to_the_bit(name, tmp_path):
    config = ROWS[name].config
    assert registry.from_dict(registry.to_dict(config)) == config
    interop.save_own(tmp_path / "run", config.make(), started(name))
    loaded = interop.load(tmp_path / "run")
    assert loaded.config == config
    for (path, a), b in zip(paths.flatten(loaded.params), jax.tree.leaves(started(name)), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=path)
