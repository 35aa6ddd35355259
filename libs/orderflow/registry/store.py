"""What the registry knows, and its one file: subjects with their versions, schemas by id, compatibility levels.

The semantics are Confluent's: a schema has one id in all subjects; ids run 1, 2, 3 ... and are never given twice; a
deleted version is hidden, can still be fetched by id, and is only removed by a second, permanent deletion.

Every change is on disk before it is answered: the new state is written to a second file, synchronised and renamed over
the first; only then it replaces the state in memory. A change that can't be written has not happened.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final

import msgspec

from orderflow.errors import OrderflowError
from orderflow.registry.compatibility import Level, SchemaError, parse, problems

FORMAT: Final = 1
FILE: Final = "registry.json"
LOCK: Final = "registry.lock"
MAX_VERSION: Final = 2**31 - 1
MAX_SUBJECT_CHARS: Final = 255
DEFAULT_LEVEL: Final = Level.BACKWARD_TRANSITIVE

Positive = Annotated[int, msgspec.Meta(ge=1, le=MAX_VERSION)]


class DataError(OrderflowError):
    """The registry's folder or file can't be used."""


class RefusedError(OrderflowError):
    """A request that the registry refuses, as Confluent's REST interface words it: HTTP status, error code, message."""

    def __init__(self, error_code: int, message: str, status: int | None = None) -> None:
        """`status` defaults to the first three digits of `error_code`."""
        super().__init__(message)
        self.error_code = error_code
        self.status = status if status is not None else int(str(error_code)[:3])


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One version of a subject."""

    version: Positive
    id: Positive
    deleted: bool = False


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything, as it lies in the file. Treated as a value: changes make a new one."""

    format: int = FORMAT
    next_id: Positive = 1
    level: Level = DEFAULT_LEVEL
    schemas: dict[Positive, str] = {}
    subjects: dict[str, tuple[Entry, ...]] = {}
    levels: dict[str, Level] = {}


class Registered(msgspec.Struct, frozen=True):
    """A version with its schema."""

    subject: str
    version: int
    id: int
    schema: str


