"""Flags of sampling and beam search, and the configs that they make."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from absl import flags

from experiments import cli

if TYPE_CHECKING:
    from llm_jax.decoding.beam import BeamConfig
    from llm_jax.decoding.sampling import SamplingConfig

Flags = Mapping[str, flags.FlagHolder[Any]]


def define_sampling() -> Flags:
    """The flags that only sampling reads, by name."""
    made: list[flags.FlagHolder[Any]] = [
        flags.DEFINE_float("temperature", 0.0, "0 is greedy."),
        flags.DEFINE_integer("top_k", 0, "Sample from the k most probable tokens, 0 for all."),
        flags.DEFINE_float("top_p", 1.0, "Sample from the smallest set of tokens with this total probability."),
        flags.DEFINE_float("min_p", 0.0, "Drop tokens below this share of the top probability."),
        flags.DEFINE_float("repetition_penalty", 1.0, "Above 1 discourages tokens that occurred before."),
        flags.DEFINE_float("presence_penalty", 0.0, "Subtracted once from the logits of generated tokens."),
        flags.DEFINE_float("frequency_penalty", 0.0, "Subtracted for every time a token was generated."),
        flags.DEFINE_integer("no_repeat_ngram", 0, "Repeat no n-gram of this size, 0 for no limit.", lower_bound=0),
        cli.define_texts("stop", "Text that ends an output; may be repeated."),
        flags.DEFINE_integer("seed", 0, "Same seed, same text."),
        flags.DEFINE_bool("sliding_window", False, "Continue past the context with a sliding window."),
        flags.DEFINE_bool("chat", False, "Talk: one user turn per line, until end of input."),
    ]
    return {flag.name: flag for flag in made}


def define_search() -> Flags:
    """The flags that only a beam search reads, by name."""
    made: list[flags.FlagHolder[Any]] = [
        flags.DEFINE_integer("num_return", 1, "Outputs of a beam search.", lower_bound=1),
        flags.DEFINE_float("length_penalty", 1.0, "Exponent of the length in a beam's score."),
        flags.DEFINE_enum("penalty", "length", ["length", "gnmt"], "length ** a, or ((5 + length) / 6) ** a."),
        flags.DEFINE_enum("early_stopping", "false", ["false", "true", "never"], "When a beam search is done."),
        flags.DEFINE_integer("min_new_tokens", 0, "Fewest tokens of a beam search's output.", lower_bound=0),
    ]
    return {flag.name: flag for flag in made}


def sampling_config(given: Flags) -> "SamplingConfig":
    """The config of sampling."""
    from llm_jax.decoding.sampling import SamplingConfig

    return SamplingConfig(
        temperature=given["temperature"].value,
        top_k=given["top_k"].value,
        top_p=given["top_p"].value,
        min_p=given["min_p"].value,
        repetition_penalty=given["repetition_penalty"].value,
        presence_penalty=given["presence_penalty"].value,
        frequency_penalty=given["frequency_penalty"].value,
        no_repeat_ngram=given["no_repeat_ngram"].value,
    )


def beam_config(given: Flags, beams: int) -> "BeamConfig":
    """The config of a beam search of width `beams`."""
    from llm_jax.decoding.beam import BeamConfig

    early = given["early_stopping"].value
    return BeamConfig(
        beams=beams,
        length_penalty=given["length_penalty"].value,
        penalty=given["penalty"].value,
        early_stopping=early if early == "never" else early == "true",
        min_new_tokens=given["min_new_tokens"].value,
    )


def check(sampling: Flags, search: Flags, beams: int) -> None:
    """Refuses flags without effect, and empty stop strings.

    Raises:
      ValueError: names the flag.
    """
    if "" in sampling["stop"].value:
        raise ValueError("--stop is empty: every output would end before it begins")
    for name, flag in (sampling if beams > 1 else search).items():
        if flag.present:
            raise ValueError(f"--{name} has no effect with --beams={beams}")
