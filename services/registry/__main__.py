"""The local Schema Registry: `python -m services.registry --port 8081 --data DIR`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

from orderflow.errors import ConfigError, OrderflowError
from orderflow.registry.server import RegistryServer

EXIT_FAILED = 2


def _port(name: str, text: str) -> int:
    if text.isascii() and text.isdigit() and int(text) <= 65535:
        return int(text)
    raise ConfigError(f"{name} {text!r} is not a port: a number from 0 to 65535 is allowed, 0 takes a free one")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m services.registry", description=__doc__)
    parser.add_argument("--port", help="port (default: SCHEMA_REGISTRY_PORT, else 8081; 0 takes a free one)")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind to (default %(default)s)")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder that holds registry.json")
    return parser.parse_args()


async def _serve(server: RegistryServer) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    async with server:
        await stopped.wait()
    logging.getLogger("orderflow").info("schema registry stopped")


def main() -> int:
    """Serve until SIGTERM or SIGINT. Exit status 0, or 2 with one line that says what to do."""
    options = _options()
    try:
        if options.port is None:
            port = _port("SCHEMA_REGISTRY_PORT", os.environ.get("SCHEMA_REGISTRY_PORT", "8081"))
        else:
            port = _port("--port", options.port)
        logging.basicConfig(level=_level(), format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
        asyncio.run(_serve(RegistryServer(options.data, port, options.host)))
    except OrderflowError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_FAILED
    return 0


def _level() -> str:
    level = os.environ.get("LOG_LEVEL", "INFO").upper()
    if level not in logging.getLevelNamesMapping():
        raise ConfigError(
            f"LOG_LEVEL {level!r} is not a level: {', '.join(logging.getLevelNamesMapping())} are allowed"
        )
    return level


if __name__ == "__main__":
    sys.exit(main())
