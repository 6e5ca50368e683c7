"""N-grams: sums to one after every history, formulas on small texts, and that vectors equal searching word by word."""

import collections
import itertools
import warnings

import numpy as np
import pytest
from letters import TEXT

from llm_jax.classic.ngrams import counting, smoothing, stored
from llm_jax.classic.text import sentences
from llm_jax.classic.text.sentences import BEGIN, END, UNKNOWN, Vocabulary


def read(tmp_path, text=TEXT, **options):
    path = tmp_path / "text.txt"
    path.write_text(text)
    return sentences.read(sentences.Reader([path]), **options)


def windows(text, order):
    """N-grams of numbered sentences, counted one by one."""
    found = [collections.Counter() for _ in range(order)]
    for t, word in enumerate(text):
        for n in range(1, order + 1):
            gram = tuple(text[t - n + 1 : t + 1].tolist()) if t >= n - 1 else ()
            if gram and word != BEGIN and BEGIN not in gram[1:] and END not in gram[:-1]:
                found[n - 1][gram] += 1
    return found


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return read(tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_counts_equal_counting_one_by_one(small, order):
    vocabulary, text = small
    counts = counting.count(text, len(vocabulary), order)
    for n, want in enumerate(windows(text, order)):
        words = counting.words_of(counts.keys, counts.size)[n]
        got = {tuple(w): c for w, c in zip(words.tolist(), counts.counts[n].tolist(), strict=True) if c}
        assert got == dict(want)


def test_suffixes(small):
    vocabulary, text = small
    counts = counting.count(text, len(vocabulary), 4)
    words = counting.words_of(counts.keys, counts.size)
    for n, suffix in enumerate(counts.suffixes[1:], start=1):
        np.testing.assert_array_equal(words[n - 1][suffix], words[n][:, 1:])


def histories(model, length):
    """All histories of words up to a length, seen or not."""
    words = [w for w in range(len(model.vocabulary)) if w not in (BEGIN, END)]
    for n in range(length + 1):
        yield from ((BEGIN, *h) for h in itertools.product(words, repeat=n))
        yield from itertools.product(words, repeat=n)


@pytest.mark.parametrize("method", [m for m in smoothing.METHODS if m != "stupid_backoff"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_sums_to_one_after_every_history(small, method, order):
    vocabulary, text = small
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = smoothing.estimate(counting.count(text, len(vocabulary), order), vocabulary, method, held_out=text[:40])
    for history in histories(model, 2):
        p = model.next(history)
        assert p.min() >= 0 and p[BEGIN] == 0
        np.testing.assert_allclose(p.sum(), 1, rtol=1e-10, err_msg=str(history))


@pytest.mark.parametrize("method", smoothing.METHODS)
def test_a_text_is_scored_as_its_words_one_by_one(small, method, tmp_path):
    vocabulary, text = small
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = smoothing.estimate(counting.count(text, len(vocabulary), 3), vocabulary, method, held_out=text)
    _, other = read(tmp_path, "a b d h\nz a b a c\n\nh h h\nb\n", vocabulary=vocabulary)
    got = model.log_prob(other)
    begin = 0
    for t, word in enumerate(other.tolist()):
        if word == BEGIN:
            begin = t
            assert got[t] == 0
            continue
        with np.errstate(divide="ignore"):
            want = np.log10(model.next(other[begin:t].tolist())[word])
        np.testing.assert_allclose(got[t], want, rtol=1e-10)


GRAMS = {}


def brute_kneser_ney(text, size, modified, history, word):
    """Chen and Goodman's equations for trigrams, by counting sets."""
    if id(text) not in GRAMS:
        GRAMS[id(text)] = text, windows(text, 3), {}
    _, grams, found = GRAMS[id(text)]

    def tables(n):  # adjusted counts of n-grams
        if n == 3:
            return grams[2]
        if n not in found:
            before = collections.Counter(g[1:] for g in grams[n])
            found[n] = {g: c if g[0] == BEGIN else before[g] for g, c in grams[n - 1].items()}
        return found[n]

    def probability(history, word):
        n = len(history) + 1
        table = tables(n)
        d = smoothing.discounts(np.array(list(table.values())), modified)
        after = {g: c for g, c in table.items() if g[:-1] == history}
        lower = probability(history[1:], word) if history else 1 / (size - 1)
        if not after:
            return lower
        total = sum(after.values())
        own = after.get((*history, word), 0)
        left = sum(d[min(c, 3) - 1] for c in after.values()) / total
        return (own - (d[min(own, 3) - 1] if own else 0)) / total + left * lower

    return probability(history, word)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Enough words that all discounts come from counts."""
    rng = np.random.default_rng(0)
    p = 1 / np.arange(1, 301)
    words = rng.choice([f"w{i}" for i in range(300)], p=p / p.sum(), size=6000)
    return read(tmp_path_factory.mktemp("drawn"), "\n".join(" ".join(w) for w in words.reshape(-1, 6)) + "\n")


@pytest.mark.filterwarnings("error")  # of discounts that fall back
def test_kneser_ney_of_a_larger_text_by_its_equations(drawn):
    vocabulary, text = drawn
    model = smoothing.estimate(counting.count(text, len(vocabulary), 3), vocabulary)
    for history in [(BEGIN,), (BEGIN, 3), (3, 4), (4, 3), (20, 21)]:
        p = model.next(history)
        for word in [0, 2, *range(3, 12), *range(12, len(vocabulary), 40)]:
            np.testing.assert_allclose(p[word], brute_kneser_ney(text, len(vocabulary), True, history, word), rtol=1e-9)


@pytest.mark.filterwarnings("error")
def test_add_k_of_orders_that_no_sentence_fills(tmp_path):
    vocabulary, text = read(tmp_path, "a b\n")
    model = smoothing.estimate(counting.count(text, len(vocabulary), 9), vocabulary, "add_k")
    np.testing.assert_allclose(model.log_prob(vocabulary.encode(["a"] * 20))[-1], -np.log10(len(vocabulary) - 1))


def test_held_out_words_that_cannot_be_weigh_nothing(small):
    vocabulary, text = small
    assert smoothing._weight(np.array([0.5, 0.0]), np.array([0.1, 0.0])) == smoothing._weight(
        np.array([0.5]), np.array([0.1])
    )
    with pytest.raises(ValueError, match="the vocabulary is closed, but 1 words of the text are not in it"):
        held_out = vocabulary.encode(["z"])
        smoothing.estimate(counting.count(text, len(vocabulary), 2), vocabulary, "interpolated", held_out, closed=True)


@pytest.mark.parametrize("modified", [False, True])
def test_kneser_ney_by_its_equations(small, modified):
    vocabulary, text = small
    method = "modified_kneser_ney" if modified else "kneser_ney"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = smoothing.estimate(counting.count(text, len(vocabulary), 3), vocabulary, method)
        words = [w for w in range(len(vocabulary)) if w != BEGIN]
        for history in [(BEGIN,), *itertools.product(range(3, 7), repeat=2), (BEGIN, 3), (3, UNKNOWN)]:
            p = model.next(history)
            for word in words:
                want = brute_kneser_ney(text, len(vocabulary), modified, history, word)
                np.testing.assert_allclose(p[word], want, rtol=1e-9)


def brute(text, size, method, history, word):
    """The printed equations for trigrams, word by word: of Chen and Goodman's section 2."""
    table = windows(text, 3)[len(history)]
    after = [c for g, c in table.items() if g[:-1] == history]
    lower = brute(text, size, method, history[1:], word) if history else 1 / (size - 1)
    if not after:
        return lower
    own, total, kinds = table.get((*history, word), 0), sum(after), len(after)
    if method == "witten_bell":
        kept = total / (total + kinds)  # 1 - lambda, the share of the maximum likelihood
        return kept * own / total + (1 - kept) * lower
    seen = list(table.values())
    d = seen.count(1) / (seen.count(1) + 2 * seen.count(2))
    return max(own - d, 0) / total + d * kinds / total * lower


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("method", ["witten_bell", "absolute"])
def test_witten_bell_and_absolute_by_their_equations(small, method):
    vocabulary, text = small
    model = smoothing.estimate(counting.count(text, len(vocabulary), 3), vocabulary, method)
    a, b, c = (vocabulary.index[w] for w in "abc")
    for history in [(), (BEGIN,), (BEGIN, a), (a, b), (b, a), (c, c), (a, UNKNOWN), (UNKNOWN, a)]:
        p = model.next(history)
        for word in [w for w in range(len(vocabulary)) if w != BEGIN]:
            np.testing.assert_allclose(p[word], brute(text, len(vocabulary), method, history, word), rtol=1e-10)


def test_witten_bell_by_hand(small):
    """Of 13 a's 9 go on with b, 2 with c, 2 end: three kinds, so (9 + 3 p(b)) / (13 + 3)."""
    vocabulary, text = small
    model = smoothing.estimate(counting.count(text, len(vocabulary), 2), vocabulary, "witten_bell")
    single, pairs = windows(text, 2)
    a, b = (vocabulary.index[w] for w in "ab")
    follow = {g: n for g, n in pairs.items() if g[0] == a}
    assert (single[a,], follow[a, b], len(follow)) == (13, 9, 3)
    words, kinds = sum(single.values()), len(single)
    p = (single[b,] + kinds / (len(vocabulary) - 1)) / (words + kinds)
    assert model.next([a])[b] == pytest.approx((9 + 3 * p) / (13 + 3), rel=1e-12)


def test_discounts_in_closed_form():
    counts = np.repeat([1, 2, 3, 4, 5], [10, 6, 4, 3, 7])
    y = 10 / 22
    assert smoothing.discounts(counts) == pytest.approx((1 - 2 * y * 6 / 10, 2 - 3 * y * 4 / 6, 3 - 4 * y * 3 / 4))
    assert smoothing.discounts(counts, modified=False) == pytest.approx((y, y, y))


@pytest.mark.parametrize(
    "seen, want",
    [
        ((120, 18, 13, 2), (0.769231, 0.333333, 2.52663)),
        ((295, 14, 5, 1), (0.913313, 1.02145, 2.26935)),
        ((3443, 213, 47, 20), (0.889894, 1.41092, 1.48529)),
        ((4273, 113, 16, 2), (0.949767, 1.59656, 2.52512)),
    ],
)
def test_discounts_that_irstlm_prints(seen, want):
    """Version 6.00.05, improved Kneser-Ney of sentences of Austen and of Brown; n-grams seen 1 to 4 times."""
    assert smoothing.discounts(np.repeat([1, 2, 3, 4], seen)) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("counts", [[1, 1, 1], [2, 2], [5], [*[1] * 10, 2, *[3] * 10, 4]])
def test_discounts_of_odd_corpora_fall_back_with_a_warning(counts):
    with pytest.warns(UserWarning, match="give no discounts"):
        assert smoothing.discounts(np.array(counts)) == smoothing.FALLBACK


def test_weights_of_interpolation_are_the_best(small):
    """No other weight of the highest order makes held-out text more probable."""
    vocabulary, text = small
    cut = np.flatnonzero(text == BEGIN)[7]
    counts = counting.count(text[:cut], len(vocabulary), 2)
    model = smoothing.estimate(counts, vocabulary, "interpolated", held_out=text[cut:])
    best = model.log_prob(text[cut:]).sum()
    lower = 10.0 ** model.log_probs[0]
    history = counts.keys[1] // counts.size
    ratio = counts.counts[1] / np.bincount(history, counts.counts[1])[history]
    for weight in np.linspace(0.01, 0.99, 50):
        left = np.where(np.bincount(history, minlength=counts.size) > 0, 1 - weight, 1.0)
        p = weight * ratio + left[history] * lower[counts.keys[1] % counts.size]
        other = type(model)(vocabulary, model.keys, [model.log_probs[0], np.log10(p)], [np.log10(left)])
        assert other.log_prob(text[cut:]).sum() <= best + 1e-6


def test_stupid_backoff(small):
    vocabulary, text = small
    counts = counting.count(text, len(vocabulary), 2)
    model = smoothing.estimate(counts, vocabulary, "stupid_backoff")
    a, b, g = (vocabulary.index[w] for w in "abg")
    single, pairs = windows(text, 2)
    p = model.next([BEGIN, a])
    after = sum(c for (h, _), c in pairs.items() if h == a)
    assert p[b] == pytest.approx(pairs[a, b] / after)
    assert p[g] == pytest.approx(0.4 * single[g,] / sum(single.values()))


def test_samples_follow_the_model(small):
    """Ten thousand second words against their probabilities: chi-square below its 99.9 % point."""
    vocabulary, text = small
    model = smoothing.estimate(counting.count(text, len(vocabulary), 2), vocabulary, "witten_bell")
    rng = np.random.default_rng(0)
    a = vocabulary.index["a"]
    drawn = [(model.sample(rng, [BEGIN, a], max_words=1) or [END])[0] for _ in range(10_000)]
    p = model.next([BEGIN, a])
    p[UNKNOWN] = 0
    p /= p.sum()
    seen = np.bincount(drawn, minlength=len(p))
    there = p > 0
    assert seen[~there].sum() == 0
    assert ((seen - 1e4 * p)[there] ** 2 / (1e4 * p[there])).sum() < 26.1
    assert there.sum() == 9  # eight degrees of freedom


@pytest.mark.parametrize("method", ["add_k", "kneser_ney"])
def test_folders_are_read_as_they_were_written(small, method, tmp_path):
    vocabulary, text = small
    model = smoothing.estimate(counting.count(text, len(vocabulary), 3), vocabulary, method)
    stored.save(model, tmp_path / "model")
    again = stored.load(tmp_path / "model")
    assert isinstance(again.keys[1], np.memmap) and again.vocabulary.words == vocabulary.words
    np.testing.assert_array_equal(again.log_prob(text), model.log_prob(text))
    (tmp_path / "model" / "keys_2.npy").write_bytes(b"cut")
    with pytest.raises(stored.StoredError, match="keys cannot be read"):
        stored.load(tmp_path / "model")
    stored.save(model, tmp_path / "model")
    words = (tmp_path / "model" / "vocabulary.txt").read_text()
    (tmp_path / "model" / "vocabulary.txt").write_text(words[: words[:-1].rindex("\n") + 1])
    with pytest.raises(stored.StoredError, match="words, but arrays of"):
        stored.load(tmp_path / "model")
    (tmp_path / "model" / "model.json").write_text("{}")
    with pytest.raises(stored.StoredError, match="model.json or vocabulary.txt cannot be read: KeyError"):
        stored.load(tmp_path / "model")
    (tmp_path / "model" / "model.json").unlink()
    with pytest.raises(stored.StoredError, match="holds no model.json"):
        stored.load(tmp_path / "model")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"method": "good_turing"}, "smoothing='good_turing' is not one of mle, add_k"),
        ({"method": "interpolated"}, "needs held-out text"),
        ({"method": "interpolated", "held_out": np.zeros(0, int)}, "needs held-out text"),
        ({"method": "add_k", "k": 0.0}, "k=0.0 must be positive"),
        ({"method": "add_k", "k": np.inf}, "k=inf must be positive"),
        ({"method": "stupid_backoff", "backoff": -1.0}, r"backoff=-1.0 must lie in \(0, 1\]"),
    ],
)
def test_errors(small, options, words):
    vocabulary, text = small
    with pytest.raises(ValueError, match=words):
        smoothing.estimate(counting.count(text, len(vocabulary), 2), vocabulary, **options)


def test_closed_vocabularies_know_all_words(tmp_path):
    vocabulary, text = read(tmp_path, min_count=2)
    counts = counting.count(text, len(vocabulary), 2)
    with pytest.raises(ValueError, match="the vocabulary is closed, but 3 words of the text are not in it"):
        smoothing.estimate(counts, vocabulary, closed=True)
    vocabulary, text = read(tmp_path)
    model = smoothing.estimate(counting.count(text, len(vocabulary), 2), vocabulary, "witten_bell", closed=True)
    p = model.next([BEGIN])
    assert p[UNKNOWN] == 0 and p.sum() == pytest.approx(1)


def test_vocabulary_of_one_word(tmp_path):
    vocabulary, text = read(tmp_path, "a\na a\n")
    with pytest.warns(UserWarning, match="no discounts"):
        model = smoothing.estimate(counting.count(text, len(vocabulary), 3), vocabulary)
    assert model.next([BEGIN]).sum() == pytest.approx(1)
    assert Vocabulary(["a"]).words == vocabulary.words
