"""Word vectors in the token tables of models."""

import jax
import numpy as np
import pytest
from tiny_models import random_params

from llm_jax.classic.vectors.project import resize
from llm_jax.classic.vectors.word_vectors import VectorsError, WordVectors
from llm_jax.data import tokenizers
from llm_jax.delta.lora import LoraConfig, attach
from llm_jax.interop.word_vectors import token_table
from llm_jax.models.bert import BertConfig
from llm_jax.models.elmo import ElmoConfig
from llm_jax.models.gpt import GPTConfig
from llm_jax.nn import paths

RNG = np.random.default_rng(0)
TEXTS = ["the cat saw the dog", "a dog saw the dog", "the cat"] * 9
VECTORS = WordVectors(["the", "cat", "dog", "bird"], RNG.normal(size=(4, 6)))
FAMILIES = {
    "gpt": (GPTConfig(290, 8, 8, 1, 2, vocab_pad_multiple=16), "bpe", (tokenizers.END_OF_TEXT,)),
    "albert": (
        BertConfig(48, 8, 8, 1, 2, 4, embedding_dim=2, num_groups=1, head="none"),
        "wordpiece",
        tokenizers.MASKED_SPECIAL,
    ),
}


def pair(name):
    config, kind, special = FAMILIES[name]
    tokenizer = tokenizers.train(TEXTS, kind, config.vocab_size, special)
    return random_params(config.make(), np.ones((1, 4), np.int32)), tokenizer


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_words_and_no_others(name):
    params, tokenizer = pair(name)
    before = {p: np.array(x) for p, x in paths.flatten(params)}
    laid = token_table.lay(params, tokenizer, VECTORS)
    words = token_table.words_of(tokenizer)
    ids = {word: i for i, word in words.items()}
    assert {"the", "cat", "dog", "saw"} <= ids.keys() and not any(w.startswith(("\u0120", "##", "<", "[")) for w in ids)
    assert laid.coverage[:3] == (3, 0, len(words))
    new = dict(paths.flatten(laid.params))
    assert new.keys() == before.keys()
    for path, old in paths.flatten(params):
        np.testing.assert_array_equal(old, before[path])  # the old ones are as they were
        assert new[path] is old or path == "embed/embedding"
    rows = [ids[w] for w in ("the", "cat", "dog")]
    old, table = before["embed/embedding"], np.asarray(new["embed/embedding"])
    others = np.delete(np.arange(len(old)), rows)
    np.testing.assert_array_equal(table[others], old[others])
    assert np.square(table[rows]).mean() == pytest.approx(np.square(old[rows]).mean(), rel=1e-5)
    want, kept = resize(VECTORS.matrix[:3], old.shape[1])
    size = np.linalg.norm(table[rows]) / np.linalg.norm(want)
    np.testing.assert_allclose(table[rows], size * want, atol=1e-5)
    assert laid.kept == kept and (kept == 1.0) == (name == "gpt")
    plain = token_table.lay(params, tokenizer, VECTORS, rescale=False).params
    np.testing.assert_allclose(np.asarray(plain["embed"]["embedding"])[rows], want, rtol=1e-6)


def test_widths():
    x = RNG.normal(size=(30, 6)) * [5, 4, 3, 2, 1, 0.1]
    wide, kept = resize(x, 9)
    assert wide.shape == (30, 9) and wide.dtype == np.float32 and kept == 1
    np.testing.assert_allclose(wide @ wide.T, x @ x.T, rtol=1e-4, atol=1e-4)
    narrow, kept = resize(x, 4)
    u, s, vt = np.linalg.svd(x)
    best = (u[:, :4] * s[:4]) @ vt[:4]
    np.testing.assert_allclose(narrow @ narrow.T, best @ best.T, rtol=1e-3, atol=1e-3)
    assert kept == pytest.approx((s[:4] ** 2).sum() / (s**2).sum())
    np.testing.assert_allclose(np.linalg.norm(resize(x, 6)[0], axis=1), np.linalg.norm(x, axis=1), rtol=1e-6)
    with pytest.raises(VectorsError, match="width=0 is below 1"):
        resize(x, 0)


def test_what_is_refused():
    params, tokenizer = pair("gpt")
    with pytest.raises(VectorsError, match="words .* has a vector"):
        token_table.lay(params, tokenizer, WordVectors(["oiseau"], np.ones((1, 3))))
    small = {**params, "embed": {"embedding": params["embed"]["embedding"][:4]}}
    with pytest.raises(VectorsError, match="embed/embedding has 4 rows, the tokenizer's word"):
        token_table.lay(small, tokenizer, VECTORS)
    with pytest.raises(VectorsError, match="its tables: a/embed/embedding, b/embed/embedding"):
        token_table.lay({"a": params, "b": params}, tokenizer, VECTORS)
    elmo = ElmoConfig(character_dim=2, widths=(1,), filters=(2,), model_dim=2, hidden_dim=2)
    shapes = jax.eval_shape(lambda: elmo.make().init(jax.random.key(0), np.ones((1, 2), np.int32))["params"])
    with pytest.raises(VectorsError, match="its tables: none that ends in embed/embedding"):
        token_table.lay(shapes, tokenizer, VECTORS)
    adapted = attach(params, LoraConfig(rank=1, targets=("embed/embedding",)), jax.random.key(0))
    with pytest.raises(VectorsError, match="lay vectors in before it is adapted"):
        token_table.lay(adapted, tokenizer, VECTORS)