class Store:
    """The registry's state over one folder, which it holds alone while it is open."""

    def __init__(self, folder: Path) -> None:
        """Open `folder`, made where it is missing.

        Raises
        ------
        DataError
            The folder can't be written, another registry holds it, or its file is damaged.
        """
        self.folder = folder.resolve()
        self._path = folder / FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / LOCK).open("ab")
        except OSError as error:
            raise DataError(f"registry folder {folder} can't be used: {error.strerror}; name another") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._state = _load(self._path)
        except BlockingIOError as error:
            self._lock.close()
            raise DataError(
                f"registry folder {folder} is in use by another registry: stop it, or name another"
            ) from error
        except DataError:
            self._lock.close()
            raise
        except OSError as error:
            self._lock.close()
            raise DataError(f"registry folder {folder} can't be locked: {error.strerror}; name a local one") from error
        self._ids = {parse(text).canonical: schema_id for schema_id, text in self._state.schemas.items()}

    def close(self) -> None:
        """Let the folder go. There is nothing left to write."""
        self._lock.close()

    # Reading

    @property
    def schemas(self) -> int:
        """Number of schemas."""
        return len(self._state.schemas)

    @property
    def level(self) -> Level:
        """The compatibility level of subjects that have none of their own."""
        return self._state.level

    def subjects(self, deleted: bool = False) -> list[str]:
        """Names in order; with `deleted`, those too of which every version is deleted."""
        return sorted(name for name in self._state.subjects if self._entries(name, deleted))

    def versions(self, subject: str, deleted: bool = False) -> list[int]:
        """Version numbers of a subject, rising."""
        return [entry.version for entry in self._known(subject, deleted)]

    def get(self, subject: str, version: str, deleted: bool = False) -> Registered:
        """The version `version`: a number, `latest` or -1."""
        wanted = version_number(version)
        entries = self._known(subject, deleted)
        if wanted is None:
            return self._registered(subject, entries[-1])
        for entry in entries:
            if entry.version == wanted:
                return self._registered(subject, entry)
        raise RefusedError(40402, f"Version {wanted} not found.")

    def lookup(self, subject: str, text: str, deleted: bool = False) -> Registered:
        """The version of `subject` whose schema is `text`."""
        entries = self._known(subject, deleted)
        schema_id = self._ids.get(_parse(text))
        for entry in reversed(entries):
            if entry.id == schema_id:
                return self._registered(subject, entry)
        raise RefusedError(40403, "Schema not found")

    def schema(self, schema_id: int) -> str:
        """The text that `schema_id` was first registered with."""
        text = self._state.schemas.get(schema_id)
        if text is None:
            raise RefusedError(40403, f"Schema {schema_id} not found")
        return text

    def uses(self, schema_id: int, deleted: bool = False) -> list[tuple[str, int]]:
        """(subject, version) of each version that has the schema `schema_id`."""
        self.schema(schema_id)
        return [
            (subject, entry.version)
            for subject in self.subjects(deleted)
            for entry in self._entries(subject, deleted)
            if entry.id == schema_id
        ]

    def level_of(self, subject: str) -> Level | None:
        """The subject's own compatibility level, None where it has none."""
        return self._state.levels.get(subject)

    def problems(self, subject: str, text: str, version: str | None = None) -> list[str]:
        """What the subject's level has against `text`: beside `version` alone, or beside the versions the level names."""
        _parse(text)
        level = self._state.levels.get(subject, self._state.level)
        if version is None:
            entries = self._entries(subject)
        elif version_number(version) is None:
            entries = self._entries(subject)[-1:]
        else:
            entry = self.get(subject, version)
            entries = (Entry(entry.version, entry.id),)
        return problems(text, [(f"version {each.version}", self.schema(each.id)) for each in entries], level)

    # Changing

    def register(self, subject: str, text: str) -> Registered:
        """Add `text` to `subject` as its newest version, or find it there.

        Raises
        ------
        RefusedError
            422 for an invalid subject or schema; 409 for one that the subject's level refuses; 500 where the change
            can't be written.
        """
        _check_subject(subject)
        canonical = _parse(text)
        state = self._state
        schema_id = self._ids.get(canonical)
        for entry in reversed(self._entries(subject)):
            if entry.id == schema_id:
                return self._registered(subject, entry)
        found = self.problems(subject, text)
        if found:
            level = state.levels.get(subject, state.level)
            raise RefusedError(
                409,
                f'Schema being registered is incompatible with an earlier schema for subject "{subject}" '
                f"(compatibility {level.value}): {'; '.join(found)}",
            )
        all_entries = self._entries(subject, deleted=True)
        version = all_entries[-1].version + 1 if all_entries else 1
        schemas = state.schemas
        next_id = state.next_id
        if schema_id is None:
            schema_id, next_id = next_id, next_id + 1
            schemas = {**schemas, schema_id: text}
        entry = Entry(version, schema_id)
        subjects = {**state.subjects, subject: (*all_entries, entry)}
        self._commit(msgspec.structs.replace(state, next_id=next_id, schemas=schemas, subjects=subjects))
        self._ids.setdefault(canonical, schema_id)
        return self._registered(subject, entry)

    def delete_subject(self, subject: str, permanent: bool) -> list[int]:
        """Hide every version of a subject, or remove one that is hidden; returns the version numbers."""
        entries = self._entries(subject, deleted=True)
        if not entries:
            raise RefusedError(40401, f"Subject '{subject}' not found.")
        alive = self._entries(subject)
        if permanent:
            if alive:
                raise RefusedError(40405, f"Subject '{subject}' was not deleted first before being permanently deleted")
            self._replace(subject, ())
            return [entry.version for entry in entries]
        if not alive:
            raise RefusedError(40404, f"Subject '{subject}' was soft deleted. Set permanent=true to delete permanently")
        self._replace(subject, tuple(msgspec.structs.replace(entry, deleted=True) for entry in entries))
        return [entry.version for entry in alive]

    def delete_version(self, subject: str, version: str, permanent: bool) -> int:
        """Hide one version, or remove one that is hidden; returns its number."""
        wanted = version_number(version)
        entries = self._known(subject, deleted=True)
        if wanted is None:
            alive = self._known(subject)
            wanted = alive[-1].version
        found = next((entry for entry in entries if entry.version == wanted), None)
        if found is None:
            raise RefusedError(40402, f"Version {wanted} not found.")
        if permanent and not found.deleted:
            raise RefusedError(
                40407,
                f"Subject '{subject}' Version {wanted} was not deleted first before being permanently deleted",
            )
        if not permanent and found.deleted:
            raise RefusedError(
                40406,
                f"Subject '{subject}' Version {wanted} was soft deleted. Set permanent=true to delete permanently",
            )
        kept = [entry for entry in entries if entry.version != wanted]
        if not permanent:
            kept.append(msgspec.structs.replace(found, deleted=True))
        self._replace(subject, tuple(sorted(kept, key=lambda entry: entry.version)))
        return wanted

    def set_level(self, level: Level | None, subject: str | None = None) -> Level:
        """Set the level of a subject, or without one the global; None sets back to the default. Returns the level before."""
        state = self._state
        if subject is None:
            before = state.level
            self._commit(msgspec.structs.replace(state, level=level or DEFAULT_LEVEL))
            return before
        before = state.levels.get(subject, state.level)
        levels = {name: each for name, each in state.levels.items() if name != subject}
        if level is not None:
            _check_subject(subject)
            levels[subject] = level
        self._commit(msgspec.structs.replace(state, levels=levels))
        return before

    def _entries(self, subject: str, deleted: bool = False) -> tuple[Entry, ...]:
        entries = self._state.subjects.get(subject, ())
        return entries if deleted else tuple(entry for entry in entries if not entry.deleted)

    def _known(self, subject: str, deleted: bool = False) -> tuple[Entry, ...]:
        entries = self._entries(subject, deleted)
        if not entries:
            raise RefusedError(40401, f"Subject '{subject}' not found.")
        return entries

    def _registered(self, subject: str, entry: Entry) -> Registered:
        return Registered(subject, entry.version, entry.id, self._state.schemas[entry.id])

    def _replace(self, subject: str, entries: tuple[Entry, ...]) -> None:
        """Put `entries` in the place of the subject's; what no version refers to any more goes, as with Confluent."""
        state = self._state
        subjects = {name: each for name, each in state.subjects.items() if name != subject}
        levels = state.levels
        if entries:
            subjects[subject] = entries
        if all(entry.deleted for entry in entries):
            levels = {name: level for name, level in levels.items() if name != subject}
        used = {entry.id for each in subjects.values() for entry in each}
        schemas = {schema_id: text for schema_id, text in state.schemas.items() if schema_id in used}
        self._commit(msgspec.structs.replace(state, subjects=subjects, levels=levels, schemas=schemas))
        self._ids = {canonical: schema_id for canonical, schema_id in self._ids.items() if schema_id in used}

    def _commit(self, state: State) -> None:
        try:
            _write(self._path, msgspec.json.format(msgspec.json.encode(state), indent=1))
        except OSError as error:
            raise RefusedError(
                50001, f"Error in the backend data store: {self._path} can't be written: {error.strerror}"
            ) from error
        self._state = state


