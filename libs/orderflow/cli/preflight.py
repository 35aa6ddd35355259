"""`orderflow preflight`: run the whole pipeline for ten minutes and judge what it left behind.

Everything runs as under `orderflow run`, in a folder and under a topic prefix of its own; the verdict is from the lake, the
topics and the recorder's own figures. Exit status 0: fit. 1: a check failed. 2: it could not run.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from orderflow.cli import run as pipeline
from orderflow.cli import runs
from orderflow.errors import OrderflowError
from orderflow.lake.layout import PARQUET_ROOT, kinds
from orderflow.lake.query import connect, fetch
from orderflow.lake.query import execute as ask_lake
from orderflow.streaming.journal import partition_of

RECONNECTS_MOST: Final = 3
DUPLICATES_MOST: Final = 0.002
LATENCY_P99_MS: Final = 120
DRIFT_MOST_MS: Final = 200
SYNCED_LEAST: Final = 0.99
WARM_UP_SEC: Final = 15.0
WARM_UP_SHARE: Final = 0.25
"""Books need their snapshots first: this much of the begin, and no more than `WARM_UP_SEC`, is not judged."""
ON_DISK: Final = ("prices", "cvd")
WIDTH: Final = 100


class Check(msgspec.Struct, kw_only=True):
    """One thing judged. `value` and `limit` are as a person reads them; `number` is what was compared, None for none."""

    name: str
    value: str
    limit: str
    passed: bool
    number: float | None
    remedy: str
    """What to do where it failed."""


class Evidence:
    """What a run has left: its summary, and its lake as SQL."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.summary: dict[str, Any] = json.loads((out / "summary.json").read_text("utf-8"))
        self.recorder: dict[str, Any] = self.summary["recorder"]
        self.symbols: list[str] = self.summary["symbols"]
        self._lake = connect(out)

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        ask_lake(self._lake, sql)
        return fetch(self._lake, 1_000_000)

    def value(self, sql: str) -> Any:
        return self.rows(sql)[0][0]

    def close(self) -> None:
        self._lake.close()


