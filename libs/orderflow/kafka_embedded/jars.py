"""The broker's jars: exactly those of `infra/kafka/jars.lock`, fetched once into the user's cache, checked by sha256.

A cache that is complete needs no network and does not even import the resolver. A stamp of sizes and modification
times saves hashing 43 MB at every start; whatever differs from it is hashed again.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from orderflow.errors import OrderflowError
from orderflow.paths import KAFKA_LOCK

logger = logging.getLogger(__name__)

LOCK_FILE: Final = KAFKA_LOCK / "jars.lock"
STAMP: Final = "verified.json"
STAGING_PREFIX: Final = ".fetch-"
FETCH_THREADS: Final = 8
FETCH_ATTEMPTS: Final = 2
FETCH_TIMEOUT_SEC: Final = 15
LOCK_PATIENCE_SEC: Final = 300.0
LOCK_POLL_SEC: Final = 0.1
SHA256_HEX_CHARS: Final = 64
BROKER: Final = "org.apache.kafka:kafka_2.13"


class JarsError(OrderflowError):
    """The jars can't be had: lock damaged, no network, or a jar that is not the one of the lock."""


@dataclass(frozen=True, slots=True)
class Jar:
    """One line of the lock."""

    group: str
    artifact: str
    version: str
    sha256: str

    @property
    def coordinate(self) -> str:
        return f"{self.group}:{self.artifact}:{self.version}"

    @property
    def filename(self) -> str:
        return f"{self.artifact}-{self.version}.jar"


Fetcher = Callable[[Jar, Path], Path]
"""Downloads one jar into a folder and returns where it lies. Raises OSError or RuntimeError. Called from threads."""


def read_lock(path: Path = LOCK_FILE) -> list[Jar]:
    """The jars of a lock, in its order, which is that of the class path. A line is `group:artifact:version sha256`.

    Raises
    ------
    JarsError
        The file is missing, a line is malformed, or two jars would have the same file name.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise JarsError(f"{path} can't be read ({error.strerror}): restore it from the repository") from error
    jars = [
        _parse(path, number, line)
        for number, line in enumerate(lines, start=1)
        if line.strip() and not line.startswith("#")
    ]
    if not jars:
        raise JarsError(f"{path} names no jars: restore it from the repository")
    names = [jar.filename for jar in jars]
    for name in names:
        if names.count(name) > 1:
            raise JarsError(f"{path} names {name} more than once: every jar must have a file name of its own")
    return jars


def _parse(path: Path, number: int, line: str) -> Jar:
    coordinate, _, digest = line.strip().partition(" ")
    parts = coordinate.split(":")
    plain = all(part and "/" not in part and part.strip(".") for part in parts)
    hexadecimal = len(digest) == SHA256_HEX_CHARS and set(digest) <= set("0123456789abcdef")
    if len(parts) != 3 or not plain or not hexadecimal:
        raise JarsError(
            f"{path}:{number}: {line!r} is not `group:artifact:version sha256` (64 lower-case hexadecimal digits)"
        )
    return Jar(parts[0], parts[1], parts[2], digest)


def cache_dir() -> Path:
    """Where downloads are kept: ORDERFLOW_CACHE, or `orderflow` in XDG_CACHE_HOME or in ~/.cache."""
    own = os.environ.get("ORDERFLOW_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "orderflow"


def jars_dir(lock: Path = LOCK_FILE) -> Path:
    """The folder of the cache for this very lock: another lock never finds this one's jars."""
    jars = read_lock(lock)
    version = next((jar.version for jar in jars if f"{jar.group}:{jar.artifact}" == BROKER), "unknown")
    content = "\n".join(f"{jar.coordinate} {jar.sha256}" for jar in jars)
    return cache_dir() / "kafka" / f"{version}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def ensure_jars(lock: Path = LOCK_FILE, fetch: Fetcher | None = None) -> list[Path]:
    """Every jar of the lock in the cache, checked; what is missing or damaged is fetched.

    Parameters
    ----------
    fetch
        How one jar is downloaded; jgo by default.

    Raises
    ------
    JarsError
        The lock is damaged, a download failed, or a jar still has another sha256 after it was fetched anew.
    """
    jars = read_lock(lock)
    folder = jars_dir(lock)
    try:
        if _unsound(folder, jars):
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder.parent / f".{folder.name}.lock"):
                _repair(folder, jars, fetch or fetch_with_jgo)
    except OSError as error:
        raise JarsError(f"the cache {folder} can't be used: {error}; set ORDERFLOW_CACHE to another folder") from error
    return [folder / jar.filename for jar in jars]


def damaged_jars(lock: Path = LOCK_FILE) -> list[Jar]:
    """Jars of the lock that are missing in the cache or not what the lock says; nothing is fetched."""
    return _unsound(jars_dir(lock), read_lock(lock))


