"""Names of files and columns of the lake."""

from __future__ import annotations

from urllib.parse import unquote

import pyarrow as pa
import pytest
from orderflow.lake import layout
from orderflow.lake.layout import (
    LAST_DAY,
    LakeError,
    avro_fields,
    cut_name,
    date_text,
    jsonl_path,
    kinds,
    parquet_path,
    partition_of,
    path_part,
    raw_fields,
    raw_path,
)
from orderflow.topics import CVD, EVENTS, FEATURE_EVENTS, FUSION, OFI, REJECTS, ROWS, SIGNALS

PROMISED = {
    "prices": "ts_ms event_ts_ms symbol price qty agg_trade_id latency_ms recv_rate_tps side side_source recv_ts_ms",
    "quotes": "ts_ms symbol bid bid_qty ask ask_qty update_id",
    "book": "ts_ms symbol bid_px bid_qty ask_px ask_qty update_id",
    "ofi": "ts_ms symbol ofi_value ofi_z scale regime ofi_l1",
    "cvd": "ts_ms symbol cvd delta z_raw z_cvd scale sigma_floor floor_used regime",
    "fusion": "ts_ms symbol score score_z regime",
    "signals": "ts_ms symbol signal_id score proba z_ofi z_cvd regime div_type confirm gating gate_reasons direction "
    "strength ttl_ms config_fingerprint",
    "marks": "ts_ms symbol price",
    "liquidations": "ts_ms symbol price qty side",
}
TRUST = {"seq", "sub", "book_state", "gap_count", "latency_ms"}


@pytest.mark.parametrize("kind", PROMISED)
def test_promised_and_trust_columns_are_there(kind: str) -> None:
    assert set(PROMISED[kind].split()) | TRUST <= set(kinds()[kind].schema.names)


def test_events_and_rejects_have_their_columns() -> None:
    assert {"ts_ms", "symbol", "event_type", "meta_json", "strength", "topic", "seq", "sub"} <= set(
        kinds()["events"].schema.names
    )
    assert {"recv_ts_ns", "symbol", "reason", "detail", "payload", "seq", "sub"} <= set(kinds()["rejects"].schema.names)


@pytest.mark.parametrize(
    ("kind", "topic"), [("ofi", OFI), ("cvd", CVD), ("fusion", FUSION), ("signals", SIGNALS), ("rejects", REJECTS)]
)
def test_every_field_of_a_schema_is_a_column(kind: str, topic: str) -> None:
    assert sorted(kinds()[kind].schema.names) == sorted(avro_fields(topic))


def test_every_field_of_both_event_schemas_is_a_column() -> None:
    assert set(avro_fields(EVENTS)) | set(avro_fields(FEATURE_EVENTS)) <= set(kinds()["events"].schema.names)


def test_every_field_of_a_row_is_a_column_of_some_kind() -> None:
    taken = {field for kind in layout.row_kinds().values() for field in kind.fields} | {"symbol"}
    assert set(avro_fields(ROWS)) - taken == {"src"}, "the kind says what `src` was"


def test_nullability_and_types_follow_the_schema() -> None:
    schema = kinds()["ofi"].schema
    assert schema.field("ofi_l1") == pa.field("ofi_l1", pa.float64(), nullable=False)
    assert schema.field("ofi_z") == pa.field("ofi_z", pa.float64())
    assert schema.field("seq") == pa.field("seq", pa.int64(), nullable=False)
    assert schema.field("components").type == pa.list_(pa.field("element", pa.float64(), nullable=False))
    assert kinds()["rejects"].schema.field("payload").type == pa.binary()
    assert kinds()["prices"].schema.field("side").type == pa.string()


def test_a_promised_column_that_a_schema_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(layout._HEADS, "ofi", (OFI, ("ts_ms", "symbol", "ofi_weight")))
    with pytest.raises(LakeError, match=r"schemas/ofi\.avsc has no field 'ofi_weight', which kind=ofi .* promises"):
        layout.kinds.__wrapped__()


def test_raw_keys_are_the_journals_then_the_encoding() -> None:
    assert raw_fields() == (
        "seq", "kind", "route", "symbol", "recv_ts_ns", "source_position", "ordinal", "epoch", "session", "payload",
        "payload_encoding",
    )  # fmt: skip


def test_paths() -> None:
    cut = cut_name("s1", 3, 1, 250_000)
    assert cut == "s1-p03-000000000001-000000250000"
    assert parquet_path("ofi", "BTCUSDT", 19_922, cut) == (
        f"data/ofi_cvd/date=2024-07-18/symbol=BTCUSDT/kind=ofi/part-{cut}.parquet"
    )
    assert parquet_path("rejects", None, 0, cut).startswith("data/ofi_cvd/date=1970-01-01/symbol=_/kind=rejects/")
    assert raw_path(3, 19_922, cut) == f"data/raw/date=2024-07-18/partition=03/part-{cut}.ndjson.zst"
    assert jsonl_path("BTCUSDT", 19_922 * 1440 + 61, "s1", 3, 1, 25) == (
        "signals/jsonl/date=2024-07-18/symbol=BTCUSDT/signals-s1-p03-20240718T0101-000000000001-000000000025.jsonl"
    )
    assert cut_name("", 0, 1, 2).startswith("unknown-p00-")


def test_days_at_both_ends() -> None:
    kind = kinds()["ofi"]
    assert date_text(kind.day_of({"ts_ms": -1})) == "1970-01-01"
    assert date_text(kind.day_of({"ts_ms": 2**63 - 1})) == "9999-12-31"
    assert date_text(LAST_DAY) == "9999-12-31"
    assert date_text(kinds()["rejects"].day_of({"recv_ts_ns": 86_400_000_000_000})) == "1970-01-02"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("BTCUSDT", "BTCUSDT"),
        ("BTCUSDT_250926", "BTCUSDT_250926"),
        ("币安人生USDT", "币安人生USDT"),
        ("A/B", "A%2FB"),
        (".hidden", "%2Ehidden"),
        ("..", "%2E."),
        ("A\0B", "A%00B"),
        ("50%", "50%25"),
        ("a=b?c\nd", "a%3Db%3Fc%0Ad"),
        ("_", "%5F"),
        ("A\u2028B", "A%E2%80%A8B"),
    ],
)
def test_only_what_a_path_or_its_readers_cannot_hold_is_encoded(text: str, part: str) -> None:
    assert path_part(text) == part
    assert unquote(part) == text


def test_a_name_too_long_for_a_file_is_cut_and_stays_distinct() -> None:
    first, second = path_part("币" * 300), path_part("币" * 301)
    assert first != second
    assert max(len(first.encode()), len(second.encode())) <= layout.MAX_NAME_BYTES
    assert len(path_part("\U000e0001" * 300).encode()) <= layout.MAX_NAME_BYTES


def test_a_file_says_which_partition_it_is_of() -> None:
    for partition in (0, 3, 11, 123):
        cut = cut_name("a-p07-1", partition, 1, 10**13)
        for path in (
            parquet_path("ofi", "BTC", 1, cut),
            raw_path(partition, 1, cut),
            jsonl_path("BTC", 61, "a-p07-1", partition, 1, 2),
        ):
            assert partition_of(path.rpartition("/")[2]) == partition
    for name in (
        "signals.sqlite",
        "part-s-p03-1-2.parquet",
        ".orderflow-tmp-0-part-s-p03-000000000001-000000000002.jsonl",
    ):
        assert partition_of(name) is None
