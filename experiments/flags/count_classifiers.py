"""Flags of classify's naive Bayes, and the options that they make."""

from collections.abc import Mapping
from typing import Any

from absl import flags

from llm_jax.classic.text import document_terms, naive_bayes, tfidf

WEIGHED = ("sublinear_tf", "use_idf", "smooth_idf", "norm")
Flags = Mapping[str, flags.FlagHolder[Any]]


def define() -> Flags:
    """The flags of naive Bayes and its features, by name."""
    o = tfidf.Options()
    made: list[flags.FlagHolder[Any]] = [
        flags.DEFINE_enum("features", "counts", ["counts", "tfidf"], "What a text becomes."),
        flags.DEFINE_string("token_pattern", o.token_pattern, "A regular expression that finds words, of lower case."),
        flags.DEFINE_enum(
            "accents", o.accents, document_terms.ACCENTS, "What drops letters' marks, or all that is not ASCII."
        ),
        flags.DEFINE_enum(
            "analyzer", o.analyzer, document_terms.ANALYZERS, "N-grams of words, characters, those inside words."
        ),
        flags.DEFINE_list("ngrams", ["1"], "Lengths of n-grams, the shortest and the longest."),
        flags.DEFINE_list("stop_words", [], "Words that are left out."),
        flags.DEFINE_string("min_df", "1", "Rarer terms are dropped: a number of texts, or (0.01) a share."),
        flags.DEFINE_string("max_df", "1.0", "More frequent terms are dropped, likewise."),
        flags.DEFINE_integer("max_features", None, "Number of terms kept, the most frequent.", lower_bound=1),
        flags.DEFINE_bool("binary", o.binary, "A term counts once a text."),
        flags.DEFINE_bool("sublinear_tf", o.sublinear_tf, "With --features=tfidf: 1 + ln(count)."),
        flags.DEFINE_bool("use_idf", o.use_idf, "With --features=tfidf: rare terms weigh more."),
        flags.DEFINE_bool("smooth_idf", o.smooth_idf, "With --use_idf: as if one more text held every term."),
        flags.DEFINE_enum("norm", o.norm, tfidf.NORMS, "With --features=tfidf: what sums to one in every text."),
        flags.DEFINE_enum("kind", "multinomial", naive_bayes.KINDS, "See llm_jax/classic/text/naive_bayes.py."),
        flags.DEFINE_float("alpha", 1.0, "What every term has been seen more in every class."),
        flags.DEFINE_enum(
            "priors", "fitted", ["fitted", "uniform"], "Priors of the classes; not with --kind=complement."
        ),
        flags.DEFINE_bool("weight_norm", False, "With --kind=complement: normalises weights."),
    ]
    return {flag.name: flag for flag in made}


def _number(flag: flags.FlagHolder[Any]) -> int | float:
    try:
        return int(flag.value) if flag.value.isdecimal() else float(flag.value)
    except ValueError:
        raise ValueError(f"--{flag.name}={flag.value} is not a number") from None


def options(given: Flags, tokenize: str | None) -> tfidf.Options:
    """What a term is and what it weighs.

    Raises:
      ValueError: for values out of range, and flags without effect.
    """
    value = {name: flag.value for name, flag in given.items()}
    weighed = value["features"] == "tfidf"
    for name in WEIGHED:
        if given[name].present and not weighed:
            raise ValueError(f"--{name} needs --features=tfidf, not {value['features']}")
    if given["smooth_idf"].present and not value["use_idf"]:
        raise ValueError("--smooth_idf needs --use_idf")
    lengths = value["ngrams"]
    if len(lengths) not in (1, 2) or not all(n.strip().isdecimal() for n in lengths):
        raise ValueError(f"--ngrams={','.join(lengths)} must be a length, or the shortest and the longest")
    names = ("token_pattern", "accents", "analyzer", "max_features", "binary")
    weights = {name: value[name] for name in WEIGHED} if weighed else {"use_idf": False, "norm": "none"}
    return tfidf.Options(
        tokenize=tokenize or "words", ngrams=(int(lengths[0]), int(lengths[-1])),
        stop_words=frozenset(value["stop_words"]), min_df=_number(given["min_df"]), max_df=_number(given["max_df"]),
        **{name: value[name] for name in names}, **weights,
    )  # fmt: skip
