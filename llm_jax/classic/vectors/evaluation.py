"""How good word vectors are: likeness as people judge it, and analogies.

Sources: gensim's `KeyedVectors.evaluate_word_pairs` and `evaluate_word_analogies`, whose figures these are: words are
compared in upper case, the first of several spellings counts, rows with an unknown word are left out and counted.
"""

import collections
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats
from etils import epath

from llm_jax.classic.vectors.word_vectors import EPSILON, VectorsError, WordVectors, combine
from llm_jax.storage.text_files import TextFile, TextFileError

BLOCK = (4096, 64)  # words and questions whose scores are computed at once: 1 MiB, which a cache holds

SIMILARITY_SETS = {"wordsim353": "wordsim353.tsv", "simlex999": "simlex999.txt"}

Pair = tuple[str, str, float]
Question = tuple[str, str, str, str]


class Likeness(NamedTuple):
    """Agreement with people.

    Attributes:
      spearman: correlation of ranks, ties averaged; nan where fewer than two pairs are known or all are alike.
      pearson: correlation; nan in the same cases.
      pairs: how many both of whose words are known.
      missing: the others.
    """

    spearman: float
    pearson: float
    pairs: int
    missing: int


class Accuracy(NamedTuple):
    """Analogies found.

    Attributes:
      correct: how many.
      asked: of how many, all of whose words are known.
      missing: the others.
    """

    correct: int
    asked: int
    missing: int

    @property
    def share(self) -> float:
        """Share of the questions asked that were answered correctly; nan if none was asked."""
        return self.correct / self.asked if self.asked else math.nan


class Analogies(NamedTuple):
    """Analogies by kind.

    Attributes:
      total: of all.
      semantic: of sections whose name does not begin with `gram`.
      syntactic: of the others.
      sections: by name, in the file's order.
    """

    total: Accuracy
    semantic: Accuracy
    syntactic: Accuracy
    sections: dict[str, Accuracy]


def _lines(path: epath.PathLike) -> list[tuple[int, str]]:
    """Lines that are not blank, with their numbers."""
    file = epath.Path(path)
    if not file.is_file():
        raise VectorsError(f"{file} is not a file")
    try:
        return [(n, line.strip()) for n, line in TextFile(file).lines() if line.strip()]
    except TextFileError as e:
        raise VectorsError(str(e)) from None


def read_pairs(path: epath.PathLike) -> list[Pair]:
    """Reads lines of two words and a score between tabs, as WordSim-353's; lines that begin with `#` are comments.

    Raises:
      VectorsError: for a missing file, one without pairs, or another line, with its number.
    """
    pairs = []
    for n, line in _lines(path):
        if line.startswith("#"):
            continue
        parts = line.split("\t")
        try:
            a, b, score = parts[0], parts[1], float(parts[2])
        except (ValueError, IndexError):
            score = math.nan
        if len(parts) != 3 or not math.isfinite(score):
            raise VectorsError(f"{path}:{n}: expected two words and a score between tabs, not {line[:60]!r}")
        pairs.append((a, b, score))
    if not pairs:
        raise VectorsError(f"{path} holds no pair of words")
    return pairs


def read_questions(path: epath.PathLike) -> dict[str, list[Question]]:
    """Reads lines of four words under lines `: section`, as questions-words.txt has them.

    Raises:
      VectorsError: for a missing file, one without questions, or another line, with its number.
    """
    sections: dict[str, list[Question]] = {}
    name = None
    for n, line in _lines(path):
        if line.startswith(":"):
            name = line[1:].strip()
            sections.setdefault(name, [])
            continue
        if name is None:
            raise VectorsError(f"{path}:{n}: expected ': section' before the first analogy, not {line[:60]!r}")
        words = line.split()
        if len(words) != 4:
            raise VectorsError(f"{path}:{n}: expected four words, not {line[:60]!r}")
        sections[name].append((words[0], words[1], words[2], words[3]))
    if not any(sections.values()):
        raise VectorsError(f"{path} holds no analogy")
    return sections


def _spelling(ignore_case: bool) -> Callable[[str], str]:
    return str.upper if ignore_case else str


def _rows_by_spelling(vectors: WordVectors, limit: int | None, ignore_case: bool) -> dict[str, list[int]]:
    """Rows of all words that count as one, in their order."""
    if limit is not None and limit < 1:
        raise VectorsError(f"limit={limit} is below 1")
    spell, rows = _spelling(ignore_case), collections.defaultdict(list)
    for row, word in enumerate(vectors.words[:limit]):
        rows[spell(word)].append(row)
    return dict(rows)


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else math.nan


def evaluate_similarity(
    vectors: WordVectors, pairs: Sequence[Pair], limit: int | None = None, ignore_case: bool = True
) -> Likeness:
    """Correlates cosines with people's scores.

    Args:
      vectors: of the words.
      pairs: two words and a score, see `read_pairs`.
      limit: only so many words are known, the first, which are the most frequent ones in most files.
      ignore_case: words that differ in case are one.

    Raises:
      VectorsError: for a `limit` below 1.
    """
    rows, spell = _rows_by_spelling(vectors, limit, ignore_case), _spelling(ignore_case)
    asked_rows = [
        (rows[spell(a)][0], rows[spell(b)][0], s) for a, b, s in pairs if spell(a) in rows and spell(b) in rows
    ]
    missing = len(pairs) - len(asked_rows)
    if len(asked_rows) < 2:
        return Likeness(math.nan, math.nan, len(asked_rows), missing)
    a, b, scores = (np.array(x) for x in zip(*asked_rows, strict=True))
    cosines = (vectors.unit[a].astype(float) * vectors.unit[b]).sum(1)
    ranks = [scipy.stats.rankdata(x) for x in (cosines, scores)]
    return Likeness(_correlation(*ranks), _correlation(cosines, scores), len(asked_rows), missing)


