"""Tf-idf: numbers that a hand can compute, what thresholds keep, files, and what is refused."""

import math

import numpy as np
import pytest

from llm_jax.classic.ngrams import stored
from llm_jax.classic.text import document_terms, tfidf
from llm_jax.classic.text.tfidf import Options, TfIdf

DOCUMENTS = ["the cat saw the dog", "A dog saw a cat, a dog!", "the_end 42 é"]


def test_words_are_runs_of_two_or_more_in_lower_case():
    assert document_terms.words("A Dog's 2 cats_ 42; ÉTÉ x") == ["dog", "cats_", "42", "été"]
    found = TfIdf.fit(["A dog .", "a . ."], Options(tokenize="blanks"))
    assert found.terms == [".", "A", "a", "dog"]


def test_counts():
    model = TfIdf.fit(DOCUMENTS)
    assert model.terms == ["42", "cat", "dog", "saw", "the", "the_end"]
    counts = model.counts([*DOCUMENTS, "cat cat bird", ""])
    np.testing.assert_array_equal(
        counts.toarray(),
        [[0, 1, 1, 1, 2, 0], [0, 1, 2, 1, 0, 0], [1, 0, 0, 0, 0, 1], [0, 2, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]],
    )
    assert counts.dtype == np.int64 and counts.has_canonical_format


@pytest.mark.parametrize("ngrams", [(1, 1), (1, 2), (2, 2), (2, 4), (3, 3)])
def test_ngrams_equal_cutting_windows(ngrams):
    rng = np.random.default_rng(0)
    documents = [list(rng.choice(list("abcd"), size=n)) for n in (0, 1, 2, 3, 7, 12, 5, 2)]
    model = TfIdf.fit(documents, Options(ngrams=ngrams))
    counts = model.counts(documents).toarray()
    for document, row in zip(documents, counts, strict=True):
        windows = [
            " ".join(document[i : i + n]) for n in range(ngrams[0], ngrams[1] + 1) for i in range(len(document) - n + 1)
        ]
        assert {t: c for t, c in zip(model.terms, row.tolist(), strict=True) if c} == {
            w: windows.count(w) for w in windows
        }
    assert model.terms == sorted(model.terms)
    np.testing.assert_array_equal(TfIdf.fit_transform(documents, model.options)[1].toarray(),
                                  model.transform(documents).toarray())  # fmt: skip


def test_weights_in_closed_form():
    documents = [["a", "a", "b"], ["a", "c"], ["a"]]
    for smooth, idf in ((True, [1, math.log(4 / 2) + 1, math.log(4 / 2) + 1]), (False, [1, *[math.log(3) + 1] * 2])):
        model, got = TfIdf.fit_transform(documents, Options(smooth_idf=smooth, norm="none"))
        np.testing.assert_allclose(model.idf, idf, rtol=1e-15)
        np.testing.assert_allclose(got.toarray(), [[2, idf[1], 0], [1, 0, idf[2]], [1, 0, 0]], rtol=1e-15)
    row = TfIdf.fit(documents, Options(use_idf=False, norm="l1")).transform([["a", "a", "b"]])
    np.testing.assert_allclose(row.toarray(), [[2 / 3, 1 / 3, 0]], rtol=1e-15)
    row = TfIdf.fit(documents, Options(use_idf=False, sublinear_tf=True, norm="none")).transform([["a", "a", "b"]])
    np.testing.assert_allclose(row.toarray(), [[1 + math.log(2), 1, 0]], rtol=1e-15)
    model = TfIdf.fit(documents, Options(binary=True, use_idf=False, norm="none"))
    np.testing.assert_array_equal(model.transform(documents).toarray(), [[1, 1, 0], [1, 0, 1], [1, 0, 0]])


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_rows_are_of_length_one_or_empty(norm):
    found = TfIdf.fit(DOCUMENTS, Options(norm=norm)).transform([*DOCUMENTS, "nothing known", ""]).toarray()
    np.testing.assert_allclose((found ** int(norm[1])).sum(1), [1, 1, 1, 0, 0], atol=1e-15)


