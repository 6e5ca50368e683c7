"""Pipeline schedules as data: which device does what at which tick.

L layers are cut into p * v pieces; device d holds pieces d, d + p, d + 2p, ... (v of them, its chunks). A batch is cut
into m micro-batches. The work items are

    F  forward of one micro-batch through one piece
    B  backward; where weight gradients are split off, of the inputs only
    W  the weight gradients of that piece and micro-batch

F of piece k needs F of piece k - 1, B needs F of its own piece and B of piece k + 1, W needs its B. A schedule is an
order of items for every device; ticks follow from it. Devices exchange at the end of every tick, so a tick lasts as
long as its slowest device: where in one some go forward and others back, the first wait. Eager 1F1B and the interleaved
schedule give a device one F and one B in a tick, so that all do the same.

Sources: Huang et al. 2019 (GPipe), https://arxiv.org/abs/1811.06965; Narayanan et al. 2021 (1F1B, interleaved),
https://arxiv.org/abs/2104.04473; Zhuang et al. 2023 (eager 1F1B), https://arxiv.org/abs/2211.05322; Qi et al. 2023
(zero bubble: ZB-H1), https://arxiv.org/abs/2401.10241.
"""

import dataclasses
import itertools
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

NAMES = ("gpipe", "1f1b", "eager_1f1b", "interleaved", "zero_bubble")
KINDS = "FBW"  # the order within a tick
COSTS = {"F": 1.0, "B": 1.0, "W": 1.0}


class Item(NamedTuple):
    """A piece of work.

    Attributes:
      kind: F, B or W.
      micro: number of its micro-batch.
      chunk: number of its piece among the device's.
    """

    kind: str
    micro: int
    chunk: int


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What every device does.

    Attributes:
      name: one of `NAMES`.
      stages: p, devices.
      micros: m, micro-batches.
      chunks: v, pieces a device.
      ticks: for every tick, for every device, its items: at most one of each kind, in the order of `KINDS`.
    """

    name: str
    stages: int
    micros: int
    chunks: int
    ticks: tuple[tuple[tuple[Item, ...], ...], ...]

    @property
    def splits(self) -> bool:
        """Whether weight gradients are items of their own."""
        return self.name == "zero_bubble"

    def items(self) -> Iterator[tuple[int, int, int, Item]]:
        """Yields (tick, device, piece, item) in order of ticks."""
        for t, tick in enumerate(self.ticks):
            for device, items in enumerate(tick):
                for item in items:
                    yield t, device, item.chunk * self.stages + device, item

    def bubble(self) -> float:
        """Share of the devices' time at which nothing is done, if all items take as long."""
        whole = self.span() * self.stages
        return (whole - sum(1 for _ in self.items())) / whole

    def live(self) -> list[int]:
        """For every device the largest number of (micro-batch, chunk) whose inputs it holds at once.

        An input is held from its F to the last item that needs it: its B, or W where that is split off.
        """
        last = "W" if self.splits else "B"
        live, peaks = [0] * self.stages, [0] * self.stages
        for _, device, _, item in self.items():
            live[device] += item.kind == "F"
            peaks[device] = max(peaks[device], live[device])
            live[device] -= item.kind == last
        return peaks

    def times(self, costs: Mapping[str, float] = COSTS) -> list[list[tuple[float, float, Item]]]:
        """When every device does what, if items take `costs` and nobody waits but for what an item needs."""
        ends: dict[tuple[int, int, str], float] = {}
        free = [0.0] * self.stages
        out: list[list[tuple[float, float, Item]]] = [[] for _ in range(self.stages)]
        for _, device, piece, item in self.items():
            begin = max([free[device], *(ends[n] for n in _needs(item, piece, self.stages * self.chunks))])
            free[device] = ends[piece, item.micro, item.kind] = begin + costs[item.kind]
            out[device].append((begin, free[device], item))
        return out

    def span(self, costs: Mapping[str, float] = COSTS) -> float:
        """Time until the last device is done, with `costs` per kind of item."""
        return max(row[-1][1] for row in self.times(costs))

    def lockstep(self, costs: Mapping[str, float] = COSTS) -> float:
        """The same where all devices begin every tick together, as neighbours that exchange at every tick must."""
        return sum(max(sum(costs[i.kind] for i in items) for items in tick) for tick in self.ticks)


def _needs(item: Item, piece: int, pieces: int) -> Iterator[tuple[int, int, str]]:
    if item.kind == "F" and piece:
        yield piece - 1, item.micro, "F"
    if item.kind == "B":
        yield piece, item.micro, "F"
        if piece < pieces - 1:
            yield piece + 1, item.micro, "B"
    if item.kind == "W":
        yield piece, item.micro, "B"


