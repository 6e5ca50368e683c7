"""Pipeline schedules as data: which device does what at which tick.

L layers are cut into p * v pieces; device d holds pieces d, d + p, d + 2p, ... (v of them, its chunks). A batch is cut
into m micro-batches. The work items are

    F  forward of one micro-batch through one piece
    B  backward; where weight gradients are split off, of the inputs only
    W  the weight gradients of that piece and micro-batch

F of piece k needs F of piece k - 1, B needs F of its own piece and B of piece k + 1, W needs its B. A schedule is an
order of items for every device; ticks follow from it.

Sources: Huang et al. 2019 (GPipe), https://arxiv.org/abs/1811.06965; Narayanan et al. 2021 (1F1B, interleaved),
https://arxiv.org/abs/2104.04473; Qi et al. 2023 (zero bubble: ZB-H1), https://arxiv.org/abs/2401.10241.
"""

import dataclasses
import string
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

NAMES = ("gpipe", "1f1b", "interleaved", "zero_bubble")
COSTS = {"F": 1.0, "B": 1.0, "W": 1.0}


class Item(NamedTuple):
    """A piece of work.

    Attributes:
      kind: F, B or W.
      micro: micro-batch.
      chunk: which of the device's pieces.
    """

    kind: str
    micro: int
    chunk: int


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What every device does.

    Attributes:
      name: of `NAMES`.
      stages: p, devices.
      micros: m, micro-batches.
      chunks: v, pieces a device.
      ticks: for every tick, for every device, an item or None.
    """

    name: str
    stages: int
    micros: int
    chunks: int
    ticks: tuple[tuple[Item | None, ...], ...]

    @property
    def splits(self) -> bool:
        """Whether weight gradients are items of their own."""
        return self.name == "zero_bubble"

    def bubble(self) -> float:
        """Share of all device ticks at which nothing is done."""
        idle = sum(item is None for tick in self.ticks for item in tick)
        return idle / (len(self.ticks) * self.stages)

    def live(self) -> list[int]:
        """For every device the largest number of (micro-batch, chunk) whose inputs it holds at once.

        An input is held from its F to the last item that needs it: its B, or W where that is split off.
        """
        last = "W" if self.splits else "B"
        peaks = []
        for device in range(self.stages):
            held, peak = 0, 0
            for tick in self.ticks:
                item = tick[device]
                held += item is not None and item.kind == "F"
                peak = max(peak, held)
                held -= item is not None and item.kind == last
            peaks.append(peak)
        return peaks

    def times(self, costs: Mapping[str, float] = COSTS) -> list[list[tuple[float, float, Item]]]:
        """When every device does what, if items take `costs` and nobody waits but for what an item needs."""
        ends: dict[tuple[int, int, str], float] = {}
        free = [0.0] * self.stages
        out: list[list[tuple[float, float, Item]]] = [[] for _ in range(self.stages)]
        for tick in self.ticks:
            for device, item in enumerate(tick):
                if item is None:
                    continue
                piece = item.chunk * self.stages + device
                begin = max([free[device], *(ends[n] for n in _needs(item, piece, self.stages * self.chunks))])
                free[device] = ends[piece, item.micro, item.kind] = begin + costs[item.kind]
                out[device].append((begin, free[device], item))
        return out

    def span(self, costs: Mapping[str, float] = COSTS) -> float:
        """When the last device is done."""
        return max(row[-1][1] for row in self.times(costs))

    def lockstep(self, costs: Mapping[str, float] = COSTS) -> float:
        """The same where all devices begin every tick together, as neighbours that exchange at every tick must."""
        return sum(max((costs[i.kind] for i in tick if i is not None), default=0.0) for tick in self.ticks)


def _needs(item: Item, piece: int, pieces: int) -> Iterator[tuple[int, int, str]]:
    if item.kind == "F" and piece:
        yield piece - 1, item.micro, "F"
    if item.kind == "B":
        yield piece, item.micro, "F"
        if piece < pieces - 1:
            yield piece + 1, item.micro, "B"
    if item.kind == "W":
        yield piece, item.micro, "B"


def _gpipe(p: int, m: int, v: int, device: int) -> list[Item]:
    del p, v, device
    return [Item("F", i, 0) for i in range(m)] + [Item("B", i, 0) for i in range(m)]


def _one_forward_one_backward(p: int, m: int, v: int, device: int) -> list[Item]:
    """Warm-up forwards, then a backward after every forward; with chunks, micro-batches go in groups of p."""
    total = m * v
    ahead = p - 1 - device if v == 1 else 2 * (p - 1 - device) + (v - 1) * p
    ahead = min(ahead, total)
    group = p * v

    def at(k: int, forward: bool) -> Item:
        chunk = k % group // p
        return Item("F" if forward else "B", k // group * p + k % p, chunk if forward else v - 1 - chunk)

    if v == 1:
        forwards, backwards = ([Item(kind, i, 0) for i in range(m)] for kind in "FB")
    else:
        forwards = [at(k, True) for k in range(total)]
        backwards = [at(k, False) for k in range(total)]
    out = forwards[:ahead]
    for k in range(total - ahead):
        out += [forwards[ahead + k], backwards[k]]
    return out + backwards[total - ahead :]


def _in_order(p: int, v: int, orders: list[list[Item]]) -> tuple[tuple[Item | None, ...], ...]:
    """Ticks in which every device does the next item of its order as soon as what it needs is there."""
    done: set[tuple[int, int, str]] = set()
    left = [list(reversed(order)) for order in orders]
    ticks = []
    while any(left):
        tick: list[Item | None] = []
        for device in range(p):
            item = left[device][-1] if left[device] else None
            piece = 0 if item is None else item.chunk * p + device
            ready = item is not None and all(n in done for n in _needs(item, piece, p * v))
            tick.append(left[device].pop() if ready else None)
        if not any(tick):
            raise AssertionError(f"no device can go on: {[order[-1] for order in left if order]}")
        done |= {(i.chunk * p + d, i.micro, i.kind) for d, i in enumerate(tick) if i is not None}
        ticks.append(tuple(tick))
    return tuple(ticks)


def _zero_bubble(p: int, m: int, v: int, device: int) -> list[Item]:
    """ZB-H1: 1F1B whose weight gradients lag by as many micro-batches as the device is down the pipeline."""
    del v
    ahead = min(p - 1 - device, m)
    out = [Item("F", i, 0) for i in range(ahead)]
    for k in range(m):
        out += [Item("F", k + ahead, 0)] if k + ahead < m else []
        out += [Item("B", k, 0)]
        out += [Item("W", k - device, 0)] if k >= device else []
    return out + [Item("W", k, 0) for k in range(max(m - device, 0), m)]


def make(name: str, stages: int, micros: int, chunks: int = 1) -> Schedule:
    """A schedule.

    Args:
      name: of `NAMES`.
      stages: p, devices along the pipeline.
      micros: m, micro-batches.
      chunks: v, pieces a device; more than 1 for `interleaved` only.

    Raises:
      ValueError: for an unknown name, or numbers that do not go together.
    """
    if name not in NAMES:
        raise ValueError(f"schedule={name!r} is none of {', '.join(NAMES)}")
    if stages < 1 or micros < 1 or chunks < 1:
        raise ValueError(f"stages={stages}, micro-batches={micros} and chunks={chunks} must be at least 1")
    if (chunks > 1) != (name == "interleaved"):
        raise ValueError(f"schedule={name} with chunks={chunks}: several chunks a device are what `interleaved` is")
    if name == "interleaved" and micros % stages:
        raise ValueError(
            f"schedule=interleaved needs microbatches that divide by pipe={stages}, not {micros}: "
            f"{max(micros // stages, 1) * stages} works"
        )
    order = {"gpipe": _gpipe, "zero_bubble": _zero_bubble}.get(name, _one_forward_one_backward)
    orders = [order(stages, micros, chunks, d) for d in range(stages)]
    return Schedule(name, stages, micros, chunks, _in_order(stages, chunks, orders))


def tables(schedule: Schedule) -> dict[str, np.ndarray]:
    """The schedule as arrays `[ticks, p]`.

    `op` is 0 idle, 1 F, 2 B, 3 W, and 4, 5, 6 the same on the last piece. `micro` and `chunk` name the item. `get` is 1
    where the device's left neighbour has just made its input (`get_micro`, `get_chunk`: for which item), `back` the
    same for the gradient from the right.
    """
    p, last = schedule.stages, schedule.stages * schedule.chunks - 1
    names = ("op", "micro", "chunk", "get", "get_micro", "get_chunk", "back", "back_micro", "back_chunk")
    out = {name: np.zeros((len(schedule.ticks), p), np.int32) for name in names}
    for t, tick in enumerate(schedule.ticks):
        for d, item in enumerate(tick):
            if item is None:
                continue
            piece = item.chunk * p + d
            out["op"][t, d] = "FBW".index(item.kind) + 1 + 3 * (piece == last)
            out["micro"][t, d], out["chunk"][t, d] = item.micro, item.chunk
            if item.kind == "F" and piece < last:
                to, chunk = (d + 1) % p, (piece + 1) // p
                out["get"][t, to], out["get_micro"][t, to], out["get_chunk"][t, to] = 1, item.micro, chunk
            if item.kind == "B" and piece:
                to, chunk = (d - 1) % p, (piece - 1) // p
                out["back"][t, to], out["back_micro"][t, to], out["back_chunk"][t, to] = 1, item.micro, chunk
    return out


def branch_shares(schedule: Schedule) -> list[float]:
    """How often a device takes each of a tick's branches, of all ticks; of the device that does most."""
    op = tables(schedule)["op"]
    counts = [[(op[:, d] == i).mean() for i in range(7)] for d in range(schedule.stages)]
    return [float(x) for x in min(counts, key=lambda row: row[0] + row[4])]