@pytest.mark.parametrize(
    "options, kept",
    [
        ({"min_df": 2}, "ab"),
        ({"min_df": 0.5}, "ab"),
        ({"min_df": 0.0}, "abcde"),
        ({"max_df": 1}, "cde"),
        ({"max_df": 0.75}, "bcde"),
        ({"min_df": 2, "max_df": 3}, "b"),
        ({"max_features": 1}, "c"),  # by occurrences, not by documents
        ({"max_features": 3}, "abc"),
        ({"max_features": 4}, "abcd"),  # d and e are as frequent
        ({"max_features": 1, "binary": True}, "a"),
        ({"stop_words": frozenset("ac")}, "bde"),
    ],
)
def test_what_is_kept(options, kept):
    documents = [["a", "b"], ["a", "b", "e"], ["a", *"cccccc"], ["a", "d", "b"]]
    assert TfIdf.fit(documents, Options(**options)).terms == list(kept)


def test_stop_words_go_before_ngrams():
    model = TfIdf.fit(["cat of the house", "the"], Options(stop_words=frozenset({"of", "the"}), ngrams=(2, 2)))
    assert model.terms == ["cat house"]


def counted(document, **options):
    """{term: its count} of one document."""
    model, counts = TfIdf.fit_transform([document], Options(use_idf=False, norm="none", **options))
    return dict(zip(model.terms, counts.toarray()[0].tolist(), strict=True))


def test_characters_are_windows_of_a_text_or_of_its_words():
    assert counted("Ab  a\tb", analyzer="char") == {"a": 2, "b": 2, " ": 1, "\t": 1}
    assert counted("ab \n ab", analyzer="char", ngrams=(2, 3)) == {
        "ab": 2, "b ": 1, " a": 1, "ab ": 1, "b a": 1, " ab": 1,
    }  # fmt: skip
    assert counted("to o", analyzer="char_wb", ngrams=(2, 3)) == {
        " t": 1, "to": 1, "o ": 2, " to": 1, "to ": 1, " o": 1, " o ": 1,
    }  # fmt: skip
    assert counted("cats i", analyzer="char_wb", ngrams=(5, 9)) == {" cats": 1, "cats ": 1, " cats ": 1, " i ": 1}
    assert counted("cat", analyzer="char", ngrams=(2, 9)) == {"ca": 1, "at": 1, "cat": 1}


@pytest.mark.parametrize("analyzer", ["char", "char_wb"])
def test_new_texts_of_characters(analyzer):
    model, fitted = TfIdf.fit_transform(DOCUMENTS, Options(analyzer=analyzer, ngrams=(1, 3)))
    np.testing.assert_array_equal(model.transform(DOCUMENTS).toarray(), fitted.toarray())
    assert model.transform(["", " ", "%%"]).toarray()[2].sum() in (0, 1)  # a blank at an end is known, % is not
    assert (model.counts(["cat"]) != model.counts(["CAT"])).nnz == 0 and model.counts(["cat"]).has_canonical_format


def test_accents_and_patterns():
    text = "Été naïve ﬁn ß 中"
    assert counted(text) == {"été": 1, "naïve": 1, "ﬁn": 1}
    assert counted(text, accents="unicode") == {"ete": 1, "naive": 1, "fin": 1}
    assert counted(text, accents="unicode", token_pattern=r"\w+") == {"ete": 1, "naive": 1, "fin": 1, "ß": 1, "中": 1}
    assert counted(text, accents="ascii", token_pattern=r"\w+") == {"ete": 1, "naive": 1, "fin": 1}
    assert counted(text, accents="ascii", tokenize="blanks") == {"Ete": 1, "naive": 1, "fin": 1}
    assert counted("X-Ray x-axis", token_pattern=r"(\w)-\w+") == {"x": 2}


def test_files(tmp_path):
    options = Options(ngrams=(1, 2), stop_words=frozenset({"saw"}), min_df=1, max_df=0.9, accents="ascii")
    model = TfIdf.fit([*DOCUMENTS, ["a\nb", "\ud800"]], options)
    tfidf.save(model, tmp_path)
    again = tfidf.load(tmp_path)
    assert again.options == options and again.terms == model.terms
    np.testing.assert_array_equal(again.transform(DOCUMENTS).toarray(), model.transform(DOCUMENTS).toarray())
    np.savez(tmp_path / "tfidf.npz", idf=model.idf[1:])
    with pytest.raises(stored.StoredError, match="terms, but weights of shape"):
        tfidf.load(tmp_path)
    for damage in (b"", b"cut", (b"PK\x03\x04" * 9)):
        (tmp_path / "tfidf.npz").write_bytes(damage)
        with pytest.raises(stored.StoredError, match="tfidf.npz cannot be read"):
            tfidf.load(tmp_path)
    (tmp_path / "tfidf.json").write_text('{"options": {"ngrams": [1, 1]}, "terms": []}')
    with pytest.raises(stored.StoredError, match="tfidf.json or tfidf.npz cannot be read: KeyError"):
        tfidf.load(tmp_path)
    (tmp_path / "tfidf.json").unlink()
    with pytest.raises(stored.StoredError, match=r"holds no tfidf\.json"):
        tfidf.load(tmp_path)


