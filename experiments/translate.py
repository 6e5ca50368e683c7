"""Translates the held-out pairs of a run and measures BLEU, beside a word-by-word baseline.

python -m experiments.translate --workdir=runs/translate --beams=4 --penalty=gnmt --length_penalty=0.6 --average_last=5
"""

import itertools
import json
import pathlib

from absl import flags
from tqdm import tqdm

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
    from llm_jax.data import corpora
    from llm_jax.data.rows import pairs
    from llm_jax.decoding.beam import BeamConfig, BeamSearch
    from llm_jax.storage.checkpoints import Checkpoints
    from llm_jax.training.averaging import average_checkpoints
    from llm_jax.training.run import load_config

    try:
        import sacrebleu
    except ImportError as e:
        raise ValueError("BLEU needs sacrebleu: pip install 'llm_jax[translate]'") from e
    config = load_config(WORKDIR.value)
    data, length = config.data, config.training.sequence_length
    if not data.fields:
        raise configs.ConfigError(f"{WORKDIR.value} was not trained on pairs")
    loaded = interop.load(WORKDIR.value)
    tokenizer, params = loaded.tokenizer, loaded.params
    assert tokenizer is not None
    if AVERAGE.value > 1:
        checkpoints = Checkpoints(pathlib.Path(WORKDIR.value) / "checkpoints", read_only=True)
        steps = checkpoints.steps()[-AVERAGE.value :]
        if len(steps) < AVERAGE.value:
            raise ValueError(f"{WORKDIR.value} keeps {len(steps)} checkpoints: raise training.keep_last")
        params = average_checkpoints(checkpoints, steps)

    splits: dict[str, list[tuple[str, str]]] = {"train": [], "validation": []}
    for document in corpora.documents(data.source, **data.read_as):
        pair = pairs.both(document, data.fields)
        if pair is not None:
            splits[corpora.split_of(document, data.validation_share)].append(pair)
    # those that the run evaluates on: a longer one would be cut
    fits = lambda text: len(tokenizer.encode_source(text)) <= length
    held = (p for p in splits["validation"] if all(map(fits, p)))
    held_out = list(itertools.islice(held, LIMIT.value or None))
    if not held_out:
        raise ValueError(f"{WORKDIR.value} holds out no pair that fits")

    config_ = BeamConfig(BEAMS.value, LENGTH_PENALTY.value, PENALTY.value)
    search = BeamSearch(loaded.model, params, tokenizer.eos_ids, config_)
    found: list[str] = []
    for start in tqdm(range(0, len(held_out), BATCH.value), unit="batch"):
        sources = [tokenizer.encode_source(a) for a, _ in held_out[start : start + BATCH.value]]
        missing = BATCH.value - len(sources)  # one compiled shape
        done = search.search(sources + sources[:1] * missing, length)[: len(sources)]
        found += [tokenizer.decode(row[0].tokens) for row in done]
    references = [[b for _, b in held_out]]
    bleu = lambda texts: sacrebleu.corpus_bleu(texts, references, lowercase=True)
    scores = {"bleu": bleu(found).score}
    print(f"{len(held_out)} pairs, {bleu(found)}")
    if BASELINE.value:
        lexicon = alignment.learn(splits["train"])
        plain = bleu([alignment.translate(lexicon, a) for a, _ in held_out])
        scores["word_by_word"] = plain.score
        print(f"word by word, {plain}")
    for (a, b), text in list(zip(held_out, found, strict=True))[:3]:
        print("-" * 80, a, f"\u25b8{text}", b, sep="\n")
    if OUT.value:
        rows = [{"source": a, "translation": t, "reference": b} for (a, b), t in zip(held_out, found, strict=True)]
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
        pathlib.Path(OUT.value).write_text(text, encoding="utf-8")
    print(json.dumps(scores))


if __name__ == "__main__":
    cli.run(main)
