"""The merge gives one order, whatever the order of arrival, duplicates, zombies' markers and restarts."""

from __future__ import annotations

import random
from collections.abc import Set
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st
from orderflow.streaming.log import Headers
from orderflow.streaming.merge import Merger

TOPICS = ("ticks", "left", "right")


@dataclass(frozen=True)
class Stored:
    offset: int
    timestamp: int = 0
    key: bytes | None = b""
    value: bytes | None = b""
    headers: Headers = ()


# Per seq: how many records each of the inputs has of it (ticks at most one, as in the journal).
worlds = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=40)


def streams(world: list[tuple[int, int, int]], rng: random.Random) -> list[list[tuple[str, int, int]]]:
    """Each input's records as ("record", seq, sub), with markers ("mark", seq, 0) put in where they are true."""
    inputs: list[list[tuple[str, int, int]]] = [[], [], []]
    for seq, counts in enumerate(world, 1):
        for number, count in enumerate(counts):
            inputs[number] += [("record", seq, sub) for sub in range(count)]
            if rng.random() < 0.3:
                inputs[number].append(("mark", seq, 0))
    for each in inputs:
        each.append(("mark", len(world), 0))
    return inputs


def expected(world: list[tuple[int, int, int]]) -> list[tuple[str, int, int]]:
    return [
        (TOPICS[rank], seq, sub)
        for seq, counts in enumerate(world, 1)
        for rank, count in enumerate(counts)
        for sub in range(count)
    ]


def feed(
    merger: Merger,
    number: int,
    item: tuple[str, int, int],
    offset: int,
    filtered: Set[tuple[str, int, int]] = frozenset(),
) -> None:
    kind, seq, sub = item
    each = merger.inputs[number]
    each.next_offset = offset + 1
    if kind == "mark":
        each.mark(seq)
    else:
        each.push(seq, sub, None if (each.topic, seq, sub) in filtered else Stored(offset))


@settings(max_examples=200, deadline=None)
@given(world=worlds, seed=st.integers(0, 2**32), limit=st.integers(1, 50))
def test_one_order_whatever_arrives_first(world: list[tuple[int, int, int]], seed: int, limit: int) -> None:
    rng = random.Random(seed)
    inputs = streams(world, rng)
    merger = Merger(TOPICS, frozenset({"ticks"}))
    taken = [0, 0, 0]
    got: list[tuple[str, int, int]] = []
    while any(taken[number] < len(inputs[number]) for number in range(3)):
        number = rng.choice([number for number in range(3) if taken[number] < len(inputs[number])])
        feed(merger, number, inputs[number][taken[number]], taken[number])
        taken[number] += 1
        if rng.random() < 0.2 and taken[number] > 1:  # a zombie writes something again
            again = rng.randrange(taken[number])
            if inputs[number][again][0] == "record":
                merger.inputs[number].push(*inputs[number][again][1:], Stored(0))
        if rng.random() < 0.5:
            got += [(each.topic, seq, sub) for each, seq, sub, _ in merger.run(limit)]
            frontier = merger.frontier
            assert all((topic, seq, sub) in got for topic, seq, sub in expected(world) if seq <= frontier)
    while released := merger.run(limit):
        got += [(each.topic, seq, sub) for each, seq, sub, _ in released]
    assert got == expected(world)
    assert merger.frontier == len(world)
    assert merger.buffered == 0


@settings(max_examples=200, deadline=None)
@given(world=worlds, seed=st.integers(0, 2**32), restarts=st.integers(1, 4), wanted=st.sampled_from([0.0, 0.5, 1.0]))
def test_a_restart_anywhere_goes_on_where_it_stood(
    world: list[tuple[int, int, int]], seed: int, restarts: int, wanted: float
) -> None:
    """`wanted`: how many of the records of the right input are of use; the others only keep their place."""
    rng = random.Random(seed)
    inputs = streams(world, rng)
    filtered = {each for each in expected(world) if each[0] == "right" and rng.random() >= wanted}
    got: list[tuple[str, int, int]] = []
    merger = Merger(TOPICS, frozenset({"ticks"}))
    taken = [0, 0, 0]
    for _ in range(restarts):
        for _ in range(rng.randrange(60)):
            open_inputs = [number for number in range(3) if taken[number] < len(inputs[number])]
            if not open_inputs:
                break
            number = rng.choice(open_inputs)
            feed(merger, number, inputs[number][taken[number]], taken[number], filtered)
            taken[number] += 1
            if rng.random() < 0.4:
                got += [(each.topic, seq, sub) for each, seq, sub, _ in merger.run(rng.randrange(1, 20))]
        saved = [(each.oldest_offset, each.taken_seq, each.taken_sub, each.resumable) for each in merger.inputs]
        merger = Merger(TOPICS, frozenset({"ticks"}))
        for number, (offset, seq, sub, progress) in enumerate(saved):
            each = merger.inputs[number]
            each.next_offset = offset
            each.last_seq = each.taken_seq = seq
            each.last_sub = each.taken_sub = sub
            each.progress = progress
            taken[number] = offset
    for number in range(3):
        for offset in range(taken[number], len(inputs[number])):
            feed(merger, number, inputs[number][offset], offset, filtered)
    while released := merger.run(1000):
        got += [(each.topic, seq, sub) for each, seq, sub, _ in released]
    assert got == [each for each in expected(world) if each not in filtered]
    assert merger.frontier == len(world)
