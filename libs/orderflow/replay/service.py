"""The service `verify`: the previous hour of the journal, recomputed as soon as it is over and dealt with."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from orderflow.config import Config, effective_fingerprint
from orderflow.replay.plan import Bound
from orderflow.streaming.codec import Codecs
from orderflow.streaming.log import TP, Log
from orderflow.streaming.seek import decoded, value_at
from orderflow.streaming.service import Running, resident_mb
from orderflow.topics import DERIVED, JOURNAL, PARTITIONS
from orderflow.verify import Report, verify

logger = logging.getLogger(__name__)

LOOK_SEC: Final = 5.0
SETTLE_SEC: Final = 30.0
"""How far the journal must have gone beyond a stretch before it is judged."""
CATCH_UP_SEC: Final = 60.0


class VerifyService:
    """Judges stretch after stretch of the journal's own time, each from the newest snapshots before it."""

    def __init__(self, log: Log, codecs: Codecs, config: Config) -> None:
        self._log = log
        self._codecs = codecs
        self._config = config
        self._stopping = asyncio.Event()
        self.ready = False
        self.divergences: dict[str, int] = dict.fromkeys(DERIVED, 0)
        self.compared = 0
        self.rounds = 0
        self.not_judged = 0
        self.newest_ns = 0
        """Receive time of the newest journal record."""
        self.judged_to_ns = 0
        self.round_sec = 0.0
        self.span_sec = config.runtime.verify_span_sec

    @property
    def drained(self) -> bool:
        """It has nothing of its own that could be left behind."""
        return True

    def stop(self) -> None:
        """End; a round under way is given up, the next start begins it again."""
        self._stopping.set()

    async def run(self) -> None:
        """Until `stop`.

        Raises
        ------
        LogError
            The journal is damaged, or the broker is away.
        """
        stopped = asyncio.create_task(self._stopping.wait())
        working = asyncio.create_task(self._work())
        try:
            await asyncio.wait({stopped, working}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
        finally:
            stopped.cancel()
            working.cancel()
            await asyncio.gather(stopped, working, return_exceptions=True)
            self.ready = False

    async def _work(self) -> None:
        span_ns = int(self._config.runtime.verify_span_sec * 1e9)
        settle_ns = int(SETTLE_SEC * 1e9)
        self.ready = True
        while True:
            self.newest_ns = await self._newest()
            if self.judged_to_ns == 0 and self.newest_ns:
                self.judged_to_ns = self.newest_ns - settle_ns - span_ns
            if self.newest_ns == 0 or self.newest_ns < self.judged_to_ns + span_ns + settle_ns:
                await asyncio.sleep(LOOK_SEC)
                continue
            await self._round(self.judged_to_ns, self.judged_to_ns + span_ns)
            self.judged_to_ns += span_ns

    async def _round(self, from_ns: int, to_ns: int) -> None:
        began = time.monotonic()
        report = await verify(
            self._log,
            self._codecs,
            self._config,
            self._config.runtime.topic_prefix,
            Bound(ns=from_ns),
            Bound(ns=to_ns),
            from_snapshots=True,
            catch_up_sec=CATCH_UP_SEC,
        )
        self._count(report)
        self.round_sec = time.monotonic() - began
        compared = sum(report.compared.values())
        found = "identical" if compared else "nothing there"
        logger.info(
            "judged %d derived records of %d journal records in %.1f s: %s",
            compared,
            report.journal_records,
            self.round_sec,
            found if report.identical else f"{len(report.divergences)} divergences",
        )

    def _count(self, report: Report) -> None:
        self.rounds += 1
        self.compared += sum(report.compared.values())
        self.not_judged += len(report.notes)
        for each in report.divergences:
            self.divergences[each.topic] += 1
            logger.error("DIVERGENCE %s", each)
        for note in report.notes:
            logger.warning("not judged: %s", note)

    async def _newest(self) -> int:
        """Receive time of the newest record of the whole journal; 0 where it is empty."""
        tps = [TP(self._config.runtime.topic_prefix + JOURNAL, partition) for partition in range(PARTITIONS)]
        newest_ns = 0
        for tp, end in (await self._log.end_offsets(tps)).items():
            value = await value_at(self._log, tp, end - 1, end) if end else None
            if value is not None:
                newest_ns = max(newest_ns, (await decoded(self._codecs, value))["recv_ts_ns"])
        return newest_ns

    def status(self) -> dict[str, Any]:
        """What the page `/status` shows."""
        return {
            "service": "verify",
            "ready": self.ready,
            "drained": self.drained,
            "rounds": self.rounds,
            "compared": self.compared,
            "divergences": self.divergences,
            "not_judged": self.not_judged,
            "judged_to_ns": self.judged_to_ns,
            "rss_mb": resident_mb(),
        }


class VerifyCollector:
    """The service's figures as Prometheus families."""

    def __init__(self, service: VerifyService, fingerprint: str) -> None:
        self._service = service
        self._fingerprint = fingerprint

    def collect(self) -> list[Any]:
        service = self._service
        divergences = CounterMetricFamily(
            "replay_divergence", "topic partitions that differed from their recomputation", labels=["topic"]
        )
        for topic, count in sorted(service.divergences.items()):
            divergences.add_metric([topic], count)
        families: list[Any] = [divergences]
        for name, text, value in (
            ("verify_records_compared", "derived records compared", service.compared),
            ("verify_rounds", "stretches judged", service.rounds),
            ("verify_not_judged", "partitions of a stretch that could not be judged", service.not_judged),
        ):
            counter = CounterMetricFamily(name, text)
            counter.add_metric([], value)
            families.append(counter)
        for name, text, gauge_value in (
            ("verify_behind_sec", "journal received and not yet judged, seconds", self._behind_sec()),
            ("verify_round_sec", "seconds that the newest stretch took", service.round_sec),
            ("verify_span_sec", "seconds of the journal that are judged at a time", service.span_sec),
        ):
            gauge = GaugeMetricFamily(name, text)
            gauge.add_metric([], gauge_value)
            families.append(gauge)
        ready = GaugeMetricFamily("orderflow_ready", "1 where the service works", labels=["service"])
        ready.add_metric(["verify"], float(service.ready))
        families.append(ready)
        info = GaugeMetricFamily(
            "orderflow_config_info", "fingerprint of the settings", labels=["service", "fingerprint"]
        )
        info.add_metric(["verify", self._fingerprint[:16]], 1)
        return [*families, info]

    def _behind_sec(self) -> float:
        service = self._service
        return max(0.0, (service.newest_ns - service.judged_to_ns) / 1e9) if service.judged_to_ns else 0.0


def verify_build(config: Config, log: Log, codecs: Codecs) -> tuple[Running, CollectorRegistry, Any]:
    """The `verify` service."""
    service = VerifyService(log, codecs, config)
    registry = CollectorRegistry()
    registry.register(VerifyCollector(service, effective_fingerprint(config)))
    return service, registry, service.status
