"""An outside judge of runs: knows the command line, the topics, their rules and the lake's folders; nothing inside.

Topics are read with plain aiokafka and compared by the canonical view: markers left out, `(seq, sub)` strictly rising,
the journal by epoch; key and Avro body, without the registry's id in front. Files are compared by sha256.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from tests.waiting import wait_for

ROOT = Path(__file__).resolve().parents[1]
ALTS = "usdm_4alts_20210722_realagg.gz"
MAJORS = "usdm_btc_eth_20240718.gz"
PARTITIONS = 12
JOURNAL = "market.journal"
DERIVED = (
    "market.ticks",
    "market.rows",
    "market.events",
    "quality.rejects",
    "features.ofi",
    "features.cvd",
    "features.fusion",
    "features.events",
    "signals",
)
SERVICES = ("ingestion", "ofi", "cvd", "fusion", "signal", "sinks", "lake")
RUN_SEC = 900.0
STATE_SEC = 300.0
"""Guards against hanging, far above what a quiet machine needs: no test is about time."""
POLL_SEC = 0.02
FILE_TREES = ("data", "signals")

Records = list[tuple[bytes, bytes]]
"""(key, Avro body) of one topic partition."""
View = dict[tuple[str, int], Records]
"""The canonical view of every partition of every topic."""


# -- the command line -------------------------------------------------------------------------------------------------


@dataclass
class Finished:
    """A command that has ended."""

    code: int
    stdout: str
    stderr: str


def environment(bootstrap: str, **more: str) -> dict[str, str]:
    """A clean environment for a command: nothing of the developer's own settings leaks in."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR", "JAVA_HOME") if name in os.environ}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "libs")]),
        "KAFKA_BOOTSTRAP": bootstrap,
        "ORDERFLOW_RUNS": str(Path(tempfile.gettempdir()) / f"orderflow-test-runs-{os.getpid()}"),
        **more,
    }


def command(
    bootstrap: str, *arguments: str, timeout_sec: float = RUN_SEC, cwd: Path | None = None, **settings: str
) -> Finished:
    """`orderflow ARGUMENTS`, waited for."""
    done = subprocess.run(
        [sys.executable, "-m", "orderflow.cli.main", *arguments],
        env=environment(bootstrap, **settings),
        cwd=cwd or ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_sec,
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def call(bootstrap: str, *arguments: str, **settings: str) -> Finished:
    """`orderflow ARGUMENTS` in this process: the same code without the second that an interpreter takes to start."""
    from orderflow.cli.main import main

    stdout, stderr = io.StringIO(), io.StringIO()
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(environment(bootstrap, **settings))
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            code = main(list(arguments))
    finally:
        os.environ.clear()
        os.environ.update(before)
    return Finished(code, stdout.getvalue(), stderr.getvalue())


def refused(done: Finished, *words: str) -> str:
    """Exit code 2 and one line for a person, which holds each of `words`; returns the line."""
    assert done.code == 2, (done.code, done.stdout, done.stderr)
    assert "Traceback" not in done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("orderflow: ")
    for word in words:
        assert word in lines[0], (word, lines[0])
    return lines[0]


# -- a run ------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A run of the pipeline, under way or over."""

    out: Path
    bootstrap: str
    process: subprocess.Popen[str]
    output: str = ""
    killed: list[str] = field(default_factory=list)

    @property
    def prefix(self) -> str:
        prefix: str = json.loads((self.out / "run.json").read_text("utf-8"))["topic_prefix"]
        return prefix

    @property
    def summary(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.out / "summary.json").read_text("utf-8"))
        return content

    def finish(self, timeout_sec: float = RUN_SEC) -> int:
        """Wait for the end; returns the exit code."""
        self.output += self.process.communicate(timeout=timeout_sec)[0]
        return self.process.returncode

    def status(self, service: str) -> dict[str, Any]:
        """A service's own page; empty while it is down or starting."""
        try:
            address = json.loads((self.out / "status" / f"{service}.json").read_text("utf-8"))
            with urllib.request.urlopen(f"http://127.0.0.1:{address['port']}/status", timeout=1) as answer:
                content: dict[str, Any] = json.load(answer)
        except (OSError, ValueError, KeyError):
            return {}
        return content if content.get("pid") == address["pid"] else {}

    def until(
        self, service: str, holds: Callable[[dict[str, Any]], bool], timeout_sec: float = STATE_SEC
    ) -> dict[str, Any]:
        """Poll a service's page until something holds of it."""
        status: dict[str, Any] = {}

        def look() -> bool:
            nonlocal status
            status = self.status(service)
            return bool(status and holds(status)) or self.process.poll() is not None

        if wait_for(look, timeout_sec, POLL_SEC) and self.process.poll() is None:
            return status
        ended = f"the run ended with {self.process.poll()}: " if self.process.poll() is not None else ""
        raise AssertionError(f"{service} did not come to the state that was waited for: {ended}{status}")

    def signal(self, service: str, number: signal.Signals, pid: int | None = None) -> int:
        """Send a signal to a service's process; returns its id."""
        pid = pid or int(json.loads((self.out / "status" / f"{service}.json").read_text("utf-8"))["pid"])
        os.kill(pid, number)
        return pid

    def kill_at_work(self, service: str) -> int:
        """SIGKILL once it has processed something and not everything; returns the id of the process."""
        status = self.until(service, at_work)
        pid = self.signal(service, signal.SIGKILL, status["pid"])
        self.killed.append(service)
        return pid


