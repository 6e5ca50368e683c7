"""Encoder-decoders: one table, many properties; each compiles once and every property reads the results."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import ENCODER_DECODERS, V, abstract, model_params
from tiny_models import padded_rows as rows_of

from llm_jax.models.t5 import T5Config
from llm_jax.models.transformer import TransformerConfig
from llm_jax.nn import paths, positions, weights
from llm_jax.nn.execution import Execution
from llm_jax.nn.stack import unstack

S, T, PAD = 7, 5, 3
RNG = np.random.default_rng(0)
IDS, TARGET = RNG.integers(0, V, (2, S)), RNG.integers(0, V, (2, T))
REAL = np.arange(S) < np.array([[S], [S - 2]])
WRITTEN = np.arange(T) < np.array([[T], [T - 1]])
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def left(x, real, fill=0):
    """Rows moved right behind PAD slots, so that their real entries end them."""
    out = np.full((2, PAD + x.shape[1]), fill, x.dtype)
    for b in range(2):
        n = real[b].sum()
        out[b, out.shape[1] - n :] = x[b, :n]
    return out


def decode(model, params, config):
    """Logits of every target token: a ragged beginning of 2, left padded, then one a time; two rows a source."""
    ids, real = left(TARGET, WRITTEN), left(WRITTEN, WRITTEN, False)
    twice = lambda x: np.repeat(x, 2, axis=0)
    begin = PAD + 2
    cache = config.init_cache(4, T + 1)
    out = model.apply({"params": params}, IDS, twice(ids[:, :begin]), REAL, twice(real[:, :begin]), cache=cache)

    def one(cache, x):
        ids, real = x
        out = model.apply({"params": params}, None, ids[:, None], None, real[:, None], cache=cache)
        return out.cache, out.logits[:, 0]

    rest = (twice(ids[:, begin:]).T, twice(real[:, begin:]).T)
    cache, logits = jax.lax.scan(one, out.cache, rest)
    return jnp.concatenate([out.logits, logits.swapaxes(0, 1)], axis=1), cache


@functools.cache
def results(name):
    config = ENCODER_DECODERS[name]
    model, params = config.make(), model_params(config)

    @jax.jit
    def run(params):
        apply = lambda *a, p=params, **kw: model.apply({"params": p}, *a, **kw)
        out = apply(IDS, TARGET, REAL, output_hidden_states=True, output_attentions=True)
        by_table = lambda table: {**params, "embed": {"embedding": table}}
        influence = jax.jacobian(lambda t: apply(IDS, TARGET, p=by_table(t)).last_hidden_state[0].sum(-1))(
            params["embed"]["embedding"]
        )
        decoded, cache = decode(model, params, config)
        return dict(
            out=out,
            influence=jnp.abs(influence).sum(-1),
            padded=apply(left(IDS, REAL, 9), left(TARGET, WRITTEN, 9), left(REAL, REAL), left(WRITTEN, WRITTEN)).logits,
            unstacked=apply(IDS, TARGET, REAL, p=unstack(params)).logits,
            nothing=apply(IDS, TARGET, np.zeros_like(REAL), WRITTEN).logits,
            decoded=decoded,
            length=cache.length_B,
            source_rows=jnp.int32(cache.cross[0].k_BKSH.shape[0]),
        )

    return jax.device_get(run(params))


@pytest.fixture(params=ENCODER_DECODERS)
def name(request):
    return request.param


def count(c):
    """Parameters in closed form."""
    d, f, (encoder, decoder) = c.model_dim, c.hidden_dim, c.depth
    rows = rows_of(c)
    tables, more = rows * d * (1 if c.tied else 2), 0
    if isinstance(c, T5Config):
        inner = c.num_heads * c.head_dim
        attention, mlp, norm = 4 * d * inner, (3 if c.gated else 2) * d * f, d
        extra = 2 * c.num_buckets * c.num_heads + 2 * norm
    else:
        attention, mlp, norm = 4 * (d * d + d), 2 * d * f + f + d, 2 * d
        extra = rows * c.logits_bias + (2 * norm if c.norm == "pre" else 0)
        more = (2 * d + 1) * ((c.decoder_hidden_dim or f) - f)
    return tables + extra + encoder * (attention + mlp + 2 * norm) + decoder * (2 * attention + mlp + more + 3 * norm)


def test_sizes_and_axes(name):
    config = ENCODER_DECODERS[name]
    params, axes = abstract(config.make(), IDS)
    assert weights.count(params) == count(config)
    names = jax.tree.map(tuple, axes, is_leaf=lambda a: isinstance(a, weights.Axes))
    assert names["decoder"]["layers"]["cross_attention"]["key"]["kernel"] == ("layers", "embed", "kv")


def test_outputs(name):
    config, out = ENCODER_DECODERS[name], results(name)["out"]
    assert out.logits.shape == (2, T, rows_of(config)) and out.encoder.last_hidden_state.shape == (2, S, 12)
    assert len(out.encoder.hidden_states) == 3 and len(out.hidden_states) == 4
    np.testing.assert_array_equal(out.hidden_states[-1], out.last_hidden_state)
    heads = getattr(config, "num_decoder_heads", None) or 3
    for maps, shape in (
        (out.encoder.attentions, (2, 3, S, S)),
        (out.attentions, (2, heads, T, T)),
        (out.cross_attentions, (2, heads, T, S)),
    ):
        assert {a.shape for a in maps} == {shape}
        close(np.stack(maps).sum(-1), 1)
    assert (np.stack(out.cross_attentions)[:, 1, :, :, S - 2 :] == 0).all()  # padding of the source gets none
    assert np.isfinite(out.logits).all() and out.cache is None
    p = np.exp(out.logits - out.logits.max(-1, keepdims=True))
    assert (p[..., V:] == 0).all()


def test_the_decoder_sees_the_whole_source_and_no_future(name):
    influence = results(name)["influence"]  # [T, V]: of the table's rows, so tokens that occur once tell
    source = set(IDS[0].tolist())
    for t in range(T):
        assert (influence[t, IDS[0]] > 1e-7).all()
        later = set(TARGET[0, t + 1 :].tolist()) - set(TARGET[0, : t + 1].tolist()) - source
        assert (influence[t, sorted(later)] == 0).all()
    others = set(IDS[1].tolist()) | set(TARGET[1].tolist())
    assert (influence[:, sorted(others - source - set(TARGET[0].tolist()))] == 0).all()


def test_padding_changes_no_real_token(name):
    r = results(name)
    for b in range(2):
        n = WRITTEN[b].sum()
        close(r["padded"][b, PAD + T - n :], r["out"].logits[b, :n])
    assert np.isfinite(r["padded"]).all() and np.isfinite(r["nothing"]).all()


def test_decoding_equals_teacher_forcing(name):
    """From a cache that has read the source once, also where several rows share a source."""
    r = results(name)
    for row in range(4):
        n = WRITTEN[row // 2].sum()
        close(r["decoded"][row, PAD + T - n :], r["out"].logits[row // 2, :n])
    assert r["length"].tolist() == [T, T, T - 1, T - 1] and r["source_rows"] == 2


def test_stacked_equals_unstacked(name):
    close(results(name)["unstacked"], results(name)["out"].logits)


@pytest.mark.parametrize("name", ["t5_1.1", "transformer"])
def test_attention_implementations_agree(name):
    config, params = ENCODER_DECODERS[name], model_params(ENCODER_DECODERS[name])
    for kind in ("chunked", "reference"):
        model = config.make(Execution(attention=kind))
        run = jax.jit(lambda p, model=model: model.apply({"params": p}, IDS, TARGET, REAL).logits)
        close(run(params), results(name)["out"].logits)


def test_dropout_needs_a_key_and_acts_everywhere():
    config = dataclasses.replace(ENCODER_DECODERS["transformer"], dropout=0.0, activation_dropout=0.5)
    params = model_params(config)
    run = jax.jit(lambda key: config.make().apply({"params": params}, IDS, TARGET, train=True, rngs={"dropout": key}))
    a, b, c = (run(jax.random.key(s)).logits for s in (0, 0, 1))
    assert (a == b).all() and not np.allclose(a, c)  # inside the feed-forward alone


def test_halves_are_the_same_sinusoids_in_another_order():
    """Marian's table under permuted parameters: a permutation of D changes no score of a norm-free sum."""
    table = positions.sinusoids(16, 12)
    halves = np.concatenate([table[:, 0::2], table[:, 1::2]], axis=1)
    close(halves @ halves.T, table @ table.T)
    close(halves[:, :6], np.sin(np.arange(16)[:, None] / 10000 ** (np.arange(6) / 6)))


