"""Hash tables score as the sorted arrays that they were made of, whatever the text and the blocks."""

import warnings

import numpy as np
import pytest
from letters import PRUNED, TEXT

from llm_jax.classic.ngrams import arpa, counting, hashed, smoothing
from llm_jax.classic.text import sentences
from llm_jax.classic.text.sentences import BEGIN, END


def read(tmp_path, text, **options):
    (tmp_path / "text.txt").write_text(text)
    return sentences.read(sentences.Reader([tmp_path / "text.txt"]), **options)


def drawn(seed, lines):
    rng = np.random.default_rng(seed)
    return "\n".join(" ".join(rng.choice(list("abcdefgh"), rng.integers(0, 9))) for _ in range(lines)) + "\n"


@pytest.mark.parametrize("method", [m for m in smoothing.METHODS if m != "add_k"])
@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_equal_to_searching(tmp_path, method, order):
    """Seen and unseen text, unknown words, empty lines, in blocks of any size."""
    vocabulary, text = read(tmp_path, TEXT + drawn(0, 100))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = smoothing.estimate(counting.count(text, len(vocabulary), order), vocabulary, method, held_out=text)
    tables = hashed.HashedModel(model)
    _, other = read(tmp_path, drawn(1, 100) + "\nz a z\n", vocabulary=vocabulary, keep_empty=True)
    for scored in (text, other, other[:0]):
        for block in (1, 10, 1 << 15):
            np.testing.assert_allclose(tables.log_prob(scored, block), model.log_prob(scored), rtol=1e-12)


def test_files_without_all_suffixes(tmp_path):
    (tmp_path / "model.arpa").write_text(PRUNED)
    model = arpa.read(tmp_path / "model.arpa")
    _, text = read(tmp_path, "a b a\na b b\nb a b\na b a z\na\n" + drawn(2, 300), vocabulary=model.vocabulary)
    np.testing.assert_allclose(hashed.HashedModel(model).log_prob(text), model.log_prob(text), rtol=1e-12)


def test_no_n_gram_goes_on_in_the_next_sentence(tmp_path):
    """A file may list what no text holds: words around the ends of sentences."""
    (tmp_path / "model.arpa").write_text(
        "\\data\\\nngram 1=4\nngram 2=3\nngram 3=2\n\n"
        "\\1-grams:\n-1 <unk>\n-99 <s> -0.5\n-0.5 a -0.25\n-0.4 </s> -0.1\n\n"
        "\\2-grams:\n-0.1 a </s> -0.3\n-0.2 </s> <s> -0.4\n-0.3 <s> a -0.6\n\n"
        "\\3-grams:\n-0.01 a </s> <s>\n-0.02 </s> <s> a\n\n\\end\\\n"
    )
    model = arpa.read(tmp_path / "model.arpa")
    text = np.array([BEGIN, 3, END] * 3)
    np.testing.assert_allclose(hashed.HashedModel(model).log_prob(text), model.log_prob(text))


def test_full_runs_and_keys_at_both_ends():
    """Hashes that all want the last slots, and the smallest and largest keys."""
    mend = pow(int(hashed.SPREAD), -1, 2**64)  # so that keys are what the test says
    keys = [0, 1, *range(2**64 - 40, 2**64 - 1)]
    hashes = np.array([k * mend % 2**64 for k in keys], np.uint64)
    table = hashed._Order(hashes[::2], [np.arange(len(hashes[::2]), dtype=float)])
    there, rows = table.find(hashes)
    assert there.tolist() == list(range(0, len(keys), 2))
    np.testing.assert_array_equal(table.value(rows, 1), np.arange(len(hashes[::2])))


def test_blocks_are_whole_sentences():
    text = np.array([BEGIN, 3, 4, END, BEGIN, 3, END, BEGIN, END])
    assert list(hashed.blocks(text, 2)) == [(0, 4), (4, 7), (7, 9)]
    assert list(hashed.blocks(text, 100)) == [(0, 9)] and not list(hashed.blocks(text[:0], 2))


def test_bytes(tmp_path):
    vocabulary, text = read(tmp_path, TEXT)
    model = smoothing.estimate(counting.count(text, len(vocabulary), 2), vocabulary, "witten_bell")
    tables = hashed.HashedModel(model)
    assert tables.nbytes == 3 * 8 * len(vocabulary) + tables.orders[0].rows.nbytes