def at_work(status: Mapping[str, Any]) -> bool:
    """Whether a service has processed something and still has work before it."""
    records = status.get("recorder", {}).get("journal_records", status["records_in"])
    return bool(status["ready"] and status["records_in"] > 30 and records > 30 and not status["drained"])


def run_arguments(capture: Path, out: Path, speed: str = "max") -> list[str]:
    what = ["run", "--source", "capture", "--capture", str(capture), "--speed", speed]
    return [*what, "--exit-at-end", "--no-view", "--out", str(out)]


def start_run(bootstrap: str, arguments: list[str], out: Path, **settings: str) -> Run:
    """Start `orderflow ARGUMENTS` in the background."""
    process = subprocess.Popen(
        [sys.executable, "-m", "orderflow.cli.main", *arguments],
        env=environment(bootstrap, **settings),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return Run(out, bootstrap, process)


@contextmanager
def running(bootstrap: str, capture: Path, out: Path, speed: str = "max", **settings: str) -> Iterator[Run]:
    """A run of a capture; ended, and its topics removed, at the exit of the block."""
    run = start_run(bootstrap, run_arguments(capture, out, speed), out, **settings)
    try:
        yield run
    finally:
        end(run)


def end(run: Run) -> None:
    """Stop what still runs and remove the topics: a broker for the whole test run must not fill up."""
    if run.process.poll() is None:
        run.process.terminate()
        try:
            run.process.wait(30)
        except subprocess.TimeoutExpired:
            run.process.kill()
            run.process.wait()
    if (run.out / "run.json").exists():
        delete_topics(run.bootstrap, run.prefix)


_shared: dict[tuple[str, str], Run] = {}


def shared_run(bootstrap: str, captures: Path, name: str, folder: pytest.TempPathFactory) -> Run:
    """The undisturbed run of a capture at full speed, made once for the whole test run."""
    if (bootstrap, name) not in _shared:
        out = folder.mktemp("undisturbed") / "run"
        run = start_run(bootstrap, run_arguments(captures / name, out), out)
        code = run.finish()
        assert code == 0, run.output
        _shared[bootstrap, name] = run
    return _shared[bootstrap, name]


# -- topics -----------------------------------------------------------------------------------------------------------


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """An Avro long at a position: (value, position behind it)."""
    number = shift = 0
    while True:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return (number >> 1) ^ -(number & 1), at
        shift += 7


def canonical(topic: str, records: list[Any]) -> Records:
    """The rule of the canonical view for one partition."""
    journal = topic == JOURNAL
    view: Records = []
    newest_epoch, last = 0, (0, 0) if journal else (-1, -1)
    for record in records:
        if record.value is None:
            continue
        seq, at = _varint(record.value, 5)
        second, _ = _varint(record.value, at)
        if journal:
            epoch = int(dict(record.headers)["epoch"])
            if epoch < newest_epoch:
                continue
            newest_epoch = epoch
            if seq < 0:  # an `open`
                continue
            if seq > last[0]:
                assert seq == last[0] + 1, f"the journal has a hole: {seq} after {last[0]}"
        place = (seq, 0) if journal else (seq, second)
        if place > last:
            last = place
            view.append((record.key, record.value[5:]))
    return view


async def _read_all(bootstrap: str, prefix: str, topics: tuple[str, ...]) -> dict[tuple[str, int], list[Any]]:
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, enable_auto_commit=False, auto_offset_reset="earliest")
    await consumer.start()
    try:
        tps = [TopicPartition(prefix + topic, number) for topic in topics for number in range(PARTITIONS)]
        consumer.assign(tps)
        ends = await consumer.end_offsets(tps)
        found: dict[TopicPartition, list[Any]] = {tp: [] for tp in tps}
        await consumer.seek_to_beginning(*tps)
        behind = {tp for tp in tps if ends[tp]}
        deadline = time.monotonic() + 60
        while behind:
            assert time.monotonic() < deadline, f"topics can't be read to their ends: {behind}"
            for tp, records in (await consumer.getmany(timeout_ms=200)).items():
                found[tp].extend(records)
            for tp in list(behind):
                if await consumer.position(tp) >= ends[tp]:
                    behind.discard(tp)
        return {(tp.topic.removeprefix(prefix), tp.partition): records for tp, records in found.items()}
    finally:
        await consumer.stop()


