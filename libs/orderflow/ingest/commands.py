"""Carries `control.commands` into the journal, whence every processor has them at the same number, in replay too.

A command becomes one record on each partition of the shard, all of the same content: also the same `apply_at_ns`, which
follows from the command alone where it asks for "at once". Reading starts anew with each recorder, far enough back, and
what the journal holds already is left out partition by partition: so a command that a dying recorder had journalled in
part is completed. Commands from before what is looked back on in a journal stand in it already.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec

from orderflow.errors import LogError
from orderflow.ingest.route import STABLE_SEC, backoff_sec, count_reason
from orderflow.processor import Record
from orderflow.streaming.codec import Codecs, peek
from orderflow.streaming.journal import epoch_of
from orderflow.streaming.log import TP, Log, LogRecord, read_ranges
from orderflow.topics import COMMANDS, JOURNAL

logger = logging.getLogger(__name__)

LOOK_BACK: Final = 1000
"""Commands that a starting recorder looks at again."""
JOURNAL_LOOK_BACK: Final = 5_000
"""Records per partition in which a starting recorder looks for commands."""
OLDER_MS: Final = 600_000
"""A command that is so much older than those records was journalled before them."""
COMMAND_KIND: Final = 7
"""Index of `command` in the enum of journal kinds."""
AT_ONCE_NS: Final = 1_000_000_000
"""Time that partitions have to come by a command that is to hold at once."""
MAX_SEEN: Final = 4096
"""Ids remembered per partition."""
POLL_MS: Final = 500
MAX_COMMAND_BYTES: Final = 1 << 20


class _Id(msgspec.Struct):
    command_id: str = ""


_decode_id = msgspec.json.Decoder(_Id).decode


class Commands:
    """Reads commands and hands them on, once per partition.

    Parameters
    ----------
    partitions
        Those that the recorder writes.
    put
        Takes a command on its way into the journal: partition, payload.
    """

    def __init__(
        self, log: Log, codecs: Codecs, prefix: str, partitions: Sequence[int], put: Callable[[int, bytes], None]
    ) -> None:
        self._log = log
        self._codecs = codecs
        self._decode = codecs.decoder(COMMANDS)
        self._decode_journal = codecs.decoder(JOURNAL)
        self._source = TP(prefix + COMMANDS, 0)
        self._journals = {partition: TP(prefix + JOURNAL, partition) for partition in sorted(partitions)}
        self._put = put
        self._since_ms = dict.fromkeys(self._journals, 0)
        """Commands with an older timestamp are in the journal, per partition."""
        self._seen: dict[int, dict[str, None]] = {partition: {} for partition in self._journals}
        self.journalled = 0
        self.refused: dict[str, int] = {}
        self.read_errors = 0

    async def run(self, chance: Callable[[], float]) -> None:
        """Until cancelled. Trouble with the log never ends it."""
        failures = 0
        recalled = False
        while True:
            began_sec = asyncio.get_running_loop().time()
            try:
                if not recalled:
                    await self._recall()
                    recalled = True
                await self._read()
            except LogError as error:
                lasted_sec = asyncio.get_running_loop().time() - began_sec
                failures = 1 if lasted_sec > STABLE_SEC else failures + 1
                self.read_errors += 1
                logger.warning("commands can't be read: %s", error)
            await asyncio.sleep(backoff_sec(failures, 1.0, 30.0, chance()))

    async def _recall(self) -> None:
        """The commands that the journal holds already."""
        tps = self._journals.values()
        begins, ends = await self._log.begin_offsets(tps), await self._log.end_offsets(tps)
        for partition, tp in self._journals.items():
            start = max(begins[tp], ends[tp] - JOURNAL_LOOK_BACK)
            records = (await read_ranges(self._log, {tp: (start, ends[tp])}))[tp]
            if start > begins[tp] and records:
                self._since_ms[partition] = records[0].timestamp - OLDER_MS
            for payload in await self._commands_in(records):
                self._remember(partition, _id_of(payload))

    async def _commands_in(self, records: Sequence[LogRecord]) -> list[bytes]:
        """Payloads of the commands among journal records, those of overtaken recorders left out."""
        found: list[bytes] = []
        epoch = 0
        for record in records:
            value = record.value
            if value is None or epoch_of(record) < epoch:
                continue
            epoch = epoch_of(record)
            if peek(value)[1] != COMMAND_KIND:
                continue
            if not self._decode_journal.knows(value):
                await self._codecs.learn(JOURNAL, value)
            found.append(self._decode_journal(value)["payload"])
        return found

    async def _read(self) -> None:
        begin = (await self._log.begin_offsets([self._source]))[self._source]
        end = (await self._log.end_offsets([self._source]))[self._source]
        reader = await self._log.reader({self._source: max(begin, end - LOOK_BACK)})
        try:
            while True:
                for records in (await reader.poll(POLL_MS, LOOK_BACK)).values():
                    for record in records:
                        await self._take(record)
        finally:
            await reader.close()

    async def _take(self, record: LogRecord) -> None:
        value = record.value
        if value is None:
            return
        if len(value) > MAX_COMMAND_BYTES:
            count_reason(self.refused, "too_long")
            return
        if not self._decode.knows(value):
            await self._codecs.learn(COMMANDS, value)
        command = self._decode(value)
        payload = _payload(command, record.timestamp)
        if payload is None:
            count_reason(self.refused, "damaged")
            logger.error("command %r is refused: its payload is no JSON", command["command_id"])
            return
        for partition in self._journals:
            if command["command_id"] in self._seen[partition] or record.timestamp < self._since_ms[partition]:
                continue
            self._remember(partition, command["command_id"])
            self._put(partition, payload)
            self.journalled += 1

    def _remember(self, partition: int, command_id: str) -> None:
        seen = self._seen[partition]
        seen[command_id] = None
        if len(seen) > MAX_SEEN:
            del seen[next(iter(seen))]

    def status(self) -> dict[str, Any]:
        """For `/status`."""
        return {
            "journalled": self.journalled,
            "refused": dict(sorted(self.refused.items())),
            "read_errors": self.read_errors,
        }


def _payload(command: Mapping[str, Any] | Record, timestamp_ms: int) -> bytes | None:
    """The JSON that processors take a command from; None where its own payload is none."""
    try:
        body = msgspec.json.decode(command["payload"], type=msgspec.Raw)
        msgspec.json.decode(body)
    except msgspec.DecodeError:
        return None
    apply_at_ns = command["apply_at_ns"] or timestamp_ms * 1_000_000 + AT_ONCE_NS
    content = {
        "command_id": command["command_id"],
        "origin": command["origin"],
        "apply_at_ns": apply_at_ns,
        "payload": body,
    }
    return msgspec.json.encode(content)


def _id_of(payload: bytes) -> str:
    try:
        return _decode_id(payload).command_id
    except msgspec.MsgspecError:
        return ""