def _repair(folder: Path, jars: Sequence[Jar], fetch: Fetcher) -> None:
    unsound = _unsound(folder, jars)  # another process may have fetched them while this one waited for the lock
    for leftover in folder.glob(f"{STAGING_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if unsound:
        logger.info("fetching %d of the %d jars of Apache Kafka into %s", len(unsound), len(jars), folder)
        _fetch_all(folder, unsound, fetch)
        _write_stamp(folder, jars)


def _unsound(folder: Path, jars: Sequence[Jar]) -> list[Jar]:
    """Jars that are missing or not what the lock says. Hashes only what differs from the stamp, and renews it."""
    stamp = _read_stamp(folder)
    unsound: list[Jar] = []
    hashed = False
    for jar in jars:
        path = folder / jar.filename
        try:
            if stamp.get(jar.filename) == _identity(path):
                continue
            hashed = True
            if file_sha256(path) == jar.sha256:
                continue
            logger.warning("%s is damaged and is fetched anew", path)
        except FileNotFoundError:
            pass
        unsound.append(jar)
    if hashed and not unsound:
        _try_stamp(folder, jars)
    return unsound


def _fetch_all(folder: Path, jars: Sequence[Jar], fetch: Fetcher) -> None:
    with ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix="kafka-jars") as threads:
        futures = [threads.submit(_fetch_one, folder, jar, fetch) for jar in jars]
        try:
            for future in futures:
                future.result()
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise


def _fetch_one(folder: Path, jar: Jar, fetch: Fetcher) -> None:
    """Download beside the cache, check, then rename: the cache never holds half a jar or a wrong one."""
    problem = ""
    for _ in range(FETCH_ATTEMPTS):
        staging = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=folder))
        try:
            path = fetch(jar, staging)
            found = file_sha256(path)
            if found == jar.sha256:
                path.replace(folder / jar.filename)
                return
            problem = (
                f"{jar.filename} ({jar.coordinate}) was fetched {FETCH_ATTEMPTS} times and is not the jar of the lock: "
                f"sha256 expected {jar.sha256}, found {found}; look at what stands between this machine and the Maven "
                "repository"
            )
        except (OSError, RuntimeError) as error:
            problem = (
                f"{jar.coordinate} can't be downloaded ({_brief(error)}): check the network, HTTPS_PROXY and "
                f"REQUESTS_CA_BUNDLE, or copy {folder} from a machine that has it"
            )
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    (folder / jar.filename).unlink(missing_ok=True)
    raise JarsError(problem)


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}{'...' if len(text) > 160 else ''}"


def fetch_with_jgo(jar: Jar, into: Path) -> Path:
    """Download one jar through jgo: Maven Central, or the repositories of the user's jgo configuration.

    The lock already lists the whole closure, so nothing is left to resolve and no POM is read.

    Raises
    ------
    OSError, RuntimeError
        No connection, or no such jar.
    """
    from jgo.config import GlobalSettings
    from jgo.constants import MAVEN_CENTRAL_URL
    from jgo.maven import MavenContext

    _adopt_ca_bundle()
    context = MavenContext(
        repo_cache=into,
        remote_repos={"central": MAVEN_CENTRAL_URL, **GlobalSettings.load().repositories},
        timeout=FETCH_TIMEOUT_SEC,
    )
    path: Path = context.project(jar.group, jar.artifact).at_version(jar.version).artifact().resolve()
    return path


def _adopt_ca_bundle() -> None:
    """jgo's HTTP client knows REQUESTS_CA_BUNDLE and CURL_CA_BUNDLE only; OpenSSL's own variable must do as well."""
    bundle = os.environ.get("SSL_CERT_FILE")
    if bundle and not os.environ.get("CURL_CA_BUNDLE"):
        os.environ.setdefault("REQUESTS_CA_BUNDLE", bundle)


def file_sha256(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _read_stamp(folder: Path) -> dict[str, tuple[int, int]]:
    try:
        return msgspec.json.decode((folder / STAMP).read_bytes(), type=dict[str, tuple[int, int]])
    except (OSError, msgspec.MsgspecError):
        return {}  # it only saves work: without it everything is hashed


def _write_stamp(folder: Path, jars: Sequence[Jar]) -> None:
    content = msgspec.json.encode({jar.filename: _identity(folder / jar.filename) for jar in jars})
    write_atomically(folder / STAMP, content)


def _try_stamp(folder: Path, jars: Sequence[Jar]) -> None:
    try:
        _write_stamp(folder, jars)
    except OSError as error:
        logger.debug("no stamp in %s: %s", folder, error)  # a read-only cache is as good, only slower to check


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path` and rename, so that a reader or a crash never meets half of it."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("wb") as file:
        deadline = time.monotonic() + LOCK_PATIENCE_SEC
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise JarsError(
                        f"another process has been filling {path.parent} for {LOCK_PATIENCE_SEC:g} s: end it, then try again"
                    ) from None
                time.sleep(LOCK_POLL_SEC)
        yield
