"""One device of a pipeline: the pieces that it has, what it carries from tick to tick, and what a tick does.

All that a stage keeps from one tick for another lies in buffers that the ticks' loop carries, `[chunks, slots, ...]`,
and is written in place. A tick is four loops of no or one turn: what branches return is copied, what loops carry is
not. It ends with one permutation of activations to the next device and one of their gradients to the previous one.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llm_jax.nn.protocols import Batch, Params, Tree
from llm_jax.parallel.pipeline.cut import (
    Cut,
    Layer,
    by_rows,
    divide,
    pick,
    pin,
    pin_gradient,
    put_at,
    send,
    zeros,
)
from llm_jax.parallel.pipeline.schedules import Schedule, Slots, slots

T = TypeVar("T")
Scored = tuple[jax.Array, dict[str, jax.Array]]  # the loss, and sums of every term
Finish = Callable[[Params, Tree, Tree], Scored]  # (outer, carry, micro-batch): the head and the objective
Row = Mapping[str, jax.Array]  # a tick of `schedules.tables`


class Micros(NamedTuple):
    """What all micro-batches bring, `[M, ...]`.

    Attributes:
      inputs: what flows into the first layer.
      contexts: what all layers see.
      batches: what the head and the objective need.
    """

    inputs: Tree
    contexts: Tree
    batches: Batch


class Work(NamedTuple):
    """An item of a tick's row, on this device.

    Attributes:
      micro: its micro-batch.
      chunk: which of the device's pieces.
      piece: which of all pieces.
    """

    micro: jax.Array
    chunk: jax.Array
    piece: jax.Array

    def slot(self, count: int) -> tuple[jax.Array, jax.Array]:
        """Where it lives in a buffer of `count` slots a chunk."""
        return self.chunk, self.micro % count


class State(NamedTuple):
    """What a device carries from tick to tick: buffers of `schedules.Slots`, then sums of gradients and scores.

    Attributes:
      inputs: what the previous device sends, until F; with a slot that nobody reads.
      layers: what flows into every layer, `[chunks, slots, layers a piece, ...]`, until its last item.
      back: gradients that the next device sends, or what flows out of the last piece, until B; with such a slot too.
      split: gradients of what flows out of every layer, from B to W; empty where the schedule has no W.
      d_layers: of the layers' floating leaves, in float32, `[chunks, layers a piece, ...]`.
      d_outer: of the other parameters' floating leaves, in float32.
      d_inputs: of what flows into the first layer, `[M, ...]`.
      d_contexts: of the contexts' floating leaves, `[M, ...]`.
      scored: loss and scores.
    """

    inputs: Tree
    layers: Tree
    back: Tree
    split: Tree
    d_layers: list[jax.Array]
    d_outer: list[jax.Array]
    d_inputs: Tree
    d_contexts: list[jax.Array]
    scored: Scored


def _once(name: str, happens: jax.Array, body: Callable[[T], T], start: T) -> T:
    """`body(start)` where `happens` is 1, `start` where it is 0."""
    with jax.named_scope(f"turn_{name}"):
        return jax.lax.fori_loop(0, happens, lambda _, state: body(state), start)


def _store(buffer: Tree, new: Tree, work: Work, happens: jax.Array, count: int) -> Tree:
    """The buffer with a new value, in the slot that nobody reads where nothing happens."""
    chunk, slot = work.slot(count)
    return put_at(buffer, new, chunk, jnp.where(happens > 0, slot, count))


@dataclasses.dataclass(frozen=True)
class Stage:
    """The pieces of one device.

    Attributes:
      schedule: what happens when.
      cut: layers and pieces.
      layer: one layer.
      finish: what follows the last layer.
      layers: parameters of its layers, `[chunks, layers a piece, ...]`.
      outer: all other parameters.
      micros: what flows in.
      layer_specs: mesh axes of one layer's gradients, by floating leaves.
      outer_specs: mesh axes of the gradients of `outer`, by floating leaves.
    """

    schedule: Schedule
    cut: Cut
    layer: Layer
    finish: Finish
    layers: Params
    outer: Params
    micros: Micros
    layer_specs: Sequence[P | None]
    outer_specs: Sequence[P | None]

    @functools.cached_property
    def _slots(self) -> Slots:
        return slots(self.schedule)

    def start(self, scored: Tree) -> State:
        """Empty buffers and zero sums.

        Args:
          scored: what `finish` returns, abstract.
        """
        count, each, inputs = self._slots, self.cut.each, self.micros.inputs

        def room(*sizes: int) -> Tree:
            return jax.tree.map(lambda x: jnp.zeros((self.schedule.chunks, *sizes, *x.shape[1:]), x.dtype), inputs)

        d_layers = zeros(divide(self.layers)[0], jnp.float32)
        d_outer = zeros(divide(self.outer)[0], jnp.float32)
        return State(
            inputs=room(count.inputs + 1),
            layers=room(count.layers, each),
            back=room(count.back + 1),
            split=room(count.split, each) if self.schedule.splits else (),
            d_layers=[pin(x, spec, 2) for x, spec in zip(d_layers, self.layer_specs, strict=True)],
            d_outer=[pin(x, spec) for x, spec in zip(d_outer, self.outer_specs, strict=True)],
            d_inputs=zeros(inputs),
            d_contexts=zeros(divide(self.micros.contexts)[0]),
            scored=zeros(scored),
        )

    def tick(self, state: State, row: Row) -> tuple[State, None]:
        """F, the head, B and W, each once or not, and the exchange with both neighbours."""
        p, device = self.schedule.stages, jax.lax.axis_index("pipe")
        at = {name: x[device] for name, x in row.items()}

        def work(name: str) -> Work:
            chunk = at[f"{name}_chunk"]
            return Work(at[f"{name}_micro"], chunk, chunk * p + device)

        y, state = self.forward(state, at, work("F"))
        dy, state = self.end(state, at, work("B"))
        dx, state = self.backward(state, at, work("B"), dy)
        if self.schedule.splits:
            state = self.weights(state, at, work("W"))
        onward = [(i, (i + 1) % p) for i in range(p)]
        y, dx = send(by_rows(y), onward), send(by_rows(dx), [(to, sender) for sender, to in onward])
        inputs = _store(state.inputs, y, work("get"), at["get"], self._slots.inputs)
        back = _store(state.back, dx, work("back"), at["back"], self._slots.back)
        return state._replace(inputs=inputs, back=back), None

    def forward(self, state: State, at: Row, work: Work) -> tuple[Tree, State]:
        """F: what flows out of a piece; keeps what flows into its layers."""
        context, slot = pick(self.micros.contexts, work.micro), work.slot(self._slots.layers)
        sent, first = pick(state.inputs, *work.slot(self._slots.inputs)), work.piece == 0
        x = jax.tree.map(lambda a, b: jnp.where(first, a, b), pick(self.micros.inputs, work.micro), sent)

        def layer(carried: tuple[Tree, Tree], j: jax.Array) -> tuple[tuple[Tree, Tree], None]:
            x, buffer = carried
            y = self._apply(work, j, pick(self.layers, work.chunk, j), x, context)
            return (y, put_at(buffer, x, *slot, j)), None

        y, layers = self._turn("F", at, layer, (by_rows(x), state.layers))
        back = _store(state.back, by_rows(y), work, at["top"], self._slots.back)
        return y, state._replace(layers=layers, back=back)

    def end(self, state: State, at: Row, work: Work) -> tuple[Tree, State]:
        """The gradient that B begins with; of the last piece the head and the objective give it, forward and back."""
        dy, batch = by_rows(pick(state.back, *work.slot(self._slots.back))), pick(self.micros.batches, work.micro)
        outer_f, outer_of = divide(self.outer)

        def head(carried: tuple[Tree, list[jax.Array], Scored]) -> tuple[Tree, list[jax.Array], Scored]:
            y, d_outer, total = carried
            finish = lambda y, outer: self.finish(outer_of(outer), y, batch)
            loss, pull, scores = jax.vjp(finish, y, outer_f, has_aux=True)
            dy, more = pull(jnp.ones((), jnp.float32))
            pairs = zip(d_outer, more, self.outer_specs, strict=True)
            d_outer = [a + pin_gradient(g.astype(a.dtype), spec) for a, g, spec in pairs]
            return dy, d_outer, jax.tree.map(jnp.add, total, (loss, scores))

        dy, d_outer, scored = _once("end", at["end"], head, (dy, state.d_outer, state.scored))
        return dy, state._replace(d_outer=d_outer, scored=scored)

    def backward(self, state: State, at: Row, work: Work, dy: Tree) -> tuple[Tree, State]:
        """B: the gradient of what flowed into a piece; adds those of parameters, or keeps what W needs."""
        context_f, context_of = divide(pick(self.micros.contexts, work.micro))
        slot, to = work.slot(self._slots.layers), work.slot(self._slots.split)

        def whole(carried: tuple[Tree, list, list], j: jax.Array) -> tuple[tuple[Tree, list, list], None]:
            dy, d_context, d_layers = carried
            layer_f, layer_of = divide(pick(self.layers, work.chunk, j))
            apply = lambda p, x, c: self._apply(work, j, layer_of(p), x, context_of(c))
            d_layer, dx, more = jax.vjp(apply, layer_f, pick(state.layers, *slot, j), context_f)[1](dy)
            return (dx, jax.tree.map(jnp.add, d_context, more), self._add(d_layers, d_layer, work, j)), None

        def of_inputs(carried: tuple[Tree, list, Tree], j: jax.Array) -> tuple[tuple[Tree, list, Tree], None]:
            dy, d_context, split = carried
            params = pick(self.layers, work.chunk, j)
            apply = lambda x, c: self._apply(work, j, params, x, context_of(c))
            dx, more = jax.vjp(apply, pick(state.layers, *slot, j), context_f)[1](dy)
            return (dx, jax.tree.map(jnp.add, d_context, more), put_at(split, dy, *to, j)), None

        name, layer = ("split", of_inputs) if self.schedule.splits else ("d_layers", whole)
        start = dy, zeros(context_f), getattr(state, name)
        dx, d_context, buffer = self._turn("B", at, layer, start, reverse=True)

        def add(sums: Tree, more: Tree) -> Tree:
            return jax.tree.map(lambda a, b: a.at[work.micro].add(b.astype(a.dtype)), sums, more)

        enters = (work.piece == 0) & (at["B"] > 0)  # a turn that did not happen leaves the dy that it was given
        d_inputs = add(state.d_inputs, jax.tree.map(lambda g: jnp.where(enters, g, 0), dx))
        d_contexts = add(state.d_contexts, d_context)
        return dx, state._replace(**{name: buffer}, d_inputs=d_inputs, d_contexts=d_contexts)

    def weights(self, state: State, at: Row, work: Work) -> State:
        """W: adds the gradients of a piece's parameters, from what B has kept."""
        context = pick(self.micros.contexts, work.micro)
        slot, kept_at = work.slot(self._slots.layers), work.slot(self._slots.split)

        def layer(d_layers: list[jax.Array], j: jax.Array) -> tuple[list[jax.Array], None]:
            layer_f, layer_of = divide(pick(self.layers, work.chunk, j))
            x, dy = pick(state.layers, *slot, j), pick(state.split, *kept_at, j)
            apply = lambda p: self._apply(work, j, layer_of(p), x, context)
            return self._add(d_layers, jax.vjp(apply, layer_f)[1](dy)[0], work, j), None

        return state._replace(d_layers=self._turn("W", at, layer, state.d_layers))

    def _turn(self, kind: str, at: Row, layer: Callable[..., tuple[T, None]], start: T, reverse: bool = False) -> T:
        """A piece's layers one after the other, where the row has such an item."""
        each = jnp.arange(self.cut.each)
        return _once(kind, at[kind], lambda state: jax.lax.scan(layer, state, each, reverse=reverse)[0], start)

    def _apply(self, work: Work, j: jax.Array, params: Params, x: Tree, context: Tree) -> Tree:
        """Layer j of a piece."""
        return self.layer(params, work.piece * self.cut.each + j, x, context)

    def _add(self, sums: list[jax.Array], more: list[jax.Array], work: Work, j: jax.Array) -> list[jax.Array]:
        """The sums with the gradients of a piece's layer j."""
        triples = zip(sums, more, self.layer_specs, strict=True)
        return [a.at[work.chunk, j].add(pin_gradient(g.astype(a.dtype), spec)) for a, g, spec in triples]