def slots(schedule: Schedule, table: Mapping[str, np.ndarray]) -> tuple[int, int, int]:
    """Places a chunk for inputs, gradients, and what waits for W: micro-batch i lives at i modulo their number."""

    def spans(begin: str | int, end: int) -> dict[tuple[int, int, int], list[int]]:
        name = begin if isinstance(begin, str) else "op"
        there = table[name] > 0 if isinstance(begin, str) else np.isin(table["op"], (begin, begin + 3))
        prefix = f"{begin}_" if isinstance(begin, str) else ""
        out: dict[tuple[int, int, int], list[int]] = {}
        for t, d in zip(*np.nonzero(there), strict=True):
            out[d, table[f"{prefix}chunk"][t, d], table[f"{prefix}micro"][t, d]] = [t]
        for t, d in zip(*np.nonzero(np.isin(table["op"], (end, end + 3))), strict=True):
            key = (d, table["chunk"][t, d], table["micro"][t, d])
            if key in out:
                out[key].append(t)
        return out

    def places(spans: dict[tuple[int, int, int], list[int]]) -> int:
        for count in range(1, schedule.micros + 1):
            taken: dict[tuple[int, int, int], list[list[int]]] = {}
            for (d, c, i), span in spans.items():
                taken.setdefault((d, c, i % count), []).append(span)
            # a place is written after the tick's work, so it may be taken in the tick that frees it
            if all(a[1] <= b[0] for row in taken.values() for a, b in zip(sorted(row), sorted(row)[1:], strict=False)):
                return count
        return schedule.micros

    return places(spans("get", 2)), places(spans("back", 2)), places(spans(2, 3)) if schedule.splits else 1


def timeline(schedule: Schedule) -> str:
    """A line a device, a column a tick: `F3`, `b3` and `w3` of micro-batch 3, a letter for the chunk."""

    def cell(item: Item | None) -> str:
        if item is None:
            return "."
        chunk = string.ascii_lowercase[item.chunk % 26] if schedule.chunks > 1 else ""
        return f"{item.kind if item.kind == 'F' else item.kind.lower()}{item.micro}{chunk}"

    width = max(len(cell(i)) for tick in schedule.ticks for i in tick) + 1
    rows = ("".join(f"{cell(tick[d]):<{width}}" for tick in schedule.ticks).rstrip() for d in range(schedule.stages))
    return "\n".join(rows)