def version_number(version: str) -> int | None:
    """The version that a path names: a number, or None for `latest` (also -1).

    Raises
    ------
    RefusedError
        Neither.
    """
    if version in ("latest", "-1"):
        return None
    if version.isascii() and version.isdigit() and len(version) <= 10 and 1 <= int(version) <= MAX_VERSION:
        return int(version)
    raise RefusedError(
        42202,
        f"The specified version '{version}' is not a valid version id. Allowed values are between [1, 2^31-1] and the "
        'string "latest"',
    )


def _parse(text: str) -> str:
    try:
        return parse(text).canonical
    except SchemaError as error:
        raise RefusedError(42201, f"Invalid schema: {error}") from error


def _check_subject(subject: str) -> None:
    if not subject or len(subject) > MAX_SUBJECT_CHARS or not subject.isprintable():
        raise RefusedError(
            42208,
            f"The specified subject {subject[:40]!r} is not a valid subject: 1 to {MAX_SUBJECT_CHARS} printable "
            "characters are allowed",
        )


def _load(path: Path) -> State:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return State()
    except OSError as error:
        raise DataError(f"registry file {path} can't be read: {error.strerror}") from error
    remedy = "restore it from a copy, or move it away to begin anew (schemas then get new ids)"
    try:
        state = msgspec.json.decode(data, type=State)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"registry file {path} is damaged: {error}; {remedy}") from error
    if state.format != FORMAT:
        raise DataError(f"registry file {path} has format {state.format}, and this version reads {FORMAT}: {remedy}")
    for contradiction in _contradictions(state):
        raise DataError(f"registry file {path} is damaged: {contradiction}; {remedy}")
    return state


def _contradictions(state: State) -> Iterator[str]:
    canonicals: dict[str, int] = {}
    for schema_id, text in state.schemas.items():
        if schema_id >= state.next_id:
            yield f"schema {schema_id} is not below next_id {state.next_id}"
        try:
            other = canonicals.setdefault(parse(text).canonical, schema_id)
        except SchemaError as error:
            yield f"schema {schema_id}: {error}"
        else:
            if other != schema_id:
                yield f"schemas {other} and {schema_id} are the same"
    for subject, entries in state.subjects.items():
        versions = [entry.version for entry in entries]
        if not versions or versions != sorted(set(versions)):
            yield f"subject {subject!r} has versions {versions}, which do not rise"
        for entry in entries:
            if entry.id not in state.schemas:
                yield f"subject {subject!r} version {entry.version} names schema {entry.id}, which is missing"


def _write(path: Path, data: bytes) -> None:
    partial = path.with_suffix(".tmp")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
