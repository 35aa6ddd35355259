"""`orderflow trace SIGNAL_ID`: from a signal back through fusion, OFI and CVD to the very frames of the journal."""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
from datetime import UTC, datetime
from typing import Any, Final

from orderflow.cli.common import add_run_argument, check_topics, reach
from orderflow.processor import Record
from orderflow.replay.trace import Source, Trace, Tracer, parse
from orderflow.topics import CVD, FUSION, JOURNAL, OFI, ROWS, SIGNALS

PAYLOAD_CHARS: Final = 600
TRACED: Final = (SIGNALS, FUSION, OFI, CVD, ROWS)
_FIELDS: Final = {
    FUSION: (
        "src",
        "score",
        "score_z",
        "z_ofi",
        "z_cvd",
        "w_ofi",
        "w_cvd",
        "consistency",
        "lag_sec",
        "skew_ms",
        "warmup",
    ),
    OFI: ("src", "ofi_value", "ofi_z", "ofi_z_raw", "scale", "ofi_ema", "mid", "spread_bps", "book_state", "gap_count"),
    CVD: ("price", "qty", "side", "delta", "cvd", "z_raw", "z_cvd", "scale", "sigma_floor", "floor_used"),
}
_ROW_FIELDS: Final = {
    "aggTrade": ("price", "qty", "side", "side_source", "agg_trade_id"),
    "bookTicker": ("bid", "bid_qty", "ask", "ask_qty", "update_id"),
    "depth": ("bid_px", "bid_qtys", "ask_px", "ask_qtys", "update_id"),
}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("trace", help="follow a signal back to its frames", description=__doc__)
    parser.add_argument("signal_id", metavar="SIGNAL_ID", help="the field signal_id of a signal")
    parser.add_argument("--replay", metavar="NAME", help="the signal is one of this replay")
    parser.add_argument("--full", action="store_true", help=f"whole frames, not their first {PAYLOAD_CHARS} characters")
    parser.add_argument("--json", action="store_true", help="one JSON object, everything in full")
    add_run_argument(parser)


def run(args: argparse.Namespace) -> int:
    parse(args.signal_id)
    return asyncio.run(_trace(args))


async def _trace(args: argparse.Namespace) -> int:
    async with reach(args, [JOURNAL, *TRACED]) as reached:
        prefix = f"replay.{args.replay}." if args.replay else reached.prefix
        if args.replay:
            await check_topics(reached.bootstrap, prefix, TRACED)
        found = await Tracer(reached.log, reached.codecs, prefix, reached.codecs, reached.prefix).trace(args.signal_id)
    if args.json:
        print(json.dumps(_content(found), indent=2, default=_plain))
    else:
        for line in _lines(found, PAYLOAD_CHARS if not args.full else 1 << 30):
            print(line)
    return 0


def _content(found: Trace) -> dict[str, Any]:
    def source(each: Source | None) -> dict[str, Any] | None:
        return None if each is None else {"feature": each.feature, "row": each.row, "frame": each.frame}

    return {
        "partition": found.partition,
        "signal": found.signal,
        "fusion": found.fusion,
        "ofi": source(found.ofi),
        "cvd": source(found.cvd),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return {"base64": base64.b64encode(value).decode()}
    raise TypeError(f"{value!r} has no form in JSON")


def _lines(found: Trace, payload_chars: int) -> list[str]:
    signal, fusion = found.signal, found.fusion
    verdict = "confirmed" if signal["confirm"] else f"blocked by {', '.join(signal['gate_reasons'])}"
    lines = [
        f"signal {signal['signal_id']}   {signal['symbol']} {signal['strength']}, {verdict}",
        f"  {_when(signal)}   score {_text(signal['score'])}, price {_text(signal['price'])}, mid {_text(signal['mid'])}",
        f"  settings of signal {signal['config_fingerprint'][:16]}",
        f"fusion {_place(found.partition, fusion)}   {_when(fusion)}",
        f"  {_values(fusion, _FIELDS[FUSION])}",
        f"  {', '.join(fusion['reasons']) or 'no reasons'}",
    ]
    for name, source in ((OFI, found.ofi), (CVD, found.cvd)):
        role = "caused it" if source is not None and source.feature["seq"] == fusion["seq"] else "newest before it"
        if source is None:
            lines.append(f"{name}: none of this symbol before it, or not kept any longer")
            continue
        lines.append(f"{name} {_place(found.partition, source.feature)}   {_when(source.feature)}   {role}")
        lines.append(f"  {_values(source.feature, _FIELDS[name])}")
        lines += _source_lines(source, payload_chars)
    return lines


def _source_lines(source: Source, payload_chars: int) -> list[str]:
    lines = []
    if source.row is not None:
        row = source.row
        fields = _ROW_FIELDS.get(row["src"], ())
        lines.append(
            f"  row {row['src']} seq {row['seq']}.{row['sub']}: {_values(row, fields)}   latency {row['latency_ms']} ms"
        )
    if source.frame is None:
        return [*lines, "  frame: not in the journal any longer (`orderflow replay --from-lake` brings it back)"]
    frame = source.frame
    at = datetime.fromtimestamp(frame["recv_ts_ns"] / 1e9, UTC).isoformat(timespec="microseconds")
    lines.append(
        f"  journal seq {frame['seq']} {frame['kind']} {frame['route'] or '-'}, received {at}, frame {frame['source_position']} "
        f"of its source, {len(frame['payload'])} bytes:"
    )
    text = _plain(frame["payload"])
    text = text if isinstance(text, str) else "base64 " + text["base64"]
    lines.append(f"    {text[:payload_chars]}" + (" ... (--full)" if len(text) > payload_chars else ""))
    return lines


def _place(partition: int, record: Record) -> str:
    return f"partition {partition} seq {record['seq']}.{record['sub']}"


def _when(record: Record) -> str:
    return f"T {datetime.fromtimestamp(record['ts_ms'] / 1000, UTC).isoformat(timespec='milliseconds')}"


def _values(record: Record, names: tuple[str, ...]) -> str:
    return "  ".join(f"{name} {_text(record[name])}" for name in names if name in record)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, list):
        return "[" + " ".join(_text(each) for each in value) + "]"
    return "-" if value is None else str(value)
