"""The faults, each as a run of the whole pipeline over a recorded capture."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from orderflow.kafka_embedded import EmbeddedCluster, EmbeddedKafka

from tests.chaos.stack import SERVICES, Stack, brokers
from tests.chaos.verifier import SHOWN, Verdict, compare, total_hash, verify
from tests.serving import registry

ALTS = "usdm_4alts_20210722_realagg.gz"
SPEED = "2"
"""The 30 s of the capture take 15 s, so that a service that died still has work before it."""
SLOW = "0.5"
SETTINGS = {"PARQUET_ROTATE_SEC": "5", "SIGNAL_SINK": "jsonl,sqlite"}
"""More cuts than by default, so that there is something to die in; every form of files."""
FILES = ("sinks", "lake")
PROCESSORS = ("ingestion", "ofi", "cvd", "fusion", "signal")
CRASHES: dict[str, tuple[tuple[str, ...], int]] = {
    "rebalance": (SERVICES, 1),
    "recovering": (SERVICES, 1),
    "recovered": (SERVICES, 1),
    "polled": (SERVICES, 20),
    "stepped": (PROCESSORS, 20),
    "shipped": (PROCESSORS, 20),
    "acknowledged": (SERVICES, 15),
    "snapshot-flushed": (PROCESSORS, 2),
    "snapshot-half": (SERVICES, 14),
    "snapshot-written": (SERVICES, 2),
    "committed": (SERVICES, 2),
    "journal-opened": (("ingestion",), 1),
    "file-temporary": (FILES, 3),
    "file-renamed": (FILES, 3),
    "rows-inserted": (("sinks",), 2),
    "rows-committed": (("sinks",), 2),
    "cut-written": (FILES, 3),
    "stopping": (SERVICES, 1),
}
"""Crash point -> the services that come to it, and at which passage they die."""
SECOND_LIFE = ("rebalance", "recovering", "recovered", "journal-opened")
"""Points on the way back: their process is the successor of one that was killed at work."""
AWAY_SEC = 6.0
NOTICE_SEC = 12.0
FROZEN_SEC = 13.0
"""Above the session of a group's member, so that its partitions go to another meanwhile."""
IDLE_SEQ = 5
"""A partition without a symbol has a session and an end, and no ticks between."""
MOST_LINES = 6
"""Warnings that one process may write about one loss of a broker."""


class Bench:
    """What all parts share: a broker, a registry, the undisturbed runs, the figures."""

    def __init__(self, folder: Path, captures: Path, rng: random.Random, options: dict[str, Any]) -> None:
        self.folder = folder
        self.captures = captures
        self.rng = rng
        self.options = options
        self.figures: dict[str, Any] = {}
        self.problems: list[str] = []
        self.recoveries: dict[str, list[float]] = {}
        self._open = ExitStack()
        self._broker: EmbeddedKafka | EmbeddedCluster | None = None
        self._registry = ""
        self._references: dict[Path, Verdict] = {}
        self._runs = 0

    @property
    def broker(self) -> EmbeddedKafka | EmbeddedCluster:
        if self._broker is None:
            self._broker = self._open.enter_context(brokers(self.folder / "kafka", 1))
        return self._broker

    @property
    def registry(self) -> str:
        if not self._registry:
            self._registry = self._open.enter_context(registry(self.folder / "registry"))
        return self._registry

    def close(self) -> None:
        self._open.close()

    def say(self, text: str) -> None:
        print(text, flush=True)

    @contextmanager
    def stack(
        self, name: str, *, capture: Path | None = None, speed: str = SPEED, bootstrap: str = "", **settings: str
    ) -> Iterator[Stack]:
        """A run that is not started yet; ended at the exit of the block."""
        self._runs += 1
        label = f"{self._runs:03d}-{name}"
        stack = Stack(
            self.folder / label,
            bootstrap or self.broker.bootstrap,
            self.registry,
            f"chaos.{label}.",
            capture or self.captures / ALTS,
            speed,
            {**SETTINGS, **settings},
        )
        try:
            yield stack
        finally:
            stack.stop()

    def reference(self, capture: Path | None = None) -> Verdict:
        """The verdict on an undisturbed run of a capture at full speed."""
        capture = capture or self.captures / ALTS
        if capture not in self._references:
            with self.stack("undisturbed", capture=capture, speed="max") as stack:
                stack.start()
                stack.drain()
            verdict = verify(stack.bootstrap, self.registry, stack.prefix, stack.folder)
            self._note("the undisturbed run", verdict)
            self.say(f"undisturbed: {verdict.records:,} records, hash {total_hash(verdict)[:16]}")
            self._references[capture] = verdict
        return self._references[capture]

    def judge(self, name: str, stack: Stack) -> bool:
        """Judge a run that is over against the undisturbed one; True where nothing is wrong."""
        reference = self.reference(stack.capture)
        verdict = verify(stack.bootstrap, stack.registry, stack.prefix, stack.folder)
        compare(verdict, reference)
        self._note(name, verdict)
        for death in stack.deaths:
            if death.recovery_sec is not None:
                self.recoveries.setdefault(death.instance.partition("-")[0], []).append(death.recovery_sec)
        for instance in stack.instances.values():
            code = instance.exit_code
            self.expect(code == 0, f"{name}: {instance.name} was asked to stop and ended with {code}")
        return not verdict.problems

    def _note(self, name: str, verdict: Verdict) -> None:
        self.problems += [f"{name}: {problem}" for problem in verdict.problems[:SHOWN]]
        if len(verdict.problems) > SHOWN:
            self.problems.append(f"{name}: and {len(verdict.problems) - SHOWN} more")

    def expect(self, holds: bool, problem: str) -> None:
        if not holds:
            self.problems.append(problem)

    def print_recoveries(self) -> None:
        """Time from the end of a process to `/readyz` of its successor."""
        everything = sorted(value for values in self.recoveries.values() for value in values)
        if not everything:
            return
        # One that is killed again before it is ready has no time of its own.
        self.say(f"time to recover, seconds, {len(everything)} deaths whose successor came to be ready:")
        for name, values in (*sorted(self.recoveries.items()), ("all", everything)):
            self.say(
                f"  {name:12} p50 {quantile(values, 0.5):6.2f}  p99 {quantile(values, 0.99):6.2f}  n {len(values)}"
            )


