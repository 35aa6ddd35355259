"""`python -m tests.bench`: measured rates of every stage, as a table and as JSON."""

from __future__ import annotations

import argparse
import gc
import os
import platform
import sys
import tempfile
from pathlib import Path
from statistics import median

from rich.console import Console

from tests.bench import data, pipeline, report, sources, stages

GROUPS = {**stages.GROUPS, "capture": sources.capture_figures, "simexchange": sources.exchange_figures}
FRAMES = 30_000
QUICK_FRAMES = 5_000
ROUNDS = 5
QUICK_ROUNDS = 3


def main() -> int:
    args = _arguments()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    try:
        earlier = [report.load(path) for path in args.compare]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="orderflow-bench-") as folder:
        content = _measure(args, Path(folder), console, skipped)
    report.print_table(console, content["figures"], skipped)
    report.write(args.json, content)
    console.print(f"written to {args.json}")
    worse = report.regressions(content, earlier) if earlier else []
    for line in worse:
        console.print(f"REGRESSION {line}")
    return 1 if worse else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer frames and rounds, no broker: for CI")
    parser.add_argument("--frames", type=int, metavar="N", help=f"journal records to work on (default {FRAMES})")
    parser.add_argument(
        "--rounds", type=int, metavar="N", help=f"rounds, of which the median counts (default {ROUNDS})"
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=data.ROOT / "runs" / "bench.json",
        metavar="PATH",
        help="where the figures go (default runs/bench.json)",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="earlier figures; exit with 1 where one has become worse beyond noise",
    )
    parser.add_argument("--only", choices=(*GROUPS, "pipeline", "latency"), action="append", help="these groups alone")
    args = parser.parse_args()
    args.frames = args.frames or (QUICK_FRAMES if args.quick else FRAMES)
    args.rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    if args.frames < 1000 or args.rounds < 1:
        parser.error("--frames must be at least 1000, and --rounds at least 1")
    return args


def _measure(args: argparse.Namespace, folder: Path, console: Console, skipped: dict[str, str]) -> dict[str, object]:
    wanted = set(args.only or (*GROUPS, "pipeline", "latency"))
    capture = data.capture_path()
    rounds: list[tuple[float, list[stages.Figure]]] = []
    name = "synthetic market"
    if wanted & GROUPS.keys():
        name, path = (
            (capture.name, capture) if capture else (name, data.write_synthetic(folder / "synthetic.gz", args.frames))
        )
        console.print(f"preparing {args.frames:,} journal records of {name}")
        dataset = data.build(name, path, args.frames)
        gc.collect()
        gc.freeze()  # the dataset is not what a service holds: collections must not walk it
        for number in range(args.rounds):
            console.print(f"round {number + 1} of {args.rounds}")
            for group, work in GROUPS.items():
                if group in wanted:
                    before = stages.calibrate()
                    figures = work(dataset)
                    rounds.append(((before + stages.calibrate()) / 2, figures))
        gc.unfreeze()
        del dataset
    rounds.append((stages.calibrate(), _whole(args, capture, folder, wanted, skipped)))
    return {
        "machine": {"python": platform.python_version(), "cores": os.cpu_count(), "load_average": os.getloadavg()},
        "data": name,
        "frames": args.frames,
        "calibration_sec": median(calibration_sec for calibration_sec, _ in rounds),
        "figures": report.summarise(rounds),
        "skipped": skipped,
    }


def _whole(
    args: argparse.Namespace, capture: Path | None, folder: Path, wanted: set[str], skipped: dict[str, str]
) -> list[stages.Figure]:
    """The rows that need a broker and the whole capture."""
    figures: list[stages.Figure] = []
    for name in ("pipeline", "latency"):
        if name not in wanted:
            continue
        if args.quick and not args.only:
            skipped[name] = "--quick"
        elif capture is None:
            skipped[name] = f"no {data.CAPTURE} in ORDERFLOW_CAPTURES or ../shared/data/replay"
        else:
            try:
                if name == "pipeline":
                    figures += pipeline.throughput(capture, folder / name)
                else:
                    figures += pipeline.latency(capture, folder / name)
            except (RuntimeError, OSError, TimeoutError) as error:
                skipped[name] = str(error)
    return figures


if __name__ == "__main__":
    sys.exit(main())
