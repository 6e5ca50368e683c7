"""Words, characters and n-grams of documents, counted: a sparse matrix with a row a document and a column a term.

Words are numbered in one pass over all documents; n-grams are pairs of numbers (see `counting`), and only the different
ones are ever spelled out. N-grams of characters inside words are found once for each different word.

Where the time goes (SST-2, single words): half is the regular expression that finds words, a quarter their numbers in
Python's dictionary; with pairs of words it is spelling and sorting the different ones.
"""

import collections
import itertools
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
import scipy.sparse

from llm_jax.classic.ngrams import counting

Document = str | Sequence[str]
Cut = Callable[[str], Sequence[str]]
_WORD = re.compile(r"\w\w+")  # as \b\w\w+\b, which is what scikit-learn says, and takes longer
_TREEBANK = re.compile(r"-[lr]rb-|n't\b|'(?:s|re|ve|ll|d|m)\b|\w+(?=n't\b)|\w+(?:-\w+)*|[^\w\s]")
_BLANKS = re.compile(r"\s\s+")
ACCENTS = ("none", "unicode", "ascii")
ANALYZERS = ("word", "char", "char_wb")


class TermsError(ValueError):
    """Documents that cannot be counted; one line that says why."""


def words(text: str) -> list[str]:
    """Runs of two or more letters, digits and underscores, lower case: scikit-learn's words."""
    return _WORD.findall(text.lower())


def treebank(text: str) -> list[str]:
    """Words and marks in lower case, contractions cut (`do n't`, `it 's`): near the cut of GloVe's text and of SST."""
    return _TREEBANK.findall(text.lower())


TOKENIZERS: dict[str, Cut] = {"words": words, "blanks": str.split, "treebank": treebank}


def strip_accents(text: str, how: str) -> str:
    """Letters without their marks.

    Args:
      text: of a document.
      how: one of `ACCENTS`: `none` leaves it, `unicode` drops combining marks of NFKD, `ascii` all that is not ASCII.
    """
    if how == "none" or text.isascii():
        return text
    apart = unicodedata.normalize("NFKD", text)
    if how == "ascii":
        return apart.encode("ascii", "ignore").decode()
    return "".join(c for c in apart if not unicodedata.combining(c))


def pattern(text: str) -> re.Pattern[str]:
    """A regular expression whose matches are words, or its group's, where it has one.

    Raises:
      TermsError: for what is none, or has several groups.
    """
    try:
        found = re.compile(text)
    except re.error as e:
        raise TermsError(f"token_pattern={text!r} is not a regular expression: {e}") from None
    if found.groups > 1:
        raise TermsError(f"token_pattern={text!r} has {found.groups} groups: one at most is what becomes a word")
    return found


def cutter(tokenize: str, token_pattern: str | None = None, accents: str = "none") -> Cut:
    """What cuts texts into words: lower case (but of `blanks`), then accents, then one of `TOKENIZERS` or a pattern."""
    if token_pattern is None and accents == "none":
        return TOKENIZERS[tokenize]
    if token_pattern is None and tokenize == "blanks":
        return lambda text: strip_accents(text, accents).split()
    patterns = {"words": _WORD, "treebank": _TREEBANK}
    find = (patterns[tokenize] if token_pattern is None else pattern(token_pattern)).findall
    return lambda text: find(strip_accents(text.lower(), accents))


def _split(documents: Iterable[Document], tokenize: Cut) -> list[Sequence[str]]:
    if isinstance(documents, str):
        raise TermsError("documents is one string: give a list of documents")
    split = [tokenize(d) if isinstance(d, str) else d for d in documents]
    for i, found in enumerate(split):
        if not isinstance(found, (list, tuple)):
            raise TermsError(f"document {i} is a {type(found).__name__}, no string and no list of words")
    return split


