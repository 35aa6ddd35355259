"""Kill anything, lose nothing, repeat nothing: the faults, one after another, each judged by the outside verifier.

    python -m tests.chaos [--seed N] [--rounds N] [--only matrix,kills,...]      # `make chaos SEED= ROUNDS=`
    python -m tests.chaos --only soak --minutes 30                               # `make soak MINUTES=30`

`--seed` fixes which service is killed, frozen or lost, and when, in units of waiting; what is under way at that moment
is the machine's. It is printed first, and the same command repeats a run. `--json FILE` keeps the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.chaos import faults
from tests.chaos.faults import Bench
from tests.chaos.load import MAJORS_SEC, scale, soak

PARTS = {
    "matrix": faults.matrix,
    "kills": faults.kills,
    "freeze": faults.freeze,
    "broker": faults.broker,
    "cluster": faults.cluster,
    "scale": scale,
    "soak": soak,
}
DEFAULT_PARTS = "matrix,kills,freeze,broker,cluster,scale"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=int(time.time()) % 1_000_000, help="default: of the clock")
    parser.add_argument("--rounds", type=int, default=20, help="random kills (default 20)")
    parser.add_argument("--minutes", type=float, default=30.0, help="of the soak")
    parser.add_argument(
        "--tile", type=float, default=MAJORS_SEC, help="seconds of the recording that the soak plays over and over"
    )
    parser.add_argument("--frames", type=int, default=2000, help="a second, of scale and soak (default 2000)")
    parser.add_argument("--only", default=DEFAULT_PARTS, help=f"of {','.join(PARTS)}; default {DEFAULT_PARTS}")
    parser.add_argument("--points", default="", help="of the matrix, joined by commas; default: all")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--keep", action="store_true", help="keep the folder of the runs")
    args = parser.parse_args()
    parts = args.only.split(",")
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}: choose of {', '.join(PARTS)}")
    captures = Path(os.environ.get("ORDERFLOW_CAPTURES", Path(__file__).resolve().parents[3] / "shared/data/replay"))
    if not captures.is_dir():
        parser.error(f"no recorded market data at {captures}; set ORDERFLOW_CAPTURES")
    folder = Path(tempfile.mkdtemp(prefix="orderflow-chaos-"))
    again = f"make chaos SEED={args.seed} ROUNDS={args.rounds}" + (
        f" PARTS={args.only}" if args.only != DEFAULT_PARTS else ""
    )
    print(f"seed {args.seed}; again: {again}", flush=True)
    bench = Bench(folder, captures, random.Random(args.seed), vars(args))
    # Ended from outside, it still stops what it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    failed = False
    try:
        for part in parts:
            began = time.monotonic()
            PARTS[part](bench)
            print(f"-- {part}: {time.monotonic() - began:.0f} s", flush=True)
    finally:
        bench.close()
        failed = bool(bench.problems) or sys.exc_info()[0] is not None
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            content: dict[str, Any] = {
                "seed": args.seed,
                "figures": bench.figures,
                "recovery_sec": bench.recoveries,
                "problems": bench.problems,
            }
            args.json.write_text(json.dumps(content, indent=1), "utf-8")
        if failed or args.keep:
            print(f"logs and topics' files in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    for problem in bench.problems:
        print(f"PROBLEM {problem}")
    bench.print_recoveries()
    print("FAILED" if failed else "all green: nothing lost, nothing repeated, hashes equal")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