def add_parser(subparsers: Any) -> None:
    """Add `preflight` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "preflight", help="judge whether exchange, network and machine are fit", description=__doc__
    )
    parser.add_argument(
        "--duration", type=float, default=600.0, metavar="S", help="seconds from the first frame on (default: 600)"
    )
    parser.add_argument("--source", choices=("live", "sim"), default="live", help="the exchange, or a simulated one")
    parser.add_argument("--symbols", metavar="A,B", help="symbols (default: as of `orderflow run`)")
    parser.add_argument("--out", metavar="DIR", help="folder of the run (default: runs/<time>-preflight)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the verdict here, besides DIR/preflight.json")
    parser.add_argument("--no-view", action="store_true", help="lines instead of the live screen")


def run(args: argparse.Namespace) -> int:
    """Run, judge, show, write; 0 where all checks passed, else 1.

    Raises
    ------
    OrderflowError
        The pipeline could not run, or not to its end.
    """
    if args.json is not None and not args.json.resolve().parent.is_dir():
        raise OrderflowError(f"--json {args.json}: its folder does not exist; make it, or name another")
    out = Path(args.out or runs.runs_dir() / f"{datetime.now(UTC):%Y%m%dT%H%M%S}-preflight").resolve()
    try:
        pipeline.run(_run_arguments(args, out))
    except OrderflowError as error:
        if args.json is not None:
            _write(args.json, {"passed": False, "error": str(error), "run": str(out), "checks": []})
        raise
    evidence = Evidence(out)
    try:
        checks = judge(evidence)
    finally:
        evidence.close()
    verdict = {
        "passed": all(check.passed for check in checks),
        "error": "",
        "run": str(out),
        "source": args.source,
        "symbols": evidence.symbols,
        "duration_sec": args.duration,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "config_fingerprint": evidence.summary["config_fingerprint"],
        "checks": msgspec.to_builtins(checks),
    }
    for path in (out / "preflight.json", args.json):
        if path is not None:
            _write(path, verdict)
    _show(checks, out)
    return 0 if verdict["passed"] else 1


def _run_arguments(args: argparse.Namespace, out: Path) -> argparse.Namespace:
    """The arguments of `orderflow run`, by its own parser, so that its defaults are ours."""
    subparsers = argparse.ArgumentParser().add_subparsers()
    pipeline.add_parser(subparsers)
    words = ["--source", args.source, "--duration", f"{args.duration:g}", "--out", str(out)]
    if args.symbols:
        words += ["--symbols", args.symbols]
    if args.no_view:
        words.append("--no-view")
    found: argparse.Namespace = subparsers.choices["run"].parse_args(words)
    found.duration_of_frames = True
    return found


def _write(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
    temporary.replace(path)


def _show(checks: list[Check], out: Path) -> None:
    console = Console(width=WIDTH, highlight=False, markup=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, width in (("preflight", 29), ("value", 36), ("limit", 20), ("", 4)):
        table.add_column(name, no_wrap=True, overflow="ellipsis", width=width)
    for check in checks:
        outcome = "pass" if check.passed else "FAIL"
        table.add_row(check.name, check.value, check.limit, outcome, style="" if check.passed else "red")
    console.print()
    console.print(table)
    failed = [check for check in checks if not check.passed]
    for check in failed:
        console.print(f"{check.name}: {check.value}", soft_wrap=True)
        console.print(f"  {check.remedy}", soft_wrap=True)
    console.print(f"verdict {out / 'preflight.json'}", soft_wrap=True)
    console.print("FIT" if not failed else f"NOT FIT: {len(failed)} of {len(checks)} checks failed")


# -- the checks -------------------------------------------------------------------------------------------------------


def judge(evidence: Evidence) -> list[Check]:
    """Every check, in the order in which a person would look."""
    return [check(evidence) for check in CHECKS]


def _whole(evidence: Evidence) -> Check:
    begin_ns, end_ns = evidence.rows("SELECT min(recv_ts_ns), max(recv_ts_ns) FROM raw WHERE kind = 'frame'")[0]
    span_sec = (end_ns - begin_ns) / 1e9 if begin_ns is not None else 0.0
    cause = str(evidence.summary["stopped_by"])
    return Check(
        name="ran to its end",
        value=f"{span_sec:,.0f} s of frames, {cause}",
        limit="ended by duration",
        passed=cause == "duration" and span_sec > 0,
        number=round(span_sec, 3),
        remedy="let it run to its end; without a single frame look at the network and at the addresses (WSS_URL)",
    )


def _journal(evidence: Evidence) -> Check:
    missing = 0
    lake = {
        str(partition): (count, highest)
        for partition, count, highest in evidence.rows(
            "SELECT partition, count(DISTINCT seq), max(seq) FROM raw WHERE seq >= 1 GROUP BY ALL"
        )
    }
    for partition, seq in evidence.recorder["seqs"].items():
        count, highest = lake.get(partition, (0, 0))
        missing += max(seq, highest) - count
    return Check(
        name="journal numbers missing",
        value=f"{missing:,} of {sum(evidence.recorder['seqs'].values()):,}",
        limit="0",
        passed=missing == 0 and bool(lake),
        number=missing,
        remedy="records of the journal are not in the lake: see logs/lake.log, and the disk",
    )


def _trades(evidence: Evidence) -> Check:
    lost, filled = evidence.rows(
        "SELECT coalesce(sum(last - first + 1 - ids), 0)::BIGINT, coalesce(sum(rows - ids), 0)::BIGINT FROM (SELECT "
        "min(agg_trade_id) AS first, max(agg_trade_id) AS last, count(DISTINCT agg_trade_id) AS ids, count(*) AS rows "
        "FROM prices GROUP BY symbol)"
    )[0]
    return Check(
        name="trade ids missing",
        value=f"{lost:,}, {filled:,} twice in the lake",
        limit="0",
        passed=lost == filled == 0,
        number=lost + filled,
        remedy="trades were lost and could not be fetched: SELECT * FROM events WHERE event_type = 'trades_lost'",
    )


def _chains(evidence: Evidence) -> Check:
    allowed: Counter[tuple[int, str]] = Counter()
    for partition, symbol, count in evidence.rows(
        "SELECT partition, coalesce(symbol, ''), count(*) FROM raw WHERE kind = 'gap' AND route <> 'market' "
        "AND payload->>'reason' IN ('disconnected', 'resubscribed', 'restart') GROUP BY ALL"
    ):
        allowed[partition, symbol] += count
    gaps = evidence.rows(
        "SELECT symbol, count(*) FROM events WHERE topic = 'market.events' AND event_type = 'gap' "
        "AND meta_json->>'reason' IN ('pu_mismatch', 'crossed_book', 'quote_mismatch', 'update_ids_went_back', 'dropped') "
        "GROUP BY symbol"
    )
    unexplained = 0
    for symbol, count in gaps:
        home = partition_of(symbol)
        unexplained += max(0, count - allowed[home, ""] - allowed[home, symbol])
    total = sum(count for _, count in gaps)
    return Check(
        name="book gaps but by reconnects",
        value=f"{unexplained:,} of {total:,} gaps",
        limit="0",
        passed=unexplained == 0,
        number=unexplained,
        remedy="diffs were missed while the socket lived: a machine too slow? SELECT * FROM events WHERE event_type = 'gap'",
    )


def _reconnects(evidence: Evidence) -> Check:
    journalled = evidence.value(
        "SELECT coalesce(max(n), 0) FROM (SELECT count(*) AS n FROM raw WHERE kind = 'gap' AND "
        "symbol IS NULL AND payload->>'reason' = 'disconnected' GROUP BY partition)"
    )
    count = max(int(journalled), _total(evidence.recorder.get("reconnects", 0)))
    return Check(
        name="reconnects",
        value=f"{count:,}",
        limit=f"{RECONNECTS_MOST}",
        passed=count <= RECONNECTS_MOST,
        number=count,
        remedy="the sockets do not hold: see logs/ingestion.log for the reasons, then the network",
    )


def _total(value: Any) -> int:
    """A count, or the sum of counts by whatever they are told apart."""
    return sum(map(_total, value.values())) if isinstance(value, dict) else int(value)


def _duplicates(evidence: Evidence) -> Check:
    dropped = 0
    for (text,) in evidence.rows("SELECT meta_json FROM events WHERE event_type = 'duplicates'"):
        dropped += sum(json.loads(text).values())
    frames = evidence.summary["frames"]
    rate = dropped / frames if frames else 0.0
    return Check(
        name="duplicate frames",
        value=f"{100 * rate:.3f} % ({dropped:,})",
        limit=f"below {100 * DUPLICATES_MOST:g} %",
        passed=rate < DUPLICATES_MOST,
        number=round(rate, 6),
        remedy="frames come twice: is a proxy in between, or does the exchange send them so? Rows are not doubled by it",
    )


def _latency(evidence: Evidence) -> Check:
    p50, p99 = evidence.rows(
        "SELECT quantile_disc(abs(latency_ms), 0.5), quantile_disc(abs(latency_ms), 0.99) FROM (SELECT latency_ms FROM "
        "prices UNION ALL SELECT latency_ms FROM quotes UNION ALL SELECT latency_ms FROM book) WHERE latency_ms IS NOT NULL"
    )[0]
    return Check(
        name="|E - R| p99",
        value="no row has an E" if p99 is None else f"{p99:,} ms (p50 {p50:,})",
        limit=f"below {LATENCY_P99_MS} ms",
        passed=p99 is not None and p99 < LATENCY_P99_MS,
        number=p99,
        remedy="too far from the exchange, a network that stalls, a machine too slow, or a clock that is off (see drift)",
    )


def _drift(evidence: Evidence) -> Check:
    most, count = evidence.rows(
        "SELECT max(abs(recv_ts_ns // 1000000 - (payload->>'serverTime')::BIGINT)), count(*) FROM raw "
        "WHERE kind = 'server_time'"
    )[0]
    return Check(
        name="clock drift",
        value="not measured" if most is None else f"{most:,} ms at most ({count:,} times)",
        limit=f"{DRIFT_MOST_MS} ms",
        passed=most is not None and most <= DRIFT_MOST_MS,
        number=most,
        remedy="set the machine's clock by NTP (chrony); not measured: /fapi/v1/time did not answer, see REST_URL",
    )


def _synced(evidence: Evidence) -> Check:
    begin_ns, end_ns = evidence.rows("SELECT min(recv_ts_ns), max(recv_ts_ns) FROM raw WHERE kind = 'frame'")[0]
    warm_ms = 0
    if begin_ns is not None:
        warm_sec = min(WARM_UP_SEC, WARM_UP_SHARE * (end_ns - begin_ns) / 1e9)
        warm_ms = begin_ns // 1_000_000 + int(1000 * warm_sec)
    shares = dict(
        evidence.rows(
            f"SELECT symbol, avg((book_state = 'synced')::INT) FROM quotes WHERE recv_ts_ms >= {warm_ms} GROUP BY symbol"
        )
    )
    worst = min(evidence.symbols, key=lambda symbol: shares.get(symbol, 0.0))
    share = shares.get(worst, 0.0)
    return Check(
        name="quotes with a synced book",
        value=f"{100 * share:.2f} % ({worst}, the least)",
        limit=f"{100 * SYNCED_LEAST:g} % once begun",
        passed=share >= SYNCED_LEAST,
        number=round(share, 6),
        remedy="books wait for snapshots: see `rest` of the recorder in summary.json, and gaps above; or too many symbols at once",
    )


def _rows(evidence: Evidence) -> Check:
    without: list[str] = []
    total = 0
    for kind in ON_DISK:
        counts = dict(evidence.rows(f"SELECT symbol, count(*) FROM {kind} GROUP BY symbol"))
        total += sum(counts.values())
        without += [f"{symbol} ({kind})" for symbol in evidence.symbols if not counts.get(symbol)]
    return Check(
        name="prices and cvd on disk",
        value=f"{total:,} rows" if not without else f"none of {', '.join(without)}",
        limit="rows of every symbol",
        passed=not without,
        number=total,
        remedy="no trade came: is the symbol listed and traded? A quiet one needs a longer --duration",
    )


def _schemas(evidence: Evidence) -> Check:
    wrong: list[str] = []
    files = 0
    for kind in ON_DISK:
        for path in sorted((evidence.out / PARQUET_ROOT).glob(f"date=*/symbol=*/kind={kind}/part-*.parquet")):
            files += 1
            if not pq.read_schema(path).equals(kinds()[kind].schema):
                wrong.append(path.name)
    return Check(
        name="schema of prices and cvd",
        value=f"{files:,} files" if not wrong else f"{len(wrong):,} of {files:,} differ, as {wrong[0]}",
        limit="as docs/lake.md",
        passed=files > 0 and not wrong,
        number=len(wrong),
        remedy="files of another version lie in the folder, choose an --out of its own"
        if files
        else "nothing was written, see the check before",
    )


def _lake(evidence: Evidence) -> Check:
    wrong: list[str] = evidence.summary["lake_disagreements"]
    return Check(
        name="lake holds what topics hold",
        value="yes" if not wrong else wrong[0],
        limit="yes",
        passed=not wrong,
        number=len(wrong),
        remedy="rows are missing in the lake: see logs/lake.log and the disk; do not go live with this",
    )


def _restarts(evidence: Evidence) -> Check:
    restarts = {name: each["count"] for name, each in evidence.summary["restarts"].items() if each["count"]}
    return Check(
        name="services restarted",
        value=", ".join(f"{name} {count}" for name, count in restarts.items()) or "0",
        limit="0",
        passed=not restarts,
        number=sum(restarts.values()),
        remedy="see the log of the service in the run's folder; memory?",
    )


CHECKS: Final[tuple[Callable[[Evidence], Check], ...]] = (
    _whole,
    _journal,
    _trades,
    _chains,
    _reconnects,
    _duplicates,
    _latency,
    _drift,
    _synced,
    _rows,
    _schemas,
    _lake,
    _restarts,
)
