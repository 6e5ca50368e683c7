"""Beam search as one compiled loop, for decoders and encoder-decoders.

The rules are those of transformers' `generate(num_beams=...)`: of the 2 W best continuations those among the first W
that end are stored with their normalised scores, the W best of the others run on, and a prompt is done by one of three
rules. A sequence's score is its log-probability divided by a penalty of its *generated* length, its end included.
The source of an encoder-decoder is read once and its keys stand once, whatever W is; beams that change places move no
keys (`nn.cache`).

Sources: Sutskever et al. 2014, https://arxiv.org/abs/1409.3215; Wu et al. 2016, section 7 (the penalty), Vaswani et al.
2017, section 6.1 (W = 4, a = 0.6), https://arxiv.org/abs/1609.08144, https://arxiv.org/abs/1706.03762.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike

from llm_jax.decoding import prefill
from llm_jax.decoding.finite import check_finite
from llm_jax.decoding.serving import Serving
from llm_jax.decoding.top_k import top_k, whole_blocks
from llm_jax.delta import bank
from llm_jax.nn.cache import Cache
from llm_jax.nn.protocols import Model, Params

NOTHING = -1e9  # score of a beam that holds nothing, as in transformers
PENALTIES = ("length", "gnmt")


@dataclasses.dataclass(frozen=True)
class BeamConfig:
    """Options of a beam search.

    Attributes:
      beams: W; 1 is greedy.
      length_penalty: a; above 0 favours long outputs, below 0 short ones.
      penalty: `length` divides scores by length ** a (transformers), `gnmt` by ((5 + length) / 6) ** a (the papers).
      early_stopping: a prompt is done when W outputs have ended and: True, at once; False, no running beam would beat
        the worst of them if it ended now (the default of transformers); `never`, none can beat it at all (the bound
        assumes the longest output where a > 0 and that no probability exceeds 1).
      min_new_tokens: tokens generated at least before an end.
      first_token: forced at the beginning (the target language of multilingual models), None for none.
      last_token: forced at the last position, None for none.
      banned: entries that are never generated, beside those that the model's config bans.
    """

    beams: int = 4
    length_penalty: float = 1.0
    penalty: str = "length"
    early_stopping: bool | str = False
    min_new_tokens: int = 0
    first_token: int | None = None
    last_token: int | None = None
    banned: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Checks names and ranges."""
        if self.beams < 1:
            raise ValueError(f"beams={self.beams} must be at least 1")
        if self.penalty not in PENALTIES:
            raise ValueError(f"penalty={self.penalty!r} is not one of {', '.join(PENALTIES)}")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(f"early_stopping={self.early_stopping!r} is not one of True, False, 'never'")
        if self.min_new_tokens < 0:
            raise ValueError(f"min_new_tokens={self.min_new_tokens} must not be negative")

    def divisor(self, length: float | jax.Array) -> float | jax.Array:
        """The penalty of a length: what a log-probability is divided by."""
        base = length if self.penalty == "length" else (5.0 + length) / 6.0
        return base**self.length_penalty


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """An output of a beam search.

    Attributes:
      tokens: generated ids, the stop token not included.
      score: normalised log-probability, its end included.
      logprob: log-probability before normalisation, its end included.
      finish_reason: `stop` or `length`.
    """

    tokens: list[int]
    score: float
    logprob: float
    finish_reason: str


class _Beams(struct.PyTreeNode):
    """Sequences `[B, W, N]`, their scores and lengths `[B, W]`."""

    tokens: jax.Array
    score: jax.Array
    length: jax.Array

    def take(self, index: jax.Array) -> "_Beams":
        def pick(x: jax.Array) -> jax.Array:
            return jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)

        return jax.tree.map(pick, self)

    def best(self, count: int) -> "_Beams":
        return self.take(jax.lax.top_k(self.score, count)[1])


class _State(struct.PyTreeNode):
    """Between two tokens: running beams with the cache behind them, ended ones, and which prompts are open."""

    cache: Cache
    token_BW: jax.Array
    running: _Beams
    ended: _Beams
    open_B: jax.Array
    step: jax.Array
    stuck: jax.Array


