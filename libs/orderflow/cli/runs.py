"""Runs on disk: where a run's data lie, and how its broker and registry are reached again afterwards."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import msgspec

from orderflow.errors import OrderflowError

RUN_FILE: Final = "run.json"
RUNS_DIR: Final = "runs"


class RunInfo(msgspec.Struct, kw_only=True):
    """What `DIR/run.json` holds."""

    run_id: str
    source: str
    topic_prefix: str
    bootstrap: str
    registry_url: str
    embedded_kafka: bool
    """The broker's data lie in DIR/kafka, and it runs only while something needs it."""
    embedded_registry: bool
    environment: dict[str, str] = {}
    """Settings by environment name, so that a later verification computes with the same ones."""
    config_fingerprint: str = ""
    """Of the effective settings at the start: files may have changed since."""


def save(out: Path, info: RunInfo) -> None:
    """Write `DIR/run.json` atomically."""
    temporary = out / f".{RUN_FILE}.{os.getpid()}"
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(info)))
    temporary.replace(out / RUN_FILE)


def load(out: Path) -> RunInfo:
    """Read `DIR/run.json`.

    Raises
    ------
    OrderflowError
        There is none, or it is damaged.
    """
    try:
        return msgspec.json.decode((out / RUN_FILE).read_bytes(), type=RunInfo)
    except OSError as error:
        raise OrderflowError(f"{out} holds no run ({RUN_FILE}: {error.strerror}); name one with --run DIR") from error
    except msgspec.MsgspecError as error:
        raise OrderflowError(f"{out / RUN_FILE} is damaged: {error}") from error


def runs_dir() -> Path:
    """Where runs without --out lie: ORDERFLOW_RUNS, or `runs` here."""
    return Path(os.environ.get("ORDERFLOW_RUNS", RUNS_DIR))


def note_latest(out: Path) -> None:
    """Remember a run as the newest, wherever its folder lies."""
    pointer = runs_dir() / "latest.txt"
    pointer.parent.mkdir(parents=True, exist_ok=True)
    temporary = pointer.with_name(f".latest.{os.getpid()}")
    temporary.write_text(str(out.resolve()), "utf-8")
    temporary.replace(pointer)


def default_out() -> Path:
    """Folder of the newest run.

    Raises
    ------
    OrderflowError
        Nothing has run here yet.
    """
    try:
        out = Path((runs_dir() / "latest.txt").read_text("utf-8").strip())
    except OSError as error:
        raise OrderflowError(
            f"no run found under {runs_dir()}: start one with `orderflow run`, or name one with --run DIR"
        ) from error
    if not out.is_dir():
        raise OrderflowError(f"the newest run {out} is gone: name another with --run DIR")
    return out


def resolve(run: str | None) -> Path:
    """The folder named, or that of the newest run; absolute, for the broker and the registry are started elsewhere."""
    return Path(run).resolve() if run else default_out()


async def reach(stack: AsyncExitStack, out: Path, info: RunInfo) -> tuple[str, str]:
    """Bootstrap and registry URL of a run; starts its own broker and registry where they are not up.

    Whatever is started here is stopped when `stack` closes.
    """
    from orderflow.cli import backing

    bootstrap = info.bootstrap
    if info.embedded_kafka:
        bootstrap = await backing.ensure_kafka(stack, out / "kafka", info.bootstrap)
    registry_url = info.registry_url
    if info.embedded_registry:
        registry_url = await backing.ensure_registry(stack, out / "registry", info.registry_url)
    return bootstrap, registry_url
