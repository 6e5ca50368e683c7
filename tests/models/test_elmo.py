"""ELMo equals its original on the fixture; masks, directions, states and the mix."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from tiny_models import abstract, random_params

from llm_jax import interop
from llm_jax.data import characters
from llm_jax.models.elmo import ElmoConfig, ScalarMix
from llm_jax.nn import weights
from llm_jax.nn.stack import unstack

TINY = ElmoConfig(
    vocab_size=11, max_characters=9, character_dim=3, widths=(1, 2, 4), filters=(2, 3, 4), num_highways=1, model_dim=6,
    hidden_dim=8, num_layers=3, vocab_pad_multiple=4,
)  # fmt: skip
SENTENCES = [["The", "cat", "sat", "down"], ["Über", "x"]]
IDS = characters.batch(SENTENCES, 9)
REAL = IDS.any(-1)
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


@functools.cache
def tiny_params():
    return random_params(TINY.make(), IDS)


@functools.cache
def tiny_results():
    params, model = tiny_params(), TINY.make()

    @jax.jit
    def run(params):
        apply = lambda ids, p=params, **kw: model.apply({"params": p}, ids, **kw)
        out = apply(IDS)
        whole, first = apply(IDS[:1]), apply(IDS[:1, :3])
        return dict(
            out=out,
            alone=apply(IDS[1:, :4]),
            unstacked=apply(IDS, unstack(params)),
            whole=whole.last_hidden_state,
            then=apply(IDS[:1, 3:], cache=first.cache).last_hidden_state,
        )

    return jax.device_get(run(params))


def test_characters_by_hand():
    row = characters.character_ids("cat", 6)
    assert row.tolist() == [259, 100, 98, 117, 260, 261]  # the example of the fixture's description
    assert characters.character_ids("abcdefgh", 6).tolist() == [259, 98, 99, 100, 101, 260]
    assert characters.character_ids("<S>", 6).tolist() == [259, 257, 260, 261, 261, 261]
    batch = characters.batch([["a", "b"], ["c"]], 5)
    assert batch.shape == (2, 4, 5) and (batch[1, 3] == 0).all() and batch[0, 3, 1] == 258
    with pytest.raises(ValueError, match="no sentence"):
        characters.batch([])


def test_equals_the_original_on_the_fixture(shared_data, tmp_path):
    """Trained weights of the original and its outputs, the state carried from sentence to sentence: 1e-6."""
    h5py = pytest.importorskip("h5py", reason="ELMo's files are HDF5")
    folder = shared_data / "elmo_bilm" / "model"
    model, params, _, config = interop.load(folder)
    assert (config.model_dim, config.hidden_dim, config.residual) == (16, 64, False)
    run = jax.jit(lambda p, ids, state: model.apply({"params": p}, ids, cache=state))
    seen = 0
    for number, sentences in enumerate(json.loads((folder / "lm_embeddings_sentences.json").read_text())):
        state = config.init_carry(1)
        with h5py.File(folder / f"lm_embeddings_{number}.hdf5") as file:
            for k, sentence in enumerate(sentences):
                ids = characters.batch([sentence.split()])
                pad = -ids.shape[1] % 16  # few shapes; rows of zeros behind a sentence change nothing
                ids = np.pad(ids, ((0, 0), (0, pad), (0, 0)))
                out = run(params, ids, state)
                state = out.cache
                want = file[str(k)][...]
                got = np.asarray(out.last_hidden_state)[0, 1 : 1 + want.shape[1]]
                np.testing.assert_allclose(got, np.concatenate(list(want), axis=-1), atol=1e-6, rtol=0)
                seen += want.shape[1]
    assert seen == 744
    interop.save(tmp_path, model, params)  # and back, array by array
    with h5py.File(folder / "lm_weights.hdf5") as a, h5py.File(tmp_path / "weights.hdf5") as b:
        names = []
        a.visititems(lambda name, x: names.append(name) if isinstance(x, h5py.Dataset) else None)
        assert len(names) == 33
        for name in names:
            np.testing.assert_array_equal(a[name][...], b[name][...], err_msg=name)
    theirs = json.loads((folder / "options.json").read_text())
    assert {**json.loads((tmp_path / "options.json").read_text()), "dropout": None} == {**theirs, "dropout": None}


def test_sizes_and_outputs():
    out = tiny_results()["out"]
    c, f = TINY, sum(TINY.filters)
    words = 262 * 3 + sum(w * 3 * n + n for w, n in zip(c.widths, c.filters, strict=True)) + 2 * (f * f + f) + f * 6 + 6
    lstm = 6 * 32 + 32 + 6 * 32 + 8 * 6
    assert weights.count(abstract(c.make(), IDS)[0]) == words + 2 * 3 * lstm + 6 * 12 + 12
    assert [h.shape for h in out.hidden_states] == [(2, 6, 12)] * 4 and out.last_hidden_state.shape == (2, 6, 12)
    np.testing.assert_array_equal(out.hidden_states[0][..., :6], out.hidden_states[0][..., 6:])
    assert out.head.padded_size == 12 and np.isfinite(out.last_hidden_state).all()


def test_padding_and_neighbours_change_nothing():
    r = tiny_results()
    for whole, alone in zip(r["out"].hidden_states, r["alone"].hidden_states, strict=True):
        close(whole[1, :4], alone[0])
    jax.tree.map(lambda a, b: close(a[1:], b), r["out"].cache, r["alone"].cache)


def test_stacked_equals_unstacked():
    close(tiny_results()["unstacked"].last_hidden_state, tiny_results()["out"].last_hidden_state)


def test_the_forward_half_goes_on_where_it_stopped():
    r = tiny_results()
    close(r["then"][0, :, :6], r["whole"][0, 3:, :6])


def test_each_direction_sees_its_side_only():
    """Change a word: the forward outputs before it stay, and the backward ones behind it."""
    run = jax.jit(lambda ids: TINY.make().apply({"params": tiny_params()}, ids).last_hidden_state)
    before = np.asarray(run(IDS[:1]))[0]
    for place in range(1, 5):
        ids = IDS[:1].copy()
        ids[0, place] = characters.character_ids("dog", 9)
        moved = (np.abs(np.asarray(run(ids))[0] - before) > 1e-7).reshape(6, 2, 6).any(-1)
        assert not moved[:place, 0].any() and moved[place:, 0].all()
        assert moved[: place + 1, 1].all() and not moved[place + 1 :, 1].any()


def test_clips_and_residuals():
    tight = dataclasses.replace(TINY, cell_clip=0.01, projection_clip=0.02, residual=False)
    large = jax.tree.map(lambda x: x * 4, tiny_params())
    out = jax.jit(lambda p: tight.make().apply({"params": p}, IDS))(large)
    assert np.abs(out.last_hidden_state).max() <= 0.02 and np.abs(out.cache.forward[0].cell_BH).max() <= 0.01
    assert np.abs(tiny_results()["out"].last_hidden_state).max() > 0.02


@pytest.mark.parametrize("layer_norm", [False, True])
def test_the_mix_by_hand(layer_norm):
    layers = tiny_results()["out"].hidden_states
    mix = ScalarMix(4, layer_norm)
    scores, gamma = np.array([0.3, -1.0, 2.0, 0.1], np.float32), np.array([1.7], np.float32)
    got = mix.apply({"params": {"weights": scores, "gamma": gamma}}, layers, REAL)
    share = np.exp(scores) / np.exp(scores).sum()
    want = 0
    for s, h in zip(share, layers, strict=True):
        inside = h[REAL]
        want = want + s * ((h - inside.mean()) / np.sqrt(inside.var()) if layer_norm else h)
    close(got, gamma * want)
    with pytest.raises(ValueError, match="3 layers for a mix of 4"):
        mix.apply({"params": {"weights": scores, "gamma": gamma}}, layers[:3])


@pytest.mark.parametrize("head", ["classification", "tokens"])
def test_heads_by_hand(head):
    """A linear layer over every word's mix, or over the mean of those between the ends of the sentence."""
    config = dataclasses.replace(TINY, vocab_size=0, head=head, labels=("a", "b", "c"))
    params = {
        **tiny_params(),
        **{k: v for k, v in random_params(config.make(), IDS).items() if k in ("mix", "classifier")},
    }
    params.pop("head")
    got = jax.jit(lambda p: config.make().apply({"params": p}, IDS))(params)
    mix = np.asarray(ScalarMix(4).apply({"params": params["mix"]}, tiny_results()["out"].hidden_states, REAL))
    read = mix if head == "tokens" else np.stack([mix[0, 1:5].mean(0), mix[1, 1:3].mean(0)])
    close(got.logits, read @ params["classifier"]["kernel"] + params["classifier"]["bias"])
    assert got.logits.dtype == np.float32 and got.head is None


