"""`orderflow config`: the effective configuration and its fingerprint."""

from __future__ import annotations

import argparse
from typing import Any

import msgspec

from orderflow.config import effective_fingerprint, load


def add_parser(subparsers: Any) -> None:
    subparsers.add_parser("config", help="print the effective configuration", description=__doc__)


def run(_: argparse.Namespace) -> int:
    config = load()
    print(msgspec.yaml.encode(msgspec.to_builtins(config)).decode(), end="")
    print(f"# fingerprint {effective_fingerprint(config)}")
    return 0
