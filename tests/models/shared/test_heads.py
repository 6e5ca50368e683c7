"""Labels on decoders and on T5: one table, a compilation a row; BERT's and XLNet's heads are in their own files."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import ENCODER_DECODERS, MODELS, V, abstract, model_params

from llm_jax.models import registry
from llm_jax.models.gpt import GPTConfig
from llm_jax.models.llama import LlamaConfig
from llm_jax.models.shared import heads
from llm_jax.models.t5 import T5Config
from llm_jax.nn import paths, weights
from llm_jax.objectives.labels import Labels
from llm_jax.objectives.objective import total_loss

T, PAD, C = 7, 3, 4
RNG = np.random.default_rng(0)
IDS = RNG.integers(2, V, (2, T))
IDS[0, -1] = IDS[1, 4] = IDS[0, 2] = 1  # T5's end, last where the row ends
REAL = np.arange(T) < np.array([[T], [T - 2]])
BATCH = {"input_ids": np.where(REAL, IDS, 9), "attention_mask": REAL}
TARGETS = {
    "classification": np.array([3, 1]),
    "tokens": np.where(REAL, RNG.integers(0, C, (2, T)), -100),
    "span": np.array([[2, 4], [0, 3]]),
}
BARE = {"gpt": MODELS["gpt_untied_padded"], "llama": MODELS["qwen3"], "t5": ENCODER_DECODERS["t5_1.1"]}
SHAPES = {"none": None, "classification": (2, C), "tokens": (2, T, C), "span": (2, T, 2)}
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def headed(config, head):
    """A row of a table under another head."""
    encoder = {"decoder": head != "tokens"} if isinstance(config, T5Config) else {}
    return dataclasses.replace(config, head=head, labels=tuple("abcd"), **encoder)


# every family with every head at least once; the full product is in tests/parity
ROWS = {
    "gpt1 classification": headed(MODELS["gpt1"], "classification"),
    "gpt2 span": headed(MODELS["gpt2"], "span"),
    "mistral classification": headed(MODELS["mistral"], "classification"),
    "qwen3 tokens": headed(MODELS["qwen3"], "tokens"),
    "t5 classification": headed(ENCODER_DECODERS["t5"], "classification"),
    "t5_1.1 span": headed(ENCODER_DECODERS["t5_1.1"], "span"),
    "t5 tokens": headed(ENCODER_DECODERS["t5"], "tokens"),
}


def left(x, fill):
    """Rows moved right behind PAD slots, so that their real entries end them."""
    out = np.full((2, PAD + T), fill, x.dtype)
    for b in range(2):
        n = REAL[b].sum()
        out[b, PAD + T - n :] = x[b, :n]
    return out


@functools.cache
def results(name):
    config = ROWS[name]
    model, objective = config.make(), Labels(config.head).for_run(1, config, None)

    def loss(params):
        prepared = objective.prepare({**BATCH, "labels": TARGETS[config.head]}, jax.random.key(0))
        out = model.apply({"params": params}, **prepared.inputs)
        return total_loss(objective, objective.score(out, prepared.targets), prepared.weights), out

    @jax.jit
    def run(params):
        apply = lambda ids, mask: model.apply({"params": params}, ids, attention_mask=mask).logits
        alone = [apply(IDS[b : b + 1, : REAL[b].sum()], None) for b in range(2)]
        return jax.value_and_grad(loss, has_aux=True)(params), apply(left(IDS, 1), left(REAL, False)), alone

    return jax.device_get(run(model_params(config)))


@pytest.fixture(params=ROWS)
def name(request):
    return request.param


def test_padding_on_either_side_changes_no_logits(name):
    """Each row alone, without a mask, is the truth; padding holds T5's end too."""
    (_, out), _ = results(name)[0]
    _, padded, alone = results(name)
    for b in range(2):
        n = REAL[b].sum()
        if ROWS[name].head == "classification":
            close(out.logits[b], alone[b][0])
            close(padded[b], alone[b][0])
        else:
            close(out.logits[b, :n], alone[b][0])
            close(padded[b, PAD + T - n :], alone[b][0])
    if ROWS[name].head == "span":
        assert (out.logits[1, T - 2 :] < -1e29).all() and np.isfinite(out.logits).all()


def test_the_objective_reaches_every_parameter(name):
    ((loss, out), grads), *_ = results(name)
    assert np.isfinite(loss) and out.head is None and out.logits.dtype == np.float32
    silent = [p for p, g in paths.flatten(grads) if not np.any(g) and not p.endswith("key/bias")]
    assert not silent


