"""Translates the held-out pairs of a run and measures BLEU, beside a word-by-word baseline.

python -m experiments.translate --workdir=runs/translate --beams=4 --penalty=gnmt --length_penalty=0.6 --average_last=5
"""

import json
import pathlib

from absl import flags

from experiments import cli

WORKDIR = flags.DEFINE_string("workdir", None, "A run of objective Seq2Seq on pairs.", required=True)
LIMIT = flags.DEFINE_integer("limit", 300, "Held-out pairs, 0 for all.", lower_bound=0)
BEAMS = flags.DEFINE_integer("beams", 4, "Width of the search, 1 is greedy.", lower_bound=1)
LENGTH_PENALTY = flags.DEFINE_float("length_penalty", 0.6, "Exponent of the length in a beam's score.")
PENALTY = flags.DEFINE_enum("penalty", "gnmt", ["length", "gnmt"], "length ** a, or ((5 + length) / 6) ** a.")
AVERAGE = flags.DEFINE_integer("average_last", 1, "Parameters are the mean of so many checkpoints.", lower_bound=1)
BATCH = flags.DEFINE_integer("batch_size", 32, "Sources at once.", lower_bound=1)
BASELINE = flags.DEFINE_bool("baseline", True, "Also learns and measures the word-by-word lexicon.")
OUT = flags.DEFINE_string("out", None, "Write source, translation and reference here, a JSON line each.")


def main() -> None:
    """Loads, translates, measures."""
    from llm_jax import config as configs
    from llm_jax import interop
    from llm_jax.classic.text import alignment
    from llm_jax.decoding.beam import BeamConfig, BeamSearch
    from llm_jax.nn.realized import realize
    from llm_jax.nn.ties import expand, parse
    from llm_jax.storage.checkpoints import Checkpoints
    from llm_jax.tasks import translation
    from llm_jax.training.averaging import average_checkpoints
    from llm_jax.training.run import load_config

    translation.check_bleu()
    config = load_config(WORKDIR.value)
    if not config.data.fields:
        raise configs.ConfigError(f"{WORKDIR.value} was not trained on pairs")
    loaded = interop.load(WORKDIR.value)
    tokenizer, params = loaded.tokenizer, loaded.params
    assert tokenizer is not None
    if AVERAGE.value > 1:
        checkpoints = Checkpoints(pathlib.Path(WORKDIR.value) / "checkpoints", read_only=True)
        steps = checkpoints.steps()[-AVERAGE.value :]
        if len(steps) < AVERAGE.value:
            raise ValueError(f"{WORKDIR.value} keeps {len(steps)} checkpoints: raise training.keep_last")
        params = expand(realize(average_checkpoints(checkpoints, steps, params)), parse(config.ties))

    trained_on, held_out = translation.read_pairs(config, tokenizer, LIMIT.value or None)
    if not held_out:
        raise ValueError(f"{WORKDIR.value} holds out no pair that fits")
    sources, references = [a for a, _ in held_out], [b for _, b in held_out]
    beams = BeamConfig(BEAMS.value, LENGTH_PENALTY.value, PENALTY.value)
    search = BeamSearch(loaded.model, params, tokenizer.eos_ids, beams)
    found = translation.translate(search, tokenizer, sources, config.training.sequence_length, BATCH.value)
    scores = {}
    scores["bleu"], line = translation.bleu(found, references)
    print(f"{len(held_out)} pairs, {line}")
    if BASELINE.value:
        lexicon = alignment.learn(trained_on)
        plain = [alignment.translate(lexicon, a) for a in sources]
        scores["word_by_word"], line = translation.bleu(plain, references)
        print(f"word by word, {line}")
    for a, text, b in list(zip(sources, found, references, strict=True))[:3]:
        print("-" * 80, a, f"\u25b8{text}", b, sep="\n")
    if OUT.value:
        rows = zip(sources, found, references, strict=True)
        lines = [
            json.dumps(dict(zip(("source", "translation", "reference"), r, strict=True)), ensure_ascii=False)
            for r in rows
        ]
        pathlib.Path(OUT.value).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(json.dumps(scores))


if __name__ == "__main__":
    cli.run(main)