Order = Sequence[tuple[Item, ...]]  # what a device does, one tick's items after the other's


def _gpipe(p: int, m: int, v: int, device: int) -> Order:
    del p, v, device
    return [(Item(kind, i, 0),) for kind in "FB" for i in range(m)]


def _one_forward_one_backward(p: int, m: int, v: int, device: int) -> Order:
    """Warm-up forwards, then a backward after every forward."""
    del v
    ahead = min(p - 1 - device, m)
    out = [(Item("F", i, 0),) for i in range(ahead)]
    for i in range(m - ahead):
        out += [(Item("F", ahead + i, 0),), (Item("B", i, 0),)]
    return out + [(Item("B", i, 0),) for i in range(m - ahead, m)]


def _paired(p: int, m: int, v: int, device: int) -> Order:
    """Twice the warm-up, then a forward and a backward a tick; with chunks, micro-batches in groups of p."""
    total, group = m * v, p * v
    ahead = min(2 * (p - 1 - device) + (v - 1) * p, total)

    def at(kind: str, k: int) -> Item:
        chunk, micro = k % group // p, k // group * p + k % p
        return Item(kind, micro, chunk if kind == "F" else v - 1 - chunk)

    out: list[tuple[Item, ...]] = [(at("F", k),) for k in range(ahead)]
    out += [(at("F", ahead + k), at("B", k)) for k in range(total - ahead)]
    return out + [(at("B", k),) for k in range(total - ahead, total)]


def _zero_bubble(p: int, m: int, v: int, device: int) -> Order:
    """ZB-H1: 1F1B whose weight gradients lag by as many micro-batches as the device is down the pipeline."""
    del v
    ahead = min(p - 1 - device, m)
    out = [Item("F", i, 0) for i in range(ahead)]
    for k in range(m):
        out += [Item("F", k + ahead, 0)] if k + ahead < m else []
        out += [Item("B", k, 0)]
        out += [Item("W", k - device, 0)] if k >= device else []
    out += [Item("W", k, 0) for k in range(max(m - device, 0), m)]
    return [(item,) for item in out]


def _in_order(p: int, v: int, orders: list[Order]) -> tuple[tuple[tuple[Item, ...], ...], ...]:
    """Ticks in which every device does what is next in its order as soon as what it needs is there."""
    done: set[tuple[int, int, str]] = set()
    left = [list(reversed(order)) for order in orders]
    ticks = []
    while any(left):
        tick: list[tuple[Item, ...]] = []
        for device in range(p):
            items = left[device][-1] if left[device] else ()
            together = {(i.chunk * p + device, i.micro, i.kind) for i in items}
            needed = {n for i in items for n in _needs(i, i.chunk * p + device, p * v)}
            tick.append(left[device].pop() if items and needed <= done | together else ())
        if not any(tick):
            raise AssertionError(f"no device can continue: {[order[-1] for order in left if order]}")
        done |= {(i.chunk * p + d, i.micro, i.kind) for d, items in enumerate(tick) for i in items}
        ticks.append(tuple(tick))
    return tuple(ticks)


def make(name: str, stages: int, micros: int, chunks: int = 1) -> Schedule:
    """A schedule.

    Args:
      name: one of `NAMES`.
      stages: p, devices along the pipeline.
      micros: m, micro-batches.
      chunks: v, pieces a device; more than 1 for `interleaved` only.

    Raises:
      ValueError: for an unknown name, or numbers that do not go together.
    """
    if name not in NAMES:
        raise ValueError(f"schedule={name!r} is not one of {', '.join(NAMES)}")
    if stages < 1 or micros < 1 or chunks < 1:
        raise ValueError(f"stages={stages}, micro-batches={micros} and chunks={chunks} must be at least 1")
    if (chunks > 1) != (name == "interleaved"):
        raise ValueError(f"schedule={name} with chunks={chunks}: several chunks a device are what `interleaved` is")
    if name == "interleaved" and micros % stages:
        raise ValueError(
            f"schedule=interleaved needs microbatches that divide by pipe={stages}, not {micros}: "
            f"{max(micros // stages, 1) * stages} works"
        )
    order = {"gpipe": _gpipe, "1f1b": _one_forward_one_backward, "zero_bubble": _zero_bubble}.get(name, _paired)
    orders = [order(stages, micros, chunks, d) for d in range(stages)]
    return Schedule(name, stages, micros, chunks, _in_order(stages, chunks, orders))


