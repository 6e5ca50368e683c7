"""Prefill, then one compiled loop with a functional cache.

The loop runs on unstacked parameters: scanning would copy every layer's weights and cache for every token.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike

from llm_jax.decoding import prefill, sampling
from llm_jax.decoding.continuation import Continuation, Decode
from llm_jax.decoding.finite import check_finite
from llm_jax.decoding.sampling import SamplingConfig
from llm_jax.decoding.serving import Serving
from llm_jax.nn.cache import Cache
from llm_jax.nn.protocols import Model, Params

RUNNING, STOP, LENGTH, STOP_STRING = range(4)
REASONS = ("running", "stop", "length", "stop_string")


class DecodeState(struct.PyTreeNode):
    """What decoding carries from one token to the next.

    Attributes:
      cache: keys and values so far.
      logits_BV: float32 logits of the next token.
      tokens_BN: generated tokens, N slots.
      logprobs_BN: their log-probabilities under the model itself, before penalties, temperature and truncation.
      count_B: number of generated tokens.
      limit_B: number of tokens that may be generated.
      reason_B: an index into `REASONS`.
      keys_B: one key a row.
      history_BM: prompt and output, for n-gram blocking; width 0 where it is off.
      prompt_BV: token counts of the prompt; width 0 where no penalty is on.
      output_BV: token counts of the output; width as `prompt_BV`.
      sound_B: whether all log-probabilities so far were finite; a stop token's counts too.
    """

    cache: Cache
    logits_BV: jax.Array
    tokens_BN: jax.Array
    logprobs_BN: jax.Array
    count_B: jax.Array
    limit_B: jax.Array
    reason_B: jax.Array
    keys_B: jax.Array
    history_BM: jax.Array
    prompt_BV: jax.Array
    output_BV: jax.Array
    sound_B: jax.Array


@dataclasses.dataclass(frozen=True)
class Completion:
    """The output of one row.

    Attributes:
      tokens: generated ids, the stop token not included.
      logprobs: log-probability of each token.
      finish_reason: `stop` (a stop token), `stop_string`, or `length`.
    """

    tokens: list[int]
    logprobs: list[float]
    finish_reason: str


class Generator(Serving):
    """A model ready to generate: its parameters laid out for decoding, and compiled functions.

    Attributes:
      sampling: how tokens are chosen.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        stop_tokens: Sequence[int] = (),
        sampling: SamplingConfig = SamplingConfig(),
        context_length: int | None = None,
        cache_dtype: DTypeLike = jnp.float32,
    ) -> None:
        """Prepares; compiles on first use. Arguments and errors are those of `Serving`, and `sampling`."""
        super().__init__(model, params, stop_tokens, context_length, cache_dtype)
        self.sampling = sampling
        self._start = jax.jit(self._prefill, static_argnames=("slots", "new"))
        self._advance = jax.jit(self._loop, donate_argnames="state")

    def _prefill(
        self,
        params: Params,
        ids_BT: jax.Array,
        mask_BT: jax.Array,
        limit_B: jax.Array,
        key: jax.Array,
        *,
        slots: int,
        new: int,
    ) -> DecodeState:
        logits, cache = prefill.begin(self.model, params, ids_BT, mask_BT, slots, self.cache_dtype)
        ids_BT, mask_BT = prefill.prefix(self.model, ids_BT, mask_BT)
        b, t = ids_BT.shape
        counted = logits.shape[1] if self.sampling.counts_tokens else 0
        prompt = jnp.zeros((b, counted), jnp.int32)
        if counted:
            prompt = prompt.at[jnp.arange(b)[:, None], ids_BT].add(mask_BT.astype(jnp.int32))
        history = jnp.zeros((b, t + new if self.sampling.no_repeat_ngram else 0), jnp.int32)
        if self.sampling.no_repeat_ngram:
            position = jnp.where(mask_BT, jnp.cumsum(mask_BT, axis=1) - 1, t + new)
            history = history.at[jnp.arange(b)[:, None], position].set(ids_BT, mode="drop")
        return DecodeState(
            cache=cache,
            logits_BV=logits,
            tokens_BN=jnp.zeros((b, new), jnp.int32),
            logprobs_BN=jnp.zeros((b, new), jnp.float32),
            count_B=jnp.zeros((b,), jnp.int32),
            limit_B=limit_B,
            reason_B=jnp.where(limit_B > 0, RUNNING, LENGTH).astype(jnp.int32),
            keys_B=jax.random.split(key, b),
            history_BM=history,
            prompt_BV=prompt,
            output_BV=jnp.zeros_like(prompt),
            sound_B=jnp.ones((b,), bool),
        )

    def _loop(self, params: Params, state: DecodeState, steps: jax.Array) -> DecodeState:
        def unfinished(carry: tuple[DecodeState, jax.Array]) -> jax.Array:
            state, done = carry
            return (done < steps) & jnp.any(state.reason_B == RUNNING)

        def step(carry: tuple[DecodeState, jax.Array]) -> tuple[DecodeState, jax.Array]:
            state, done = carry
            return self._step(params, state), done + 1

        return jax.lax.while_loop(unfinished, step, (state, jnp.int32(0)))[0]

    def _step(self, params: Params, state: DecodeState) -> DecodeState:
        c, rows = self.sampling, jnp.arange(state.count_B.shape[0])
        logits = prefill.ban(state.logits_BV, self.banned)
        if c.counts_tokens:
            logits = sampling.penalize(logits, state.prompt_BV, state.output_BV, c)
        if c.no_repeat_ngram:
            logits = sampling.block_ngrams(logits, state.history_BM, state.cache.length_B, c.no_repeat_ngram)
        keys = jax.vmap(jax.random.fold_in)(state.keys_B, state.count_B)
        token = sampling.choose(logits, keys, c)
        logprob = state.logits_BV[rows, token] - jax.nn.logsumexp(state.logits_BV, axis=-1)

        running = state.reason_B == RUNNING
        stops = jnp.isin(token, jnp.asarray(self.stop_tokens, token.dtype))
        grows = running & ~stops
        slot = jnp.where(grows, state.count_B, state.tokens_BN.shape[1])  # past the end: dropped
        count = state.count_B + grows
        reason = jnp.where(running & stops, STOP, state.reason_B)
        reason = jnp.where(grows & (count >= state.limit_B), LENGTH, reason)
        history, output = state.history_BM, state.output_BV
        if c.no_repeat_ngram:
            position = jnp.where(grows, state.cache.length_B, history.shape[1])
            history = history.at[rows, position].set(token, mode="drop")
        if c.counts_tokens:
            output = output.at[rows, token].add(grows.astype(jnp.int32))
        logits, cache = prefill.go_on(self.model, params, token[:, None], grows[:, None], state.cache)
        return state.replace(
            cache=cache,
            logits_BV=logits,
            tokens_BN=state.tokens_BN.at[rows, slot].set(token, mode="drop"),
            logprobs_BN=state.logprobs_BN.at[rows, slot].set(logprob.astype(jnp.float32), mode="drop"),
            count_B=count,
            reason_B=reason,
            history_BM=history,
            output_BV=output,
            sound_B=state.sound_B & (jnp.isfinite(logprob) | ~running),
        )

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        key: jax.Array,
        window: bool = False,
    ) -> DecodeState:
        """Reads the prompts into a fresh cache.

        Args:
          prompts: token ids, one list a row, of any lengths.
          max_new_tokens: for all rows, or one each.
          key: same key, same text.
          window: generate past the context with a sliding window of `context_length` tokens (rotary models).

        Raises:
          ValueError: if a prompt is empty, or prompt and output exceed the context and `window` is off or the model
            has learned positions.
        """
        limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        ids, mask, slots, new = prefill.lay_out(self.model, prompts, limits, self.context_length, window)
        return self._start(self.params, ids, mask, np.asarray(limits, np.int32), key, slots=slots, new=new)

    def advance(self, state: DecodeState, steps: int) -> DecodeState:
        """Generates up to `steps` more tokens in every running row; the state passed in is consumed."""
        return self._advance(self.params, state, np.int32(steps))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        key: jax.Array,
        window: bool = False,
        stop_strings: Sequence[str] = (),
        decode: Decode | None = None,
        chunk: int = 16,
    ) -> list[Completion]:
        """Generates for all prompts.

        Args:
          prompts: token ids.
          max_new_tokens: for all rows, or one each.
          key: same key, same text.
          window: see `start`.
          stop_strings: a row ends where its text behind the prompt contains one of these; checked every `chunk` tokens,
            the tokens behind the match are dropped.
          decode: ids to text, needed for stop strings.
          chunk: tokens between checks.
        """
        if stop_strings and decode is None:
            raise ValueError("stop_strings need decode, the tokenizer's decoder")
        state = self.start(prompts, max_new_tokens, key, window)
        if not stop_strings or decode is None:
            return completions(self.advance(state, 2**30))
        texts = [self._continuation(decode, prompt).text for prompt in prompts]
        while True:
            state = self.advance(state, chunk)
            state, running = self._cut(state, stop_strings, texts)
            if not running:
                return completions(state)

    def _continuation(self, decode: Decode, prompt: Sequence[int], stop_strings: Sequence[str] = ()) -> Continuation:
        """The prompt's continuation; what an encoder-decoder writes continues nothing."""
        return Continuation(decode, () if prefill.is_encoder_decoder(self.model) else prompt, stop_strings)

    def _cut(
        self, state: DecodeState, stop_strings: Sequence[str], texts: Sequence[Callable[[list[int]], str]]
    ) -> tuple[DecodeState, bool]:
        """Ends the rows whose text holds a stop string, and says whether any row still runs."""
        tokens, count, reason = (np.array(x) for x in (state.tokens_BN, state.count_B, state.reason_B))

        def stops(row: int, length: int) -> bool:
            text = texts[row](tokens[row, :length].tolist())
            return any(stop in text for stop in stop_strings)

        for row in range(len(count)):
            if reason[row] != STOP_STRING and stops(row, count[row]):
                count[row] = next(n for n in range(1, count[row] + 1) if stops(row, n))
                reason[row] = STOP_STRING
        state = state.replace(count_B=jnp.asarray(count), reason_B=jnp.asarray(reason))
        return state, bool((reason == RUNNING).any())

    def stream(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        key: jax.Array,
        decode: Decode,
        window: bool = False,
        stop_strings: Sequence[str] = (),
        chunk: int = 1,
        alone: bool = False,
    ) -> Iterator[str]:
        """Yields text as it is generated; the pieces joined are the text behind the prompt, without stop strings.

        Args:
          prompt: token ids.
          max_new_tokens: at most.
          key: same key, same text.
          decode: ids to text; see `Continuation`.
          window: see `start`.
          stop_strings: see `generate`.
          chunk: tokens between pieces.
          alone: the new tokens are a text of their own (an answer in a chat), and do not continue the prompt.
        """
        state = self.start([prompt], max_new_tokens, key, window)
        follow = self._continuation(decode, () if alone else prompt, stop_strings=stop_strings)
        plain = self._continuation(decode, () if alone else prompt)
        while True:
            state = self.advance(state, chunk)
            _check_sound(state)
            if stop_strings:
                state, running = self._cut(state, stop_strings, [plain.text])
            else:
                running = bool(np.asarray(state.reason_B)[0] == RUNNING)
            new = np.asarray(state.tokens_BN)[0, : int(np.asarray(state.count_B)[0])].tolist()
            piece = follow.piece(new, not running)
            if piece:
                yield piece
            if not running:
                return


def _check_sound(state: DecodeState) -> None:
    check_finite("the rows' log-probabilities", np.where(jax.device_get(state.sound_B), 0, np.nan))


def completions(state: DecodeState) -> list[Completion]:
    """Results of a finished state, on the host.

    Raises:
      ValueError: if the model's logits were not finite.
    """
    _check_sound(state)
    tokens, logprobs, count, reason = jax.device_get(
        (state.tokens_BN, state.logprobs_BN, state.count_B, state.reason_B)
    )
    return [
        Completion(tokens[i, :n].tolist(), logprobs[i, :n].tolist(), REASONS[reason[i]]) for i, n in enumerate(count)
    ]
