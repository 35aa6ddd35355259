"""Every line of docs/taps.md for kcat, run as it stands there against a live run; and every topic read whole."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from orderflow.paths import ROOT
from orderflow.topics import TOPICS
from run_helpers import Run, end, physical, start_run

from tests.serving import registry

PAGE = (ROOT / "docs" / "taps.md").read_text("utf-8")
LINES = re.findall(r"^kcat .*$", PAGE, re.MULTILINE)
AVRO_TOPICS = [topic.name for topic in TOPICS if topic.schema is not None]
KCAT_SEC = 300.0


def with_avro() -> bool:
    found = shutil.which("kcat")
    return bool(found) and b"Avro" in subprocess.run([str(found), "-V"], capture_output=True, check=False).stdout


pytestmark = [
    pytest.mark.kafka,
    pytest.mark.xdist_group("taps"),  # one run for all of them
    pytest.mark.skipif(not with_avro(), reason="no kcat with Avro on this machine"),
    pytest.mark.skipif(shutil.which("jq") is None, reason="no jq on this machine"),
]


@dataclass
class Live:
    """A run under way, with the registry that outlives it."""

    run: Run
    url: str


@pytest.fixture(scope="module")
def live(kafka_bootstrap: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("taps")
    with registry(folder / "registry") as url:
        out = folder / "run"
        arguments = ["run", "--source", "sim", "--duration", "600", "--no-view", "--out", str(out)]
        run = start_run(kafka_bootstrap, arguments, out, SCHEMA_REGISTRY_URL=url, SNAPSHOT_SEC="1")
        try:
            run.until("signal", lambda status: status.get("records_in", 0) > 200)
            yield Live(run, url)
        finally:
            end(run)


def shell(live: Live, line: str) -> str:
    """What a line prints, with the names that the page sets."""
    names = {"B": live.run.bootstrap, "R": live.url, "P": live.run.prefix}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        env=os.environ | names,
        capture_output=True,
        text=True,
        timeout=KCAT_SEC,
        check=False,
    )
    assert done.returncode == 0, (line, done.stdout[-500:], done.stderr[-1000:])
    return done.stdout


def test_the_page_has_a_line_for_every_topic() -> None:
    for topic in AVRO_TOPICS:
        assert any(f"-t ${{P}}{topic} " in line and "value=avro" in line for line in LINES), topic
    assert any("-t ${P}state." in line for line in LINES)


@pytest.mark.parametrize("line", LINES)
def test_a_line_of_the_page_works_as_it_stands(live: Live, line: str) -> None:
    if "control.commands" in line or "jq -c 'select" in line:  # there may be none
        shell(live, line)
        return
    line = line.replace("-c 40", "-c 4")  # quiet topics: no more is sure to be there soon
    printed = shell(live, line)
    assert printed
    if "value=avro" in line and "jq" not in line:
        for text in filter(None, printed.splitlines()):
            assert json.loads(text)["seq"] >= -1


def test_variables_can_be_taken_from_a_run(live: Live) -> None:
    (line,) = (line for line in PAGE.splitlines() if line.startswith("B=$(jq"))
    printed = shell(live, f'D={live.run.out}; {line}; echo "$B $R $P"')
    assert printed.split() == [live.run.bootstrap, live.url, live.run.prefix]


def test_kcat_reads_every_record_of_every_topic(live: Live) -> None:
    """After the end, so that both read the same; the count of values, and each one decoded."""
    live.run.process.send_signal(signal.SIGINT)
    assert live.run.finish() == 0, live.run.output
    topics = tuple(name for name in AVRO_TOPICS if name != "control.commands")
    held = physical(live.run.bootstrap, live.run.prefix, topics)
    for topic in topics:
        expected = sum(
            record.value is not None for (name, _), records in held.items() if name == topic for record in records
        )
        printed = shell(live, f"kcat -b $B -s value=avro -r $R -C -q -e -t ${{P}}{topic} -o beginning")
        decoded = [json.loads(text) for text in printed.splitlines() if text]
        assert len(decoded) == expected, topic
        assert all("seq" in record for record in decoded), topic
