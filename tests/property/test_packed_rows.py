"""Packed rows come back as they were put in."""

from __future__ import annotations

import random
import struct
import tracemalloc
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from orderflow.lake.packed import PackedRows

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(),
    st.binary(),
    st.lists(st.text()),
)


def exact(row: tuple[Any, ...]) -> list[Any]:
    """With the bits of doubles, so that -0.0 and NaN count."""
    return [(type(value), struct.pack(">d", value) if type(value) is float else value) for value in row]


@given(st.lists(st.lists(VALUES, max_size=8).map(tuple), max_size=20), st.sampled_from((1, 40, 1 << 16)))
def test_rows_come_back_bit_for_bit(rows: list[tuple[Any, ...]], chunk_bytes: int) -> None:
    packed = PackedRows(chunk_bytes)
    for row in rows:
        packed.append(row)
    assert len(packed) == len(rows)
    for _ in range(2):
        assert [exact(row) for row in packed] == [exact(row) for row in rows]
    if rows:
        assert (exact(packed.first), exact(packed.last)) == (exact(rows[0]), exact(rows[-1]))


def test_buffers_do_not_mix() -> None:
    one, other = PackedRows(64), PackedRows(64)
    for number in range(200):
        one.append((number, "one"))
        other.append((number, "other"))
    assert list(one) == [(number, "one") for number in range(200)]
    assert list(other) == [(number, "other") for number in range(200)]


def test_a_row_takes_far_less_than_its_objects() -> None:
    rng = random.Random(5)
    packed = PackedRows()
    tracemalloc.start()
    for number in range(20_000):
        packed.append((number, 1_721_347_200_000 + number, "f" * 64, *(rng.random() for _ in range(5)), *[None] * 20))
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < 20_000 * 80