def evaluate_analogies(
    vectors: WordVectors,
    sections: Mapping[str, Sequence[Question]],
    method: str = "3cosadd",
    limit: int | None = None,
    ignore_case: bool = True,
    epsilon: float = EPSILON,
    block: tuple[int, int] = BLOCK,
) -> Analogies:
    """Counts the analogies whose fourth word scores highest, the other three set aside.

    Args:
      vectors: of the words.
      sections: questions by name, see `read_questions`.
      method: see `WordVectors.analogy`.
      limit: only so many words are known and may be answers, the first.
      ignore_case: words that differ in case are one.
      epsilon: of 3CosMul.
      block: words and questions whose scores are computed at once.

    Raises:
      VectorsError: for an unknown method, or a `limit` below 1.
    """
    rows, spell = _rows_by_spelling(vectors, limit, ignore_case), _spelling(ignore_case)
    asked_rows: list[list[list[int]]] = []  # of each question, of its words: rows
    names: list[str] = []
    for name, questions in sections.items():
        found = [[rows[spell(w)] for w in q] for q in questions if all(spell(w) in rows for w in q)]
        asked_rows += found
        names += [name] * len(found)
    answers = _answers(vectors.unit[:limit], asked_rows, method, epsilon, block)
    correct, asked = collections.Counter[str](), collections.Counter(names)
    for name, question, answer in zip(names, asked_rows, answers.tolist(), strict=True):
        correct[name] += answer in question[3]
    counted = {name: Accuracy(correct[name], asked[name], len(sections[name]) - asked[name]) for name in sections}

    def total(chosen: Callable[[str], bool]) -> Accuracy:
        return Accuracy(*(sum(x[i] for name, x in counted.items() if chosen(name)) for i in range(3)))

    is_syntactic = lambda name: name.startswith("gram")
    return Analogies(total(lambda _: True), total(lambda x: not is_syntactic(x)), total(is_syntactic), counted)


class Quality(NamedTuple):
    """How good vectors are on the sets of a folder.

    Attributes:
      similarity: by the name of the set.
      analogies: of questions-words.txt.
    """

    similarity: dict[str, Likeness]
    analogies: Analogies

    def to_dict(self) -> dict[str, float | None]:
        """JSON-ready: Spearman's correlations and the share of analogies, None where there is none."""
        numbers = {name: like.spearman for name, like in self.similarity.items()}
        numbers["analogies"] = self.analogies.total.share
        return {name: None if math.isnan(x) else x for name, x in numbers.items()}


def evaluate(
    vectors: WordVectors, folder: epath.PathLike, method: str = "3cosadd", limit: int | None = None
) -> Quality:
    """Measures vectors on the files of `SIMILARITY_SETS` and on questions-words.txt.

    Args:
      vectors: of the words.
      folder: of the files.
      method: see `WordVectors.analogy`.
      limit: words that may be answers of analogies, the first.

    Raises:
      VectorsError: for missing files, and what `evaluate_analogies` refuses.
    """
    folder = epath.Path(folder)
    pairs = {name: read_pairs(folder / file) for name, file in SIMILARITY_SETS.items()}
    similarity = {name: evaluate_similarity(vectors, p) for name, p in pairs.items()}
    questions = read_questions(folder / "questions-words.txt")
    return Quality(similarity, evaluate_analogies(vectors, questions, method, limit))


def _answers(
    unit: np.ndarray,
    asked_rows: Sequence[Sequence[list[int]]],
    method: str,
    epsilon: float,
    block: tuple[int, int],
) -> np.ndarray:
    """The row of the best answer to each question, `[Q]`.

    Few words are asked about again and again, so that cosines are computed once per word and not per question.
    """
    asked = np.array([[rows[0] for rows in q[:3]] for q in asked_rows], int).reshape(-1, 3)
    words, positions = np.unique(asked, return_inverse=True)
    positions = positions.reshape(asked.shape)
    barred = np.array([(i, row) for i, q in enumerate(asked_rows) for rows in q[:3] for row in rows], int).reshape(
        -1, 2
    )
    rows_at_once, questions_at_once = block
    best, best_scores = np.zeros(len(asked_rows), int), np.full(len(asked_rows), -np.inf, np.float32)
    for first in range(0, len(unit), rows_at_once):
        cosines = unit[words] @ unit[first : first + rows_at_once].T
        inside = barred[(barred[:, 1] >= first) & (barred[:, 1] < first + rows_at_once)]
        for begin in range(0, len(asked_rows), questions_at_once):
            now = slice(begin, begin + questions_at_once)
            scores = combine(*(cosines[positions[now, k]] for k in range(3)), method, epsilon)
            lo, hi = np.searchsorted(inside[:, 0], (begin, begin + questions_at_once))
            scores[inside[lo:hi, 0] - begin, inside[lo:hi, 1] - first] = -np.inf
            top = scores.argmax(1)
            top_scores = scores[np.arange(len(top)), top]
            better = top_scores > best_scores[now]
            best[now] = np.where(better, top + first, best[now])
            best_scores[now] = np.where(better, top_scores, best_scores[now])
    return best
