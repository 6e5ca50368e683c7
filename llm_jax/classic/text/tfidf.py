"""Counts of words and n-grams in documents, and their tf-idf, as sparse matrices with a column a term.

Terms are sorted, and defaults and formulas are those of scikit-learn's CountVectorizer and TfidfVectorizer, so that
matrices compare entry by entry.

Source: Sparck Jones 1972, "A statistical interpretation of term specificity"; scikit-learn's user guide, 6.2.3.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import scipy.sparse
from etils import epath

from llm_jax.classic.ngrams import counting
from llm_jax.classic.ngrams.stored import StoredError
from llm_jax.classic.text import model_folder
from llm_jax.classic.text.document_terms import (
    ACCENTS,
    ANALYZERS,
    TOKENIZERS,
    Document,
    count,
    count_characters,
    cutter,
    pattern,
)

NORMS = ("l1", "l2", "none")


class TfIdfError(ValueError):
    """Options that go with no documents; one line that says why."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What a term is, which are chosen, and what a document's row says of them.

    Attributes:
      tokenize: how a string becomes words: one of `TOKENIZERS`, or a function (which is not saved).
      ngrams: the shortest and the longest n-grams that are terms.
      stop_words: taken out before n-grams are made.
      min_df: terms in fewer documents are dropped; an integer is a count, a float a share of the documents.
      max_df: terms in more documents are dropped; likewise.
      max_features: how many terms are chosen, the most frequent; among equals the first in the alphabet.
      binary: a term counts once a document.
      sublinear_tf: 1 + ln(count) instead of the count.
      use_idf: times ln(N / df) + 1 for N documents, of which df hold the term.
      smooth_idf: ln((1 + N) / (1 + df)) + 1 instead, as if one more document held every term.
      norm: what is one of every row, the sum of its entries (l1) or of their squares (l2), or none.
      analyzer: what n-grams are of: `word`, or characters: `char`, `char_wb`, see `document_terms.count_characters`.
      token_pattern: a regular expression instead of `tokenize`, of lower case, see `document_terms.pattern`.
      accents: what becomes of letters' marks, see `document_terms.strip_accents`.
    """

    tokenize: str | Callable[[str], Sequence[str]] = "words"
    ngrams: tuple[int, int] = (1, 1)
    stop_words: frozenset[str] = frozenset()
    min_df: int | float = 1
    max_df: int | float = 1.0
    max_features: int | None = None
    binary: bool = False
    sublinear_tf: bool = False
    use_idf: bool = True
    smooth_idf: bool = True
    norm: str = "l2"
    analyzer: str = "word"
    token_pattern: str | None = None
    accents: str = "none"

    def __post_init__(self) -> None:
        if isinstance(self.tokenize, str) and self.tokenize not in TOKENIZERS:
            raise TfIdfError(f"tokenize={self.tokenize!r} is not one of {', '.join(TOKENIZERS)}, and no function")
        for name, known in (("accents", ACCENTS), ("analyzer", ANALYZERS), ("norm", NORMS)):
            if getattr(self, name) not in known:
                raise TfIdfError(f"{name}={getattr(self, name)!r} is not one of {', '.join(known)}")
        self._check_words()
        if len(self.ngrams) != 2 or not 1 <= self.ngrams[0] <= self.ngrams[1]:
            raise TfIdfError(f"ngrams={self.ngrams} must be the shortest and the longest length, from 1 on")
        for name in ("min_df", "max_df"):
            value = getattr(self, name)
            if not (value >= 1 if isinstance(value, int) else 0.0 <= value <= 1.0):
                raise TfIdfError(f"{name}={value} must be a whole number from 1 on, or a share from 0.0 to 1.0")
        if isinstance(self.stop_words, str):
            raise TfIdfError(f"stop_words={self.stop_words!r} is not a set of words, and no list is built in")
        if self.max_features is not None and self.max_features < 1:
            raise TfIdfError(f"max_features={self.max_features} must be at least 1, or None")

    def _check_words(self) -> None:
        """Refuses options that have no effect beside others."""
        cut = {"tokenize": self.tokenize != "words", "token_pattern": self.token_pattern is not None}
        if self.analyzer != "word":
            given = cut | {"stop_words": bool(self.stop_words)}
            if wrong := next((name for name, there in given.items() if there), None):
                raise TfIdfError(f"{wrong} is of words, and analyzer={self.analyzer!r} takes characters")
        if all(cut.values()):
            raise TfIdfError(f"token_pattern={self.token_pattern!r} takes the place of tokenize: give one of them")
        if callable(self.tokenize) and self.accents != "none":
            raise TfIdfError(f"accents={self.accents!r} with a function that finds words: let it strip them itself")
        if self.token_pattern is not None:
            pattern(self.token_pattern)


def _select(counts: scipy.sparse.csr_matrix, new: np.ndarray, width: int) -> scipy.sparse.csr_matrix:
    """Counts with their columns renumbered by `new`, sorted in every row, without those that become `ABSENT`."""
    columns = new[counts.indices]
    chosen = columns >= 0
    begins = np.append(0, np.cumsum(chosen))[counts.indptr]
    out = scipy.sparse.csr_matrix((counts.data[chosen], columns[chosen], begins), (counts.shape[0], width))
    out.sort_indices()
    return out


def _count(documents: Iterable[Document], options: Options) -> tuple[list[str], scipy.sparse.csr_matrix]:
    o = options
    if o.analyzer == "word":
        tokenize = cutter(o.tokenize, o.token_pattern, o.accents) if isinstance(o.tokenize, str) else o.tokenize
        terms, counts = count(documents, tokenize, o.ngrams, o.stop_words)
    else:
        terms, counts = count_characters(documents, o.analyzer, o.ngrams, o.accents)
    if o.binary:
        counts.data[:] = 1
    return terms, counts


def _chosen(terms: list[str], counts: scipy.sparse.csr_matrix, options: Options) -> np.ndarray:
    """Columns of the terms that are chosen, in the alphabet's order.

    Raises:
      TfIdfError: where there is no document, no word, or no term within the limits.
    """
    size = counts.shape[0]
    if not counts.nnz:
        raise TfIdfError(f"no term in {size} documents" if size else "no document")
    df = np.bincount(counts.indices, minlength=len(terms))
    least, most = (x if isinstance(x, int) else x * size for x in (options.min_df, options.max_df))
    chosen = np.flatnonzero((df >= max(least, 1)) & (df <= most))
    chosen = np.array(sorted(chosen.tolist(), key=terms.__getitem__), np.int64)
    if options.max_features is not None:
        often = np.bincount(counts.indices, counts.data, len(terms))[chosen]
        chosen = chosen[np.sort(np.argsort(-often, kind="stable")[: options.max_features])]
    if not len(chosen):
        raise TfIdfError(
            f"no term is in min_df={options.min_df} to max_df={options.max_df} of {size} documents: widen the limits"
        )
    return chosen


@dataclasses.dataclass(frozen=True)
class TfIdf:
    """Terms and what they weigh.

    Attributes:
      options: see there.
      terms: V, sorted.
      idf: `[V]`; ones without `use_idf`.
    """

    options: Options
    terms: list[str]
    idf: np.ndarray

    @classmethod
    def fit(cls, documents: Iterable[Document], options: Options = Options()) -> "TfIdf":
        """Chooses terms and weighs them; see `fit_transform`."""
        return cls._fit(documents, options)[0]

    @classmethod
    def fit_transform(
        cls, documents: Iterable[Document], options: Options = Options()
    ) -> tuple["TfIdf", scipy.sparse.csr_matrix]:
        """(model, `[N, V]` of the documents), counted once.

        Args:
          documents: strings, or lists of words.
          options: see there.

        Raises:
          TermsError: see `document_terms.count`.
          TfIdfError: where there is no document, no word, or no term within the limits.
        """
        model, counts = cls._fit(documents, options)
        return model, model._weigh(counts)

    @classmethod
    def _fit(cls, documents: Iterable[Document], options: Options) -> tuple["TfIdf", scipy.sparse.csr_matrix]:
        terms, counts = _count(documents, options)
        chosen = _chosen(terms, counts, options)
        new = np.full(len(terms), counting.ABSENT)
        new[chosen] = np.arange(len(chosen))
        counts = _select(counts, new, len(chosen))
        idf = np.ones(len(chosen))
        if options.use_idf:
            more = int(options.smooth_idf)
            idf += np.log((counts.shape[0] + more) / (np.bincount(counts.indices, minlength=len(chosen)) + more))
        return cls(options, [terms[i] for i in chosen], idf), counts

    @functools.cached_property
    def _index(self) -> dict[str, int]:
        return {term: i for i, term in enumerate(self.terms)}

    def counts(self, documents: Iterable[Document]) -> scipy.sparse.csr_matrix:
        """How often each term is in each document, int64 `[N, V]`; other terms count nowhere."""
        terms, counts = _count(documents, self.options)
        new = np.fromiter((self._index.get(t, counting.ABSENT) for t in terms), np.int64, len(terms))
        return _select(counts, new, len(self.terms))

    def transform(self, documents: Iterable[Document]) -> scipy.sparse.csr_matrix:
        """Tf-idf of documents, float64 `[N, V]`; a document of no known term is a row of zeros."""
        return self._weigh(self.counts(documents))

    def _weigh(self, counts: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
        out = counts.astype(np.float64)
        if self.options.sublinear_tf:
            out.data = 1.0 + np.log(out.data)
        out.data *= self.idf[out.indices]
        if self.options.norm != "none":
            rows = np.repeat(np.arange(out.shape[0]), np.diff(out.indptr))
            if self.options.norm == "l1":
                out.data /= np.bincount(rows, out.data)[rows]
            else:
                out.data /= np.sqrt(np.bincount(rows, out.data**2))[rows]
        return out


def save(model: TfIdf, path: epath.PathLike) -> None:
    """Writes `tfidf.json` and `tfidf.npz` into a folder.

    Raises:
      StoredError: where words are made by a function of one's own, which no file holds.
    """
    about = dataclasses.asdict(model.options) | {"stop_words": sorted(model.options.stop_words)}
    if not isinstance(about["tokenize"], str):
        raise StoredError(f"tokenize={about['tokenize']!r} cannot be saved: give lists of words, and leave it away")
    model_folder.write(path, "tfidf", {"options": about, "terms": model.terms}, idf=model.idf)


def load(path: epath.PathLike) -> TfIdf:
    """Reads what `save` wrote.

    Raises:
      StoredError: for a folder that holds none, or whose files are damaged or do not fit together.
    """
    with model_folder.reading(path, "tfidf", "tf-idf") as (about, read):
        given, terms = about["options"], list(about["terms"])
        tuples = {"ngrams": tuple(given["ngrams"]), "stop_words": frozenset(given["stop_words"])}
        options, idf = Options(**given | tuples), read()["idf"]
    if idf.shape != (len(terms),):
        raise StoredError(f"{path}: {len(terms):,} terms, but weights of shape {idf.shape}")
    return TfIdf(options, terms, idf)
