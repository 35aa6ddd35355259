"""`orderflow kafka`: an Apache Kafka broker on loopback that stays up between runs, without Docker."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, Final

from orderflow.errors import ConfigError
from orderflow.kafka_embedded import (
    daemon_nodes,
    daemon_status,
    kill_node,
    running_daemon,
    start_daemon,
    start_node,
    stop_daemon,
    stop_node,
)
from orderflow.kafka_embedded.cluster import MOST_NODES
from orderflow.kafka_embedded.daemon import DEFAULT_PORT, DaemonStatus

__all__ = ["add_parser", "run", "running_daemon"]

NOT_RUNNING: Final = 3
"""As for `systemctl status`."""


def add_parser(subparsers: Any) -> None:
    """Add `kafka` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser("kafka", help="run a local broker", description=__doc__)
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    up = tasks.add_parser(
        "up",
        help="start it, or find it running; prints its address",
        description="Start the broker, or find it running, and print its address on standard output. It stays up until "
        "`orderflow kafka down`. With KAFKA_BOOTSTRAP set nothing is started.",
    )
    up.add_argument("--port", type=int, metavar="N", help=f"of 127.0.0.1 (default {DEFAULT_PORT})")
    up.add_argument(
        "--nodes",
        type=int,
        default=1,
        metavar="N",
        help="3: a cluster in which every topic has three copies, and any one node may be lost",
    )
    down = tasks.add_parser("down", help="stop it; its data stay")
    status = tasks.add_parser(
        "status", help=f"say whether it runs: exit code 0 if so, {NOT_RUNNING} if not", description="Exit code as said."
    )
    node = tasks.add_parser("node", help="start, stop or kill one node of a cluster")
    node.add_argument("act", choices=("start", "stop", "kill"), help="kill is SIGKILL, as of a crash")
    node.add_argument("number", type=int, metavar="NUMBER", help="1 is the first")
    for task in (up, down, status, node):
        task.add_argument(
            "--data", type=Path, metavar="DIR", help="folder of its data (default: kafka in ORDERFLOW_HOME)"
        )


def run(args: argparse.Namespace) -> int:
    """Do the task; returns the exit code.

    Raises
    ------
    OrderflowError
        The broker can't be started or stopped.
    """
    tasks = {"up": _up, "down": _down, "status": _status, "node": _node}
    return tasks[args.task](args)


def _up(args: argparse.Namespace) -> int:
    elsewhere = os.environ.get("KAFKA_BOOTSTRAP")
    if elsewhere:
        _say(f"KAFKA_BOOTSTRAP is {elsewhere}: that broker is used, and none is started here")
        print(elsewhere)
        return 0
    if args.port is not None and not 0 < args.port < 65_536:
        raise ConfigError(f"--port is {args.port}: it must be between 1 and 65535")
    if not 1 <= args.nodes <= MOST_NODES:
        raise ConfigError(f"--nodes is {args.nodes}: it must be between 1 and {MOST_NODES}")
    status = start_daemon(args.port, args.data, nodes=args.nodes)
    _say_running(status)
    return 0


def _down(args: argparse.Namespace) -> int:
    stopped = stop_daemon(args.data)
    _say("stopped; the data stay" if stopped else f"no broker runs on {daemon_status(args.data).data_dir}")
    return 0


def _status(args: argparse.Namespace) -> int:
    status = daemon_status(args.data)
    if status.pid is None:
        _say(f"no broker runs on {status.data_dir}: start one with `orderflow kafka up`")
        return NOT_RUNNING
    if not status.answers:
        _say(f"the broker on {status.data_dir} (pid {status.pid}) does not answer at {status.bootstrap}")
        return NOT_RUNNING
    _say_running(status)
    return 0


def _node(args: argparse.Namespace) -> int:
    if args.act == "start":
        started = start_node(args.number, args.data)
        _say(f"node {args.number} runs (pid {started.pid})")
        print(started.bootstrap)
        return 0
    ended = (stop_node if args.act == "stop" else kill_node)(args.number, args.data)
    done = "stopped" if args.act == "stop" else "killed"
    _say(f"node {args.number} {done if ended else 'does not run'}; its data stay")
    return 0


def _say_running(status: DaemonStatus) -> None:
    nodes = daemon_nodes(status.data_dir)
    dead = [str(number) for number, each in nodes.items() if not each.answers]
    size = f", {len(nodes)} nodes" if len(nodes) > 1 else ""
    _say(f"Apache Kafka runs (pid {status.pid}, data in {status.data_dir}{size})")
    if dead:
        _say(f"node {', '.join(dead)} does not answer: `orderflow kafka node start {dead[0]}`")
    print(status.bootstrap)


def _say(text: str) -> None:
    print(text, file=sys.stderr)
