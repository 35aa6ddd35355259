"""Signals in SQLite: one file, one table, one transaction a cut.

One file for all partitions, since a reader wants one table (and SQLite attaches no more than ten files to a
connection), and since cuts are short and rare: writers take turns (`BEGIN IMMEDIATE`), those of other processes by
SQLite's own lock. The table is ordered by its primary key and has no hidden row numbers, so its content does not tell
in which order partitions, instances or restarts wrote. `sub` belongs to the key: a backfill gives one journal record
many trades, and so one seq many signals of a symbol.

A cut that is made again (a crash came between the transaction and the commit record, or a zombie writes) finds its rows
and inserts nothing. Where it finds other values under its keys the file belongs to another computation: nothing is
changed, and the cut waits for somebody to decide.

`synchronous=FULL`: a transaction is on the disk when COMMIT returns. Under NORMAL, what WAL mode recommends, a loss of
power may take back the newest transactions; the commit record in Kafka would then say that these signals are written,
and nothing would ever write them again.

The connection is kept from cut to cut, so that `-wal` and `-shm` are there while the service lives: without them SQLite
refuses readers who may not write into the folder.
"""

from __future__ import annotations

import errno
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar, Final

import msgspec

from orderflow.lake import files
from orderflow.lake.layout import SIGNALS_DATABASE, LakeError, avro_fields
from orderflow.lake.packed import PackedRows
from orderflow.lake.signal_form import SignalCut
from orderflow.lake.sink import FileWritten
from orderflow.streaming import crash
from orderflow.topics import SIGNALS

logger = logging.getLogger(__name__)

JSONL_FIRST: Final = " (where JSON Lines are kept too, move their folder away first)"
TABLE: Final = "signals"
KEY: Final = ("session", "symbol", "seq", "sub")
BUSY_SEC: Final = 1.0
"""How long an attempt waits for another writer. With the retries of `files` it stays below the time of a stop."""
PAUSE_SEC: Final = 1.0
"""After a failure, how long the other partitions fail at once instead of each waiting in its turn."""
WAL_BYTES: Final = 64 << 20
"""Size to which the log is cut back once its content is in the database's file."""
OLDEST_SQLITE: Final = (3, 37, 0)
"""The first with STRICT tables."""

_TYPES: Final = {"long": "INTEGER", "int": "INTEGER", "boolean": "INTEGER", "double": "REAL", "float": "REAL"}
_ERRNO: Final = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_BUSY: errno.EBUSY,
    sqlite3.SQLITE_LOCKED: errno.EBUSY,
    sqlite3.SQLITE_READONLY: errno.EACCES,
    sqlite3.SQLITE_CANTOPEN: errno.EACCES,
    sqlite3.SQLITE_PERM: errno.EACCES,
    sqlite3.SQLITE_IOERR: errno.EIO,
}
"""SQLite's result codes that may pass by themselves, or once the disk is seen to."""
_DAMAGE: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

_SESSIONS_SQL: Final = f"""
    WITH RECURSIVE found(session) AS (
        SELECT min(session) FROM {TABLE}
        UNION ALL SELECT (SELECT min(session) FROM {TABLE} WHERE session > found.session) FROM found WHERE session IS NOT NULL
    )
    SELECT session FROM found WHERE session <> ''"""
"""Every session, each by one step down the key's tree."""

Row = tuple[Any, ...]
"""A signal in the order of `columns`, without the session."""


def columns() -> dict[str, str]:
    """Declarations of the table's columns by name: the session, then the fields of the topic's schema in its order.

    A column of doubles is never NOT NULL: SQLite keeps NaN as NULL, as JSON does.
    """
    declared = {"session": "TEXT NOT NULL"}
    for name, avro in avro_fields(SIGNALS).items():
        nullable = isinstance(avro, list)
        if nullable:
            (avro,) = [branch for branch in avro if branch != "null"]
        kind = _TYPES.get(avro, "TEXT") if isinstance(avro, str) else "TEXT"
        declared[name] = kind if nullable or kind == "REAL" else f"{kind} NOT NULL"
    return declared


