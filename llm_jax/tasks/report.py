"""What the training binaries print at the end: the summary line and sampled continuations."""

import itertools
import lzma
import sys
from typing import Any

import jax
import numpy as np

from llm_jax.data import corpora
from llm_jax.data.rows import pairs
from llm_jax.decoding.continuation import Continuation
from llm_jax.decoding.fill_mask import fill
from llm_jax.decoding.generate import Generator
from llm_jax.decoding.sampling import SamplingConfig
from llm_jax.objectives.causal_lm import CausalLM
from llm_jax.objectives.masked_lm import MaskedLM
from llm_jax.objectives.permutation_lm import PermutationLM
from llm_jax.objectives.seq2seq import Seq2Seq
from llm_jax.training.run import Trained
from llm_jax.training.run_config import RunConfig


def xz_bits_per_byte(source: str, share: float, **read_as: Any) -> float | None:
    """Bits per byte of `xz -9` on the held-out documents joined, None where nothing is held out.

    Args:
      source: of the run.
      share: held out.
      **read_as: how the files are read, see `corpora.documents`.
    """
    documents = corpora.documents(source, **read_as)
    held_out = [d.text for d in documents if d.text and corpora.split_of(d, share) == "validation"]
    data = "".join(held_out).encode("utf-8", "surrogatepass")
    return 8 * len(lzma.compress(data, preset=9)) / len(data) if data else None


def numbers(trained: Trained, workdir: str) -> str:
    """Results on one line, and the path of their files."""
    parts = [f"step {int(trained.state.step)}"]
    parts += [f"{k.removeprefix('eval/')} {v:.3f}" for k, v in trained.evaluation.items()]
    return f"{', '.join(parts)}\nresults in {workdir}: loss.png, metrics.jsonl, checkpoints/, tokenizer.json"


def summary(config: RunConfig, trained: Trained, workdir: str) -> str:
    """The results with `xz -9` on the same files beside them."""
    line = numbers(trained, workdir)
    if "eval/bits_per_byte" not in trained.evaluation or config.data.split != "hash":
        return line
    xz = xz_bits_per_byte(config.data.source, config.data.validation_share, **config.data.read_as)
    return line if xz is None else f"xz -9 on the held-out files: {xz:.3f} bits per byte\n{line}"


def _beginning(text: str) -> str:
    """The head of a document up to its first definition, or its first eight lines."""
    lines = text.splitlines(keepends=True)
    end = next((i + 1 for i, line in enumerate(lines) if line.lstrip().startswith("def ")), 8)
    return "".join(lines[max(0, end - 8) : end])


def _beginnings(config: RunConfig, count: int) -> list[str]:
    """Of held-out documents, or of training ones where none is held out."""
    found: list[str] = []
    for document in corpora.documents(config.data.source, **config.data.read_as):
        if len(found) == count:
            break
        held_out = corpora.split_of(document, config.data.validation_share) == "validation"
        if document.text and (held_out or not config.data.validation_share or config.data.split == "tail"):
            found.append(_beginning(document.text))
    return found


def _marks() -> tuple[str, str]:
    """What stands around a model's own words: bold on a terminal, a triangle in front elsewhere."""
    return ("\x1b[1m", "\x1b[0m") if sys.stdout.isatty() else ("\u25b8", "")


def samples(trained: Trained, count: int, config: RunConfig) -> list[str]:
    """What the model says, in the way of its objective; nothing for one that says nothing."""
    ways = {CausalLM: continuations, PermutationLM: continuations, MaskedLM: fillings, Seq2Seq: answers}
    say = ways.get(type(config.objective))
    return [] if say is None else say(trained, count, config)


def answers(trained: Trained, count: int, config: RunConfig) -> list[str]:
    """Held-out sources, what the model makes of them (greedily), and what stands there."""
    tokenizer = trained.tokenizer
    assert tokenizer is not None
    data, length = config.data, config.training.sequence_length
    if not data.fields:
        return []
    read = corpora.documents(data.source, **data.read_as)
    held_out = (d for d in read if corpora.split_of(d, data.validation_share) == "validation")
    found = (pairs.both(d, data.fields) for d in held_out)
    texts = list(itertools.islice((p for p in found if p is not None and len(tokenizer.encode(p[0])) < length), count))
    if not texts:
        return []
    generator = Generator(trained.model, trained.params, tokenizer.eos_ids)
    new = min(length, trained.model.config.context_length - 1)
    done = generator.generate([tokenizer.encode_source(a) for a, _ in texts], new, jax.random.key(0))
    begin, end = _marks()
    return [f"{a}\n{begin}{tokenizer.decode(d.tokens)}{end}\n{b}" for (a, b), d in zip(texts, done, strict=True)]


def fillings(trained: Trained, count: int, config: RunConfig, length: int = 48) -> list[str]:
    """Held-out text with every eighth piece hidden: the model's guess, and behind a slash the truth where it erred."""
    tokenizer = trained.tokenizer
    assert tokenizer is not None
    objective: Any = config.objective.for_run(1, config.model, tokenizer.role("mask"))
    length = min(length, trained.model.config.context_length - 2)
    out = []
    for prompt in _beginnings(config, count):
        truth = tokenizer.encode(prompt)[:length]
        ids = np.array([[tokenizer.role("cls"), *truth, tokenizer.role("sep")]])
        hidden = np.arange(4, len(truth), 8)
        ids[0, 1 + hidden] = objective.mask_id
        best = fill(trained.model, trained.params, ids, np.ones_like(ids))[0].argmax(-1)
        begin, end = _marks()
        pieces = []
        for i, index in enumerate(truth):
            guess = int(best[1 + i])
            wrong = f"/{tokenizer.token(index)}" if guess != index else ""
            pieces.append(f"{begin}{tokenizer.token(guess)}{wrong}{end}" if i in hidden else tokenizer.token(index))
        out.append(" ".join(pieces))
    return out


def continuations(trained: Trained, count: int, config: RunConfig, length: int = 96) -> list[str]:
    """Samples that continue the beginnings of held-out documents (of training ones where none is held out).

    What is sampled is bold on a terminal, and behind a triangle elsewhere.
    """
    tokenizer = trained.tokenizer
    assert tokenizer is not None
    prompts = _beginnings(config, count)
    if not prompts:
        return []
    room = trained.model.config.context_length
    new = min(length, room // 2)
    first = tokenizer.rule.begin
    ids = [[*first, *tokenizer.encode(p)[-(room - new - len(first)) :]] for p in prompts]
    sampler = SamplingConfig(temperature=0.7, top_p=0.9)
    generator = Generator(trained.model, trained.params, tokenizer.eos_ids, sampler)
    results = generator.generate(ids, new, jax.random.key(config.training.seed))
    begin, end = _marks()
    said = [Continuation(tokenizer.decode, p).text(r.tokens) for p, r in zip(ids, results, strict=True)]
    return [f"{tokenizer.decode(p)}{begin}{text}{end}" for p, text in zip(ids, said, strict=True)]
