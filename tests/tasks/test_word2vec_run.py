"""Runs of word2vec: they resume, spread over devices, and learn."""

import dataclasses

import jax
import numpy as np
import pytest

from llm_jax.classic.text.sentences import Reader
from llm_jax.classic.vectors.word2vec import Word2VecConfig
from llm_jax.classic.vectors.word_vectors import WordVectors
from llm_jax.tasks import word2vec_run
from llm_jax.tasks.word2vec_run import Word2VecSchedule
from llm_jax.training import metrics
from llm_jax.training.loop import TrainingError
from llm_jax.training.workdir import WorkdirError

CONFIG = Word2VecConfig(size=16, window=3, tile=8, block=128, blocks=4, shared=8, sample=0.0)
TOPICS = ("red green blue black white", "cat dog cow horse sheep", "one two three four five")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Sentences of one topic each, with words of none between."""
    rng = np.random.default_rng(0)
    topics = [[*t.split(), "the", "of"] for t in TOPICS]
    lines = [" ".join(rng.choice(topics[i % 3], 8)) for i in range(1200)]
    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text("\n".join([*lines, "rare words here"]))
    return word2vec_run.read(Reader([path]), min_count=5)


def test_a_text_without_its_rare_words(text):
    words, known = text
    assert known.total == 9603 and len(known.words) == 9600 == known.counts.sum() and "rare" not in words
    assert words[:2] == ["the", "of"] or words[:2] == ["of", "the"]
    assert (np.diff(known.sentences) >= 0).all() and len(np.unique(known.sentences)) == 1200


@pytest.mark.parametrize("loss", ["negative_sampling", "hierarchical"])
def test_words_of_a_topic_come_together(text, tmp_path, loss):
    words, known = text
    table = word2vec_run.train(
        dataclasses.replace(CONFIG, loss=loss, row_rate=1.6),
        Word2VecSchedule(8, 0.1),
        known,
        tmp_path,
        jax.devices()[:1],
    )
    vectors = WordVectors(words, table)
    for topic in TOPICS:
        names = topic.split()
        for word in names:
            assert {w for w, _ in vectors.nearest(word, 4, ("the", "of"))} == set(names) - {word}
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) > 10 and (tmp_path / "loss.png").exists()


def test_a_word_again_and_again(tmp_path):
    """A block of one word is many terms of few rows."""
    lines = ["x " * 300, "a b c d e f g h " * 40] * 20
    (tmp_path / "text.txt").write_text("\n".join(lines))
    _, known = word2vec_run.read(Reader([tmp_path / "text.txt"]))
    config = Word2VecConfig(size=16, sample=0.0, blocks=2)
    word2vec_run.train(config, Word2VecSchedule(5, 0.05), known, tmp_path / "run", jax.devices()[:1])
    rows = metrics.read_metrics(tmp_path / "run")
    assert max(r["train/loss"] for r in rows) < 8 and rows[-1]["train/loss"] < 0.8 * rows[0]["train/loss"]


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """Vectors of two epochs on one device."""
    return word2vec_run.train(CONFIG, Word2VecSchedule(2), text[1], tmp_path_factory.mktemp("whole"), jax.devices()[:1])


def test_resumes_where_it_stopped(text, whole, tmp_path):
    schedule, known, one = Word2VecSchedule(2), text[1], jax.devices()[:1]
    half = len(known.words) * schedule.epochs // (CONFIG.block * CONFIG.blocks) // 2
    word2vec_run.train(CONFIG, schedule, known, tmp_path / "parts", one, last_step=half)
    assert 0 < max(int(p.name) for p in (tmp_path / "parts" / "checkpoints").iterdir() if p.name.isdigit()) == half
    parts = word2vec_run.train(CONFIG, schedule, known, tmp_path / "parts", one)
    np.testing.assert_array_equal(parts, whole)
    again = word2vec_run.train(CONFIG, schedule, known, tmp_path / "parts", one)  # nothing is left to do
    np.testing.assert_array_equal(again, whole)
    with pytest.raises(WorkdirError, match=r"another config \(schedule.seed: 1 -> 2\)"):
        word2vec_run.train(CONFIG, Word2VecSchedule(2, seed=2), known, tmp_path / "parts", one)
    other = known._replace(words=known.words[::-1].copy())
    with pytest.raises(WorkdirError, match="text.crc32"):
        word2vec_run.train(CONFIG, schedule, other, tmp_path / "parts", one)


def test_tiles_over_devices(text, whole, tmp_path):
    known, devices = text[1], jax.devices()
    four = word2vec_run.train(CONFIG, Word2VecSchedule(2), known, tmp_path / "four", devices[:4])
    np.testing.assert_allclose(four, whole, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="16 tiles do not divide over 3 devices: set block"):
        word2vec_run.train(CONFIG, Word2VecSchedule(1), known, tmp_path / "three", devices[:3])


def test_what_was_learned_before_a_bad_step_stays(text, tmp_path):
    config = dataclasses.replace(CONFIG, row_rate=1e6)
    with pytest.raises(TrainingError, match="not finite"):
        word2vec_run.train(config, Word2VecSchedule(2, 1e30, 1e30), text[1], tmp_path, jax.devices()[:1])
    assert any(p.name.isdigit() for p in (tmp_path / "checkpoints").iterdir())


def test_bad_schedules():
    with pytest.raises(ValueError, match="epochs=0 must be at least 1"):
        Word2VecSchedule(0)
    with pytest.raises(ValueError, match="learning_rate=nan must be a positive number"):
        Word2VecSchedule(rate=float("nan"))
