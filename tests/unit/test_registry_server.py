"""The REST interface over real HTTP: paths, codes, content types, limits."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import aiohttp
import pytest
from orderflow.errors import OrderflowError
from orderflow.registry.server import CONTENT_TYPE, RegistryServer
from yarl import URL

A = json.dumps({"type": "record", "name": "R", "fields": [{"name": "a", "type": "long"}]})
AB = json.dumps(
    {
        "type": "record",
        "name": "R",
        "fields": [{"name": "a", "type": "long"}, {"name": "b", "type": "int", "default": 0}],
    }
)
BAD = json.dumps({"type": "record", "name": "R", "fields": [{"name": "z", "type": "long"}]})


class Caller:
    """Requests to one server: status and decoded body."""

    def __init__(self, session, url):
        self.session = session
        self.url = url

    async def __call__(self, method, path, body=None, *, data=None, content_type=CONTENT_TYPE):
        if body is not None:
            data = json.dumps(body)
        headers = {"Content-Type": content_type} if content_type else {}
        url = URL(self.url + path, encoded=True)
        async with self.session.request(
            method, url, data=data, headers=headers, skip_auto_headers=("Content-Type",)
        ) as answer:
            assert answer.content_type == CONTENT_TYPE
            text = await answer.text()
            return answer.status, json.loads(text) if text else None

    async def error(self, *arguments, **options):
        status, body = await self(*arguments, **options)
        assert set(body) == {"error_code", "message"}
        assert body["message"]
        return status, body["error_code"]


@pytest.fixture
async def call(tmp_path):
    async with RegistryServer(tmp_path, 0, max_body_bytes=100_000) as server, aiohttp.ClientSession() as session:
        yield Caller(session, server.url)


async def test_register_and_read_back(call):
    assert await call("POST", "/subjects/x/versions", {"schema": A}) == (200, {"id": 1})
    assert await call("POST", "/subjects/x/versions", {"schema": AB, "schemaType": "AVRO"}) == (200, {"id": 2})
    assert await call("GET", "/subjects") == (200, ["x"])
    assert await call("GET", "/subjects/x/versions") == (200, [1, 2])
    first = {"subject": "x", "version": 1, "id": 1, "schema": A}
    assert await call("GET", "/subjects/x/versions/1") == (200, first)
    assert await call("POST", "/subjects/x", {"schema": A}) == (200, first)
    assert await call("GET", "/subjects/x/versions/latest/schema") == (200, json.loads(AB))
    assert await call("GET", "/subjects/x/versions/1/referencedby") == (200, [])
    assert await call("GET", "/schemas/ids/1") == (200, {"schema": A})
    assert await call("GET", "/schemas/ids/1/schema") == (200, json.loads(A))
    assert await call("GET", "/schemas/ids/1/versions") == (200, [{"subject": "x", "version": 1}])
    assert await call("GET", "/schemas/ids/1/subjects") == (200, ["x"])


async def test_fixed_answers(call):
    assert await call("GET", "/") == (200, {})
    status, health = await call("GET", "/healthz")
    assert (status, health["status"], health["schemas"]) == (200, "ok", 0)
    assert Path(health["folder"]).is_dir()
    assert await call("GET", "/schemas/types") == (200, ["AVRO"])
    assert await call("GET", "/mode") == (200, {"mode": "READWRITE"})
    assert await call("GET", "/mode/x?defaultToGlobal=true") == (200, {"mode": "READWRITE"})
    assert await call.error("GET", "/mode/x") == (404, 40409)
    assert await call("GET", "/contexts") == (200, ["."])


@pytest.mark.parametrize("subject", ["a%2Fb", "a%20b", "%C3%A9", "a%25b", "a:b", "..x", "a%3Fb", "%252F"])
async def test_percent_encoded_subjects(call, subject):
    plain = URL("http://x/?s=" + subject, encoded=True).query["s"]
    assert await call("POST", f"/subjects/{subject}/versions", {"schema": A}) == (200, {"id": 1})
    assert await call("GET", "/subjects") == (200, [plain])
    status, found = await call("GET", f"/subjects/{subject}/versions/latest")
    assert (status, found["subject"]) == (200, plain)
    assert await call("PUT", f"/config/{subject}", {"compatibility": "FULL"}) == (200, {"compatibility": "FULL"})
    assert (await call("POST", f"/compatibility/subjects/{subject}/versions/1", {"schema": AB}))[0] == 200
    assert await call("DELETE", f"/subjects/{subject}") == (200, [1])


async def test_not_found(call):
    await call("POST", "/subjects/x/versions", {"schema": A})
    assert await call.error("GET", "/subjects/y/versions") == (404, 40401)
    assert await call.error("GET", "/subjects/y/versions/latest") == (404, 40401)
    assert await call.error("POST", "/subjects/y", {"schema": A}) == (404, 40401)
    assert await call.error("POST", "/subjects/x", {"schema": AB}) == (404, 40403)
    assert await call.error("GET", "/subjects/x/versions/2") == (404, 40402)
    assert await call.error("GET", "/subjects/x/versions/zero") == (422, 42202)
    assert await call.error("GET", "/schemas/ids/9") == (404, 40403)
    assert await call.error("GET", "/schemas/ids/9/versions") == (404, 40403)
    assert await call.error("GET", "/schemas/ids/x") == (404, 404)
    assert await call.error("GET", "/nowhere") == (404, 404)
    assert await call.error("PATCH", "/subjects") == (405, 405)


async def test_refused_registrations(call):
    async def register(**body):
        return await call.error("POST", "/subjects/x/versions", body)

    assert await register(schema="{") == (422, 42201)
    assert await register(schema='{"type":"bogus"}') == (422, 42201)
    assert await register(schema="") == (422, 42201)
    assert await register() == (422, 42201)
    assert await register(schema=A, schemaType="PROTOBUF") == (422, 42201)
    assert await register(schema=A, references=[{"name": "n", "subject": "s", "version": 1}]) == (422, 42201)
    assert await register(schema=A, metadata={"properties": {}}) == (422, 42201)
    assert await register(schema=A, id=7) == (422, 42205)
    assert await register(schema=5) == (400, 400)
    assert await call.error("POST", "/subjects/x/versions", data="{") == (400, 400)
    assert await call.error("POST", "/subjects/x/versions", data=b"\xff") == (400, 400)
    assert await call.error("POST", "/subjects/x/versions", data="[" * 50_000) == (400, 400)
    nested = '{"type":"array","items":' * 2000 + '"long"' + "}" * 2000
    assert await register(schema=nested) == (422, 42201)
    assert await call("GET", "/subjects") == (200, [])


async def test_what_a_client_may_leave_empty(call):
    body = {"schema": A, "schemaType": None, "references": [], "metadata": None, "ruleSet": None, "id": -1, "new": 1}
    assert await call("POST", "/subjects/x/versions?normalize=true", body) == (200, {"id": 1})


async def test_bodies_are_bounded(call):
    huge = json.dumps({"type": "record", "name": "R", "doc": "x" * 100_000, "fields": []})
    assert await call.error("POST", "/subjects/x/versions", {"schema": huge}) == (413, 413)


@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "text/plain", "multipart/form-data"])
async def test_what_a_browser_may_send_unasked_is_refused(call, content_type):
    answer = await call.error("POST", "/subjects/x/versions", {"schema": A}, content_type=content_type)
    assert answer == (415, 415)


@pytest.mark.parametrize(
    "content_type", ["application/json", "application/vnd.schemaregistry+json; charset=utf-8", None]
)
async def test_accepted_content_types(call, content_type):
    assert (await call("POST", "/subjects/x/versions", {"schema": A}, content_type=content_type))[0] == 200


async def test_incompatible_schemas(call):
    await call("POST", "/subjects/x/versions", {"schema": A})
    status, body = await call("POST", "/subjects/x/versions", {"schema": BAD})
    assert (status, body["error_code"]) == (409, 409)
    assert 'incompatible with an earlier schema for subject "x"' in body["message"]
    assert "cannot read data of version 1: R.z: the field is missing" in body["message"]
    for path in ("/compatibility/subjects/x/versions/latest", "/compatibility/subjects/x/versions"):
        assert await call("POST", path, {"schema": AB}) == (200, {"is_compatible": True})
        assert await call("POST", path, {"schema": BAD}) == (200, {"is_compatible": False})
        status, body = await call("POST", path + "?verbose=true", {"schema": BAD})
        assert body["is_compatible"] is False
        assert "R.z" in body["messages"][0]
    unknown = "/compatibility/subjects/y/versions/latest"
    assert await call("POST", unknown, {"schema": A}) == (200, {"is_compatible": True})
    assert await call.error("POST", "/compatibility/subjects/x/versions/9", {"schema": A}) == (404, 40402)
    assert await call.error("POST", "/compatibility/subjects/x/versions/1", {"schema": "{"}) == (422, 42201)


async def test_levels(call):
    default = {"compatibilityLevel": "BACKWARD_TRANSITIVE"}
    assert await call("GET", "/config") == (200, default)
    assert await call.error("GET", "/config/x") == (404, 40408)
    assert await call.error("DELETE", "/config/x") == (404, 40408)
    assert await call("GET", "/config/x?defaultToGlobal=true") == (200, default)
    assert await call("PUT", "/config/x", {"compatibility": "none"}) == (200, {"compatibility": "NONE"})
    assert await call("GET", "/config/x") == (200, {"compatibilityLevel": "NONE"})
    await call("POST", "/subjects/x/versions", {"schema": A})
    assert (await call("POST", "/subjects/x/versions", {"schema": BAD}))[0] == 200
    assert await call("DELETE", "/config/x") == (200, {"compatibilityLevel": "NONE"})
    assert await call.error("GET", "/config/x") == (404, 40408)
    assert await call("PUT", "/config", {"compatibility": "FULL"}) == (200, {"compatibility": "FULL"})
    assert await call("DELETE", "/config") == (200, {"compatibilityLevel": "FULL"})
    assert await call("GET", "/config") == (200, default)
    assert await call.error("PUT", "/config", {"compatibility": "SIDEWAYS"}) == (422, 42203)
    assert await call.error("PUT", "/config", {}) == (422, 42203)


async def test_deletion(call):
    for text in (A, AB):
        await call("POST", "/subjects/x/versions", {"schema": text})
    assert await call.error("DELETE", "/subjects/x?permanent=true") == (404, 40405)
    assert await call("DELETE", "/subjects/x/versions/1") == (200, 1)
    assert await call("GET", "/subjects/x/versions?deleted=true") == (200, [1, 2])
    assert await call("DELETE", "/subjects/x/versions/1?permanent=true") == (200, 1)
    assert await call("DELETE", "/subjects/x") == (200, [2])
    assert await call("GET", "/subjects") == (200, [])
    assert await call("GET", "/subjects?deleted=true") == (200, ["x"])
    assert await call("DELETE", "/subjects/x?permanent=true") == (200, [2])
    assert await call.error("GET", "/schemas/ids/2") == (404, 40403)


async def test_lists_in_pages(call):
    for name in ("a1", "a2", "b1"):
        await call("POST", f"/subjects/{name}/versions", {"schema": A})
    assert await call("GET", "/subjects?subjectPrefix=a") == (200, ["a1", "a2"])
    assert await call("GET", "/subjects?offset=1&limit=1") == (200, ["a2"])
    assert await call("GET", "/subjects?offset=0&limit=-1") == (200, ["a1", "a2", "b1"])
    assert await call.error("GET", "/subjects?offset=x") == (404, 404)


async def test_registrations_at_once_get_one_id(call):
    answers = await asyncio.gather(
        *(call("POST", f"/subjects/s{n % 5}/versions", {"schema": A}) for n in range(50)),
        *(call("POST", f"/subjects/t{n % 5}/versions", {"schema": AB}) for n in range(50)),
    )
    assert {body["id"] for _, body in answers[:50]} == {answers[0][1]["id"]}
    assert {body["id"] for _, body in answers[50:]} == {answers[50][1]["id"]}
    assert sorted({body["id"] for _, body in answers}) == [1, 2]


async def test_a_taken_port_is_one_clear_error_and_leaves_the_folder_free(tmp_path):
    async with RegistryServer(tmp_path / "one", 0) as server:
        port = int(server.url.rpartition(":")[2])
        second = RegistryServer(tmp_path / "two", port)
        with pytest.raises(OrderflowError, match=rf"127\.0\.0\.1:{port} is taken"):
            await second.start()
        async with RegistryServer(tmp_path / "two", 0):
            pass


async def test_a_wrong_host_is_one_clear_error(tmp_path):
    with pytest.raises(OrderflowError, match="can't listen on"):
        await RegistryServer(tmp_path, 0, "192.0.2.1").start()