@pytest.mark.parametrize("name, scale", [("t5_1.1", 200), ("transformer_pre", 1500), ("marian", 1500)])
def test_float16_equals_float32_where_states_pass_its_range(name, scale):
    """Feed-forwards this large pass 65504 inside and in the sums behind them."""
    config = ENCODER_DECODERS[name]
    enlarge = lambda path, x: (x * scale if "/mlp/" in path and path.endswith("kernel") else x).astype("float16")
    half = paths.map_with_path(enlarge, model_params(config, std=0.1))
    run = lambda p: config.make().apply({"params": p}, IDS, TARGET, REAL, output_hidden_states=True)
    got, want = jax.device_get(jax.jit(lambda p: (run(p), run(weights.cast(p, jnp.float32))))(half))
    assert config.block.norm == "post" or abs(want.hidden_states[1]).max() > 65504
    assert got.last_hidden_state.dtype == np.float16
    got, want = got.logits[..., :V], want.logits[..., :V]
    np.testing.assert_allclose(got, want, rtol=0, atol=0.01 * abs(want).max())


@pytest.mark.parametrize("name", ["transformer", "t5"])
@pytest.mark.parametrize(
    "call, words",
    [
        (dict(cache=8), "decoder_input_ids are missing"),
        (dict(input_ids=None, decoder_input_ids=TARGET), "input_ids=None needs a cache that has read a source"),
        (dict(decoder_input_ids=TARGET, train=True), "train=True needs a dropout key"),
        (dict(decoder_input_ids=TARGET, attention_mask=REAL[0]), r"attention_mask must be \[B, T\] like input_ids"),
        (dict(decoder_input_ids=TARGET[0]), r"input_ids must be \[B, T\] integers"),
        (dict(decoder_input_ids=np.zeros((3, 2), np.int32)), "3 rows of decoder_input_ids for 2 of input_ids"),
        (dict(decoder_input_ids=TARGET, cache=3), "5 tokens do not fit into a cache of 3"),
    ],
)  # fmt: skip
def test_calls_refused(name, call, words):
    config = ENCODER_DECODERS[name]
    call = {"input_ids": IDS, **call}
    if "cache" in call:
        call["cache"] = config.init_cache(2, call["cache"])
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(lambda: config.make().apply({"params": model_params(config)}, **call))


