"""A local Schema Registry: the part of Confluent's REST interface that serializers, consoles and stream engines use.

For one machine: no authentication (it binds to loopback unless told otherwise), one process, one file. Schemas of type
AVRO without references. A deployment that needs more runs Karapace or Confluent's; clients see only another URL.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
from aiohttp import web

from orderflow.errors import OrderflowError
from orderflow.registry.compatibility import Level
from orderflow.registry.store import DEFAULT_LEVEL, MAX_VERSION, RefusedError, Registered, Store

logger = logging.getLogger(__name__)

CONTENT_TYPE: Final = "application/vnd.schemaregistry.v1+json"
ACCEPTED_TYPES: Final = frozenset(
    {CONTENT_TYPE, "application/vnd.schemaregistry+json", "application/json", "application/octet-stream"}
)
MAX_BODY_BYTES: Final = 1 << 20
STOP_SEC: Final = 2.0

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Item = TypeVar("Item")
Body = TypeVar("Body", bound=msgspec.Struct)


class SchemaBody(msgspec.Struct):
    """Body of a registration, a lookup, or a check."""

    schema: str = ""
    schemaType: str | None = None
    references: list[Any] | None = None
    metadata: Any = None
    ruleSet: Any = None
    id: int | None = None
    version: int | None = None


class LevelBody(msgspec.Struct):
    """Body of a change of the compatibility level."""

    compatibility: str | None = None
    compatibilityLevel: str | None = None


class Api:
    """The routes over one store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def application(self, max_body_bytes: int = MAX_BODY_BYTES) -> web.Application:
        """The web application: every answer and every error is JSON in Confluent's form."""
        app = web.Application(middlewares=[_errors_as_json], client_max_size=max_body_bytes)
        subject = "/subjects/{subject}"
        versions = f"{subject}/versions"
        one = versions + "/{version}"
        check = "/compatibility" + versions
        app.add_routes(
            [
                web.get("/", self._root),
                web.get("/healthz", self._health),
                web.get("/contexts", self._contexts),
                web.get("/mode", self._mode),
                web.get("/mode/{subject}", self._subject_mode),
                web.get("/config", self._level),
                web.put("/config", self._set_level),
                web.delete("/config", self._delete_level),
                web.get("/config/{subject}", self._subject_level),
                web.put("/config/{subject}", self._set_level),
                web.delete("/config/{subject}", self._delete_level),
                web.get("/schemas/types", self._types),
                web.get("/schemas/ids/{id}", self._schema),
                web.get("/schemas/ids/{id}/schema", self._schema_text),
                web.get("/schemas/ids/{id}/versions", self._schema_versions),
                web.get("/schemas/ids/{id}/subjects", self._schema_subjects),
                web.get("/subjects", self._subjects),
                web.post(subject, self._lookup),
                web.delete(subject, self._delete_subject),
                web.get(versions, self._versions),
                web.post(versions, self._register),
                web.get(one, self._version),
                web.delete(one, self._delete_version),
                web.get(f"{one}/schema", self._version_text),
                web.get(f"{one}/referencedby", self._referenced_by),
                web.post(check, self._check),
                web.post(check + "/{version}", self._check),
            ]
        )
        return app

    async def _root(self, _: web.Request) -> web.Response:
        return _json({})

    async def _health(self, _: web.Request) -> web.Response:
        return _json({"status": "ok", "schemas": self._store.schemas, "folder": str(self._store.folder)})

    async def _contexts(self, _: web.Request) -> web.Response:
        return _json(["."])

    async def _types(self, _: web.Request) -> web.Response:
        return _json(["AVRO"])

    async def _mode(self, _: web.Request) -> web.Response:
        return _json({"mode": "READWRITE"})

    async def _subject_mode(self, request: web.Request) -> web.Response:
        if _flag(request, "defaultToGlobal"):
            return _json({"mode": "READWRITE"})
        raise RefusedError(40409, f"Subject '{_subject(request)}' does not have subject-level mode configured")

    async def _level(self, _: web.Request) -> web.Response:
        return _json({"compatibilityLevel": self._store.level.value})

    async def _subject_level(self, request: web.Request) -> web.Response:
        subject = _subject(request)
        level = self._store.level_of(subject)
        if level is None and _flag(request, "defaultToGlobal"):
            level = self._store.level
        if level is None:
            raise _no_level(subject)
        return _json({"compatibilityLevel": level.value})

    async def _set_level(self, request: web.Request) -> web.Response:
        body = await _body(request, LevelBody)
        level = _parse_level(body.compatibility or body.compatibilityLevel)
        self._store.set_level(level, request.match_info.get("subject"))
        return _json({"compatibility": level.value})

    async def _delete_level(self, request: web.Request) -> web.Response:
        subject = request.match_info.get("subject")
        if subject is not None and self._store.level_of(subject) is None:
            raise _no_level(subject)
        return _json({"compatibilityLevel": self._store.set_level(None, subject).value})

    async def _schema(self, request: web.Request) -> web.Response:
        return _json({"schema": self._store.schema(_schema_id(request))})

    async def _schema_text(self, request: web.Request) -> web.Response:
        return _text(self._store.schema(_schema_id(request)))

    async def _schema_versions(self, request: web.Request) -> web.Response:
        uses = self._store.uses(_schema_id(request), _flag(request, "deleted"))
        return _json([{"subject": subject, "version": version} for subject, version in _page(request, uses)])

    async def _schema_subjects(self, request: web.Request) -> web.Response:
        uses = self._store.uses(_schema_id(request), _flag(request, "deleted"))
        return _json(_page(request, list(dict.fromkeys(subject for subject, _ in uses))))

    async def _subjects(self, request: web.Request) -> web.Response:
        prefix = request.query.get("subjectPrefix", "")
        names = self._store.subjects(_flag(request, "deleted"))
        return _json(_page(request, [name for name in names if name.startswith(prefix)]))

    async def _lookup(self, request: web.Request) -> web.Response:
        text = await _schema_of(request)
        return _json(self._store.lookup(_subject(request), text, _flag(request, "deleted")))

    async def _delete_subject(self, request: web.Request) -> web.Response:
        return _json(self._store.delete_subject(_subject(request), _flag(request, "permanent")))

    async def _versions(self, request: web.Request) -> web.Response:
        return _json(_page(request, self._store.versions(_subject(request), _flag(request, "deleted"))))

    async def _register(self, request: web.Request) -> web.Response:
        text = await _schema_of(request)
        return _json({"id": self._store.register(_subject(request), text).id})

    async def _version(self, request: web.Request) -> web.Response:
        return _json(self._find(request))

    async def _version_text(self, request: web.Request) -> web.Response:
        return _text(self._find(request).schema)

    async def _referenced_by(self, request: web.Request) -> web.Response:
        self._find(request)
        return _json([])

    async def _delete_version(self, request: web.Request) -> web.Response:
        version = request.match_info["version"]
        return _json(self._store.delete_version(_subject(request), version, _flag(request, "permanent")))

    async def _check(self, request: web.Request) -> web.Response:
        text = await _schema_of(request)
        found = self._store.problems(_subject(request), text, request.match_info.get("version"))
        answer: dict[str, Any] = {"is_compatible": not found}
        if _flag(request, "verbose"):
            answer["messages"] = found
        return _json(answer)

    def _find(self, request: web.Request) -> Registered:
        return self._store.get(_subject(request), request.match_info["version"], _flag(request, "deleted"))