def physical(bootstrap: str, prefix: str, topics: tuple[str, ...] = (JOURNAL, *DERIVED)) -> dict[Any, list[Any]]:
    """Everything that lies in the topics, duplicates and markers included: (topic, partition) -> records."""
    return asyncio.run(_read_all(bootstrap, prefix, topics))


def topics_of(run: Run) -> View:
    """The canonical view of a run's topics."""
    return {place: canonical(place[0], found) for place, found in physical(run.bootstrap, run.prefix).items()}


def assert_same_topics(one: View, other: View) -> None:
    """Every record of every topic partition is the same, key and body; names the first that is not."""
    assert one.keys() == other.keys()
    for place in sorted(one):
        for number, (left, right) in enumerate(zip(one[place], other[place], strict=False)):
            assert left == right, f"{place}: record {number} differs"
        assert len(one[place]) == len(other[place]), place


async def _copy(run: Run, target: str, change: Callable[[str, int, bytes], bytes]) -> None:
    found = await _read_all(run.bootstrap, run.prefix, (JOURNAL, *DERIVED))
    admin = AIOKafkaAdminClient(bootstrap_servers=run.bootstrap)
    producer = AIOKafkaProducer(bootstrap_servers=run.bootstrap, enable_idempotence=True)
    await admin.start()
    await producer.start()
    try:
        await admin.create_topics([NewTopic(target + topic, PARTITIONS, 1) for topic in (JOURNAL, *DERIVED)])
        for (topic, partition), records in found.items():
            for record in records:
                value = record.value if record.value is None else change(topic, partition, record.value)
                await producer.send(
                    target + topic, value, record.key, partition, record.timestamp, list(record.headers)
                )
        await producer.flush()
    finally:
        await producer.stop()
        await admin.close()


def copy_topics(run: Run, target: str, change: Callable[[str, int, bytes], bytes]) -> None:
    """Copy a run's topics under another prefix; `change(topic, partition, value)` gives each record's new value."""
    asyncio.run(_copy(run, target, change))


async def _delete(bootstrap: str, prefix: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        ours = [name for name in await admin.list_topics() if name.startswith(prefix)]
        if ours:
            await admin.delete_topics(ours)
    finally:
        await admin.close()


def delete_topics(bootstrap: str, prefix: str) -> None:
    assert prefix, "an empty prefix would remove every topic"
    asyncio.run(_delete(bootstrap, prefix))


# -- files ------------------------------------------------------------------------------------------------------------


def files_of(out: Path) -> dict[str, str]:
    """sha256 of every data file of a run, by path below its folder."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for tree in FILE_TREES
        for path in sorted((out / tree).rglob("*"))
        if path.is_file()
    }


def assert_same_run(run: Run, undisturbed: Run) -> None:
    """The same topics and the same files, byte for byte."""
    assert_same_topics(topics_of(run), topics_of(undisturbed))
    files, expected = files_of(run.out), files_of(undisturbed.out)
    assert files.keys() == expected.keys()
    assert [path for path in files if files[path] != expected[path]] == []


def lake(out: Path, sql: str) -> list[tuple[Any, ...]]:
    """Ask the Parquet files themselves: `{kind}` in the SQL stands for all files of a kind."""
    with_files = re.sub(
        r"\{(\w+)\}",
        lambda found: (
            f"read_parquet('{out}/data/ofi_cvd/date=*/symbol=*/kind={found[1]}/*.parquet', hive_partitioning = false)"
        ),
        sql,
    )
    with duckdb.connect() as connection:
        return connection.execute(with_files).fetchall()
