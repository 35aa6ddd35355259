"""What is wrong is refused at once: one line with what, value and remedy, exit code 2, nothing left behind."""

from __future__ import annotations

import gzip
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from run_helpers import (
    ALTS,
    ROOT,
    call,
    command,
    delete_topics,
    environment,
    refused,
    run_arguments,
)

from tests.serving import registry

NOWHERE = "127.0.0.1:1"


@pytest.fixture(scope="module")
def listening() -> Iterator[str]:
    """An address at which something listens: what is refused here is refused before any broker is asked."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A capture of two frames."""
    path = tmp_path / "small.txt"
    frame = '{"stream":"btcusdt@aggTrade","data":{"e":"aggTrade","s":"BTCUSDT","T":1}}'
    path.write_text("".join(f"{1_700_000_000_000_000_000 + number} market {frame}\n" for number in range(2)))
    return path


def truncated(path: Path) -> None:
    path.write_bytes(gzip.compress(b"1 market {}\n" * 5000)[:40])


BAD_CAPTURES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "No such file"),
    "folder": (lambda path: path.mkdir(), "Is a directory"),
    "empty": (lambda path: path.write_bytes(b""), "holds no frame"),
    "text": (lambda path: path.write_text("hello\n"), "line 1 is not of the capture format"),
    "binary": (lambda path: path.write_bytes(bytes(range(256)) * 20), "not of the capture format"),
    "truncated gzip": (truncated, "truncated gzip"),
    "damaged gzip": (lambda path: path.write_bytes(gzip.compress(b"1 market {}\n" * 9)[:12] + b"\xff" * 90), "gzip"),
    "cut text": (lambda path: path.write_text('1 market {"stream":"btcusdt@aggTr'), "stops inside frame 1"),
}


@pytest.mark.parametrize("name", BAD_CAPTURES)
def test_bad_captures(name: str, listening: str, tmp_path: Path) -> None:
    make, words = BAD_CAPTURES[name]
    capture, out = tmp_path / "capture", tmp_path / "out"
    make(capture)
    refused(call(listening, *run_arguments(capture, out)), str(capture), words)
    assert not out.exists()


def test_a_real_capture_that_was_cut(listening: str, captures: Path, tmp_path: Path) -> None:
    whole = (captures / ALTS).read_bytes()
    cut = tmp_path / "cut.gz"
    cut.write_bytes(whole[: len(whole) // 2])
    done = refused(
        call(listening, *run_arguments(cut, tmp_path / "out")), str(cut), "truncated gzip", "record it again"
    )
    assert "inside frame" in done
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--speed", "fast"], ("--speed is 'fast'", "`max` or a factor")),
        (["--speed", "0"], ("--speed is '0'",)),
        (["--speed", "nan"], ("--speed is 'nan'",)),
        (["--duration", "0"], ("--duration is 0",)),
        (["--duration", "nan"], ("--duration is nan", "above 0")),
        (["--duration", "inf"], ("--duration is inf",)),
        (["--symbols", "DOGEUSDT"], ("symbol DOGEUSDT", "holds BTCUSDT")),
        (["--source", "live"], ("--capture goes with --source capture or sim",)),
    ],
)
def test_wrong_arguments(
    arguments: list[str], words: tuple[str, ...], listening: str, small: Path, tmp_path: Path
) -> None:
    refused(call(listening, *run_arguments(small, tmp_path / "out"), *arguments), *words)
    assert not (tmp_path / "out").exists()