@pytest.mark.parametrize(
    "call, words",
    [
        (dict(input_ids=IDS[0]), r"input_ids must be \[B, T, M\] integers"),
        (dict(input_ids=IDS[..., :5]), "words have 5 characters, the config asks for max_characters=9"),
        (dict(attention_mask=REAL[:1]), r"attention_mask must be \[B, T\] like the words \[2, 6\]"),
        (dict(train=True), "train=True needs a dropout key"),
    ],
)
def test_calls_refused(call, words):
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(lambda: TINY.make().apply({"params": tiny_params()}, **{"input_ids": IDS, **call}))


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"activation": "gelu"}, "activation='gelu' is not one of relu, tanh"),
        ({"head": "span"}, "head='span' is not one of none, classification, tokens"),
        ({"head": "tokens"}, "takes the place of the words' output layer: set vocab_size=0"),
        ({"widths": (1, 2)}, "must name as many"),
        ({"max_characters": 3}, "exceed max_characters=3"),
    ],
)
def test_configs_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(TINY, **fields)


def test_files_that_are_broken_or_unknown(tmp_path):
    pytest.importorskip("h5py", reason="ELMo's files are HDF5")
    model, params = TINY.make(), dict(tiny_params())
    table = params["words"]["characters"]["embedding"].copy()
    with pytest.raises(interop.InteropError, match="has a row for id 0"):
        interop.save(tmp_path, model, params)
    table[0] = 0
    params["words"] = {**params["words"], "characters": {"embedding": table}}
    interop.save(tmp_path, model, params)
    loaded = interop.load(tmp_path)
    assert loaded.config == dataclasses.replace(TINY, vocab_pad_multiple=1)
    np.testing.assert_array_equal(loaded.params["head"]["bias"], params["head"]["bias"][:11])
    tagger = interop.load(tmp_path, head="tokens", labels=("x", "y", "z"))
    assert tagger.config.labels == ("x", "y", "z") and tagger.params["classifier"]["kernel"].shape == (12, 3)
    np.testing.assert_array_equal(tagger.params["mix"]["weights"], np.zeros(4))
    np.testing.assert_array_equal(tagger.params["words"]["projection"]["bias"], params["words"]["projection"]["bias"])
    with pytest.raises(interop.InteropError, match="ELMo: head='span' is not one of none, classification, tokens"):
        interop.load(tmp_path, head="span")
    options = tmp_path / "options.json"
    contents = json.loads(options.read_text())
    options.write_text(json.dumps({**contents, "lstm": {**contents["lstm"], "peepholes": True}}))
    with pytest.raises(interop.InteropError, match="options.json has lstm.peepholes"):
        interop.load(tmp_path)
    options.write_text(json.dumps({**contents, "lstm": {}}))
    with pytest.raises(interop.InteropError, match="options.json lacks or misstates"):
        interop.load(tmp_path)
    options.write_text(json.dumps(contents))
    (tmp_path / "weights.hdf5").write_bytes(b"no")
    with pytest.raises(interop.InteropError, match="cannot be read"):
        interop.load(tmp_path)
