"""`python -m tests.storm --seed 7 --rounds 1000 --minutes 10 --jobs 2`: storms, judged; see `make storm`."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Final

import msgspec

from tests.storm.judge import Verdict, judge
from tests.storm.run import storm
from tests.storm.world import Options

WORST_SHOWN: Final = 20
PROGRESS_EVERY: Final = 50


class Report(msgspec.Struct, frozen=True):
    """What is kept of one seed."""

    options: Options
    violations: list[str]
    plan: list[str]
    kinds: dict[str, int]
    recoveries: list[tuple[str, float]]
    compared: dict[str, int]
    cpu_sec: float


def one(options: Options) -> Report:
    """Run and judge one seed."""
    logging.disable(logging.CRITICAL)
    began = time.process_time()
    try:
        verdict = judge(storm(options))
    except Exception as error:
        verdict = Verdict(violations=[f"the run itself failed: {error!r}"])
    drawn = options.storm_plan()
    plan = [*drawn.exchange.lines(), *map(str, drawn.machine)]
    kinds = Counter(line.partition("@")[0] for line in plan)
    spent = time.process_time() - began
    return Report(options, verdict.violations, plan, dict(kinds), verdict.recoveries, dict(verdict.counts), spent)


def command(options: Options) -> str:
    """What repeats a run."""
    usual = Options(seed=0)
    text = f"make storm SEED={options.seed} ROUNDS=1 MINUTES={options.minutes:g}"
    if options.activity != usual.activity:
        text += f" ACTIVITY={options.activity:g}"
    return text if options.kinds == usual.kinds else f"{text} KINDS={','.join(options.kinds)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run storms; 1 where one was lost."""
    parser = argparse.ArgumentParser(prog="make storm", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=100, help="so many seeds from --seed on")
    parser.add_argument("--minutes", type=float, default=10.0, help="simulated, of each")
    parser.add_argument(
        "--activity", type=float, default=Options(seed=0).activity, help="changes of the best quote a second and symbol"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--kinds", default="", help="of faults, separated by commas; all if left out")
    given = parser.parse_args(arguments)
    kinds = tuple(given.kinds.split(",")) if given.kinds else Options(seed=0).kinds
    seeds = range(given.seed, given.seed + given.rounds)
    began = time.monotonic()
    reports = []
    options = [Options(seed=seed, minutes=given.minutes, kinds=kinds, activity=given.activity) for seed in seeds]
    for report in _all(options, given.jobs):
        reports.append(report)
        if report.violations:
            _tell(report)
        if len(reports) % PROGRESS_EVERY == 0:
            print(f"{len(reports)} of {len(seeds)} seeds after {time.monotonic() - began:.0f} s", flush=True)
    _table(reports, time.monotonic() - began)
    return 1 if any(report.violations for report in reports) else 0


def _all(options: list[Options], jobs: int) -> Iterator[Report]:
    if jobs <= 1 or len(options) == 1:
        yield from map(one, options)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(one, options, chunksize=1)


def _tell(report: Report) -> None:
    print(f"\nseed {report.options.seed}: {len(report.violations)} violations")
    for line in report.plan:
        print(f"  plan  {line}")
    for line in report.violations[:WORST_SHOWN]:
        print(f"  WRONG {line}")
    print(f"  repeat: {command(report.options)}", flush=True)


def _table(reports: list[Report], wall_sec: float) -> None:
    minutes = sum(report.options.minutes for report in reports)
    lost = [report.options.seed for report in reports if report.violations]
    kinds: Counter[str] = Counter()
    compared: Counter[str] = Counter()
    times: dict[str, list[float]] = defaultdict(list)
    for report in reports:
        kinds.update(report.kinds)
        compared.update(report.compared)
        for kind, sec in report.recoveries:
            times[kind].append(sec)
    print(f"\n{len(reports)} seeds, {minutes:g} simulated minutes in {wall_sec:.0f} s ", end="")
    print(f"({60 * minutes / max(wall_sec, 1e-9):.0f} times real time, {_mean_cpu(reports):.2f} s CPU a seed)")
    print("compared: " + ", ".join(f"{count} {what}" for what, count in sorted(compared.items())))
    print(f"{'fault':<18}{'drawn':>8}{'alone':>8}{'p50 s':>8}{'p99 s':>8}{'max s':>8}   until all was well")
    for kind, count in sorted(kinds.items()):
        ranked = sorted(times[kind])
        shown = "".join(f"{_quantile(ranked, each):8.1f}" for each in (0.5, 0.99, 1.0)) if ranked else ""
        print(f"{kind:<18}{count:>8}{len(ranked):>8}{shown}")
    print(f"failed seeds: {', '.join(map(str, lost)) or 'none'}")


def _mean_cpu(reports: list[Report]) -> float:
    return sum(report.cpu_sec for report in reports) / max(1, len(reports))


def _quantile(ranked: list[float], share: float) -> float:
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))]


if __name__ == "__main__":
    sys.exit(main())
