"""Runs as `python -m services.simexchange`.

Exit codes: 0 stopped by SIGTERM or SIGINT; 2 a wrong setting, a bad capture, or a port that is taken.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from orderflow.errors import ConfigError, OrderflowError
from orderflow.streaming.service import set_up_logging, write_status_file
from orderflow.venues.binance.sim.faults import FaultPlan, read_plan
from orderflow.venues.binance.sim.hub import SocketRules
from orderflow.venues.binance.sim.market import DEFAULT_SYMBOLS, SyntheticConfig
from orderflow.venues.binance.sim.playback import CaptureSource, PlaybackConfig
from orderflow.venues.binance.sim.server import ServerOptions, SimExchange
from orderflow.venues.binance.sim.source import MarketSource
from orderflow.venues.binance.sim.synthetic import SyntheticSource

logger = logging.getLogger("orderflow.simexchange")

DEFAULT_PORT = 9443
MINUTES_MOST = 7 * 24 * 60.0
SOURCES = ("synthetic", "capture")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


def parser(environment: Mapping[str, str]) -> argparse.ArgumentParser:
    """Every option has a name in the environment, which the command line overrides."""
    options = argparse.ArgumentParser(prog="python -m services.simexchange", description=__doc__)

    def add(name: str, variable: str, default: Any, text: str, **rest: Any) -> None:
        options.add_argument(name, default=environment.get(variable) or default, help=f"{text} ({variable})", **rest)

    add("--host", "SIM_HOST", "127.0.0.1", "address to listen on")
    add("--port", "SIM_PORT", DEFAULT_PORT, "port for sockets and REST; 0: any", type=int)
    add("--source", "SIM_SOURCE", "synthetic", "the market", choices=SOURCES)
    add("--symbols", "SYMBOLS", "", "comma-separated; default: all of the capture, or BTCUSDT,ETHUSDT,SOLUSDT")
    add("--speed", "SPEED", "1", "factor of the pace; for a capture also max")
    add("--capture", "CAPTURE", "", "file to play")
    add(
        "--start-grace-sec",
        "SIM_START_GRACE_SEC",
        None,
        "capture: from the first subscription to the start",
        type=float,
    )
    add("--rest-wait-sec", "SIM_REST_WAIT_SEC", None, "capture: how long a snapshot waits to be asked for", type=float)
    add("--seed", "SIM_SEED", 1, "synthetic: the same seed, the same market", type=int)
    add("--activity", "SIM_ACTIVITY", None, "synthetic: quotes a second and symbol", type=float)
    add("--sessions", "SIM_SESSIONS", None, "synthetic: on or off, whether activity follows the hour of the day")
    add("--predictability", "SIM_PREDICTABILITY", None, "synthetic: 0 to 1, how far flow foretells prices", type=float)
    add("--lead-ms", "SIM_LEAD_MS", None, "synthetic: how long flow leads prices", type=int)
    add("--horizon-ms", "SIM_HORIZON_MS", None, "synthetic: how long a push lasts on average", type=int)
    add("--start-ms", "SIM_START_MS", None, "synthetic: simulated time of the start; default: now", type=int)
    add("--life-sec", "SIM_LIFE_SEC", None, "age at which a connection is ended", type=float)
    add(
        "--faults", "SIM_FAULTS", "", "what goes wrong and when: drop@10s+3s:symbol=BTCUSDT; ..., JSON, or a file of it"
    )
    add(
        "--fault-seed",
        "SIM_FAULT_SEED",
        None,
        "of chance in faults; without --faults a plan is drawn from it",
        type=int,
    )
    add("--fault-minutes", "SIM_FAULT_MINUTES", 60.0, "length of a plan that is drawn, in market time", type=float)
    add("--log-level", "LOG_LEVEL", "INFO", "of the log lines", choices=LOG_LEVELS)
    return options


def _converted(kind: type, **given: Any) -> Any:
    """A configuration struct of what was given; out of range is a `ConfigError`."""
    chosen = {name: value for name, value in given.items() if value is not None}
    try:
        return msgspec.convert(chosen, kind)
    except msgspec.ValidationError as error:
        name = str(error).rpartition("$.")[2].rstrip("`")
        option = f"--{name.replace('_', '-')}"
        raise ConfigError(f"{option} is {chosen.get(name)}: {str(error).partition(' - at')[0]}; see --help") from error


def _speed(text: str) -> float | None:
    if text == "max":
        return None
    try:
        speed = float(text)
    except ValueError:
        speed = 0.0
    if not 0.001 <= speed <= 10_000:
        raise ConfigError(f"--speed is {text!r}: it must be `max` or a factor from 0.001 to 10000")
    return speed


def _switch(text: str | None) -> bool | None:
    if text not in (None, "on", "off"):
        raise ConfigError(f"--sessions is {text!r}: it must be on or off")
    return None if text is None else text == "on"


def source_of(args: argparse.Namespace) -> MarketSource:
    """The market that the options describe.

    Raises
    ------
    OrderflowError
        They do not fit together, or the capture cannot be read.
    """
    if args.source not in SOURCES:
        # argparse does not hold a default, here from the environment, against the choices.
        raise ConfigError(f"--source is {args.source!r}: it must be one of {', '.join(SOURCES)}")
    symbols = tuple(symbol.strip() for symbol in args.symbols.split(",") if symbol.strip())
    speed = _speed(args.speed)
    if args.source == "capture":
        if not args.capture:
            raise ConfigError("--capture is missing: --source capture needs the file to play")
        playback = _converted(PlaybackConfig, start_grace_sec=args.start_grace_sec, rest_wait_sec=args.rest_wait_sec)
        return CaptureSource(Path(args.capture), symbols=symbols, config=msgspec.structs.replace(playback, speed=speed))
    if speed is None:
        raise ConfigError("--speed is max: a synthetic market has no end to reach; give a factor")
    config = _converted(
        SyntheticConfig,
        activity=args.activity,
        sessions=_switch(args.sessions),
        predictability=args.predictability,
        lead_ms=args.lead_ms,
        horizon_ms=args.horizon_ms,
    )
    return SyntheticSource(args.seed, symbols or DEFAULT_SYMBOLS, config=config, speed=speed, start_ms=args.start_ms)


def plan_of(args: argparse.Namespace, symbols: Sequence[str]) -> FaultPlan:
    """The faults that the options describe.

    Raises
    ------
    ConfigError
        They are not understood.
    """
    if args.faults:
        text = args.faults if _is_inline(args.faults) else _read_faults(Path(args.faults))
        return read_plan(text, 1 if args.fault_seed is None else args.fault_seed)
    if args.fault_seed is None:
        return FaultPlan()
    if not 0.0 < args.fault_minutes <= MINUTES_MOST:
        raise ConfigError(f"--fault-minutes is {args.fault_minutes:g}: it must be above 0 and at most {MINUTES_MOST:g}")
    duration_ms = int(args.fault_minutes * 60_000)
    return FaultPlan.draw(args.fault_seed, duration_ms, symbols, quiet_end_ms=min(60_000, duration_ms // 4))


def _is_inline(faults: str) -> bool:
    """Whether `--faults` is the plan itself: JSON, or the lines of a table, and not the name of a file."""
    try:
        return not Path(faults).is_file()
    except (OSError, ValueError):  # longer than any name may be, or with characters that no name has
        return True


def _read_faults(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--faults {path} cannot be read: {error}") from error


def _log_faults(args: argparse.Namespace, plan: FaultPlan) -> None:
    for line in plan.lines():
        logger.info("fault %s", line)
    if plan.faults and not args.faults:
        logger.info(
            "faults drawn: %d; --fault-seed %d --fault-minutes %g with the same market repeats them",
            len(plan.faults),
            args.fault_seed,
            args.fault_minutes,
        )


async def serve(args: argparse.Namespace) -> None:
    """Run until a signal, or until the source fails."""
    rules = SocketRules() if args.life_sec is None else SocketRules(life_sec=args.life_sec)
    market = source_of(args)
    plan = plan_of(args, tuple(market.instruments))
    exchange = SimExchange(market, ServerOptions(host=args.host, port=args.port, rules=rules, faults=plan))
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    async with exchange:
        source = exchange.source.status()
        logger.info(
            "simulated exchange at %s and %s: %s of %s, %s",
            exchange.url,
            exchange.ws_url,
            exchange.source.name,
            ",".join(source["symbols"]),
            f"seed {args.seed}" if args.source == "synthetic" else f"sha256 {source['sha256']}",
        )
        _log_faults(args, plan)
        write_status_file(
            os.environ.get("STATUS_FILE", ""),
            {"service": "simexchange", "pid": os.getpid(), "host": args.host, "port": exchange.port},
        )
        failed = asyncio.ensure_future(exchange.wait_failed())
        stopped = asyncio.ensure_future(stopping.wait())
        try:
            await asyncio.wait((failed, stopped), return_when=asyncio.FIRST_COMPLETED)
            if failed.done():
                failed.result()
        finally:
            for task in (failed, stopped):
                task.cancel()
    logger.info("stopped")


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser(os.environ).parse_args(arguments)
    level = args.log_level if args.log_level in LOG_LEVELS else "INFO"
    set_up_logging("simexchange", level)
    try:
        if level != args.log_level:
            raise ConfigError(f"--log-level is {args.log_level!r}: it must be one of {', '.join(LOG_LEVELS)}")
        asyncio.run(serve(args))
    except OrderflowError as error:
        logger.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