def test_a_source_is_read_once():
    config = ENCODER_DECODERS["t5"]
    params = model_params(config)
    run = lambda *a, **kw: config.make().apply({"params": params}, *a, **kw)

    def twice():
        cache = run(IDS, TARGET[:, :1], cache=config.init_cache(2, 8)).cache
        return run(IDS, TARGET[:, 1:2], cache=cache)

    with pytest.raises(ValueError, match="this cache has read its source: pass input_ids=None"):
        jax.eval_shape(twice)
    with pytest.raises(ValueError, match="is an encoder alone: it takes no decoder_input_ids"):
        alone = dataclasses.replace(config, decoder=False).make()
        jax.eval_shape(lambda: alone.apply({"params": params}, IDS, TARGET))


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: TransformerConfig(sinusoids="odd"), "sinusoids='odd' is not one of interleaved, halves"),
        (lambda: TransformerConfig(model_dim=15, num_heads=3), "model_dim=15 must be even"),
        (lambda: TransformerConfig(num_heads=5), "model_dim=512 is not a multiple of num_heads=5"),
        (lambda: TransformerConfig(vocab_size=9, start_id=9), "start_id=9 lies outside of the vocabulary of 9"),
        (lambda: TransformerConfig(activation="swish"), "activation='swish' is not one of"),
        (lambda: TransformerConfig(context_length=8).init_cache(1, 9), "a cache of 9 exceeds the context of 8"),
        (lambda: T5Config(num_buckets=6), "num_buckets=6 must be a multiple of 4"),
        (lambda: T5Config(max_distance=16), "max_distance=16 must exceed num_buckets / 2 = 16"),
    ],
)
def test_configs_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
