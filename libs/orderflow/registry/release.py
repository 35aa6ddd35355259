"""The schemas of this tree against those of every release: the rule that CI enforces (`schemas/RULES.md`).

python -m orderflow.registry.release check
python -m orderflow.registry.release record 1.2.0
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from orderflow.errors import OrderflowError
from orderflow.paths import SCHEMAS
from orderflow.registry.compatibility import Level, SchemaError, canonical_text, parse, problems

LEVEL: Final = Level.BACKWARD_TRANSITIVE
RELEASED: Final = SCHEMAS / "released"
VERSION: Final = re.compile(r"\d+\.\d+\.\d+\Z", re.ASCII)
DESCRIPTION: Final = "Compare the schemas of this tree with those of every release."
PEEKED: Final = 3
"""Leading fields that readers take from the bytes without decoding the rest (`streaming.codec.peek`)."""


class ReleaseError(OrderflowError):
    """The folder of released schemas is missing or not laid out as the rule asks."""


def check_release(schemas: Path = SCHEMAS, released: Path = RELEASED) -> list[str]:
    """What breaks the rule, one message a problem; empty where the schemas may be released.

    `schemas` holds the current `NAME.avsc`, `released` a folder `X.Y.Z/NAME.avsc` for each release that changed them.

    Raises
    ------
    ReleaseError
        A folder is missing, a released one is not named X.Y.Z, or a released schema is damaged.
    """
    current = _texts(schemas)
    if not current:
        raise ReleaseError(f"no schema (*.avsc) in {schemas}: name the folder that holds them")
    malformed = {name: _check_form(name, text) for name, text in current.items()}
    found = [problem for each in malformed.values() for problem in each]
    for name, versions in _history(released).items():
        if name not in current:
            found.append(
                f"{name}: {versions[-1][0]} released it and it is gone: keep the file, its data are still in the topics"
            )
        elif not malformed[name]:
            found += _check_one(name, current[name], versions)
    return found


def record_release(version: str, schemas: Path = SCHEMAS, released: Path = RELEASED) -> list[str]:
    """Keep the current schemas as those of `version`, where they differ from the last kept; returns their names.

    Raises
    ------
    ReleaseError
        The version is not X.Y.Z, is not above the newest one, or the schemas break the rule.
    """
    found = check_release(schemas, released)
    if found:
        raise ReleaseError(f"{len(found)} problems, nothing was recorded; the first: {found[0]}")
    newest = max((folder.name for folder in _folders(released)), key=_key, default="")
    if not VERSION.match(version) or (newest and _key(version) <= _key(newest)):
        raise ReleaseError(f"version {version!r} must be of the form X.Y.Z{f' and above {newest}' if newest else ''}")
    history = _history(released)
    changed = {
        name: text
        for name, text in _texts(schemas).items()
        if name not in history or canonical_text(history[name][-1][1]) != canonical_text(text)
    }
    if changed:
        (released / version).mkdir()
    for name, text in changed.items():
        (released / version / f"{name}.avsc").write_text(text, "utf-8")
    return list(changed)


def _check_one(name: str, text: str, versions: Sequence[tuple[str, str]]) -> list[str]:
    found = problems(text, versions, LEVEL)
    found += [why for label, old in versions for why in _check_head(text, label, old)]
    return [f"{name}: {problem}" for problem in found]


def _check_form(name: str, text: str) -> list[str]:
    try:
        tree = parse(text).tree
    except SchemaError as error:
        return [f"{name}: {error}"]
    if tree.type != "record":
        return [f"{name}: the schema must be a record, and is of type {tree.type}"]
    if '"logicalType"' in parse(text).canonical:
        return [f"{name}: logicalType is not used here: no check sees it change. Put the unit into the field's name"]
    return []


def _check_head(text: str, label: str, old: str) -> list[str]:
    """The first fields are read at their place in the bytes, an enum by its number: both must stay."""
    before, after = parse(old).tree.fields[:PEEKED], parse(text).tree.fields[:PEEKED]
    if not before or before[0].name != "seq":
        return []
    found = []
    for index, field in enumerate(before):
        now = after[index] if index < len(after) else None
        if now is None or now.name != field.name or not _same_place(field.type, now.type):
            found.append(
                f"field {index + 1} is {field.name!r} in {label} and must keep its place, type and enum numbers: readers "
                f"take the first {PEEKED} fields from the bytes; append fields at the end, symbols behind the last"
            )
    return found


def _same_place(before: Any, after: Any) -> bool:
    if before.type != after.type:
        return False
    if before.type == "enum":
        return list(after.symbols[: len(before.symbols)]) == list(before.symbols)
    return True


def _texts(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text("utf-8") for path in sorted(folder.glob("*.avsc"))}


def _key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _folders(released: Path) -> list[Path]:
    if not released.is_dir():
        raise ReleaseError(
            f"{released} is missing: it holds the released schemas, and is empty before the first release"
        )
    folders = [path for path in released.iterdir() if path.is_dir()]
    stray = [path for path in folders if not VERSION.match(path.name)] + list(released.glob("*.avsc"))
    if stray:
        raise ReleaseError(f"{min(stray)} is not the folder of a release: schemas lie in {released}/X.Y.Z/")
    return sorted(folders, key=lambda folder: _key(folder.name))


def _history(released: Path) -> dict[str, list[tuple[str, str]]]:
    """By schema name: (label, text) of each release that changed it, oldest first."""
    history: dict[str, list[tuple[str, str]]] = {}
    for folder in _folders(released):
        for name, text in _texts(folder).items():
            _demand_record(folder / f"{name}.avsc", text)
            history.setdefault(name, []).append((f"release {folder.name}", text))
    return dict(sorted(history.items()))


def _demand_record(path: Path, text: str) -> None:
    try:
        kind = parse(text).tree.type
    except SchemaError as error:
        raise ReleaseError(f"released schema {path} is damaged: {error}; restore it from its release") from error
    if kind != "record":
        raise ReleaseError(f"released schema {path} is of type {kind}, not a record: restore it from its release")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: exit status 0, 1 for problems found, 2 for a folder or version that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m orderflow.registry.release", description=DESCRIPTION)
    parser.add_argument("--schemas", type=Path, default=SCHEMAS, help="folder of the current schemas")
    parser.add_argument("--released", type=Path, help="folder of the released ones (default SCHEMAS/released)")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="compare the current schemas with every release")
    commands.add_parser("record", help="keep the current schemas as a release").add_argument("version")
    options = parser.parse_args(arguments)
    released = options.released or options.schemas / "released"
    try:
        if options.command == "record":
            changed = record_release(options.version, options.schemas, released)
            sys.stdout.write(f"{options.version}: {len(changed)} changed schemas recorded\n")
            return 0
        found = check_release(options.schemas, released)
    except OrderflowError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write("".join(f"{problem}\n" for problem in found) or "the schemas may be released\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