def tables(schedule: Schedule) -> dict[str, np.ndarray]:
    """The schedule as arrays `[ticks, p]`.

    `F`, `B` and `W` are 1 where there is such an item, `F_micro`, `F_chunk` and so on name it; `top` is 1 where F,
    `end` where B is of the last piece. `get` is 1 where the device's left neighbour has just made its input
    (`get_micro`, `get_chunk`: for which item), `back` the same for the gradient from the right.
    """
    p, last = schedule.stages, schedule.stages * schedule.chunks - 1
    named = [f"{name}{what}" for name in (*KINDS, "get", "back") for what in ("", "_micro", "_chunk")]
    out = {name: np.zeros((len(schedule.ticks), p), np.int32) for name in (*named, "top", "end")}

    def note(name: str, t: int, device: int, micro: int, chunk: int) -> None:
        out[name][t, device], out[f"{name}_micro"][t, device], out[f"{name}_chunk"][t, device] = 1, micro, chunk

    for t, d, piece, item in schedule.items():
        note(item.kind, t, d, item.micro, item.chunk)
        if item.kind == "F" and piece < last:
            note("get", t, (d + 1) % p, item.micro, (piece + 1) // p)
        if item.kind == "B" and piece:
            note("back", t, (d - 1) % p, item.micro, (piece - 1) // p)
        if piece == last and item.kind in "FB":
            out["top" if item.kind == "F" else "end"][t, d] = 1
    return out


TURNS = ("F", "end", "B", "W")  # what a tick consists of, each done once or not


def turn_shares(schedule: Schedule) -> dict[str, float]:
    """How often a device takes each of a tick's turns, of all ticks; of the device that takes most."""
    table = tables(schedule)
    shares = [{turn: float(table[turn][:, d].mean()) for turn in TURNS} for d in range(schedule.stages)]
    return max(shares, key=lambda row: sum(row.values()))


class Slots(NamedTuple):
    """Slots of every chunk's buffers: micro-batch i lives in slot i modulo their number.

    Attributes:
      inputs: for what a neighbour sends forward, until F.
      layers: for what flows into every layer, from F to the last item that needs it.
      back: for gradients that a neighbour sends back, or what flows out of the last piece, until B.
      split: for gradients of what flows out of every layer, from B to W.
    """

    inputs: int
    layers: int
    back: int
    split: int


def slots(schedule: Schedule) -> Slots:
    """Numbers of buffer slots that a schedule needs."""
    last = schedule.stages * schedule.chunks - 1
    Spans = dict[tuple[int, int], tuple[int, int]]  # by piece and micro-batch, from when to when
    when: dict[str, dict[tuple[int, int], int]] = {kind: {} for kind in KINDS}
    for t, _, piece, item in schedule.items():
        when[item.kind][piece, item.micro] = 4 * t + KINDS.index(item.kind)  # the exchange follows, 3
    sent = lambda kind, piece, micro: when[kind][piece, micro] // 4 * 4 + 3

    def fewest(spans: Spans) -> int:
        for count in range(1, schedule.micros + 1):
            taken: dict[tuple[int, int], list[tuple[int, int]]] = {}
            for (piece, micro), span in spans.items():
                taken.setdefault((piece, micro % count), []).append(span)
            if all(a[1] <= b[0] for row in taken.values() for a, b in itertools.pairwise(sorted(row))):
                return count
        return 1

    until = when["W" if schedule.splits else "B"]
    return Slots(
        fewest({(k, m): (sent("F", k - 1, m), t) for (k, m), t in when["F"].items() if k}),
        fewest({at: (t, until[at]) for at, t in when["F"].items()}),
        fewest({(k, m): (when["F"][k, m] if k == last else sent("B", k + 1, m), t) for (k, m), t in when["B"].items()}),
        fewest({at: (when["B"][at], t) for at, t in when["W"].items()}),
    )


def timeline(schedule: Schedule) -> str:
    """A line a device, a column a tick: `F3`, `b3` and `w3` of micro-batch 3, a letter for the chunk."""

    def cell(items: tuple[Item, ...]) -> str:
        chunk = lambda i: string.ascii_lowercase[i.chunk % 26] if schedule.chunks > 1 else ""
        return "".join(f"{i.kind if i.kind == 'F' else i.kind.lower()}{i.micro}{chunk(i)}" for i in items) or "."

    width = max(len(cell(items)) for tick in schedule.ticks for items in tick) + 1
    rows = ("".join(f"{cell(tick[d]):<{width}}" for tick in schedule.ticks).rstrip() for d in range(schedule.stages))
    return "\n".join(rows)
