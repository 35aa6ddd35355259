"""From a signal back through fusion, OFI and CVD to the frames of the journal that it was made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from orderflow.errors import OrderflowError
from orderflow.processor import Record
from orderflow.streaming.codec import Codecs
from orderflow.streaming.journal import partition_of
from orderflow.streaming.log import TP, Log
from orderflow.streaming.seek import NEIGHBOURS, decoded, journal_entry, offset_of_seq, read_journal
from orderflow.topics import CVD, FUSION, JOURNAL, OFI, ROWS, SIGNALS
from orderflow.verify import canonical

LOOK_BACK: Final = 1000
"""Records of a topic partition that are searched first for the newest of a symbol; then four times as many."""


@dataclass(frozen=True, slots=True)
class Source:
    """One feature record, the row that it was made of, and the frame that the row was made of."""

    topic: str
    feature: Record
    row: Record | None
    frame: Record | None
    """None where retention has taken it from the journal."""


@dataclass(frozen=True, slots=True)
class Trace:
    """What a signal was made of."""

    partition: int
    signal: Record
    fusion: Record
    ofi: Source | None
    cvd: Source | None


def parse(signal_id: str) -> tuple[str, int, int]:
    """(symbol, seq, sub) of a signal's id, `symbol-seq-sub-fingerprint`; symbols may hold hyphens.

    Raises
    ------
    OrderflowError
        It has another form.
    """
    parts = signal_id.rsplit("-", 3)
    if len(parts) != 4 or not parts[0] or not (parts[1].isdecimal() and parts[2].isdecimal()):
        raise OrderflowError(
            f"{signal_id!r} is no signal_id: it must be SYMBOL-SEQ-SUB-FINGERPRINT, as the field signal_id of "
            "`orderflow tap signals` or of the lake's signals"
        )
    return parts[0], int(parts[1]), int(parts[2])


class Tracer:
    """Looks records up by their place."""

    def __init__(self, log: Log, codecs: Codecs, prefix: str, journal_codecs: Codecs, journal_prefix: str) -> None:
        self._log = log
        self._codecs = codecs
        self._prefix = prefix
        self._journal_codecs = journal_codecs
        self._journal_prefix = journal_prefix

    async def trace(self, signal_id: str) -> Trace:
        """Follow one signal back.

        Raises
        ------
        OrderflowError
            There is no such signal, or its records are not kept any longer.
        """
        symbol, seq, sub = parse(signal_id)
        partition = partition_of(symbol)
        signal = next(
            (each for each in await self._at(SIGNALS, partition, seq) if each["signal_id"] == signal_id), None
        )
        if signal is None:
            raise OrderflowError(
                f"there is no signal {signal_id!r} under the prefix {self._prefix!r}: is it of another run (--run, "
                "--prefix), of a replay (--replay NAME), or older than what the topic keeps?"
            )
        fusion = next((each for each in await self._at(FUSION, partition, seq) if each["sub"] == sub), None)
        if fusion is None:
            raise OrderflowError(f"the fusion record {seq}.{sub} of {signal_id!r} is not kept any longer")
        cause, other = (OFI, CVD) if fusion["src"] == "ofi" else (CVD, OFI)
        sources = {
            cause: await self._source(cause, partition, await self._caused(cause, partition, symbol, seq)),
            other: await self._source(other, partition, await self._newest_before(other, partition, symbol, seq)),
        }
        return Trace(partition, signal, fusion, sources[OFI], sources[CVD])

    async def _caused(self, topic: str, partition: int, symbol: str, seq: int) -> Record | None:
        found = [each for each in await self._at(topic, partition, seq) if each["symbol"] == symbol]
        return found[-1] if found else None

    async def _source(self, topic: str, partition: int, feature: Record | None) -> Source | None:
        if feature is None:
            return None
        seq: int = feature["seq"]
        wanted = ("aggTrade",) if topic == CVD else ("bookTicker", "depth")
        rows = await self._at(ROWS, partition, seq)
        row = next((each for each in rows if each["symbol"] == feature["symbol"] and each["src"] in wanted), None)
        return Source(topic, feature, row, await self._frame(partition, seq))

    async def _frame(self, partition: int, seq: int) -> Record | None:
        tp = TP(self._journal_prefix + JOURNAL, partition)
        offset, epoch = await journal_entry(self._log, tp, seq)
        end = (await self._log.end_offsets([tp]))[tp]
        async for chunk in read_journal(self._log, tp, offset, epoch, None, end):
            for number, record in chunk:
                if number == seq:
                    return await decoded(self._journal_codecs, record.value or b"")
            if chunk[-1][0] > seq:
                return None
        return None

    async def _at(self, topic: str, partition: int, seq: int) -> list[Record]:
        """Every record of a seq."""
        tp = TP(self._prefix + topic, partition)
        start = max(0, await offset_of_seq(self._log, tp, seq) - NEIGHBOURS)
        found: list[Record] = []
        async for chunk in canonical(self._log, tp, start=start):
            for number, _, record in chunk:
                if number == seq:
                    found.append(await self._decoded(topic, record.value or b""))
            if chunk[-1][0] > seq:
                break
        return found

    async def _newest_before(self, topic: str, partition: int, symbol: str, seq: int) -> Record | None:
        """The newest record of a symbol at or before a seq; None where none is kept."""
        tp = TP(self._prefix + topic, partition)
        begin = (await self._log.begin_offsets([tp]))[tp]
        until = await offset_of_seq(self._log, tp, seq + 1)
        back = LOOK_BACK
        key = symbol.encode()
        while True:
            start = max(begin, until - back)
            newest: bytes | None = None
            async for chunk in canonical(self._log, tp, start=start):
                for number, _, record in chunk:
                    if number <= seq and record.key == key:
                        newest = record.value
                if chunk[-1][0] > seq:
                    break
            if newest is not None:
                return await self._decoded(topic, newest)
            if start == begin:
                return None
            back *= 4

    async def _decoded(self, topic: str, value: bytes) -> Record:
        decode = self._codecs.decoder(topic)
        if not decode.knows(value):
            await self._codecs.learn(topic, value)
        return decode(value)
