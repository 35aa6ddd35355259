"""`orderflow doctor`: look at everything that must be right, and say how to mend what is not. Changes nothing.

Exit status 0: nothing is wrong (there may be warnings). 1: something is.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from orderflow.cli import runs
from orderflow.config import Config, load
from orderflow.doctor import backing, exchange, machine
from orderflow.doctor.check import Check, ok, warning, wrong
from orderflow.errors import ConfigError, OrderflowError
from orderflow.ingest.choice import settled
from orderflow.kafka_embedded import running_daemon
from orderflow.venues.binance.endpoints import Endpoints

WIDTH: Final = 118
NAME_WIDTH: Final = 18
MARKS: Final = {"ok": "ok     ", "warning": "WARNING", "wrong": "WRONG  "}


@dataclass(frozen=True, slots=True)
class Patient:
    """What is looked at."""

    config: Config
    bootstrap: str
    registry_url: str
    prefix: str
    data: Path
    kafka_named: bool
    """Somebody has named the broker: then it must be there."""
    registry_named: bool
    embedded: bool
    """The broker is, or would be, the embedded one."""
    endpoint_named: bool
    """An address of the exchange is set: then it must be there, as it must where live data are asked for."""
    source: str
    """Where frames come from; `auto` is decided by what answers."""


def add_parser(subparsers: Any) -> None:
    """Add `doctor` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "doctor", help="look for what is wrong, and say how to mend it", description=__doc__
    )
    parser.add_argument("--run", metavar="DIR", help="look at this run (default: what the environment names)")
    parser.add_argument("--prefix", help="topic prefix (default: the run's, or TOPIC_PREFIX)")
    parser.add_argument("--no-exchange", action="store_true", help="leave the exchange out")
    parser.add_argument("--timeout", type=float, default=10.0, metavar="S", help="patience of each look (default 10)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    """Look, show; 0 where nothing is wrong, else 1.

    Raises
    ------
    OrderflowError
        The run named is none, or the patience is no time.
    """
    if not 0.1 <= args.timeout <= 600 or not math.isfinite(args.timeout):
        raise OrderflowError(f"--timeout is {args.timeout:g}: it must be a number of seconds from 0.1 to 600")
    checks = asyncio.run(examine(args))
    failed = [check for check in checks if check.outcome == "wrong"]
    if args.json:
        print(json.dumps({"ok": not failed, "checks": msgspec.to_builtins(checks)}, indent=2, ensure_ascii=False))
    else:
        _show(checks)
    return 1 if failed else 0


async def examine(args: argparse.Namespace) -> list[Check]:
    """Every check, in the order in which a person would look."""
    checks = [machine.python()]
    try:
        patient = _patient(args)
    except ConfigError as error:
        checks.append(
            wrong("settings", str(error), "mend the setting that is named; the checks that need it are left out")
        )
        return checks
    checks.append(ok("settings", f"preset {os.environ.get('ORDERFLOW_PRESET') or 'none'}, prefix {patient.prefix!r}"))
    checks += [machine.java(patient.embedded), machine.jars(patient.embedded), machine.disk(patient.data)]
    checks.append(await machine.ports(os.environ, min(args.timeout, 2.0)))
    checks += await _backing(patient, args.timeout)
    if args.no_exchange:
        return checks
    return checks + await _exchange(patient, args.timeout)


def _patient(args: argparse.Namespace) -> Patient:
    environment: Mapping[str, str] = os.environ
    info: runs.RunInfo | None = None
    data: Path | None = None
    if args.run:
        data = Path(args.run)
        info = runs.load(data)
        environment = {**os.environ, **info.environment}
    config = load(environment)
    endpoint_named = bool(environment.get("WSS_URL") or environment.get("REST_URL"))
    source = info.source if info else config.ingestion.source
    kafka_named = bool(os.environ.get("KAFKA_BOOTSTRAP")) and info is None
    daemon = None if kafka_named or info else running_daemon()
    prefix = args.prefix if args.prefix is not None else info.topic_prefix if info else config.runtime.topic_prefix
    return Patient(
        config=config,
        bootstrap=info.bootstrap if info else daemon or config.runtime.kafka_bootstrap,
        registry_url=info.registry_url if info else config.runtime.schema_registry_url,
        prefix=prefix,
        data=data or Path(config.runtime.data_dir),
        kafka_named=kafka_named or bool(info and not info.embedded_kafka),
        registry_named=bool(info and not info.embedded_registry)
        or (info is None and bool(os.environ.get("SCHEMA_REGISTRY_URL"))),
        embedded=info.embedded_kafka if info else not kafka_named,
        endpoint_named=endpoint_named,
        source=source,
    )


async def _backing(patient: Patient, timeout_sec: float) -> list[Check]:
    broker = await backing.broker(patient.bootstrap, patient.kafka_named, timeout_sec)
    checks = [broker]
    if broker.outcome == "ok":
        checks += await backing.topics(patient.bootstrap, patient.prefix, timeout_sec)
    registry = await backing.registry(patient.registry_url, patient.registry_named, timeout_sec)
    checks.append(registry)
    # A laxer rule of the registry is no reason not to look at what it holds; that none answers is.
    if registry.outcome == "ok" or "subjects" in registry.found:
        checks.append(await backing.schemas(patient.registry_url, patient.prefix, timeout_sec))
    return checks


async def _exchange(patient: Patient, timeout_sec: float) -> list[Check]:
    settings, source = patient.config.ingestion, patient.source
    try:
        if source == "auto":
            settings = await asyncio.to_thread(settled, settings)
            source = settings.source
    except ConfigError as error:
        return [wrong("exchange", str(error), "the recorder would not start: do what stands there")]
    needed = source == "live" or settings is not patient.config.ingestion or patient.endpoint_named
    try:
        endpoints = Endpoints(ws_url=settings.ws_url.rstrip("/"), rest_url=settings.rest_url.rstrip("/"))
    except (ValueError, msgspec.ValidationError) as error:
        return [wrong("exchange", str(error), "set WSS_URL and REST_URL as in .env.example")]
    symbols = settings.symbols or ("BTCUSDT",)
    rest = await exchange.rest(endpoints, symbols, timeout_sec)
    checks = [rest]
    if rest.outcome != "wrong":
        checks.append(await exchange.clock(endpoints, timeout_sec))
    checks += await exchange.sockets(endpoints, symbols[0], timeout_sec)
    if needed:
        return checks
    return [
        check
        if check.outcome != "wrong" or check.name == "clock"
        else warning(check.name, check.found, f"only live data need it. {check.remedy}")
        for check in checks
    ]


def _show(checks: list[Check]) -> None:
    for check in checks:
        lines = textwrap.wrap(check.found, WIDTH - NAME_WIDTH - 9, break_long_words=False, break_on_hyphens=False) or [
            ""
        ]
        print(f"{MARKS[check.outcome]}  {check.name:<{NAME_WIDTH}}{lines[0]}")
        for line in lines[1:]:
            print(" " * (NAME_WIDTH + 9) + line)
        if check.remedy:
            indent = " " * 11
            print(
                textwrap.fill(
                    f"mend: {check.remedy}",
                    WIDTH,
                    initial_indent=indent,
                    subsequent_indent=indent + "      ",
                    break_long_words=False,
                    break_on_hyphens=False,
                )
            )
    counts = {outcome: sum(check.outcome == outcome for check in checks) for outcome in MARKS}
    print(f"{counts['ok']} ok, {counts['warning']} warnings, {counts['wrong']} wrong")
