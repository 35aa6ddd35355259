"""The client against the real server, and against servers that fail."""

from __future__ import annotations

import json
import socket

import pytest
from aiohttp import web
from orderflow.errors import ConfigError, LogError
from orderflow.registry.client import IncompatibleSchemaError, RegistryClient, RegistryError, value_subject
from orderflow.registry.server import RegistryServer

A = json.dumps({"type": "record", "name": "R", "fields": [{"name": "a", "type": "long"}]})
AB = json.dumps(
    {
        "type": "record",
        "name": "R",
        "fields": [{"name": "a", "type": "long"}, {"name": "b", "type": "int", "default": 0}],
    }
)
BAD = json.dumps({"type": "record", "name": "R", "fields": [{"name": "z", "type": "long"}]})


@pytest.fixture
async def client(tmp_path):
    async with RegistryServer(tmp_path, 0) as server, RegistryClient(server.url + "/") as client:
        yield client


class Scripted:
    """A server that gives the answers of a list, the last one for ever, and keeps the requests."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.requests = []

    async def handle(self, request):
        self.requests.append((request.method, request.raw_path, dict(request.headers), await request.text()))
        status, body = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if status == 0:
            request.transport.abort()
            return web.Response()
        return web.Response(status=status, text=body, content_type="application/json")

    async def __aenter__(self):
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", self.handle)
        self.runner = web.AppRunner(app)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        self.port = self.runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *_):
        await self.runner.cleanup()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("orderflow.registry.client.FIRST_DELAY_SEC", 0.001)


async def test_register_and_read_back(client):
    subject = value_subject("replay.r42.signals")
    assert subject == "replay.r42.signals-value"
    assert [await client.register(subject, text) for text in (A, AB, A)] == [1, 2, 1]
    assert await client.schema_by_id(2) == AB
    latest = await client.latest(subject)
    assert (latest.subject, latest.version, latest.id, latest.schema) == (subject, 2, 2, AB)
    assert await client.subjects() == [subject]


@pytest.mark.parametrize("subject", ["a/b", "a b", "é", "a%2Fb", "a?b#c", "..", "a:b"])
async def test_any_subject_arrives_as_it_is(client, subject):
    await client.register(subject, A)
    assert await client.subjects() == [subject]
    assert (await client.latest(subject)).subject == subject


async def test_compatibility(client):
    assert await client.check_compatibility("x", A) == []
    await client.register("x", A)
    assert await client.check_compatibility("x", AB) == []
    (why,) = await client.check_compatibility("x", BAD)
    assert "R.z" in why
    with pytest.raises(IncompatibleSchemaError, match=r"R\.z.*RULES\.md") as caught:
        await client.register("x", BAD)
    assert caught.value.status == 409
    with pytest.raises(RegistryError) as caught:
        await client.check_compatibility("x", A, 9)
    assert caught.value.error_code == 40402
    await client.set_compatibility("NONE", "x")
    assert await client.register("x", BAD) == 2


async def test_refusals_carry_the_code(client):
    with pytest.raises(RegistryError, match="Subject 'x' not found") as caught:
        await client.latest("x")
    assert (caught.value.status, caught.value.error_code) == (404, 40401)
    with pytest.raises(RegistryError, match="Invalid schema") as caught:
        await client.register("x", "{")
    assert caught.value.error_code == 42201
    with pytest.raises(RegistryError, match="Invalid compatibility level"):
        await client.set_compatibility("SIDEWAYS")


async def test_a_schema_is_fetched_once():
    async with Scripted((200, json.dumps({"schema": A}))) as server, RegistryClient(server.url) as client:
        assert {await client.schema_by_id(5) for _ in range(3)} == {A}
        assert len(server.requests) == 1


async def test_the_cache_is_bounded(monkeypatch):
    monkeypatch.setattr("orderflow.registry.client.CACHED_SCHEMAS", 2)
    async with Scripted((200, json.dumps({"schema": A}))) as server, RegistryClient(server.url) as client:
        for schema_id in (1, 2, 3, 3, 2, 1):
            await client.schema_by_id(schema_id)
        assert [path for _, path, _, _ in server.requests] == [f"/schemas/ids/{n}" for n in (1, 2, 3, 1)]


@pytest.mark.parametrize("passing", [(0, ""), (500, "{}"), (503, "busy"), (429, "")])
async def test_passing_failures_are_retried(passing):
    async with Scripted(passing, passing, (200, '{"id": 3}')) as server, RegistryClient(server.url) as client:
        assert await client.register("x", A) == 3
        assert len(server.requests) == 3


@pytest.mark.parametrize("lasting", [400, 401, 404, 409, 422])
async def test_lasting_refusals_are_not_retried(lasting):
    async with Scripted((lasting, "no")) as server, RegistryClient(server.url) as client:
        with pytest.raises(RegistryError, match="no") as caught:
            await client.register("x", A)
        assert (caught.value.status, caught.value.error_code) == (lasting, lasting)
        assert len(server.requests) == 1


async def test_attempts_are_bounded():
    async with Scripted((503, '{"error_code": 50003, "message": "down"}')) as server:
        async with RegistryClient(server.url, attempts=4) as client:
            with pytest.raises(RegistryError, match="down") as caught:
                await client.latest("x")
        assert caught.value.error_code == 50003
        assert len(server.requests) == 4


async def test_an_unreachable_registry_is_named_with_the_remedy():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        async with RegistryClient(f"http://user:secret@{address}", attempts=2) as client:
            with pytest.raises(LogError) as caught:
                await client.latest("x")
    message = str(caught.value)
    assert f"at http://{address}" in message
    assert "SCHEMA_REGISTRY_URL" in message
    assert "secret" not in message


async def test_a_silent_server_times_out():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        async with RegistryClient(f"http://127.0.0.1:{silent.getsockname()[1]}", 0.05, attempts=2) as client:
            with pytest.raises(LogError, match="2 attempts"):
                await client.subjects()


@pytest.mark.parametrize("body", ["<html>", "[]", '{"other": 1}', ""])
async def test_what_is_no_registry_is_said(body):
    async with Scripted((200, body)) as server, RegistryClient(server.url) as client:
        with pytest.raises(LogError, match="not answered by a Schema Registry"):
            await client.register("x", A)


async def test_user_and_password_of_the_url_and_a_base_path():
    async with (
        Scripted((200, "[]")) as server,
        RegistryClient(f"http://me:p%40ss@127.0.0.1:{server.port}/registry/") as client,
    ):
        assert await client.subjects() == []
        assert "p@ss" not in client.url
    method, path, headers, _ = server.requests[0]
    assert (method, path, headers["Authorization"]) == ("GET", "/registry/subjects", "Basic bWU6cEBzcw==")


async def test_other_registries_wordings():
    """Karapace and Confluent answer with more fields, other codes, and 404 for a subject that is not there yet."""
    more = json.dumps({"id": 4, "version": 1, "guid": "g", "schemaType": "AVRO", "schema": A})
    async with Scripted((200, more)) as server, RegistryClient(server.url) as client:
        assert await client.register("x", A) == 4
    conflict = json.dumps({"error_code": 40901, "message": "Incompatible schema"})
    async with Scripted((409, conflict)) as server, RegistryClient(server.url) as client:
        with pytest.raises(IncompatibleSchemaError):
            await client.register("x", A)
    missing = json.dumps({"error_code": 40402, "message": "Version latest not found."})
    async with Scripted((404, missing)) as server, RegistryClient(server.url) as client:
        assert await client.check_compatibility("x", A) == []
    silent = json.dumps({"is_compatible": False})
    async with Scripted((200, silent)) as server, RegistryClient(server.url) as client:
        assert await client.check_compatibility("x", A) == ["x: the schema is not compatible with version latest"]


@pytest.mark.parametrize(
    "url", ["", "localhost:8081", "ftp://x", "http://", "http://x:99999", "http://x/?a=1", "http://[x"]
)
def test_what_is_not_a_url(url):
    with pytest.raises(ConfigError, match="SCHEMA_REGISTRY_URL"):
        RegistryClient(url)


async def test_a_closed_client_may_be_used_again(client):
    await client.register("x", A)
    await client.close()
    await client.close()
    assert await client.subjects() == ["x"]