class RegistryServer:
    """The registry over `folder`, served while it is started.

    `port` 0 takes a free one; `url` tells which.
    """

    def __init__(self, folder: Path, port: int, host: str = "127.0.0.1", max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self._folder = folder
        self._port = port
        self._host = host
        self._max_body_bytes = max_body_bytes
        self._store: Store | None = None
        self._runner: web.AppRunner | None = None
        self.url = ""

    async def start(self) -> str:
        """Open the folder and the port; returns the URL.

        Raises
        ------
        OrderflowError
            The folder can't be used, or the port is taken.
        """
        self._store = Store(self._folder)
        application = Api(self._store).application(self._max_body_bytes)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=STOP_SEC)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, self._port).start()
        except (OSError, OverflowError) as error:
            await self.stop()
            raise OrderflowError(self._why(error)) from error
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        logger.info("schema registry at %s over %s: %d schemas", self.url, self._folder, self._store.schemas)
        return self.url

    def _why(self, error: Exception) -> str:
        where = f"{self._host}:{self._port}"
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            return f"schema registry: {where} is taken by another process; stop it, or choose another --port"
        return f"schema registry: can't listen on {where}: {error}; choose another --host or --port"

    async def stop(self) -> None:
        """Answer what has been asked, close the port and the folder."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        if self._store is not None:
            self._store.close()
            self._store = None

    async def __aenter__(self) -> RegistryServer:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except RefusedError as error:
        if error.status >= 500:
            logger.error("%s %s: %s", request.method, request.path, error)
        return _error(error.status, error.error_code, str(error))
    except web.HTTPRequestEntityTooLarge as error:
        return _error(413, 413, f"the body is too large: {error.text}")
    except web.HTTPException as error:
        answer = _error(error.status, error.status, f"HTTP {error.status} {error.reason}")
        if "Allow" in error.headers:
            answer.headers["Allow"] = error.headers["Allow"]
        return answer
    except Exception:
        logger.exception("%s %s failed", request.method, request.path)
        return _error(500, 500, "Internal Server Error: see the registry's log")


def _json(value: Any) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type=CONTENT_TYPE)


def _text(schema: str) -> web.Response:
    return web.Response(body=schema.encode(), content_type=CONTENT_TYPE)


def _error(status: int, error_code: int, message: str) -> web.Response:
    body = msgspec.json.encode({"error_code": error_code, "message": message})
    return web.Response(status=status, body=body, content_type=CONTENT_TYPE)


def _subject(request: web.Request) -> str:
    return request.match_info["subject"]


def _schema_id(request: web.Request) -> int:
    text = request.match_info["id"]
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= MAX_VERSION):
        raise RefusedError(404, "HTTP 404 Not Found")
    return int(text)


def _flag(request: web.Request, name: str) -> bool:
    return request.query.get(name, "").lower() == "true"


def _page(request: web.Request, items: Sequence[Item]) -> Sequence[Item]:
    """`offset` and `limit` of the query; a limit of -1 is none."""
    try:
        offset, limit = int(request.query.get("offset", "0")), int(request.query.get("limit", "-1"))
    except ValueError:
        raise RefusedError(404, "HTTP 404 Not Found") from None
    offset = max(offset, 0)
    return items[offset:] if limit < 0 else items[offset : offset + limit]


async def _body(request: web.Request, kind: type[Body]) -> Body:
    # Only JSON types: what a page in a browser may send to loopback without asking (forms, plain text) is refused.
    if request.content_type not in ACCEPTED_TYPES:
        raise RefusedError(415, f"HTTP 415 Unsupported Media Type: {request.content_type}; send {CONTENT_TYPE}")
    data = await request.read()
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RefusedError(400, f"the body is not what this path takes: {error}") from error


async def _schema_of(request: web.Request) -> str:
    body = await _body(request, SchemaBody)
    if body.schemaType not in (None, "AVRO"):
        raise RefusedError(42201, f"Invalid schema type {body.schemaType}: this registry takes AVRO")
    for name, value in (("references", body.references), ("metadata", body.metadata), ("ruleSet", body.ruleSet)):
        if value:
            raise RefusedError(42201, f"Invalid schema: this registry takes none with {name}")
    if body.id is not None and body.id > 0:
        raise RefusedError(42205, f"Subject {_subject(request)} is not in import mode: leave the id out")
    if not body.schema:
        raise RefusedError(42201, "Empty schema")
    return body.schema


def _parse_level(text: str | None) -> Level:
    try:
        return Level((text or "").upper())
    except ValueError:
        allowed = ", ".join(level.value for level in Level)
        raise RefusedError(
            42203,
            f"Invalid compatibility level {text!r}. Valid values are {allowed}; the default is {DEFAULT_LEVEL.value}",
        ) from None


def _no_level(subject: str) -> RefusedError:
    return RefusedError(40408, f"Subject '{subject}' does not have subject-level compatibility configured")
