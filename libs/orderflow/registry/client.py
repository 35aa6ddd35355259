"""Client of a Schema Registry with Confluent's REST interface: the local one, Karapace, Confluent's."""

from __future__ import annotations

import asyncio
import base64
import random
from types import TracebackType
from typing import Any, Final, TypeVar
from urllib.parse import quote, unquote, urlsplit

import aiohttp
import msgspec
from yarl import URL

from orderflow.errors import ConfigError, LogError

CONTENT_TYPE: Final = "application/vnd.schemaregistry.v1+json"
ACCEPT: Final = f"{CONTENT_TYPE}, application/vnd.schemaregistry+json, application/json"
ATTEMPTS: Final = 6
FIRST_DELAY_SEC: Final = 0.1
LAST_DELAY_SEC: Final = 2.0
RETRIED: Final = frozenset({408, 429, 500, 502, 503, 504})
CACHED_SCHEMAS: Final = 1024
NOT_FOUND: Final = frozenset({40401, 40402})

Answer = TypeVar("Answer")


class RegistryError(LogError):
    """The registry answered with an error: its HTTP status and its `error_code` (equal where it gave none)."""

    def __init__(self, message: str, status: int, error_code: int) -> None:
        super().__init__(message)
        self.status = status
        self.error_code = error_code


class IncompatibleSchemaError(RegistryError):
    """The registry refuses a schema because the subject's earlier versions forbid it."""


class RegisteredSchema(msgspec.Struct, frozen=True):
    """One version of a subject."""

    subject: str
    version: int
    id: int
    schema: str


class _Id(msgspec.Struct):
    id: int


class _Schema(msgspec.Struct):
    schema: str


class _Compatible(msgspec.Struct):
    is_compatible: bool
    messages: list[str] | None = None


def value_subject(topic: str) -> str:
    """The subject of a topic's values (Confluent's TopicNameStrategy, which every tool assumes)."""
    return f"{topic}-value"


