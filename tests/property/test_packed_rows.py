"""Packed rows come back as they were put in."""

from __future__ import annotations

import math
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from orderflow.lake.packed import PackedRows

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(),
    st.lists(st.text()),
)


def exact(row: tuple[Any, ...]) -> list[Any]:
    """With the bits of doubles, so that -0.0 and NaN count."""
    return [(type(value), struct.pack(">d", value) if type(value) is float else value) for value in row]


@given(st.lists(st.lists(VALUES, max_size=8).map(tuple), max_size=20))
def test_rows_come_back_bit_for_bit(rows: list[tuple[Any, ...]]) -> None:
    packed = PackedRows()
    for row in rows:
        packed.append(row)
    assert len(packed) == len(rows)
    for again in (list(packed), list(packed), [packed[index] for index in range(len(rows))]):
        assert [exact(row) for row in again] == [exact(row) for row in rows]
    if rows:
        assert exact(packed[-1]) == exact(rows[-1])


def test_a_row_that_is_not_there_is_not_invented() -> None:
    packed = PackedRows()
    packed.append((math.pi,))
    for index in (1, -2):
        with pytest.raises(IndexError):
            packed[index]