@pytest.mark.parametrize("head", SHAPES)
@pytest.mark.parametrize("family", BARE)
def test_shapes_and_counts(family, head):
    """The bare model and the head in closed form; an output layer of its own is not there."""
    config = headed(BARE[family], head)
    d, bare = config.model_dim, dataclasses.replace(config, head="none")
    params, axes = abstract(config.make(), IDS)
    biases = 0 if head == "classification" and family != "t5" else 1
    features = {"none": 0, "span": 2}.get(head, C)
    more = d * d + d if (family, head) == ("t5", "classification") else 0
    assert weights.count(params) == weights.count(abstract(bare.make(), IDS)[0]) + (d + biases) * features + more
    assert "head" not in params and (head == "none" or tuple(axes["classifier"]["kernel"]) == ("embed", "labels"))
    call = {} if family == "t5" and head != "none" else {"decoder_input_ids": IDS} if family == "t5" else {}
    out = jax.eval_shape(lambda p: config.make().apply({"params": p}, IDS, **call), params)
    assert (None if out.logits is None else out.logits.shape) == SHAPES[head]
    assert (None if out.pooler_output is None else out.pooler_output.shape) == (
        (2, d) if head == "classification" else None
    )


@pytest.mark.parametrize("family", BARE)
def test_configs_of_before_mean_the_language_model(family):
    """A saved config without the fields of a head; and with them there and back."""
    values = registry.to_dict(BARE[family])
    for field in ("head", "labels", "head_dropout"):
        values.pop(field)
    assert registry.from_dict(values) == BARE[family] and BARE[family].head == "lm"
    config = headed(BARE[family], "classification")
    assert registry.from_dict(json.loads(json.dumps(registry.to_dict(config)))) == config
    assert config.num_labels == C


def test_without_a_mask_the_padding_id_ends_a_row():
    h_BTD = jnp.asarray(RNG.normal(size=(2, T, 3)))
    marks = np.array([[1, 1, 0, 1, 0, 0, 0], [0] * T])
    close(heads.last_states(h_BTD, jnp.asarray(marks)), [h_BTD[0, 3], h_BTD[1, -1]])
    ids, config = np.where(REAL, IDS, 0), dataclasses.replace(ROWS["gpt1 classification"], pad_id=0)
    got = config.make().apply({"params": model_params(config)}, ids).logits
    close(got, results("gpt1 classification")[0][0][1].logits)


def test_a_source_without_its_end_is_named():
    config = dataclasses.replace(ROWS["t5 classification"], num_layers=1, num_decoder_layers=1)
    ids = np.where(np.array([[1], [0]]), IDS, 5)
    with pytest.raises(ValueError, match="row 1 of input_ids has no end_id=1, where its classes are read"):
        config.make().apply({"params": model_params(config)}, ids)


@pytest.mark.parametrize(
    "call",
    [
        dict(decoder_input_ids=IDS),
        dict(decoder_attention_mask=REAL),
        dict(input_ids=None),
        dict(cache=ENCODER_DECODERS["t5"].init_cache(2, T)),
    ],
    ids=["ids", "mask", "no source", "cache"],
)
@pytest.mark.parametrize("head", ["classification", "span"])
def test_t5_feeds_its_decoder_by_itself(head, call):
    config = headed(ENCODER_DECODERS["t5"], head)
    with pytest.raises(ValueError, match=f"head='{head}' feeds its decoder the source: give input_ids and their mask"):
        jax.eval_shape(lambda: config.make().apply({"params": model_params(config)}, **{"input_ids": IDS, **call}))


@pytest.mark.parametrize("rate, same", [(0.0, True), (0.5, False)])
def test_dropout_before_the_classes_of_tokens(rate, same):
    config = dataclasses.replace(ROWS["qwen3 tokens"], head_dropout=rate)
    params = model_params(config)
    run = jax.jit(lambda key: config.make().apply({"params": params}, IDS, train=True, rngs={"dropout": key}).logits)
    assert np.allclose(run(jax.random.key(0)), run(jax.random.key(1))) == same


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: GPTConfig(head="choice"), "head='choice' is not one of none, lm, classification, tokens, span"),
        (lambda: LlamaConfig(head="masked_lm"), "head='masked_lm' is not one of none, lm"),
        (lambda: T5Config(head="pairs"), "head='pairs' is not one of none, lm"),
        (lambda: T5Config(head="tokens"), "head='tokens' needs decoder=False"),
        (lambda: T5Config(head="span", decoder=False), "head='span' needs decoder=True"),
    ],
)
def test_configs_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