def test_a_function_is_not_saved(tmp_path):
    model = TfIdf.fit(["ab"], Options(tokenize=list))
    assert model.terms == ["a", "b"]
    with pytest.raises(stored.StoredError, match="cannot be saved"):
        tfidf.save(model, tmp_path)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"tokenize": "letters"}, "tokenize='letters' is not one of words, blanks"),
        ({"ngrams": (2, 1)}, r"ngrams=\(2, 1\) must be"),
        ({"ngrams": (0, 1)}, r"ngrams=\(0, 1\) must be"),
        ({"min_df": 0}, "min_df=0 must be a whole number from 1 on"),
        ({"min_df": -0.1}, "min_df=-0.1 must be"),
        ({"max_df": 1.5}, "max_df=1.5 must be"),
        ({"max_df": math.nan}, "max_df=nan must be"),
        ({"max_features": 0}, "max_features=0 must be at least 1"),
        ({"norm": "l3"}, "norm='l3' is not one of l1, l2, none"),
        ({"analyzer": "letters"}, "analyzer='letters' is not one of word, char, char_wb"),
        ({"accents": "latin"}, "accents='latin' is not one of none, unicode, ascii"),
        ({"token_pattern": "("}, r"token_pattern='\(' is not a regular expression"),
        ({"token_pattern": "(a)(b)"}, r"has 2 groups: one at most"),
        ({"token_pattern": "a", "tokenize": "blanks"}, "takes the place of tokenize"),
        ({"accents": "ascii", "tokenize": list}, "with a function that finds words"),
        ({"analyzer": "char", "stop_words": frozenset("a")}, "stop_words is of words, and analyzer='char' takes char"),
        ({"analyzer": "char_wb", "tokenize": "blanks"}, "tokenize is of words"),
        ({"analyzer": "char", "token_pattern": "a"}, "token_pattern is of words"),
        ({"stop_words": "english"}, "stop_words='english' is not a set of words"),
    ],
)
def test_errors_of_options(options, words):
    with pytest.raises((tfidf.TfIdfError, document_terms.TermsError), match=words):
        Options(**options)


@pytest.mark.parametrize(
    "documents, options, words",
    [
        ([], {}, "no document"),
        (["", "a !"], {}, "no term in 2 documents"),
        (["ab"], {"ngrams": (2, 2)}, "no term in 1 documents"),
        (["ab", "cd"], {"stop_words": frozenset({"ab", "cd"})}, "no term in 2 documents"),
        (["ab", "cd"], {"min_df": 2}, "no term is in min_df=2 to max_df=1.0 of 2 documents"),
        (["ab cd"] * 3, {"min_df": 3, "max_df": 2}, "no term is in min_df=3 to max_df=2 of 3"),
        ("ab cd", {}, "documents is one string"),
        ("ab cd", {"analyzer": "char"}, "documents is one string"),
        ("ab cd", {"analyzer": "char_wb"}, "documents is one string"),
        ([["ab"]], {"analyzer": "char"}, "analyzer=char takes strings, not a list"),
        (["", " "], {"analyzer": "char_wb"}, "no term in 2 documents"),
        (["ab", None], {}, "document 1 is a NoneType"),
        ([["ab", 3]], {}, "3 among the words of the documents is not a string"),
        ([["a b", "c"]], {"ngrams": (1, 2)}, "the word 'a b' holds a blank"),
    ],
)
def test_errors_of_documents(documents, options, words):
    with pytest.raises((tfidf.TfIdfError, document_terms.TermsError), match=words):
        TfIdf.fit(documents, Options(**options))
