"""`orderflow`: one command, one sub-command a task."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from typing import Final

from orderflow.errors import OrderflowError

COMMANDS: Final = {
    "run": "orderflow.cli.run",
    "preflight": "orderflow.cli.preflight",
    "record": "orderflow.cli.record",
    "capture": "orderflow.cli.capture",
    "tap": "orderflow.cli.tap",
    "topics": "orderflow.cli.topics",
    "verify": "orderflow.cli.verify",
    "replay": "orderflow.cli.replay",
    "diff": "orderflow.cli.diff",
    "trace": "orderflow.cli.trace",
    "lake": "orderflow.cli.lake",
    "kafka": "orderflow.cli.kafka",
    "init": "orderflow.cli.init",
    "config": "orderflow.cli.config",
    "doctor": "orderflow.cli.doctor",
}
"""Sub-command -> module with `add_parser(subparsers)` and `run(args) -> int`."""


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, and turn an error that names its remedy into one line and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="orderflow",
        description="Order flow for crypto futures as a stream people can trust.",
        epilog="`orderflow COMMAND --help` explains a command. Start with `orderflow run --source sim`.",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    named = next((argument for argument in arguments if not argument.startswith("-")), None)
    # Only the module of the command asked for is imported: start-up stays quick.
    for name in [named] if named in COMMANDS else list(COMMANDS):
        importlib.import_module(COMMANDS[name]).add_parser(subparsers)
    args = parser.parse_args(arguments)
    # The client library repeats itself while a broker is away; a person gets one line, from the error below.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    try:
        code: int = importlib.import_module(COMMANDS[args.command]).run(args)
    except OrderflowError as error:
        print(f"orderflow: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


if __name__ == "__main__":
    sys.exit(main())
