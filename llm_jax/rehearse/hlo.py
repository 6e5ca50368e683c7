"""Reads compiled programs: which collectives run, how often, over whom, with how many bytes.

`compiled.as_text()` is the optimized program of one device. XLA's own `cost_analysis` counts the body of a loop once;
here every instruction is counted as often as its loops turn.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,<=]*)\]")  # type, bits, sizes
_CALLEES = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|called_computations)=(?:\{([^}]*)\}|(%?[\w.\-]+))"
)
_MESH = re.compile(
    r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[(.*?)\](?:T\((.*?)\))?\))? \{(.*?)\}"
)  # sizes, and how devices are numbered: dimensions, order; axes
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TURN = re.compile(r'op_name="[^"]*/turn_(\w+)/while"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
      name: without `%`.
      opcode: as printed.
      type: as printed, layouts included.
      operands: names of its operands.
      attributes: the rest of the line.
    """

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    attributes: str

    @functools.cached_property
    def callees(self) -> tuple[str, ...]:
        """Names of the computations that this instruction calls."""
        found = [a or b for a, b in _CALLEES.findall(self.attributes)]
        return tuple(name.strip().lstrip("%") for text in found for name in text.split(","))

    def attribute(self, name: str) -> str:
        """What stands behind `name=`, up to the comma that ends it; empty where there is none."""
        begin = re.search(rf"(?:^|[ ,]){name}=", self.attributes)
        return "" if begin is None else self.attributes[begin.end() : _end(self.attributes, begin.end())]


@dataclasses.dataclass(frozen=True)
class Program:
    """A program: its computations by name, the name of its entry, and on how many devices it runs."""

    computations: dict[str, dict[str, Instruction]]
    entry: str
    devices: int = 1

    def calls(self, turns: Mapping[str, float] | None = None) -> dict[str, float]:
        """How often each computation runs in one call of the program.

        Args:
          turns: how often a loop of no or one turn, in the scope `turn_NAME`, turns, by name; all other loops turn as
            often as they say, and of conditionals every branch counts as taken.
        """
        times = dict.fromkeys(self.computations, 0.0)
        times[self.entry] = 1.0
        for name in self._callers_first():
            for instruction in self.computations[name].values():
                callees = instruction.callees
                often: float = self.trips(instruction) if instruction.opcode == "while" else 1
                turn = _TURN.search(instruction.attributes) if instruction.opcode == "while" and turns else None
                if turn and turns:
                    often = turns[turn[1]]
                for callee in callees:
                    times[callee] += times[name] * often
        return times

    def cycles(self, turns: Mapping[str, float] | None = None) -> float:
        """Cycles that a TPU's compiler estimates for all that computes, loops included; collectives not.

        Args:
          turns: see `calls`.
        """
        times = self.calls(turns)
        fused = {
            c for body in self.computations.values() for i in body.values() if i.opcode == "fusion" for c in i.callees
        }
        return sum(
            times[name] * cycles(i)
            for name, body in self.computations.items()
            if name not in fused
            for i in body.values()
        )

    def _callers_first(self) -> list[str]:
        order: list[str] = []
        seen = set()

        def visit(name: str) -> None:
            seen.add(name)
            for callee in {c for i in self.computations[name].values() for c in i.callees} - seen:
                if callee not in seen:
                    visit(callee)
            order.append(name)

        visit(self.entry)
        return order[::-1]

    def trips(self, loop: Instruction) -> int:
        """How often a `while` turns: as annotated, or the constant that its condition compares with."""
        annotated = _TRIPS.search(loop.attributes)
        if annotated:
            return int(annotated[1])
        condition = self.computations[loop.attribute("condition").lstrip("%")]
        constants = [i.operands[0] for i in condition.values() if i.opcode == "constant"]
        numbers = [int(c) for c in constants if c.isdigit()]
        return numbers[0] if len(numbers) == 1 else 1


def _end(text: str, begin: int) -> int:
    """Where the item that begins here ends: before a comma outside of brackets, or with the text."""
    depth = 0
    for i in range(begin, len(text)):
        if text[i] in "({[":
            depth += 1
        elif text[i] in ")}]":
            depth -= 1
        elif text[i] == "," and depth == 0:
            return i
    return len(text)