def table_sql() -> str:
    """The statement that makes the table; it is compared with the one that made an existing file's."""
    lines = [f"  {name} {declared}" for name, declared in columns().items()]
    lines.append(f"  PRIMARY KEY ({', '.join(KEY)})")
    return f"CREATE TABLE {TABLE} (\n" + ",\n".join(lines) + "\n) STRICT, WITHOUT ROWID"


def signals_held(root: Path) -> int:
    """How many signals the database of a lake holds; 0 where there is none.

    Raises
    ------
    LakeError
        It can't be read.
    """
    path = root / SIGNALS_DATABASE
    if not path.exists():
        return 0
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as reader:
            held: int = reader.execute(f"SELECT count(*) FROM {TABLE}").fetchone()[0]
            return held
    except sqlite3.Error as error:
        raise LakeError(
            f"{path} can't be read: {error}; where the service says that it is damaged, do what it says; else let this "
            "process read and write its folder"
        ) from error


class SqliteForm:
    """Signals of one partition in the database."""

    kind: ClassVar[str] = "sqlite"
    tree: ClassVar[str | None] = None

    def __init__(self, database: SignalDatabase, failed: Callable[[OSError], None]) -> None:
        """`failed` is told of every failed attempt to write."""
        self._database = database
        self._failed = failed

    def write(self, cut: SignalCut, signals: Mapping[str, PackedRows]) -> list[FileWritten]:
        """Commit the rows of a cut in one transaction; `bytes` is what the database grew by."""
        rows = {symbol: SignalRows(packed) for symbol, packed in signals.items()}
        grown, made = self._database.write(cut, rows, self._failed)
        return [FileWritten(SIGNALS_DATABASE, sum(map(len, rows.values())), grown, made)]


class SignalRows:
    """Packed signals of one symbol, as the table takes them: lists as JSON."""

    def __init__(self, packed: PackedRows) -> None:
        self._packed = packed

    def __len__(self) -> int:
        return len(self._packed)

    @property
    def first(self) -> Row:
        return _row(self._packed.first)

    @property
    def last(self) -> Row:
        return _row(self._packed.last)

    def __iter__(self) -> Iterator[Row]:
        return map(_row, self._packed)


def _row(values: Row) -> Row:
    return tuple(msgspec.json.encode(value).decode() if type(value) is list else value for value in values)


