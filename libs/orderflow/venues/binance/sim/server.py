"""The simulated exchange: market sockets and market REST on one port, over a recorded or a synthetic market."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

import msgspec
from aiohttp import web

from orderflow.errors import ConfigError, OrderflowError
from orderflow.venues.binance.sim.faults import DRAWN_KINDS, Fault, FaultEngine, FaultPlan
from orderflow.venues.binance.sim.hub import Hub, SocketRules
from orderflow.venues.binance.sim.rest import RestApi, WeightLimit
from orderflow.venues.binance.sim.source import MarketSource
from orderflow.venues.binance.streams import Route

logger = logging.getLogger(__name__)

_STOP_SEC: Final = 3.0
_FAULT_STEP_SEC: Final = 0.005
"""While a plan is on, its time is looked at so often, also where the market is quiet."""
LEDGER_SHOWN: Final = 1_000


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Where it listens, and the limits that it keeps."""

    host: str = "127.0.0.1"
    port: int = 0
    """0: any free port."""
    rules: SocketRules = SocketRules()  # noqa: RUF009 (frozen)
    weight_per_minute: int = 2400
    faults: FaultPlan = FaultPlan()  # noqa: RUF009 (frozen)


class SimExchange:
    """A server over one market.

    Sockets: `/public/stream`, `/market/stream`, their raw forms `/public/ws`, `/market/ws`, and the un-routed `/stream`
    and `/ws`, which since April 2026 carry public data alone. REST: `/fapi/v1/...`. For its own state: `/sim/status`
    (also `/status`), `/healthz`, `/readyz`. What is to go wrong: `/sim/faults`, GET and POST.
    """

    def __init__(self, source: MarketSource, options: ServerOptions | None = None) -> None:
        """
        Raises
        ------
        ConfigError
            The plan has a fault that only simulated time can have.
        """
        self.source = source
        self.options = options or ServerOptions()
        _check_faults(self.options.faults.faults)
        self.engine = FaultEngine(self.options.faults)
        self.hub = Hub(self.options.rules, self.engine, source.elapsed_ms)
        self.rest = RestApi(source, WeightLimit(self.options.weight_per_minute), self.engine)
        self.port = 0
        self._runner: web.AppRunner | None = None
        self._source_task: asyncio.Task[None] | None = None
        self._housekeeping: asyncio.Task[None] | None = None
        self._fault_clock: asyncio.Task[None] | None = None
        self._faults_added = asyncio.Event()

    @property
    def url(self) -> str:
        """Base of REST; the sockets' begins with `ws` instead of `http`."""
        return f"http://{self.options.host}:{self.port}"

    @property
    def ws_url(self) -> str:
        return f"ws://{self.options.host}:{self.port}"

    async def start(self) -> None:
        """Listen, and let the market begin.

        Raises
        ------
        OrderflowError
            The address cannot be had.
        """
        self._runner = web.AppRunner(self._application(), access_log=None, shutdown_timeout=_STOP_SEC)
        await self._runner.setup()
        host, port = self.options.host, self.options.port
        try:
            await web.TCPSite(self._runner, host, port).start()
        except OSError as error:
            await self._runner.cleanup()
            taken = error.errno == errno.EADDRINUSE
            reason = "it is taken" if taken else error.strerror or str(error)
            raise OrderflowError(
                f"the simulated exchange cannot listen on {host}:{port}: {reason}; choose another --port, or 0 for any"
            ) from error
        self.port = self._runner.addresses[0][1]
        self._source_task = asyncio.create_task(self.source.run(self.hub))
        self._source_task.add_done_callback(self._task_ended)
        self._housekeeping = asyncio.create_task(self.hub.housekeeping())
        self._fault_clock = asyncio.create_task(self._run_faults())
        self._fault_clock.add_done_callback(self._task_ended)

    async def wait_failed(self) -> None:
        """Raises the source's error if it fails; returns never, for a capture that is over stays open to questions."""
        assert self._source_task is not None, "start first"
        await asyncio.shield(self._source_task)
        await asyncio.Event().wait()

    async def stop(self) -> None:
        """End the market, close every socket with 1001, stop listening. A second call does nothing."""
        tasks = [task for task in (self._source_task, self._housekeeping, self._fault_clock) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.hub.close_all(_STOP_SEC)
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def __aenter__(self) -> SimExchange:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def status(self) -> dict[str, Any]:
        """What it does and has done, ready for JSON."""
        hub = self.hub
        error = self._source_error()
        return {
            "service": "simexchange",
            "ready": self._source_task is not None and error is None,
            "source": self.source.name,
            "done": self.source.done,
            "elapsed_ms": self.source.elapsed_ms(),
            "frames_sent": dict(hub.counts.sent),
            "frames_unsubscribed": dict(hub.counts.skipped),
            "frames_deaf": hub.counts.deaf,
            "clients": len(hub.clients),
            "clients_connected": hub.counts.connected,
            "subscriptions": hub.subscriptions,
            "errors": {
                "source": None if error is None else str(error),
                "control": hub.counts.control_errors + sum(client.session.errors for client in hub.clients),
                "closed": dict(sorted(hub.counts.closed.items())),
                "rest": self.rest.status()["errors"],
            },
            "faults": self.engine.status(),
            "rest_requests": self.rest.status()["requests"],
            self.source.name: self.source.status(),
        }

    def _source_error(self) -> BaseException | None:
        task = self._source_task
        return task.exception() if task is not None and task.done() and not task.cancelled() else None

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            what = "the market has" if task is self._source_task else "the faults have"
            logger.error("%s failed: %s", what, error, exc_info=error)

    def _application(self) -> web.Application:
        app = web.Application(client_max_size=1 << 16)
        app.add_routes([web.get(path, self._rest) for path in self.rest.paths])
        app.add_routes([web.get("/sim/faults", self._show_faults), web.post("/sim/faults", self._add_faults)])
        app.add_routes([web.get(path, self._status_page) for path in ("/sim/status", "/status")])
        app.add_routes([web.get("/healthz", self._healthz), web.get("/readyz", self._readyz)])
        for prefix, route in (("/public", "public"), ("/market", "market"), ("", "public")):
            app.add_routes(self._socket_routes(prefix, "market" if route == "market" else "public"))
        app.router.add_route("*", "/{path:.*}", self._not_found)
        return app

    def _socket_routes(self, prefix: str, route: Route) -> list[web.RouteDef]:
        def handler(combined: bool) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
            async def serve(request: web.Request) -> web.StreamResponse:
                return await self.hub.serve(request, route, combined, _names(request))

            return serve

        return [
            web.get(f"{prefix}/stream", handler(True)),
            web.get(f"{prefix}/ws", handler(False)),
            web.get(f"{prefix}/ws/{{names:.+}}", handler(False)),
        ]

    # Faults

    def add_faults(self, faults: Sequence[Fault]) -> None:
        """Let things go wrong, at times relative to now. Raises `ConfigError`; then nothing is added."""
        _check_faults(faults)
        self.engine.add(self.source.elapsed_ms(), faults)
        self._faults_added.set()

    async def _run_faults(self) -> None:
        """Move the faults' time on, which is the market's, until cancelled; costs nothing while there are none."""
        while True:
            if self.engine.idle:
                self._faults_added.clear()
                await self._faults_added.wait()
            self.rest.keep_books(self.source.elapsed_ms())
            self.hub.publish(())
            await asyncio.sleep(_FAULT_STEP_SEC)

    async def _show_faults(self, _: web.Request) -> web.Response:
        """The plan, counts, and the newest entries of the ledger."""
        newest = self.engine.ledger[-LEDGER_SHOWN:]
        body = {
            "plan": self.engine.plan,
            "lines": self.engine.plan.lines(),
            "status": self.engine.status(),
            "ledger": [entry._asdict() for entry in newest],
        }
        return web.Response(body=msgspec.json.encode(body), content_type="application/json")

    async def _add_faults(self, request: web.Request) -> web.Response:
        try:
            faults = FaultPlan.from_json(await request.read()).faults
            self.add_faults(faults)
        except ConfigError as error:
            return web.json_response({"error": str(error)}, status=400)
        return web.json_response({"added": [fault.text() for fault in faults], "now_ms": self.source.elapsed_ms()})

    # REST

    async def _rest(self, request: web.Request) -> web.Response:
        address = request.remote or "unknown"
        reply = await self.rest.answer(request.path, request.query, address, self.source.elapsed_ms())
        if reply is None:
            if request.transport is not None:
                request.transport.abort()
            return web.Response(status=504)
        return web.Response(
            status=reply.status, headers=reply.headers, body=reply.body, content_type="application/json"
        )

    async def _status_page(self, _: web.Request) -> web.Response:
        return web.json_response(self.status())

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.json_response({"ok": True})

    async def _readyz(self, _: web.Request) -> web.Response:
        ready = self.status()["ready"]
        return web.json_response({"ready": ready}, status=200 if ready else 503)

    async def _not_found(self, request: web.Request) -> web.Response:
        return web.json_response(
            {"code": -5000, "msg": f"Path {request.path}, Method {request.method} is invalid"}, status=404
        )


def _check_faults(faults: Sequence[Fault]) -> None:
    for fault in faults:
        if fault.kind not in DRAWN_KINDS:
            raise ConfigError(f"fault {fault.text()} needs simulated time: a server cannot move its clients' clocks")


def _names(request: web.Request) -> list[str]:
    """Streams of the URL: `/ws/a/b` or `?streams=a/b`."""
    text = request.match_info.get("names") or request.query.get("streams", "")
    return [name for name in text.split("/") if name]
