"""Predictions and rows of labels equal transformers' pipelines and its alignment of pieces with words."""

import numpy as np
import pytest
import transformers
from tiny_models import BERT, noise

from llm_jax import interop
from llm_jax.data import tokenizers
from llm_jax.data.rows.labeled_rows import Encoder
from llm_jax.decoding.predict import predict
from llm_jax.models.bert import BertConfig

TEXT = "the cat sat on a mat , and the dog saw one more cat ; doesn't it ?"
PAIR = ("the mate sat", "a dog , and more")


@pytest.fixture
def saved(tmp_path):
    """A random model with a head, as ours and as a folder of theirs."""

    def make(head, labels=("no", "yes", "so")):
        tokenizer = tokenizers.train([TEXT] * 9, "wordpiece", 70, tokenizers.MASKED_SPECIAL)
        sizes = {**BERT, "vocab_size": tokenizer.vocab_size, "context_length": 48}
        model = BertConfig(
            **sizes, head=head, labels=labels, pooler="tanh" if head == "classification" else None
        ).make()
        interop.save(tmp_path, model, noise(model, 0.5), tokenizer)
        return interop.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)

    return make


def test_classes_of_pairs_by_name(saved, tmp_path):
    ours, _ = saved("classification")
    pipe = transformers.pipeline("text-classification", model=str(tmp_path), device="cpu", top_k=None)
    want = {x["label"]: x["score"] for x in pipe({"text": PAIR[0], "text_pair": PAIR[1]})}
    (said,) = predict(ours.model, ours.params, ours.tokenizer, [PAIR])
    assert said["probabilities"] == pytest.approx(want, rel=1e-5) and said["label"] == max(want, key=want.get)


def test_tags_of_words(saved, tmp_path):
    ours, theirs = saved("tokens")
    words = TEXT.split()
    encoded = theirs(words, is_split_into_words=True)
    (pieces,) = Encoder.of(ours.config, ours.tokenizer, "tokens", 48)([tuple(words)])[0]
    assert pieces.ids.tolist() == encoded["input_ids"]
    assert pieces.places == [encoded.word_ids().index(i) for i in range(len(words))]
    pipe = transformers.pipeline(
        "token-classification", model=str(tmp_path), device="cpu", aggregation_strategy="first"
    )
    groups = {i: g["entity_group"] for g in pipe(TEXT) for i in range(g["start"], g["end"])}
    (said,) = predict(ours.model, ours.params, ours.tokenizer, [tuple(words)])
    starts = np.cumsum([0, *(len(w) + 1 for w in words)])
    assert said["tags"] == [groups[int(s)] for s in starts[:-1]]


def test_answers(saved, tmp_path):
    ours, theirs = saved("span", ("start", "end"))
    question = "one cat ?"
    (said,) = predict(ours.model, ours.params, ours.tokenizer, [(question, TEXT)])
    import torch

    model = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path)
    batch = theirs(question, TEXT, return_tensors="pt", return_offsets_mapping=True)
    offsets, sides = batch.pop("offset_mapping")[0].tolist(), batch.sequence_ids(0)
    with torch.no_grad():
        out = model(**batch)
    start, end = (x[0].softmax(-1).numpy() for x in (out.start_logits, out.end_logits))
    inside = [i for i, s in enumerate(sides) if s == 1]
    scores = {(i, j): start[i] * end[j] for i in inside for j in inside if i <= j < i + 30} | {
        (0, 0): start[0] * end[0]
    }
    i, j = max(scores, key=scores.get)
    assert said["answer"] == ("" if i == 0 else TEXT[offsets[i][0] : offsets[j][1]])
    assert said["probability"] == pytest.approx(float(scores[i, j]), rel=1e-4)
