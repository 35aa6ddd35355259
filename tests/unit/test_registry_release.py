"""The rule for releases: each schema reads the data of every release, and keeps what readers take from the bytes."""

from __future__ import annotations

import json

import pytest
from orderflow.registry.release import RELEASED, ReleaseError, check_release, main, record_release
from orderflow.topics import DERIVED, JOURNAL, TOPICS

HEAD = [{"name": "seq", "type": "long"}, {"name": "sub", "type": "int"}]


def schema(*fields, head=HEAD, name="Tick"):
    return {"type": "record", "name": name, "namespace": "orderflow", "fields": [*head, *fields]}


def kind(*symbols):
    return {"name": "kind", "type": {"type": "enum", "name": "Kind", "symbols": list(symbols), "default": symbols[0]}}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "released").mkdir()
    write(tmp_path, schema(kind("a", "b")))
    return tmp_path


def write(folder, value, name="tick"):
    (folder / f"{name}.avsc").write_text(json.dumps(value), "utf-8")


def check(folder):
    return check_release(folder, folder / "released")


def record(folder, version):
    return record_release(version, folder, folder / "released")


def test_the_schemas_of_this_tree_may_be_released():
    assert check_release() == []
    assert RELEASED.is_dir()


def test_every_topic_with_a_schema_begins_as_its_readers_expect():
    """`peek` reads seq and sub of derived records, and seq and kind of the journal, without decoding the rest."""
    for topic in TOPICS:
        if topic.schema is None:
            continue
        fields = json.loads((RELEASED.parent / f"{topic.schema}.avsc").read_text("utf-8"))["fields"]
        if topic.name in DERIVED:
            assert [(each["name"], each["type"]) for each in fields[:2]] == [("seq", "long"), ("sub", "int")]
        elif topic.name == JOURNAL:
            assert (fields[0]["name"], fields[0]["type"], fields[1]["name"]) == ("seq", "long", "kind")
            assert fields[1]["type"]["symbols"][0] == "open"


def test_before_the_first_release_everything_may_change(folder):
    assert check(folder) == []


def test_a_compatible_change_is_recorded_once(folder):
    assert record(folder, "0.1.0") == ["tick"]
    assert record(folder, "0.1.1") == []
    write(folder, schema(kind("a", "b", "c"), {"name": "x", "type": "long", "default": 0}))
    assert check(folder) == []
    assert record(folder, "0.2.0") == ["tick"]
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("0*/*.avsc")) == [
        "released/0.1.0/tick.avsc",
        "released/0.2.0/tick.avsc",
    ]


def test_every_release_counts_and_not_only_the_last(folder):
    record(folder, "0.9.0")
    write(folder, schema(kind("a", "b"), {"name": "x", "type": "long", "default": 0}))
    record(folder, "0.10.0")
    write(folder, schema(kind("a", "b"), {"name": "x", "type": "long"}))
    (problem,) = check(folder)
    assert problem.startswith("tick: the new schema cannot read data of release 0.9.0: Tick.x: the field is missing")
    with pytest.raises(ReleaseError, match=r"nothing was recorded.*Tick\.x"):
        record(folder, "0.11.0")


@pytest.mark.parametrize(
    ("changed", "place"),
    [
        (schema(kind("b", "a")), "field 3 is 'kind'"),
        (schema(kind("new", "a", "b")), "field 3 is 'kind'"),
        (schema({"name": "x", "type": "int", "default": 0}, kind("a", "b")), "field 3 is 'kind'"),
        (schema(kind("a", "b"), head=HEAD[::-1]), "field 1 is 'seq'"),
        (schema(kind("a", "b"), head=[HEAD[0], {"name": "sub", "type": "long"}]), "field 2 is 'sub'"),
    ],
)
def test_what_avro_would_allow_and_readers_of_the_bytes_do_not(folder, changed, place):
    record(folder, "1.0.0")
    write(folder, changed)
    found = check(folder)
    assert found
    assert all(problem.startswith("tick: field ") for problem in found)
    assert any(place in problem for problem in found)


def test_other_problems_are_named(folder):
    record(folder, "1.0.0")
    (folder / "tick.avsc").unlink()
    write(folder, schema({"name": "t", "type": {"type": "long", "logicalType": "timestamp-millis"}}), "timed")
    write(folder, "string", "plain")
    write(folder, {"type": "bogus"}, "broken")
    found = "\n".join(check(folder))
    assert "tick: release 1.0.0 released it and it is gone" in found
    assert "timed: logicalType is not used here" in found
    assert "plain: the schema must be a record" in found
    assert "broken: not a valid Avro schema" in found
    assert len(found.splitlines()) == 4


def test_an_unusable_folder_is_an_error_and_not_a_pass(folder):
    with pytest.raises(ReleaseError, match="is missing"):
        check_release(folder, folder / "nowhere")
    with pytest.raises(ReleaseError, match="no schema"):
        check_release(folder / "released", folder / "released")
    (folder / "released" / "tick.avsc").write_text("{}", "utf-8")
    with pytest.raises(ReleaseError, match=r"is not the folder of a release"):
        check(folder)
    (folder / "released" / "tick.avsc").unlink()
    record(folder, "1.0.0")
    (folder / "released" / "1.0.0" / "tick.avsc").write_text("{", "utf-8")
    with pytest.raises(ReleaseError, match="is damaged"):
        check(folder)


@pytest.mark.parametrize("version", ["1.0", "v1.2.3", "../x", "0.9.9", "1.0.0", "1.2.3\n"])
def test_versions_must_rise(folder, version):
    record(folder, "1.0.0")
    with pytest.raises(ReleaseError, match=r"above 1\.0\.0"):
        record(folder, version)


def test_command_line(folder, capsys):
    arguments = ["--schemas", str(folder)]
    assert main([*arguments, "check"]) == 0
    assert main([*arguments, "record", "1.0.0"]) == 0
    assert "1 changed schemas recorded" in capsys.readouterr().out
    write(folder, schema(kind("b", "a")))
    assert main([*arguments, "check"]) == 1
    assert "field 3 is 'kind'" in capsys.readouterr().out
    assert main([*arguments, "record", "2.0.0"]) == 2
    assert "nothing was recorded" in capsys.readouterr().err