def _close(text: str, begin: int) -> int:
    """Where the bracket that opens at `begin` closes."""
    depth = 0
    for i in range(begin, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise ValueError(f"no bracket closes {text[begin : begin + 40]!r}")


def _items(text: str) -> Iterator[str]:
    begin = 0
    while begin < len(text):
        end = _end(text, begin)
        yield text[begin:end].strip()
        begin = end + 1


def parse(text: str) -> Program:
    """Reads an optimized program.

    Raises:
      ValueError: if it has no entry.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", {}
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
            continue
        begin = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
        if not begin:
            continue
        rest = re.sub(r"/\*.*?\*/", "", line[begin.end() :])
        cut = _close(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
        kind, after = rest[:cut], rest[cut:].lstrip()
        opens = after.index("(")
        closes = _close(after, opens)
        operands = tuple(o.split(" ")[-1].lstrip("%") for o in _items(after[opens + 1 : closes]))
        current[begin[1]] = Instruction(begin[1], after[:opens], kind, operands, after[closes + 1 :])
    if not entry:
        raise ValueError("the text holds no ENTRY computation: pass compiled.as_text()")
    header = text.splitlines()[0]
    counts = [int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", header)]
    return Program(computations, entry, math.prod(counts))


def bytes_of(kind: str) -> int:
    """Bytes of an array or tuple type as printed."""
    total = 0
    for dtype, bits, shape in _ARRAY.findall(kind):
        size = int(bits or _BITS[dtype])
        total += math.ceil(math.prod(int(n) for n in re.findall(r"\d+", shape)) * size / 8)
    return total


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: one of `KINDS`.
      size: bytes of the array before it is divided (gathers: the result; else what a device puts in).
      groups: devices that take part together; of a permutation the pairs (from, to).
      times: runs a call of the program.
      asynchronous: begun by one instruction and awaited by another.
      cover: cycles that the compiler (a TPU's) estimates for what runs between these two, one run.
      where: the op's name in the traced program.
    """

    kind: str
    size: int
    groups: tuple[tuple[int, ...], ...]
    times: float
    asynchronous: bool
    cover: int
    where: str

    def _share(self, device: int, end: int) -> float:
        if self.kind == "collective-permute":
            return float(self.size * sum(pair[end] == device and pair[0] != pair[1] for pair in self.groups))
        n = next((len(g) for g in self.groups if device in g), 1)
        return self.size * (n - 1) / n * (2 if self.kind == "all-reduce" else 1)

    def sent(self, device: int) -> float:
        """Bytes that a device sends a call of the program, by the algorithms of `collectives.traffic`."""
        return self.times * self._share(device, 0)

    def received(self, device: int) -> float:
        """Bytes that a device receives a call of the program."""
        return self.times * self._share(device, 1)


def _groups(i: Instruction, devices: int) -> tuple[tuple[int, ...], ...]:
    """Who takes part: pairs, or one of the forms in which groups are printed.

    `{{0,1},{2,3}}`; `[2,4]<=[8]`, `[4,2]<=[2,4]T(1,0)`; `mesh['a'=2,'b'=4] {'b'}`, also with
    `, device_ids=([2,2,2]T(1,0,2))` between the two; `{}` is one group of all.
    """
    ids: np.ndarray
    text = i.attribute("source_target_pairs") or i.attribute("replica_groups")
    listed = re.findall(r"\{(\d[\d,]*)\}", text)
    if listed:
        return tuple(tuple(int(n) for n in group.split(",")) for group in listed)
    numbers = lambda text: [int(n) for n in text.split(",")] if text else []
    if text.startswith("mesh"):
        whole = _MESH.search(i.attributes)
        if whole is None or ":" in whole[4]:
            raise ValueError(f"unknown form of replica groups: {i.attributes[:200]}")
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", whole[1])}
        ids = np.arange(math.prod(sizes.values()))
        if whole[2]:
            ids = ids.reshape(numbers(whole[2])).transpose(numbers(whole[3] or "") or None)
        along = re.findall(r"'([^']+)'", whole[4])
        order = [list(sizes).index(name) for name in (*(n for n in sizes if n not in along), *along)]
        ids = ids.reshape(tuple(sizes.values())).transpose(order)
        return tuple(tuple(row) for row in ids.reshape(-1, math.prod(sizes[name] for name in along)).tolist())
    dims = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if dims is None:
        return (tuple(range(devices)),)
    shape, source, turned = (numbers(d or "") for d in dims.groups())
    ids = np.arange(math.prod(source)).reshape(source).transpose(turned or None).reshape(shape)
    return tuple(tuple(row) for row in ids.tolist())


def cycles(instruction: Instruction) -> int:
    """What a TPU's compiler estimates for one run; 0 where it says nothing, or no number that can be one."""
    found = _CYCLES.search(instruction.attributes)
    estimate = int(found[1]) if found else 0
    return estimate if estimate < 2**48 else 0


def _between(computation: dict[str, Instruction], first: str, last: str) -> int:
    """Estimated cycles of what is scheduled after `first` and before `last`."""
    names = list(computation)
    between = names[names.index(first) + 1 : names.index(last)]
    return sum(cycles(computation[name]) for name in between)


def _covers(program: Program) -> dict[str, int]:
    """Cycles between start and done: by the name of a start, or by the channel of a chain of TPU fusions."""
    called_by = {
        callee: (where, i.name)
        for where, computation in program.computations.items()
        for i in computation.values()
        for callee in i.callees
        if i.opcode == "fusion"
    }
    covers: dict[str, int] = {}
    chains: dict[str, list[tuple[str, str]]] = {}
    for where, computation in program.computations.items():
        for i in computation.values():
            if i.opcode.endswith("-done") and i.operands[0] in computation:
                covers[i.operands[0]] = _between(computation, i.operands[0], i.name)
            elif "chain_id=" in i.attributes and where in called_by:
                chains.setdefault(i.attribute("channel_id"), []).append(called_by[where])
    for channel, links in chains.items():
        where = links[0][0]
        order = list(program.computations[where])
        there = sorted((name for w, name in links if w == where), key=order.index)
        covers[f"channel {channel}"] = _between(program.computations[where], there[0], there[-1])
    return covers


def collectives(text: str | Program, turns: Mapping[str, float] | None = None) -> list[Collective]:
    """All collectives of an optimized program, in the order of the text.

    Args:
      text: `compiled.as_text()`, or what `parse` made of it.
      turns: see `Program.calls`.

    A TPU's compiler writes one that runs behind others as a chain: a fusion that starts it, fusions that compute and
    carry it on, a fusion that ends it, each with the collective in its body. Those are one. And it writes a
    reduce-scatter as an all-reduce in the body of a fusion that cuts it.
    """
    program = parse(text) if isinstance(text, str) else text
    times, covers = program.calls(turns), _covers(program)
    found = []
    seen = set()
    for name, computation in program.computations.items():
        for i in computation.values():
            kind = i.opcode.removesuffix("-start")
            if kind not in KINDS or not times[name]:
                continue
            chain = f"channel {i.attribute('channel_id')}" if "chain_id=" in i.attributes else ""
            if chain and chain in seen:
                continue
            seen.add(chain)
            if name.startswith("all-reduce-scatter"):  # a TPU's fusion of a sum and the cutting of it
                kind = "reduce-scatter"
            groups = _groups(i, program.devices)
            size = sum(bytes_of(computation[o].type) for o in i.operands)
            if kind == "all-gather":
                size *= len(groups[0]) if groups else 1
            where = re.search(r'op_name="([^"]*)"', i.attributes)
            started = bool(chain) or i.opcode.endswith("-start")
            cover = covers.get(chain or i.name, 0)
            found.append(Collective(kind, size, groups, times[name], started, cover, where[1] if where else ""))
    return found


def axes_of(groups: Sequence[Sequence[int]], mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes that groups (or pairs) run along; `("?",)` where no choice of axes gives them."""
    ids = np.arange(mesh.size).reshape(mesh.devices.shape)
    names = [a for a in mesh.axis_names if mesh.shape[a] > 1]
    wanted = {frozenset(g) for g in groups if len(set(g)) > 1}
    for count in range(len(names) + 1):
        for axes in itertools.combinations(names, count):
            there = [mesh.axis_names.index(a) for a in axes]
            along = np.moveaxis(ids, there, range(-count, 0)).reshape(-1, math.prod(mesh.shape[a] for a in axes))
            whole = {frozenset(row) for row in along.tolist()}
            if wanted <= whole or (count and all(any(g <= w for w in whole) for g in wanted)):
                return axes
    return ("?",)


def table(found: Sequence[Collective], mesh: Mesh) -> dict[tuple[str, str], dict[str, Any]]:
    """Sums by kind and mesh axes: `{(kind, "data"): {"calls": n, "bytes": size, "sent": of device 0}}`."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for c in found:
        row = rows.setdefault((c.kind, "+".join(axes_of(c.groups, mesh))), {"calls": 0, "bytes": 0, "sent": 0.0})
        row["calls"] += c.times
        row["bytes"] += c.times * c.size
        row["sent"] += c.sent(0)
    return rows