class BeamSearch(Serving):
    """A model ready to search: its parameters laid out for decoding, and one compiled function a shape.

    Attributes:
      config: how to search.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        stop_tokens: Sequence[int] = (),
        config: BeamConfig = BeamConfig(),
        context_length: int | None = None,
        cache_dtype: DTypeLike = jnp.float32,
    ) -> None:
        """Prepares; compiles on first use. Arguments are those of `Serving`, and `config`.

        Raises:
          ValueError: as `Serving`, and if a stop, forced or banned token is not an entry of the vocabulary.
        """
        forced = [t for t in (config.first_token, config.last_token) if t is not None]
        super().__init__(model, params, stop_tokens, context_length, cache_dtype)
        for token in (*stop_tokens, *config.banned, *forced):
            if not 0 <= token < model.config.vocab_size:
                raise ValueError(f"token {token} lies outside of the vocabulary of {model.config.vocab_size}")
        self.config, self.banned = config, (*config.banned, *self.banned)
        self._search = jax.jit(self._run, static_argnames=("slots", "new"))

    def _best(self, logits: jax.Array, count: int, step: jax.Array, limit: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Log-probabilities and tokens, `[rows, count]`, of each row's best, after bans and forced tokens."""
        c = self.config
        # by columns, as few rows leave the last product on a CPU; the barrier keeps XLA from transposing them once a
        # reader
        logits_VR = jax.lax.optimization_barrier(whole_blocks(logits.T))
        total = jax.nn.logsumexp(logits_VR, axis=0)

        def rows_of(tokens: Sequence[int]) -> jax.Array:
            return jnp.asarray(prefill.entries(logits_VR.shape[0], tokens))[:, None]

        banned = rows_of(self.banned)
        if c.min_new_tokens and self.stop_tokens:
            banned |= rows_of(self.stop_tokens) & (step < c.min_new_tokens)
        logits_VR = jnp.where(banned, -jnp.inf, logits_VR)
        for forced, when in ((c.first_token, step == 0), (c.last_token, step == limit - 1)):
            if forced is not None:  # transformers gives it log-probability 0
                logits_VR = jnp.where(when, jnp.where(rows_of([forced]), total, -jnp.inf), logits_VR)
        best, token = top_k(logits_VR, count)
        return best - total[:, None], token

    def _select(self, state: _State, logits: jax.Array, limit: jax.Array) -> tuple[_State, jax.Array]:
        """Chooses continuations: the state with the next tokens, and the beams that they continue, `[B, W]`."""
        c = self.config
        b, w, _ = state.running.tokens.shape
        entries = logits.shape[-1]
        count = min(w * (1 + max(1, len(self.stop_tokens))), w * entries)
        of_beam = min(count, entries)  # the best of every beam hold the best of all
        score, token = (x.reshape(b, w, of_beam) for x in self._best(logits, of_beam, state.step, limit))
        score = (score + state.running.score[:, :, None]).reshape(b, -1)
        score, index = jax.lax.top_k(score, count)
        beam, token = index // of_beam, jnp.take_along_axis(token.reshape(b, -1), index, axis=1)
        length = state.step + 1
        candidates = state.running.take(beam)
        tokens = candidates.tokens.at[:, :, state.step].set(token)
        lengths = jnp.full((b, count), length, jnp.int32)

        ends = jnp.isin(token, jnp.asarray(self.stop_tokens, jnp.int32)) if self.stop_tokens else token < 0
        ends |= length >= limit
        unended = _Beams(tokens, jnp.where(ends, score + NOTHING, score), lengths)
        chosen = jax.lax.top_k(unended.score, w)[1]
        running = unended.take(chosen)
        parent = jnp.take_along_axis(beam, chosen, axis=1)

        full = jnp.all(state.ended.length > 0, axis=1, keepdims=True)
        may_end = ends & (jnp.arange(count) < w)[None, :] & state.open_B[:, None] & (score > NOTHING / 2)
        if c.early_stopping is True:
            may_end &= ~full
        new = _Beams(tokens, jnp.where(may_end, score / c.divisor(length), NOTHING), jnp.where(may_end, lengths, 0))
        ended = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), state.ended, new).best(w)

        longest = limit if c.early_stopping == "never" and c.length_penalty > 0 else length
        best_possible = running.score[:, :1] / c.divisor(longest)
        worst = jnp.where(ended.length > 0, jnp.min(ended.score, axis=1, keepdims=True), NOTHING)
        next_state = state.replace(
            token_BW=jnp.take_along_axis(token, chosen, axis=1),
            running=running,
            ended=ended,
            open_B=state.open_B & jnp.any(best_possible > worst, axis=1),
            step=length,
            stuck=jnp.all(ends),
        )
        return next_state, parent

    def _unfinished(self, state: _State) -> jax.Array:
        full = jnp.all(state.ended.length > 0) & (self.config.early_stopping is True)
        return jnp.any(state.open_B) & ~full & ~state.stuck

    def _run(
        self, params: Params, ids_BT: jax.Array, mask_BT: jax.Array, limit: jax.Array, *, slots: int, new: int
    ) -> _Beams:
        """The ended beams of every prompt, the best first."""
        b, w = ids_BT.shape[0], self.config.beams
        logits, cache = prefill.begin(self.model, params, ids_BT, mask_BT, slots, self.cache_dtype)
        tokens, lengths = jnp.zeros((b, w, new), jnp.int32), jnp.zeros((b, w), jnp.int32)
        # all beams begin alike: one of them counts
        first = jnp.broadcast_to(jnp.where(jnp.arange(w) > 0, NOTHING, 0.0), (b, w))
        state = _State(
            cache=cache,
            token_BW=jnp.zeros((b, w), jnp.int32),
            running=_Beams(tokens, first, lengths),
            ended=_Beams(tokens, jnp.full((b, w), NOTHING), lengths),
            open_B=jnp.ones(b, bool),
            step=jnp.int32(0),
            stuck=jnp.bool_(False),
        )
        state, _ = self._select(state, jnp.repeat(logits, w, axis=0), limit)
        state = state.replace(cache=cache.widen(w))
        params = bank.repeated(params, w)

        def step(state: _State) -> _State:
            token = state.token_BW.reshape(-1, 1)
            logits, cache = prefill.go_on(self.model, params, token, jnp.ones_like(token, bool), state.cache)
            state, parent = self._select(state, logits, limit)
            return state.replace(cache=cache.follow(parent))

        return jax.lax.while_loop(self._unfinished, step, state).ended

    def search(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, num_return: int = 1
    ) -> list[list[Hypothesis]]:
        """The best outputs of every prompt, the best first.

        Args:
          prompts: token ids, one list a row, of any lengths; sources of an encoder-decoder.
          max_new_tokens: tokens generated at most, an end included.
          num_return: outputs a prompt, at most W (fewer where fewer are possible).

        Raises:
          ValueError: if a prompt is empty or too long, `num_return` exceeds W, or `max_new_tokens` is below 1.
        """
        w = self.config.beams
        if not 1 <= num_return <= w:
            raise ValueError(f"num_return={num_return} must lie in 1..beams={w}")
        if max_new_tokens < 1 or max_new_tokens < self.config.min_new_tokens:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1 and min_new_tokens")
        limits = [max_new_tokens] * len(prompts)
        ids, mask, slots, new = prefill.lay_out(self.model, prompts, limits, self.context_length)
        ended = jax.device_get(self._search(self.params, ids, mask, np.int32(max_new_tokens), slots=slots, new=new))
        found = ended.length[:, :num_return] > 0
        # comparisons with NaN are false: no beam of such a prompt ever ends
        check_finite("the best scores of the prompts", np.where(found[:, 0], ended.score[:, 0], np.nan))
        return [
            [self._hypothesis(ended, row, beam) for beam in range(num_return) if ended.length[row, beam]]
            for row in range(len(prompts))
        ]

    def _hypothesis(self, ended: _Beams, row: int, beam: int) -> Hypothesis:
        length, score = int(ended.length[row, beam]), float(ended.score[row, beam])
        tokens = ended.tokens[row, beam, :length].tolist()
        stopped = tokens[-1] in self.stop_tokens
        logprob = score * float(self.config.divisor(length))
        return Hypothesis(tokens[:-1] if stopped else tokens, score, logprob, "stop" if stopped else "length")