def count(
    documents: Iterable[Document],
    tokenize: Cut = words,
    ngrams: tuple[int, int] = (1, 1),
    stop_words: Collection[str] = (),
    between: str = " ",
) -> tuple[list[str], scipy.sparse.csr_matrix]:
    """Counts of all terms.

    Args:
      documents: strings, or lists of words.
      tokenize: how a string becomes words.
      ngrams: the shortest and the longest n-grams that are terms.
      stop_words: taken out before n-grams are made.
      between: stands between the words of an n-gram.

    Returns:
      The different terms, V, in no order (stop words among them, which nothing holds), and int64 counts `[N, V]`.

    Raises:
      TermsError: where something is not a document or not a word.
    """
    split = _split(documents, tokenize)
    lengths = np.fromiter(map(len, split), np.int64, len(split))
    numbers: collections.defaultdict[str, int] = collections.defaultdict()
    numbers.default_factory = numbers.__len__
    text = np.fromiter(map(numbers.__getitem__, itertools.chain.from_iterable(split)), np.int64, lengths.sum())
    spelled = list(numbers)
    if (wrong := next((w for w in spelled if not isinstance(w, str)), None)) is not None:
        raise TermsError(f"{wrong!r} among the words of the documents is not a string")
    if between and ngrams[1] > 1 and (wrong := next((w for w in spelled if between in w), None)) is not None:
        raise TermsError(f"the word {wrong!r} holds a blank, which stands between the words of an n-gram")
    document = np.repeat(np.arange(len(split)), lengths)
    if stop_words:
        wanted = np.array([w not in stop_words for w in spelled], bool)[text]
        text, document = text[wanted], document[wanted]
    terms: list[str] = []
    columns, rows = [], []
    grams, positions, ends = spelled, text, np.arange(len(text))
    for n in range(1, ngrams[1] + 1):
        if n > 1:  # numbers of the grams that end at each word: of the one before, and the word
            ends = ends[ends >= n - 1]
            ends = ends[document[ends] == document[ends - n + 1]]
            found, _, ranks = counting.rank(positions[ends - 1] * len(spelled) + text[ends])
            before, last = np.divmod(found, len(spelled))
            grams = [f"{grams[a]}{between}{spelled[b]}" for a, b in zip(before.tolist(), last.tolist(), strict=True)]
            positions = np.full(len(text), counting.ABSENT)
            positions[ends] = ranks
        if n >= ngrams[0]:
            columns.append(positions[ends] + len(terms))
            rows.append(document[ends])
            terms += grams
    where = np.concatenate(rows), np.concatenate(columns)
    return terms, scipy.sparse.csr_matrix((np.ones(len(where[0]), np.int64), where), (len(split), len(terms)))


def count_characters(
    documents: Iterable[Document], analyzer: str, ngrams: tuple[int, int], accents: str = "none"
) -> tuple[list[str], scipy.sparse.csr_matrix]:
    """Counts of n-grams of characters, lower case, as scikit-learn cuts them.

    Args:
      documents: strings.
      analyzer: `char` takes all windows of a text, in which several blanks are one; `char_wb` those of each word with a
        blank at both ends, of a word that is too short for any the whole.
      ngrams: the shortest and the longest.
      accents: see `strip_accents`.

    Returns:
      As `count`.

    Raises:
      TermsError: where something is not a string.
    """

    def prepare(document: Document) -> str:
        if not isinstance(document, str):
            raise TermsError(f"analyzer={analyzer} takes strings, not a {type(document).__name__}")
        return strip_accents(document.lower(), accents)

    documents = documents if isinstance(documents, str) else map(prepare, documents)
    if analyzer == "char":
        return count(documents, lambda text: list(_BLANKS.sub(" ", text)), ngrams, between="")
    found, counts = count(documents, str.split)
    cut = [_windows(f" {word} ", ngrams) for word in found]
    terms, of_words = count(cut, list)
    return terms, counts @ of_words


def _windows(word: str, ngrams: tuple[int, int]) -> list[str]:
    longest = min(ngrams[1], len(word))
    sizes = range(min(ngrams[0], longest), longest + 1)
    return [word[i : i + n] for n in sizes for i in range(len(word) - n + 1)]