def test_arguments_that_need_others(listening: str) -> None:
    refused(call(listening, "run", "--source", "capture"), "--source capture needs --capture FILE")
    refused(call(listening, "run", "--source", "sim", "--exit-at-end"), "--exit-at-end needs --capture FILE")
    refused(call(listening, "run", "--source", "sim", "--resume"), "--resume needs --out DIR")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("Z_MODE", "foo", ("Z_MODE=foo", "z_mode", "delta", "level")),
        ("SCALE_MODE", "big", ("SCALE_MODE=big", "scale_mode")),
        ("PARQUET_ROTATE_SEC", "0", ("PARQUET_ROTATE_SEC=0", ">= 1")),
        ("PARQUET_ROTATE_SEC", "often", ("PARQUET_ROTATE_SEC=often", "`int`")),
        ("HALF_LIFE_SEC", "-3", ("HALF_LIFE_SEC=-3", "> 0")),
        ("METRICS_PORT", "99999", ("METRICS_PORT=99999", "<= 65535")),
        ("LOG_LEVEL", "loud", ("LOG_LEVEL=loud", "DEBUG, INFO")),
        ("SYMBOLS", "btc usdt", ("BTC USDT",)),
        ("ORDERFLOW_PRESET", "none-such", ("ORDERFLOW_PRESET is 'none-such'", "v13")),
        ("ORDERFLOW_CONFIG", "/no/such/file", ("/no/such/file", "can't be read")),
        ("TOPIC_PREFIX", "my desk/", ("TOPIC_PREFIX is 'my desk/'", "letters, digits")),
        ("SCHEMA_REGISTRY_URL", f"http://{NOWHERE}", (f"SCHEMA_REGISTRY_URL is 'http://{NOWHERE}'", "unset it")),
        ("KAFKA_BOOTSTRAP", NOWHERE, (f"KAFKA_BOOTSTRAP is '{NOWHERE}'", "start that broker, or unset it")),
        ("KAFKA_BOOTSTRAP", "nonsense", ("KAFKA_BOOTSTRAP is 'nonsense'", "host:port")),
        ("KAFKA_BOOTSTRAP", "host:99999", ("KAFKA_BOOTSTRAP is 'host:99999'", "host:port")),
    ],
)
def test_wrong_environment(
    name: str, value: str, words: tuple[str, ...], listening: str, small: Path, tmp_path: Path
) -> None:
    line = refused(call(listening, *run_arguments(small, tmp_path / "out"), **{name: value}), *words)
    assert "typing." not in line
    assert not (tmp_path / "out").exists()


def test_out_that_is_not_empty_or_no_folder(listening: str, small: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "theirs").write_text("keep me")
    refused(call(listening, *run_arguments(small, taken)), str(taken), "not empty", "--resume")
    assert [path.name for path in taken.iterdir()] == ["theirs"]
    refused(call(listening, *run_arguments(small, taken / "theirs")), "is a file", "name a folder")
    refused(call(listening, *run_arguments(small, taken / "theirs" / "below")), "can't be made")
    assert (taken / "theirs").read_text() == "keep me"


def test_resume_of_what_is_no_run(listening: str, small: Path, tmp_path: Path) -> None:
    refused(call(listening, *run_arguments(small, tmp_path), "--resume"), str(tmp_path), "holds no run")


def test_the_command_itself_prints_one_line_and_exits_with_2(listening: str, tmp_path: Path) -> None:
    """As a process: what the other tests see in theirs is what a shell sees."""
    refused(command(listening, *run_arguments(tmp_path / "missing", tmp_path / "out")), "No such file")


# -- a service started alone ------------------------------------------------------------------------------------------


def service(name: str, bootstrap: str, **settings: str) -> tuple[int, list[dict[str, str]]]:
    """`python -m services.NAME`: exit code and its log lines."""
    done = subprocess.run(
        [sys.executable, "-m", f"services.{name}"],
        env=environment(bootstrap, **settings),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=450,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, [json.loads(line) for line in done.stderr.splitlines()]


def test_a_service_names_a_wrong_setting(tmp_path: Path) -> None:
    code, lines = service("cvd", NOWHERE, Z_MODE="foo")
    assert code == 2
    assert [line["level"] for line in lines] == ["ERROR"]
    assert "Z_MODE=foo" in lines[0]["message"]


def test_a_service_names_the_broker_that_does_not_answer() -> None:
    code, lines = service("ofi", NOWHERE)
    assert code == 2
    assert [line["message"] for line in lines[:-1] if line["level"] != "INFO"] == []
    assert lines[-1]["level"] == "ERROR"
    assert f"no Kafka broker answered at '{NOWHERE}'" in lines[-1]["message"]
    assert "set KAFKA_BOOTSTRAP" in lines[-1]["message"]


@pytest.mark.kafka
def test_a_service_names_a_port_that_is_taken(kafka_bootstrap: str, tmp_path: Path) -> None:
    prefix = f"taken{os.getpid()}."
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        with registry(tmp_path) as url:
            settings = {"TOPIC_PREFIX": prefix, "SCHEMA_REGISTRY_URL": url}
            done = command(kafka_bootstrap, "init", **settings)
            assert done.code == 0, done.stderr
            try:
                code, lines = service("ofi", kafka_bootstrap, METRICS_PORT=port, **settings)
            finally:
                delete_topics(kafka_bootstrap, prefix)
    assert code == 2
    assert f"METRICS_PORT={port}" in lines[-1]["message"]
    assert "choose another, or 0 for any" in lines[-1]["message"]
