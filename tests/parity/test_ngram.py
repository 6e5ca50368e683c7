"""N-gram models against nltk and the kenlm package, on English text."""

import gzip
import pathlib
import sysconfig

import kenlm
import nltk.lm
import numpy as np
import pytest
from letters import PRUNED

from llm_jax.classic.ngrams import arpa, counting, hashed, smoothing
from llm_jax.classic.text import sentences
from llm_jax.classic.text.sentences import BEGIN


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """(vocabulary, training text, held-out text, its lines): words of the standard library's documentation strings."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = []
    for path in sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]:
        words = (line.split() for line in path.read_text(errors="ignore").splitlines())
        lines += [" ".join(w) for w in words if w]
    (folder / "train.txt").write_text("\n".join(lines[:-500]) + "\n")
    (folder / "held_out.txt").write_text("\n".join(lines[-500:]) + "\n")
    vocabulary, text = sentences.read(sentences.Reader([folder / "train.txt"]))
    _, held_out = sentences.read(sentences.Reader([folder / "held_out.txt"]), vocabulary=vocabulary)
    return vocabulary, text, held_out, lines[-500:]


@pytest.mark.parametrize("order", [2, 3, 5])
@pytest.mark.parametrize("method", ["modified_kneser_ney", "kneser_ney", "witten_bell", "absolute", "interpolated"])
def test_kenlm_scores_our_files_as_we_do(corpus, order, method, tmp_path):
    vocabulary, text, held_out, lines = corpus
    model = smoothing.estimate(counting.count(text, len(vocabulary), order), vocabulary, method, held_out=held_out)
    arpa.write(model, tmp_path / "model.arpa")
    theirs = kenlm.Model(str(tmp_path / "model.arpa"))
    ours = model.log_prob(held_out)
    begins = np.flatnonzero(held_out == BEGIN)
    for line, begin, end in zip(lines, begins, [*begins[1:], len(held_out)], strict=True):
        want = [p for p, _, _ in theirs.full_scores(line)]
        np.testing.assert_allclose(ours[begin + 1 : end], want, atol=1e-5)


def test_files_from_elsewhere(corpus, tmp_path):
    """A file that kenlm reads, with pruned orders and words that nobody knows: the same scores here."""
    vocabulary, text, held_out, lines = corpus
    model = smoothing.estimate(counting.count(text, len(vocabulary), 3), vocabulary)
    rare = counting.count(text, len(vocabulary), 3).counts[2] > 1
    pruned = type(model)(
        vocabulary,
        [*model.keys[:2], model.keys[2][rare]],
        [*model.log_probs[:2], model.log_probs[2][rare]],
        model.backoffs,
    )
    arpa.write(pruned, tmp_path / "model.arpa")
    theirs, ours = kenlm.Model(str(tmp_path / "model.arpa")), arpa.read(tmp_path / "model.arpa")
    _, numbers = sentences.read(_reader(tmp_path, lines), vocabulary=ours.vocabulary)
    sums = np.add.reduceat(ours.log_prob(numbers), np.flatnonzero(numbers == BEGIN))
    np.testing.assert_allclose(sums, [theirs.score(line) for line in lines], atol=2e-4, rtol=1e-6)


def _reader(folder, lines):
    (folder / "lines.txt").write_text("\n".join(lines) + "\n")
    return sentences.Reader([folder / "lines.txt"])


def test_pruned_files_as_kenlm_reads_them(tmp_path):
    (tmp_path / "model.arpa").write_text(PRUNED)
    theirs, ours = kenlm.Model(str(tmp_path / "model.arpa")), arpa.read(tmp_path / "model.arpa")
    for line in ("a b a", "a b b", "b a b", "a b a z", "a", ""):
        want = [p for p, _, _ in theirs.full_scores(line)]
        np.testing.assert_allclose(ours.log_prob(ours.vocabulary.encode(line.split()))[1:], want, atol=1e-6)


ROOT = pathlib.Path(__file__).parents[2]


def test_a_file_of_irstlm_as_kenlm_reads_it():
    """What another program estimated (see ngrams/test_arpa.py), on words and orders that back off to all depths."""
    path = ROOT / "tests" / "classic" / "ngrams" / "irstlm.arpa"
    theirs, ours = kenlm.Model(str(path)), arpa.read(path)
    rng = np.random.default_rng(0)
    words = ours.vocabulary.words[3:]
    lines = [" ".join(rng.choice(words, n)) for n in range(20)]
    lines += [" ".join(row) for row in np.array(ours.vocabulary.words)[counting.words_of(ours.keys, len(words) + 3)[2]]]
    for line in lines:
        line = " ".join(w for w in line.split() if w not in sentences.SPECIAL)
        want = [p for p, _, _ in theirs.full_scores(line)]
        np.testing.assert_allclose(ours.log_prob(ours.vocabulary.encode(line.split()))[1:], want, atol=1e-5)


def test_perplexity_of_austen_as_kenlm_says_it(tmp_path):
    """Modified Kneser-Ney of order 4 on one novel, another one line by line: by searching and by hash tables."""
    austen = ROOT.parent / "shared" / "data" / "austen"
    if not austen.is_dir():
        pytest.skip("no ../shared/data/austen")
    vocabulary, text = sentences.read(sentences.Reader([austen / "persuasion.txt.gz"]))
    model = smoothing.estimate(counting.count(text, len(vocabulary), 4), vocabulary)
    arpa.write(model, tmp_path / "model.arpa")
    theirs = kenlm.Model(str(tmp_path / "model.arpa"))
    with gzip.open(austen / "northanger_abbey.txt.gz", "rt") as f:
        lines = [line for line in f.read().split("\n") if line.strip()]
    _, other = sentences.read(_reader(tmp_path, lines), vocabulary=vocabulary)
    begins = np.flatnonzero(other == BEGIN)
    want = np.array([theirs.score(" ".join(line.split())) for line in lines])
    for ours in (model, hashed.HashedModel(model), arpa.read(tmp_path / "model.arpa")):
        numbers = sentences.read(_reader(tmp_path, lines), vocabulary=getattr(ours, "vocabulary", vocabulary))[1]
        log_p = ours.log_prob(numbers)
        np.testing.assert_allclose(np.add.reduceat(log_p, begins), want, rtol=1e-6, atol=1e-5)
        perplexity = 10 ** (-log_p.sum() / (len(other) - len(begins)))
        assert perplexity == pytest.approx(10 ** (-want.sum() / (len(other) - len(begins))), rel=1e-5)


class Known(nltk.lm.Vocabulary):
    """Counts no beginning of a sentence among the words that can follow."""

    def __len__(self):
        return super().__len__() - 1


@pytest.mark.parametrize(
    "method, theirs, extra",
    [
        ("mle", lambda order, v: nltk.lm.MLE(order, vocabulary=v), {}),
        ("add_k", lambda order, v: nltk.lm.Lidstone(0.3, order, vocabulary=v), {"k": 0.3}),
    ],
)
def test_nltk(corpus, method, theirs, extra):
    """Probabilities of words after histories that were seen, whose counts are all that both use."""
    vocabulary, text, _, _ = corpus
    text = text[: np.flatnonzero(text == BEGIN)[2000]]
    model = smoothing.estimate(counting.count(text, len(vocabulary), 3), vocabulary, method, **extra)
    begins = [*np.flatnonzero(text == BEGIN), len(text)]
    spelled = [[vocabulary.words[w] for w in text[a:b]] for a, b in zip(begins, begins[1:], strict=False)]
    other = theirs(3, Known(vocabulary.words[1:], unk_label="<unk>"))
    other.fit([[g for n in (1, 2, 3) for g in nltk.ngrams(s, n) if g != ("<s>",)] for s in spelled])
    for s in spelled[::40]:
        history = s[:1]
        for word in s[1:]:
            p = model.next([vocabulary.index[w] for w in history])
            want = other.score(word, history[-2:])
            np.testing.assert_allclose(p[vocabulary.index[word]], want, rtol=1e-10)
            history.append(word)


@pytest.mark.parametrize("method", ["witten_bell", "absolute", "kneser_ney"])
def test_nltk_interpolated(corpus, method):
    """nltk's shares of pairs and triples over our single words, which it leaves without a uniform share.

    It takes one discount where ours follow from each order's counts; and after `<s>` it has no Kneser-Ney counts.
    """
    vocabulary, text, _, _ = corpus
    text = text[: np.flatnonzero(text == BEGIN)[2000]]
    counts = counting.count(text, len(vocabulary), 3)
    model = smoothing.estimate(counts, vocabulary, method)
    begins = [*np.flatnonzero(text == BEGIN), len(text)]
    spelled = [[vocabulary.words[w] for w in text[a:b]] for a, b in zip(begins, begins[1:], strict=False)]
    kinds = dict(
        witten_bell=nltk.lm.WittenBellInterpolated,
        absolute=nltk.lm.AbsoluteDiscountingInterpolated,
        kneser_ney=nltk.lm.KneserNeyInterpolated,
    )
    other = kinds[method](3, vocabulary=Known(vocabulary.words[1:], unk_label="<unk>"))
    other.fit([[g for n in (1, 2, 3) for g in nltk.ngrams(s, n) if g != ("<s>",)] for s in spelled])
    table = smoothing.adjusted(counts) if method == "kneser_ney" else counts.counts
    discounts = [smoothing.discounts(c, modified=False)[0] for c in table]
    theirs = other.estimator.alpha_gamma

    def share(word, context):
        other.estimator.discount = discounts[len(context)]
        return theirs(word, context)

    other.estimator.alpha_gamma = share
    other.estimator.unigram_score = lambda word: 10.0 ** model.log_probs[0][vocabulary.index[word]]
    compared = 0
    for s in spelled[::40]:
        for t in range(3 if method == "kneser_ney" else 1, len(s)):
            p = model.next([vocabulary.index[w] for w in s[:t]])
            for word in (s[t], s[t - 1], "return", "="):  # seen there or not
                if word != "<s>":
                    want = other.score(word, s[max(t - 2, 0) : t])
                    np.testing.assert_allclose(p[vocabulary.index[word]], want, rtol=1e-9)
                    compared += 1
    assert compared > 200
