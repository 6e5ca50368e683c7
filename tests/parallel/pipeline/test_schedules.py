"""Schedules against the papers' formulas: idle share, micro-batches held at once, and that nothing runs too early."""

import collections

import pytest

from llm_jax.parallel.pipeline import schedules

CASES = [
    (name, p, m, v)
    for name, v in [
        *((name, 1) for name in schedules.NAMES if name != "interleaved"),
        *(("interleaved", v) for v in (2, 3)),
    ]
    for p in (1, 2, 3, 4, 8)
    for m in (p, 2 * p, 4 * p)
]


@pytest.mark.parametrize("name, p, m, v", CASES)
def test_formulas(name, p, m, v):
    s = schedules.make(name, p, m, v)
    work = 3 * m if name == "zero_bubble" else 2 * m * v
    idle = p - 1 if name == "zero_bubble" else 2 * (p - 1)  # of every device, where all items take as long
    assert s.bubble() == pytest.approx(idle / (work + idle))  # (p - 1) / (v m + p - 1), of zero bubble 3 m
    paired = m * v + 2 * (p - 1) + (v - 1) * p
    assert len(s.ticks) == {"eager_1f1b": paired, "interleaved": paired}.get(name, work + idle)
    held = {
        "gpipe": [m] * p,
        "1f1b": [min(p - d, m) for d in range(p)],
        "zero_bubble": [p] * p,
        "eager_1f1b": [min(2 * (p - 1 - d) + 1, m) for d in range(p)],
        "interleaved": [min(2 * (p - 1 - d) + (v - 1) * p + 1, m * v) for d in range(p)],
    }
    assert s.live() == held[name]


@pytest.mark.parametrize("name, p, m, v", [*CASES, ("1f1b", 4, 2, 1), ("gpipe", 4, 1, 1), ("zero_bubble", 4, 3, 1)])
def test_every_item_once_and_after_what_it_needs(name, p, m, v):
    s = schedules.make(name, p, m, v)
    when = {}
    for t, device, piece, item in s.items():
        assert piece == item.chunk * p + device and (item.kind, item.micro, piece) not in when
        when[item.kind, item.micro, piece] = t
    kinds = "FBW" if s.splits else "FB"
    assert collections.Counter(k for k, _, _ in when) == dict.fromkeys(kinds, m * p * v)
    for tick in s.ticks:
        for items in tick:
            assert [i.kind for i in items] in ([], ["F"], ["B"], ["W"], ["F", "B"])
    for (kind, micro, piece), t in when.items():
        if kind == "F" and piece:
            assert when["F", micro, piece - 1] < t
        if kind == "B":
            assert when["F", micro, piece] <= t  # in one tick F comes first
            assert piece == p * v - 1 or when["B", micro, piece + 1] < t
        if kind == "W":
            assert when["B", micro, piece] < t


@pytest.mark.parametrize("name, p, m, v", CASES)
def test_places(name, p, m, v):
    """What is written into a place is there until it is read: every buffer, replayed."""
    s = schedules.make(name, p, m, v)
    table, places = schedules.tables(s), schedules.slots(s)
    held, into, back, outof = {}, {}, {}, {}
    for t in range(len(s.ticks)):
        at = [{key: int(x[t, d]) for key, x in table.items()} for d in range(p)]
        for d, row in enumerate(at):
            where = lambda name, count, d=d, row=row: (d, row[f"{name}_chunk"], row[f"{name}_micro"] % count)
            micro = lambda name, row=row: row[f"{name}_micro"]
            if row["F"]:
                if d or row["F_chunk"]:
                    assert held[where("F", places.inputs)] == micro("F")
                into[where("F", places.layers)] = micro("F")
            if row["top"]:
                back[where("F", places.back)] = micro("F")
            if row["B"]:
                assert back[where("B", places.back)] == micro("B") == into[where("B", places.layers)]
                outof[where("B", places.split)] = micro("B")
            if row["W"]:
                assert into[where("W", places.layers)] == micro("W") == outof[where("W", places.split)]
            if row["get"]:
                held[where("get", places.inputs)] = micro("get")
            if row["back"]:
                back[where("back", places.back)] = micro("back")


def test_time_with_costs():
    """Backward twice as long: without lockstep as the formulas; in lockstep too where no tick mixes, unlike 1F1B's."""
    costs = {"F": 1, "B": 2, "W": 1}
    p, m = 4, 8
    span = lambda name, v=1, c=costs: schedules.make(name, p, m, v).span(c)
    assert span("gpipe") == span("1f1b") == 3 * (m + p - 1)
    assert span("interleaved", 2) == 3 * (2 * m + p - 1)  # of pieces half as large
    whole = schedules.make("zero_bubble", p, m)
    assert whole.span({"F": 1, "B": 1, "W": 1}) == 3 * m + p - 1
    for name, v in (("gpipe", 1), ("eager_1f1b", 1), ("interleaved", 2)):
        assert schedules.make(name, p, m, v).lockstep(costs) == 3 * (m * v + p - 1)
    assert schedules.make("1f1b", p, m).lockstep(costs) == 40 > 3 * (m + p - 1)


def test_what_recomputation_makes_of_zero_bubble():
    """5.25 units against 3.75 (`test_pipeline` counts them) pay where stages are many and micro-batches few."""
    for p, m, pays in ((4, 4, False), (8, 8, True), (8, 16, False), (16, 16, True)):
        one = schedules.make("1f1b", p, m).span({"F": 1, "B": 2.75})
        zero = schedules.make("zero_bubble", p, m).span({"F": 1, "B": 1.75, "W": 2.5})
        assert (zero < one) == pays, (p, m, zero, one)


def test_timeline():
    assert schedules.timeline(schedules.make("zero_bubble", 2, 2)).splitlines() == [
        "F0 F1 .  b0 w0 b1 w1",
        ".  F0 b0 F1 b1 w0 w1",
    ]
    assert schedules.timeline(schedules.make("interleaved", 2, 2, 2)).splitlines() == [
        "F0a    F1a    F0b    F1b    b0b    b1b    b0a    b1a",
        ".      F0a    F1a    F0bb0b F1bb1b b0a    b1a    .",
    ]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("dapple", 2, 2), "schedule='dapple' is not one of gpipe, 1f1b, eager_1f1b, interleaved, zero_bubble"),
        (("gpipe", 2, 0), "micro-batches=0 and chunks=1 must be at least 1"),
        (("1f1b", 2, 4, 2), "schedule=1f1b with chunks=2"),
        (("interleaved", 2, 4, 1), "schedule=interleaved with chunks=1"),
        (("interleaved", 4, 6, 2), "divide by pipe=4, not 6: 4 works"),
    ],
)
def test_errors(arguments, words):
    with pytest.raises(ValueError, match=words):
        schedules.make(*arguments)