def quantile(values: list[float], share: float) -> float:
    """By nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


# -- crash points -----------------------------------------------------------------------------------------------------


def matrix(bench: Bench) -> None:
    """Every crash point times every service that comes to it: one run a point, all those services armed."""
    bench.reference()
    chosen = [point for point in bench.options["points"].split(",") if point] or list(CRASHES)
    width = max(map(len, CRASHES))
    bench.say(f"{'crash point':{width}}  " + "  ".join(f"{service:>9}" for service in SERVICES))
    table: dict[str, dict[str, str]] = {}
    for point in chosen:
        services, count = CRASHES[point]
        second = point in SECOND_LIFE
        plan = {service: ["", point] if second else [f"{point}:{count}"] for service in services}
        with bench.stack(point) as stack:
            stack.start(plan)
            for service in services:
                if second or point == "stopping":
                    stack.until_at_work(service, 5)
                    stack.of(service)[0].signal(signal.SIGKILL if second else signal.SIGTERM)
            stack.drain()
        green = bench.judge(f"crash point {point}", stack)
        table[point] = {}
        for service in SERVICES:
            reached = bool(stack.crashed_at(service, point))
            table[point][service] = (
                "" if service not in services else ("ok" if green else "WRONG") if reached else "missed"
            )
            bench.expect(reached or service not in services, f"{service} never came to the crash point {point}")
        bench.say(f"{point:{width}}  " + "  ".join(f"{table[point][service]:>9}" for service in SERVICES))
    bench.figures["matrix"] = table


# -- signals ----------------------------------------------------------------------------------------------------------


def kills(bench: Bench) -> None:
    """SIGKILL at random: any service, at any moment, recovering ones too, several at once."""
    rounds = bench.options["rounds"]
    done = run = 0
    while done < rounds:
        run += 1
        with bench.stack(f"kills{run}", speed=SLOW) as stack:
            stack.start()
            stack.until_at_work("signal")
            before = done
            while done < rounds and not stack.recorder().get("done"):
                for service in bench.rng.sample(SERVICES, bench.rng.choice((1, 1, 1, 2, 3))):
                    done += done < rounds and stack.of(service)[0].signal(signal.SIGKILL)
                time.sleep(bench.rng.uniform(0.05, 1.5))
            stack.drain()
        green = bench.judge(f"random kills, run {run}", stack)
        bench.say(f"random kills, run {run}: {done - before} kills, {'same hash' if green else 'WRONG'}")
        if done == before:
            bench.expect(False, "the capture ended before anything was killed")
            return
    bench.figures["kills"] = {"kills": done, "runs": run}


def freeze(bench: Bench) -> None:
    """SIGSTOP beyond the session, with a peer that takes over meanwhile, then SIGCONT: a zombie writes on."""
    with bench.stack("freeze", speed="0.75") as stack:
        stack.start()
        names = bench.rng.sample(("ofi", "cvd", "fusion", "signal"), 2)
        peers = {name: stack.add(name) for name in names}
        for name in names:
            stack.until_at_work(name)
            stack.until(lambda name=name: all(each.ready for each in stack.of(name)), f"both {name} own partitions")  # type: ignore[misc]
            stack.instances[name].signal(signal.SIGSTOP)
        frozen_at = time.monotonic()
        stack.until(
            lambda: all(len(peer.status().get("partitions", ())) == 12 for peer in peers.values()),
            "the peers own every partition",
        )
        stack.until(lambda: time.monotonic() - frozen_at > FROZEN_SEC, "the time of the freeze")
        for name in names:
            stack.instances[name].signal(signal.SIGCONT)
        stack.drain()
    green = bench.judge(f"{' and '.join(names)} frozen", stack)
    bench.expect(not stack.deaths, f"a frozen service ended: {stack.deaths}")
    bench.say(f"frozen {FROZEN_SEC:g} s beside a peer ({', '.join(names)}): {'same hash' if green else 'WRONG'}")


# -- brokers ----------------------------------------------------------------------------------------------------------


def broker(bench: Bench) -> None:
    """The only broker is stopped, and killed, under way: every service waits for it and goes on by itself.

    It has the topics of these runs alone: one with thousands of partitions is away for longer than a recorder waits.
    """
    bench.reference()
    with brokers(bench.folder / "broker", 1) as node:
        assert isinstance(node, EmbeddedKafka)
        bench.figures["broker"] = {
            act: _broker_away(bench, node, act, end) for act, end in (("stopped", node.stop), ("killed", node.kill))
        }


def _broker_away(bench: Bench, node: EmbeddedKafka, act: str, end: Callable[[], None]) -> dict[str, Any]:
    with bench.stack(f"broker-{act}", speed="1", bootstrap=node.bootstrap) as stack:
        stack.start()
        stack.until_at_work("signal")
        stack.until(lambda: all_ready(stack), "every service ready")
        before = memory(stack)
        end()
        away_at = time.monotonic()
        noticed = stack.until(lambda: none_ready(stack), "every /readyz false", NOTICE_SEC)
        stack.until(lambda: time.monotonic() - away_at > AWAY_SEC, "the broker's absence")
        node.start()
        back = stack.until(lambda: all_ready(stack), "every service ready again")
        grown = {name: round(after - before[name], 1) for name, after in memory(stack).items() if name in before}
        stack.drain()
    green = bench.judge(f"broker {act}", stack)
    survivals = survived(bench, f"broker {act}", stack, green)
    bench.say(f"  not ready after {noticed:.1f} s, ready {back:.1f} s after it was back, memory grown by {grown} MB")
    return {**survivals, "noticed_sec": noticed, "back_sec": back, "grown_mb": grown}


def cluster(bench: Bench) -> None:
    """Each node of three is lost in turn, by SIGKILL or a clean stop, and comes back."""
    bench.reference()
    with brokers(bench.folder / "cluster", 3) as nodes:
        assert isinstance(nodes, EmbeddedCluster)
        with bench.stack("cluster", speed="0.3", bootstrap=nodes.bootstrap) as stack:
            stack.start()
            stack.until_at_work("signal")
            backs = []
            for number in bench.rng.sample(sorted(nodes.nodes), len(nodes.nodes)):
                act = bench.rng.choice(("kill", "stop"))
                stack.until(lambda: all_ready(stack), "every service ready")
                before = stack.frontiers("signal")
                getattr(nodes.nodes[number], act)()
                backs.append(stack.until(lambda before=before: moved(stack, before), "signals while a node is away"))  # type: ignore[misc]
                bench.say(f"node {number} lost by {act}: signals go on after {backs[-1]:.1f} s")
                nodes.nodes[number].start()
            stack.until(lambda: all_ready(stack), "every service ready")
            stack.drain()
        green = bench.judge("one of three brokers lost", stack)
    figures = survived(bench, "one of three lost", stack, green)
    bench.figures["cluster"] = {**figures, "signals_after_sec": backs}


def survived(bench: Bench, name: str, stack: Stack, green: bool) -> dict[str, Any]:
    """What a loss of brokers must not have done."""
    bench.expect(not stack.deaths, f"{name}: services ended: {[(each.instance, each.cause) for each in stack.deaths]}")
    lines = stack.log_lines()
    for service, said in lines.items():
        bench.expect(len(said) <= MOST_LINES, f"{name}: {service} wrote {len(said)} warnings, as {said[:3]}")
    most = max(map(len, lines.values()), default=0)
    bench.say(
        f"{name}: {'same hash' if green else 'WRONG'}, {len(stack.deaths)} restarts, at most {most} warnings a process"
    )
    return {"warnings": most, "restarts": len(stack.deaths)}


def all_ready(stack: Stack) -> bool:
    return all(instance.ready for instance in stack.instances.values())


def none_ready(stack: Stack) -> bool:
    # Processors and sinks; a recorder is ready as long as it can take frames.
    return not any(instance.ready for instance in stack.instances.values() if instance.service != "ingestion")


def memory(stack: Stack) -> dict[str, float]:
    return {name: status["rss_mb"] for name, each in stack.instances.items() if (status := each.status())}


def moved(stack: Stack, before: dict[str, int]) -> bool:
    """Whether every partition that has a symbol, and so a clock, has gone on."""
    now = stack.frontiers("signal")
    active = [partition for partition, seq in before.items() if seq > IDLE_SEQ]
    return bool(active) and all(now.get(partition, -1) > before[partition] for partition in active)
