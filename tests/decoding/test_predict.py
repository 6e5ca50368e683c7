"""What heads with labels say equals a computation by hand from the model's logits, in every batch size."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_models import BERT, noise

from llm_jax.data import tokenizers
from llm_jax.data.rows.labeled_rows import Pieces
from llm_jax.decoding import predict as heads
from llm_jax.decoding.predict import kind_of, predict
from llm_jax.models.bert import BertConfig
from llm_jax.models.gpt import GPTConfig

TEXT = "the cat sat on a mat , and the dog saw one more cat"
TOKENIZER = tokenizers.train([TEXT] * 9, "wordpiece", 60, tokenizers.MASKED_SPECIAL)
SIZES = {**BERT, "vocab_size": TOKENIZER.vocab_size, "context_length": 40, "num_layers": 1}
CONFIG = BertConfig(**SIZES, labels=("no", "yes", "so"))
PAIRS = [("the cat", "a dog sat"), ("one mat", "the cat saw the dog , and more"), ("a", "a")]
softmax = lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def built(head, labels=CONFIG.labels):
    model = dataclasses.replace(CONFIG, head=head, labels=labels, pooler="tanh").make()
    params = noise(model, 0.5)
    return model, params


def by_hand(model, params, texts, pairs=None):
    batch = TOKENIZER.batch(texts, pairs)
    return np.asarray(jax.jit(lambda p: model.apply({"params": p}, **batch).logits)(params)), batch


def test_classes_and_numbers():
    model, params = built("classification")
    want = softmax(by_hand(model, params, *map(list, zip(*PAIRS, strict=True)))[0])
    for size in (2, 3):
        found = predict(model, params, TOKENIZER, PAIRS, batch_size=size)
        for said, p in zip(found, want, strict=True):
            assert said["label"] == CONFIG.labels[p.argmax()]
            np.testing.assert_allclose([said["probabilities"][n] for n in CONFIG.labels], p, rtol=1e-4)
            assert said["probability"] == pytest.approx(p.max(), rel=1e-4)
    model, params = built("classification", ("score",))
    want, _ = by_hand(model, params, [a for a, _ in PAIRS])
    found = predict(model, params, TOKENIZER, [(a,) for a, _ in PAIRS])
    np.testing.assert_allclose([s["value"] for s in found], want[:, 0], rtol=1e-4)


def test_tags():
    model, params = built("tokens")
    words = [("the", "mate", "sat"), ("dog",)]
    logits, batch = by_hand(model, params, [" ".join(w) for w in words])
    pieces = [TOKENIZER.encode(w) for w in words[0]]
    assert len(pieces[1]) > 1  # only the first counts
    places = [1 + sum(map(len, pieces[:i])) for i in range(3)]
    found = predict(model, params, TOKENIZER, words)
    assert found[0]["tags"] == [CONFIG.labels[i] for i in logits[0, places].argmax(-1)]
    np.testing.assert_allclose(found[0]["probabilities"], softmax(logits)[0, places].max(-1), rtol=1e-4)
    assert found[1]["tags"] == [CONFIG.labels[logits[1, 1].argmax()]]
    cut = predict(model, params, TOKENIZER, words, length=3)[0]
    assert cut["tags"][1:] == [None, None] and cut["probabilities"][1:] == [None, None]


def test_answers():
    """All pairs of an ordered first and last token of the context are tried by brute force."""
    model, params = built("span")
    question, context = "cat and dog", TEXT
    logits, batch = by_hand(model, params, [question], [context])
    (row,) = TOKENIZER.encodings([question], [context])
    p = softmax(logits[0].T)
    inside = [i for i, s in enumerate(row.sequence_ids) if s == 1]
    scores = {(i, j): p[0, i] * p[1, j] for i in inside for j in inside if i <= j} | {(0, 0): p[0, 0] * p[1, 0]}
    first, last = max(scores, key=scores.get)
    (said,) = predict(model, params, TOKENIZER, [(question, context)])
    assert said["probability"] == pytest.approx(scores[first, last], rel=1e-4)
    assert said["answer"] == context[row.offsets[first][0] : row.offsets[last][1]] != ""
    assert context[said["start"] :].startswith(said["answer"])
    away = jax.tree.map(lambda x: x * 0, params)  # all alike: the first candidate, no answer
    assert predict(model, away, TOKENIZER, [(question, context)])[0] == {
        "answer": "",
        "start": None,
        "probability": pytest.approx(1 / len(row.ids) ** 2),
    }


def test_texts_of_any_length_and_number_share_programs():
    """A second call, and texts of other lengths and numbers in the same buckets, compile nothing."""
    model, params = built("classification")
    before = heads._logits._cache_size()
    for count in (3, 4, 3):
        for text in ("the cat", "a dog sat on one mat"):
            predict(model, params, TOKENIZER, [(text,)] * count)
    assert heads._logits._cache_size() == before + 1
    one, four = (predict(model, params, TOKENIZER, [("the cat",)] * count) for count in (1, 4))
    assert one[0]["probability"] == pytest.approx(four[-1]["probability"], rel=1e-5)


def test_no_answer_is_longer_than_allowed():
    pieces = Pieces(np.zeros(50, np.int32), np.zeros(50, np.int32), [None, *((i, i + 1) for i in range(49))], False)
    logp = np.full((50, 2), -9.0, np.float32)
    logp[3, 0] = logp[40, 1] = -1.0
    logp[20, 1] = -2.0
    said = heads._answer("a" * 50, pieces, logp)
    assert (said["start"], len(said["answer"])) == (2, 18) and said["probability"] == pytest.approx(np.exp(-3.0))
    logp[33, 1] = -1.5  # 31 tokens: one more than allowed
    assert len(heads._answer("a" * 50, pieces, logp)["answer"]) == 18
    logp[32, 1] = -1.5
    assert len(heads._answer("a" * 50, pieces, logp)["answer"]) == 30


def test_choices():
    model, params = built("choice")
    rows = [("the cat", "sat on a mat", "more"), ("a dog", "saw", "one cat saw a mat")]
    logits = jax.jit(lambda p, batch: model.apply({"params": p}, **batch).logits)
    for given, said in zip(rows, predict(model, params, TOKENIZER, rows), strict=True):
        batch = TOKENIZER.batch([given[0]] * 2, list(given[1:]))
        p = softmax(np.asarray(logits(params, {k: v[None] for k, v in batch.items()}))[0])
        assert said["choice"] == given[1:][p.argmax()]
        np.testing.assert_allclose(list(said["probabilities"].values()), p, rtol=1e-4)


@pytest.mark.parametrize(
    "head, inputs, message",
    [
        ("classification", [("a", "b", "c")], "a model with head='classification' cannot read"),
        ("classification", [("a",), ("a", "b")], "cannot read"),
        ("span", [("a",)], "a model with head='span' cannot read"),
        ("tokens", [()], "a model with head='tokens' cannot read"),
        ("tokens", [("a", " ")], "cannot read"),
        ("span", [("the " * 50, "a")], "leaves its context no room in 40"),
        ("none", [("a",)], "the model has head='none' and no labels: fine-tune it with objective Labels"),
    ],
)
def test_what_cannot_be_read(head, inputs, message):
    model = dataclasses.replace(CONFIG, head=head).make()
    with pytest.raises(ValueError, match=message):
        predict(model, None, TOKENIZER, inputs)


def test_kinds():
    assert kind_of(dataclasses.replace(CONFIG, head="classification", labels=("x",))) == "regression"
    assert kind_of(dataclasses.replace(CONFIG, head="span", labels=("x",))) == "span"
    with pytest.raises(ValueError, match="no labels"):
        kind_of(GPTConfig())