class SignalDatabase:
    """The database of a lake, as one process writes it: one connection, used by the sinks of all its partitions.

    The file is opened, and made where it is missing, by the first write.
    """

    def __init__(self, root: Path, *, busy_sec: float = BUSY_SEC, pause_sec: float = PAUSE_SEC) -> None:
        self.path = root / SIGNALS_DATABASE
        self._busy_sec = busy_sec
        self._pause_sec = pause_sec
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._made = False
        """Whether the file was missing when it was opened, and nothing has been committed to it since."""
        self._failure: tuple[float, LakeError] | None = None
        names = columns()
        self._seq, self._sub, self._id = (list(names).index(name) - 1 for name in ("seq", "sub", "signal_id"))
        self._insert_sql = (
            f"INSERT INTO {TABLE} ({', '.join(names)}) VALUES ({', '.join('?' * len(names))}) "
            f"ON CONFLICT ({', '.join(KEY)}) DO NOTHING"
        )
        self._range_sql = (
            f"FROM {TABLE} WHERE session = ? AND symbol = ? AND (seq, sub) >= (?, ?) AND (seq, sub) <= (?, ?)"
        )

    def write(
        self, cut: SignalCut, rows: Mapping[str, SignalRows], failed: Callable[[OSError], None]
    ) -> tuple[int, bool]:
        """Make the rows of a cut durable, by symbol and in the order of (seq, sub).

        Returns the bytes that the file grew by, and whether it was made by this.

        Raises
        ------
        LakeError
            They could not be written, or the file is damaged, of another schema, or holds other values under their
            keys. Nothing is changed.
        """
        with self._lock:
            if self._failure is not None and time.monotonic() < self._failure[0]:
                raise self._failure[1]
            self._failure = None
            what = f"{sum(map(len, rows.values()))} rows"
            try:
                return files.persist(self.path, what, lambda: self._attempt(cut, rows), failed)
            except LakeError as error:
                self._failure = (time.monotonic() + self._pause_sec, error)
                raise

    def close(self) -> None:
        """Give the file up; what is committed and still in the log goes into the file, unless others use it."""
        with self._lock:
            self._close()

    # -- a transaction --------------------------------------------------------------------------------------------

    def _attempt(self, cut: SignalCut, rows: Mapping[str, SignalRows]) -> tuple[int, bool]:
        try:
            connection = self._open(cut)
            connection.execute("BEGIN IMMEDIATE")
            session = cut.session or self._session_of(connection, rows)
            pages = _pragma(connection, "page_count")
            for symbol in sorted(rows):
                self._insert(connection, session, symbol, rows[symbol])
            grown = (_pragma(connection, "page_count") - pages) * _pragma(connection, "page_size")
            crash.point("rows-inserted")
            connection.execute("COMMIT")
        except (sqlite3.Error, OverflowError) as error:
            self._close()
            raise self._told(error) from error
        except BaseException:
            self._close()
            raise
        crash.point("rows-committed")
        made, self._made = self._made, False
        self._checkpoint(connection)
        return grown, made

    def _session_of(self, connection: sqlite3.Connection, rows: Mapping[str, SignalRows]) -> str:
        """The session under which some of these signals are there already; empty where there are none.

        For a reader that began in the middle of a session, so that what an earlier one wrote is not written again under
        no session's name. A signal's id is unique under a topic prefix.
        """
        for symbol, wanted in rows.items():
            ids = {row[self._id] for row in wanted}
            for (session,) in connection.execute(_SESSIONS_SQL).fetchall():
                ends = (session, symbol, *self._place(wanted.first), *self._place(wanted.last))
                held = connection.execute(f"SELECT signal_id {self._range_sql}", ends)
                if any(signal_id in ids for (signal_id,) in held):
                    return str(session)
        return ""

    def _insert(self, connection: sqlite3.Connection, session: str, symbol: str, rows: SignalRows) -> None:
        before = connection.total_changes
        connection.executemany(self._insert_sql, ((session, *row) for row in rows))
        ends = (session, symbol, *self._place(rows.first), *self._place(rows.last))
        (held,) = connection.execute(f"SELECT count(*) {self._range_sql}", ends).fetchone()
        if held != len(rows) or connection.total_changes - before != len(rows):
            found = connection.execute(f"SELECT * {self._range_sql}", ends).fetchall()
            self._compare(session, symbol, rows, {self._place(row[1:]): row[1:] for row in found})

    def _place(self, row: Row) -> tuple[int, int]:
        return row[self._seq], row[self._sub]

    def _compare(self, session: str, symbol: str, rows: SignalRows, found: dict[tuple[int, int], Row]) -> None:
        """What was there before must be what would have been written."""
        wanted = {self._place(row): tuple(None if value != value else value for value in row) for row in rows}
        for place in sorted(wanted.keys() | found.keys()):
            if wanted.get(place) == found.get(place):
                continue
            if place not in wanted:
                differs = "is there, and no such signal is to be written"
            else:
                names = avro_fields(SIGNALS)
                name, old, new = next(
                    each for each in zip(names, found[place], wanted[place], strict=True) if each[1] != each[2]
                )
                differs = f"has {name} {old!r}, and {new!r} is to be written"
            raise LakeError(
                f"{self.path} holds signals of another computation: session {session} symbol {symbol} seq {place[0]} sub "
                f"{place[1]} {differs}. Nothing was changed; the log keeps the data. Give these settings a DATA_DIR of "
                "their own, or stop the service, move the file away with its -wal and -shm, and start it again"
            )

    def _checkpoint(self, connection: sqlite3.Connection) -> None:
        """Move what readers do not need any more out of the log; it is durable there too."""
        try:
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
        except sqlite3.Error as error:
            logger.warning("%s: the newest signals stay in the -wal file, where they are durable: %s", self.path, error)

    # -- the file -------------------------------------------------------------------------------------------------

    def _open(self, cut: SignalCut) -> sqlite3.Connection:
        if self._connection is not None:
            if self._identity == self._on_disk():
                return self._connection
            logger.warning("%s was moved or removed while it was in use", self.path)
            self._close()
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            raise LakeError(
                f"SIGNAL_SINK=sqlite needs SQLite {'.'.join(map(str, OLDEST_SQLITE))} or newer, and this Python has "
                f"{sqlite3.sqlite_version}: run it on a newer one, or leave sqlite out of SIGNAL_SINK"
            )
        new = self._made = self._on_disk() is None
        files.make_folders(self.path.parent)
        connection = self._connection = sqlite3.connect(
            self.path, timeout=self._busy_sec, isolation_level=None, check_same_thread=False
        )
        mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if mode != "wal":
            raise LakeError(
                f"{self.path} can't be kept in WAL mode, SQLite uses {mode!r}: put DATA_DIR on a local file system"
            )
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.execute(f"PRAGMA journal_size_limit = {WAL_BYTES}")
        self._make_table(connection)
        self._identity = self._on_disk()
        if new and cut.signals_before:
            logger.warning(
                "%s is made anew and begins with seq %d of partition %d: %d signals of this partition were written before. "
                "Where the old file is lost, one start with STATE_REBUILD=true writes again what the log still has%s",
                self.path, cut.first_seq, cut.partition, cut.signals_before, JSONL_FIRST,
            )  # fmt: skip
        return connection

    def _make_table(self, connection: sqlite3.Connection) -> None:
        found = connection.execute("SELECT sql FROM sqlite_schema WHERE name = ?", (TABLE,)).fetchone()
        if found is None:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(table_sql().replace("CREATE TABLE", "CREATE TABLE IF NOT EXISTS", 1))
            connection.execute("COMMIT")
        elif found[0] != table_sql():
            held = {row[1] for row in connection.execute(f"PRAGMA table_info({TABLE})")}
            missing, more = sorted(columns().keys() - held), sorted(held - columns().keys())
            says = [f"without {', '.join(missing)}"] if missing else []
            says += [f"with {', '.join(more)}"] if more else []
            raise LakeError(
                f"{self.path} has another table {TABLE!r}, {' and '.join(says) or 'of other types or another key'}: stop the "
                "service, move the file away with its -wal and -shm, and start it again: a new file begins where the old "
                "one ends, and one start with STATE_REBUILD=true writes into it all that the log still has"
                f"{JSONL_FIRST}; nothing is lost meanwhile"
            )

    def _on_disk(self) -> tuple[int, int] | None:
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return None
        return status.st_dev, status.st_ino

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _told(self, error: Exception) -> Exception:
        """OSError for what may pass by itself; LakeError for what somebody has to see to."""
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in _ERRNO:
            return OSError(_ERRNO[code], str(error))
        if code in _DAMAGE:
            return LakeError(
                f"{self.path} is damaged ({error}): stop the service, move the file away with its -wal and -shm, and start "
                f"it once with STATE_REBUILD=true: what the log still has is written into a new file{JSONL_FIRST}; "
                "`sqlite3 FILE .recover` reads what is left of the old one"
            )
        return LakeError(
            f"{self.path}: a signal can't be written ({error}): records must be decoded with the topic's schema; the log "
            "keeps the data"
        )


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    value: int = connection.execute(f"PRAGMA {name}").fetchone()[0]
    return value