class RegistryClient:
    """Asynchronous; connects at the first call. Reads and registrations are idempotent, so all of them are retried.

    Every call raises `LogError` where the registry can't be reached within the bounded attempts, and `RegistryError`
    where it refuses.
    """

    def __init__(self, url: str, timeout_s: float = 10.0, attempts: int = ATTEMPTS) -> None:
        """`url`: base URL; user and password in it become basic authentication. `timeout_s`: of one attempt.

        Raises
        ------
        ConfigError
            The URL is not one.
        """
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise ConfigError(f"SCHEMA_REGISTRY_URL {url!r} is not a URL: {error}; {_EXAMPLE}") from error
        if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
            raise ConfigError(f"SCHEMA_REGISTRY_URL {_without_user(url)!r} is not the URL of a registry; {_EXAMPLE}")
        if attempts < 1 or timeout_s <= 0:
            raise ValueError(f"attempts {attempts} and timeout_s {timeout_s} must be above 0")
        address = f"[{host}]" if ":" in host else host
        self.url = f"{parts.scheme}://{address}{f':{port}' if port else ''}{parts.path.rstrip('/')}"
        self._headers = {"Accept": ACCEPT, "Content-Type": CONTENT_TYPE}
        if parts.username:
            user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self._headers["Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._attempts = attempts
        self._session: aiohttp.ClientSession | None = None
        self._texts: dict[int, str] = {}

    async def register(self, subject: str, schema_text: str) -> int:
        """Register a schema, or find it where it is registered already; returns its id.

        Raises
        ------
        IncompatibleSchemaError
            The subject's earlier versions forbid it.
        """
        path = f"/subjects/{_quote(subject)}/versions"
        return (await self._call("POST", path, _Id, {"schema": schema_text, "schemaType": "AVRO"})).id

    async def schema_by_id(self, schema_id: int) -> str:
        """The text of a schema. Texts of ids never change: each is fetched once."""
        text = self._texts.get(schema_id)
        if text is None:
            text = (await self._call("GET", f"/schemas/ids/{schema_id}", _Schema)).schema
            if len(self._texts) >= CACHED_SCHEMAS:
                del self._texts[next(iter(self._texts))]
            self._texts[schema_id] = text
        return text

    async def latest(self, subject: str) -> RegisteredSchema:
        """The newest version of a subject; `RegistryError` with code 40401 where there is none."""
        return await self._call("GET", f"/subjects/{_quote(subject)}/versions/latest", RegisteredSchema)

    async def subjects(self) -> list[str]:
        """The names of all subjects."""
        return await self._call("GET", "/subjects", list[str])

    async def check_compatibility(self, subject: str, schema_text: str, version: int | str = "latest") -> list[str]:
        """Why `schema_text` may not follow `version` of the subject: messages, none where it may.

        A subject without versions forbids nothing.
        """
        path = f"/compatibility/subjects/{_quote(subject)}/versions/{version}?verbose=true"
        try:
            answer = await self._call("POST", path, _Compatible, {"schema": schema_text, "schemaType": "AVRO"})
        except RegistryError as error:
            if version == "latest" and error.error_code in NOT_FOUND:
                return []
            raise
        if answer.is_compatible:
            return []
        return answer.messages or [f"{subject}: the schema is not compatible with version {version}"]

    async def set_compatibility(self, level: str, subject: str | None = None) -> None:
        """Set the compatibility level of a subject, or of all that have none of their own."""
        path = "/config" if subject is None else f"/config/{_quote(subject)}"
        await self._call("PUT", path, dict[str, Any], {"compatibility": level})

    async def close(self) -> None:
        """Close the connections. A closed client connects anew when it is used again."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def __aenter__(self) -> RegistryClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, method: str, path: str, answer: type[Answer], body: dict[str, Any] | None = None) -> Answer:
        status, data = await self._attempt(method, path, None if body is None else msgspec.json.encode(body))
        if 200 <= status < 300:
            try:
                return msgspec.json.decode(data, type=answer)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise LogError(
                    f"{method} {self.url}{path} was not answered by a Schema Registry: {error}; the answer begins with "
                    f"{data[:60]!r}. Set SCHEMA_REGISTRY_URL to a registry's"
                ) from error
        raise self._refusal(method, path, status, data)

    async def _attempt(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        """Status and body of the first attempt that gives a lasting answer, or of the last."""
        for attempt in range(1, self._attempts + 1):
            last = attempt == self._attempts
            try:
                status, data = await self._request(method, path, body)
                if status not in RETRIED or last:
                    return status, data
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                if last:
                    raise LogError(
                        f"no Schema Registry answers at {self.url} ({self._attempts} attempts; the last: "
                        f"{error or type(error).__name__}): start it with `python -m services.registry`, or set "
                        "SCHEMA_REGISTRY_URL"
                    ) from error
            delay_s = min(FIRST_DELAY_SEC * 2 ** (attempt - 1), LAST_DELAY_SEC)
            # Half of it by chance, so that services that lost the registry together do not come back together.
            await asyncio.sleep(delay_s * (0.5 + random.random() / 2))
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _request(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=self._timeout, headers=self._headers)
        async with self._session.request(method, URL(self.url + path, encoded=True), data=body) as response:
            return response.status, await response.read()

    def _refusal(self, method: str, path: str, status: int, data: bytes) -> RegistryError:
        try:
            answer = msgspec.json.decode(data, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError):
            answer = {"message": data[:200].decode("utf-8", "replace")}
        code = answer.get("error_code")
        code = code if isinstance(code, int) else status
        message = f"{method} {self.url}{path}: {status}, code {code}: {answer.get('message', '')}"
        if status == 409:
            return IncompatibleSchemaError(
                f"{message}; make the change compatible (schemas/RULES.md), or use another TOPIC_PREFIX", status, code
            )
        if status in (401, 403):
            message += "; put the user and password into SCHEMA_REGISTRY_URL (https://USER:PASSWORD@HOST)"
        return RegistryError(message, status, code)


_EXAMPLE: Final = "an example is http://127.0.0.1:8081"


def _quote(subject: str) -> str:
    return quote(subject, safe="")


def _without_user(url: str) -> str:
    return url.rpartition("@")[2]
