"""The registry's state: ids, versions, deletion, and what survives a restart or a failing disk."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from orderflow.registry.compatibility import Level
from orderflow.registry.store import FILE, DataError, RefusedError, Store


def schema(*names, default=0):
    fields = [{"name": name, "type": "long", "default": default} for name in names]
    return json.dumps({"type": "record", "name": "R", "fields": fields})


A, AB, ABC = schema("a"), schema("a", "b"), schema("a", "b", "c")
INCOMPATIBLE = json.dumps({"type": "record", "name": "R", "fields": [{"name": "z", "type": "string"}]})


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path)
    yield store
    store.close()


def reopened(store, folder):
    store.close()
    return Store(folder)


def code_of(call, *arguments, **options):
    with pytest.raises(RefusedError) as caught:
        call(*arguments, **options)
    return caught.value.error_code


def test_ids_run_from_one_in_order_of_registration_over_all_subjects(store):
    assert [store.register("x", A).id, store.register("y", AB).id, store.register("x", ABC).id] == [1, 2, 3]
    assert store.versions("x") == [1, 2]
    assert store.subjects() == ["x", "y"]


def test_registering_again_changes_nothing(store, tmp_path):
    store.register("x", A)
    before = (tmp_path / FILE).read_bytes()
    again = store.register("x", json.dumps(json.loads(A), indent=4, sort_keys=True))
    assert (again.id, again.version) == (1, 1)
    assert (tmp_path / FILE).read_bytes() == before


def test_one_schema_has_one_id_in_all_subjects(store):
    assert store.register("x", A).id == store.register("y", A).id == 1
    assert store.uses(1) == [("x", 1), ("y", 1)]


def test_schemas_that_differ_in_a_default_keep_their_own_text(store):
    other = schema("a", default=7)
    assert store.register("x", A).id != store.register("x", other).id
    assert store.schema(2) == other


def test_everything_survives_a_restart(store, tmp_path):
    store.register("x", A)
    store.register("x", AB)
    store.register("y", A)
    store.set_level(Level.FULL)
    store.set_level(Level.NONE, "y")
    store.delete_version("x", "1", permanent=False)
    store = reopened(store, tmp_path)
    try:
        assert (store.versions("x"), store.versions("x", deleted=True)) == ([2], [1, 2])
        assert (store.level, store.level_of("y"), store.level_of("x")) == (Level.FULL, Level.NONE, None)
        assert store.get("x", "latest").schema == AB
        assert store.register("z", ABC).id == 3
        assert store.register("w", A).id == 1
    finally:
        store.close()


def test_an_incompatible_schema_is_refused_and_takes_no_id(store):
    store.register("x", A)
    assert code_of(store.register, "x", INCOMPATIBLE) == 409
    assert store.register("y", INCOMPATIBLE).id == 2
    store.set_level(Level.NONE, "x")
    assert store.register("x", INCOMPATIBLE).version == 2


def test_check_against_one_version_and_against_all(store):
    drops_default = json.dumps(
        {"type": "record", "name": "R", "fields": [{"name": "a", "type": "long"}, {"name": "b", "type": "long"}]}
    )
    store.register("x", A)
    store.register("x", AB)
    assert store.problems("x", drops_default, "latest") == []
    assert store.problems("x", drops_default, "2") == []
    assert len(store.problems("x", drops_default, "1")) == 1
    assert len(store.problems("x", drops_default)) == 1
    assert store.problems("unknown", drops_default, "latest") == []
    assert code_of(store.problems, "unknown", drops_default, "1") == 40401
    assert code_of(store.problems, "x", drops_default, "3") == 40402


def test_deleted_versions_are_hidden_and_count_no_more(store):
    store.register("x", A)
    store.register("x", AB)
    assert store.delete_version("x", "latest", permanent=False) == 2
    assert store.versions("x") == [1]
    assert store.get("x", "2", deleted=True).schema == AB
    assert store.schema(2) == AB
    assert code_of(store.get, "x", "2") == 40402
    assert code_of(store.lookup, "x", AB) == 40403
    assert store.lookup("x", AB, deleted=True).version == 2
    assert code_of(store.delete_version, "x", "2", permanent=False) == 40406
    assert code_of(store.delete_version, "x", "1", permanent=True) == 40407
    assert store.register("x", AB).version == 3
    assert store.delete_version("x", "2", permanent=True) == 2
    assert store.versions("x", deleted=True) == [1, 3]
    assert store.schema(2) == AB


def test_deleting_a_subject(store):
    store.register("x", A)
    store.register("x", AB)
    store.register("y", A)
    store.set_level(Level.FULL, "x")
    assert code_of(store.delete_subject, "x", permanent=True) == 40405
    assert store.delete_subject("x", permanent=False) == [1, 2]
    assert (store.subjects(), store.subjects(deleted=True)) == (["y"], ["x", "y"])
    assert code_of(store.versions, "x") == 40401
    assert code_of(store.delete_subject, "x", permanent=False) == 40404
    assert store.level_of("x") is None
    assert store.register("x", INCOMPATIBLE).version == 3
    store.delete_subject("x", permanent=False)
    assert store.delete_subject("x", permanent=True) == [1, 2, 3]
    assert code_of(store.delete_subject, "x", permanent=False) == 40401
    assert store.schema(1) == A
    assert code_of(store.schema, 2) == 40403


def test_ids_are_never_given_twice(store, tmp_path):
    store.register("x", A)
    store.delete_subject("x", permanent=False)
    store.delete_subject("x", permanent=True)
    store = reopened(store, tmp_path)
    try:
        assert store.register("x", A).id == 2
    finally:
        store.close()


@pytest.mark.parametrize("version", ["0", "-2", "x", "", "1.0", str(2**31), "99999999999999999999", "\u00b2"])
def test_what_is_not_a_version(store, version):
    store.register("x", A)
    assert code_of(store.get, "x", version) == 42202


@pytest.mark.parametrize("subject", ["", "x" * 256, "a\nb", "a\x00"])
def test_what_is_not_a_subject(store, subject):
    assert code_of(store.register, subject, A) == 42208
    assert code_of(store.set_level, Level.FULL, subject) == 42208


def test_one_registry_a_folder(store, tmp_path):
    with pytest.raises(DataError, match="in use by another registry"):
        Store(tmp_path)
    reopened(store, tmp_path).close()


@pytest.mark.parametrize("when", ["write", "fsync", "rename"])
def test_a_change_that_cannot_be_written_has_not_happened(store, tmp_path, monkeypatch, when):
    store.register("x", A)
    before = (tmp_path / FILE).read_bytes()

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if when == "write":
            (tmp_path / "registry.tmp").mkdir()
        elif when == "fsync":
            patch.setattr(os, "fsync", fail)
        else:
            patch.setattr(Path, "replace", fail)
        for change in (
            lambda: store.register("x", AB),
            lambda: store.delete_subject("x", permanent=False),
            lambda: store.set_level(Level.NONE),
        ):
            assert code_of(change) == 50001
    assert (tmp_path / FILE).read_bytes() == before
    assert (store.versions("x"), store.level) == ([1], Level.BACKWARD_TRANSITIVE)
    if when == "write":
        (tmp_path / "registry.tmp").rmdir()
    assert store.register("x", AB).id == 2


def test_a_torn_second_file_is_not_read(store, tmp_path):
    store.register("x", A)
    (tmp_path / "registry.tmp").write_text("{", "utf-8")
    store = reopened(store, tmp_path)
    try:
        assert store.versions("x") == [1]
        assert store.register("x", AB).version == 2
    finally:
        store.close()


GOOD = {"format": 1, "next_id": 2, "schemas": {"1": A}, "subjects": {"x": [{"version": 1, "id": 1}]}}


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"[" * 100_000,
        {**GOOD, "format": 2},
        {**GOOD, "next_id": 1},
        {**GOOD, "next_id": 0},
        {**GOOD, "schemas": {}},
        {**GOOD, "schemas": {"1": "{"}},
        {**GOOD, "schemas": {"0": A}},
        {**GOOD, "next_id": 3, "schemas": {"1": A, "2": A}},
        {**GOOD, "level": "SOMEHOW"},
        {**GOOD, "subjects": {"x": []}},
        {**GOOD, "subjects": {"x": [{"version": 1, "id": 1}, {"version": 1, "id": 1}]}},
        {**GOOD, "unknown": 1},
    ],
)
def test_a_damaged_file_is_refused_with_its_name(tmp_path, damaged):
    path = tmp_path / FILE
    path.write_text(json.dumps(GOOD), "utf-8")
    Store(tmp_path).close()
    data = damaged if isinstance(damaged, bytes) else json.dumps(damaged).encode()
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"registry\.json .*restore it from a copy"):
        Store(tmp_path)
    assert path.read_bytes() == data
    path.write_text(json.dumps(GOOD), "utf-8")
    Store(tmp_path).close()


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(DataError, match="can't be used"):
        Store(tmp_path / "file")
