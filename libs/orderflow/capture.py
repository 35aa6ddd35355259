"""Recorded market data: one frame a line, `<rx_ns> <conn> <frame>`, gzip or plain text.

`rx_ns` is the local receive time in nanoseconds since the epoch. `conn` is `public` or `market` (a combined-stream
frame exactly as the socket of that route sent it) or `rest` (a body of `GET /fapi/v1/depth`, with the key `symbol`
added). Frames may hold spaces, never a line break.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final

import msgspec

from orderflow.errors import CaptureError

CONNECTIONS: Final = ("public", "market", "rest")

MEMBER_BYTES: Final = 1 << 20
"""Text of a gzip member of a recording: what a kill between two flushes can cost at most."""

_GZIP_MAGIC: Final = b"\x1f\x8b"
_BLOCK_BYTES: Final = 1 << 18
_LINE_MOST_BYTES: Final = 1 << 24
"""A line without an end must not eat the memory."""
_SHOWN_BYTES: Final = 60
_STREAM_HEAD: Final = b'{"stream":"'
_REST_SYMBOL: Final = re.compile(rb'"symbol"\s*:\s*"([^"]+)"')
_REST_SYMBOL_FIRST: Final = re.compile(rb'^\{"symbol":"[^"]*",')
_FORMAT_REMEDY: Final = "each line must be `<rx_ns> <conn> <frame>` with conn one of public, market, rest"


@dataclass(frozen=True, slots=True)
class CaptureInfo:
    """What a capture holds.

    Attributes
    ----------
    sha256 : of the bytes of the file as they lie on disk (of the compressed bytes for gzip).
    frames : number of lines.
    frames_by_conn : conn -> number of frames; names without frames are left out.
    symbols : upper case, sorted; taken from the names of streams and from the bodies of `rest`.
    streams : name of a stream -> number of frames, sorted by name.
    snapshots : symbol -> number of recorded REST snapshots, sorted by symbol.
    first_rx_ns, last_rx_ns : receive times of the first and of the last line.
    rx_back : number of lines whose receive time is below that of the line before.
    """

    path: Path
    sha256: str
    frames: int
    frames_by_conn: dict[str, int]
    symbols: tuple[str, ...]
    streams: dict[str, int]
    snapshots: dict[str, int]
    first_rx_ns: int
    last_rx_ns: int
    rx_back: int


def frames(path: Path) -> Iterator[tuple[int, str, bytes]]:
    """The frames of a capture in the order of the file: (rx_ns, conn, frame).

    Raises
    ------
    CaptureError
        The file is missing, empty, a truncated gzip, or holds a line that is not of the format. What came before the
        fault has been yielded.
    """
    return _parsed(path, _blocks(path, None))


def scan(path: Path) -> CaptureInfo:
    """Read a capture once, wholly, and say what it holds.

    Raises
    ------
    CaptureError
        As for `frames`; also where a frame can't be routed.
    """
    tally = Tally(path)
    for rx_ns, conn, frame in tally.frames():
        tally.add(rx_ns, conn, frame)
    return tally.info()


class Tally:
    """Counts what a capture holds while it is read once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self.text_bytes = 0
        """Of the frames, uncompressed, without receive times and connections."""
        self.first_ns = self.last_ns = self.rx_back = 0
        self._digest = hashlib.sha256()
        self._by_conn: dict[str, int] = {}
        self._streams: dict[bytes, int] = {}
        self._snapshots: dict[str, int] = {}

    def frames(self) -> Iterator[tuple[int, str, bytes]]:
        """As the function of that name; digests the file on the way."""
        return _parsed(self.path, _blocks(self.path, self._digest))

    def add(self, rx_ns: int, conn: str, frame: bytes) -> bytes:
        """Count a frame; returns the name of its stream, empty for a snapshot.

        Raises
        ------
        CaptureError
            It names no stream, or no symbol.
        """
        self.count += 1
        self.text_bytes += len(frame)
        if self.count == 1:
            self.first_ns = rx_ns
        elif rx_ns < self.last_ns:
            self.rx_back += 1
        self.last_ns = rx_ns
        self._by_conn[conn] = self._by_conn.get(conn, 0) + 1
        if conn == "rest":
            symbol = rest_symbol(frame)
            if symbol is None:
                raise CaptureError(
                    f"{self.path}: line {self.count} is a rest frame without the key `symbol`: {_shown(frame)}; "
                    'a recorded depth snapshot must name its symbol, as in {"symbol":"BTCUSDT","lastUpdateId":...}'
                )
            self._snapshots[symbol] = self._snapshots.get(symbol, 0) + 1
            return b""
        stream = stream_of(frame)
        if stream is None:
            raise CaptureError(
                f"{self.path}: line {self.count} holds no combined-stream frame: {_shown(frame)}; "
                'a frame of a socket must be {"stream":"<name>","data":...} exactly as received'
            )
        self._streams[stream] = self._streams.get(stream, 0) + 1
        return stream

    def info(self) -> CaptureInfo:
        """What was counted; the hash is of what has been read."""
        named = {stream.decode("utf-8", "replace"): number for stream, number in sorted(self._streams.items())}
        symbols = {symbol_of_stream(stream) for stream in named if not stream.startswith("!")} | set(self._snapshots)
        return CaptureInfo(
            path=self.path,
            sha256=self._digest.hexdigest(),
            frames=self.count,
            frames_by_conn={conn: self._by_conn[conn] for conn in CONNECTIONS if conn in self._by_conn},
            symbols=tuple(sorted(symbols)),
            streams=named,
            snapshots=dict(sorted(self._snapshots.items())),
            first_rx_ns=self.first_ns,
            last_rx_ns=self.last_ns,
            rx_back=self.rx_back,
        )


def stream_of(frame: bytes) -> bytes | None:
    """The stream's name in a combined-stream frame, without decoding it; None where it is no such frame."""
    if not frame.startswith(_STREAM_HEAD):
        return None
    end = frame.find(b'"', len(_STREAM_HEAD))
    return frame[len(_STREAM_HEAD) : end] if end > 0 else None


def symbol_of_stream(stream: str) -> str:
    """`btcusdt@depth@100ms` -> `BTCUSDT`."""
    return stream.partition("@")[0].upper()


def rest_symbol(frame: bytes) -> str | None:
    """The symbol that was added to the body of a recorded snapshot."""
    found = _REST_SYMBOL.search(frame)
    return found[1].decode("utf-8", "replace") if found else None


def rest_body(frame: bytes) -> bytes:
    """A recorded snapshot as the exchange answered it: without the added key, every other byte kept."""
    return _REST_SYMBOL_FIRST.sub(b"{", frame, count=1)


def rest_frame(symbol: str, body: bytes) -> bytes:
    """The body of a depth snapshot as a capture holds it: on one line, its symbol in front. Undone by `rest_body`.

    Raises
    ------
    CaptureError
        The body is not a JSON object with content.
    """
    line = body.strip().replace(b"\r", b" ").replace(b"\n", b" ")  # whitespace: strings of JSON hold no line breaks
    if not line.startswith(b"{") or not line.endswith(b"}") or not line[1:-1].strip():
        raise CaptureError(f"the snapshot of {symbol} is no JSON object: {_shown(body)}; ask for it again")
    if rest_symbol(line) is not None:
        return line
    return b'{"symbol":%s,%s' % (msgspec.json.encode(symbol), line[1:])


def why_unheld(frame: bytes) -> str | None:
    """Why the format can't hold a frame of a socket; None where it can."""
    if b"\n" in frame:
        return "line_break"
    return None if stream_of(frame) else "no_stream"


class CaptureWriter:
    """Records frames in the capture format; the file appears under its name only when it is complete.

    Until `close`, the frames are in `<name>.part` beside it. Left through an exception, the part stays, so that what
    was recorded is not lost, and `path` is not touched. A name ending in `.gz` makes it gzip, a member every
    `MEMBER_BYTES` and at each `flush`, so that a part is a readable capture up to its last member whatever ends the
    process. No time or file name is stored: the same frames and flushes give the same bytes.
    """

    def __init__(self, path: Path, *, level: int = 6) -> None:
        """
        Raises
        ------
        CaptureError
            The file, or a part of it, is there already; or its folder cannot be written.
        """
        self.path = path
        self.part = path.with_name(path.name + ".part")
        self.frames = 0
        self.size_bytes = 0
        """Written to the disk so far."""
        self._level = level
        self._zipped = path.suffix == ".gz"
        self._lines: list[bytes] = []
        self._gathered = 0
        if path.exists():
            raise CaptureError(f"{path} is there already: a recording is never overwritten; choose another name")
        try:
            self._file = self.part.open("xb", buffering=0)
        except FileExistsError:
            raise CaptureError(
                f"{self.part} is there already, left by a recording that was killed or still goes on: rename it to keep "
                "it, or choose another name"
            ) from None
        except OSError as error:
            raise CaptureError(f"cannot write {self.part}: {error.strerror}; choose a folder that exists") from error

    def write(self, rx_ns: int, conn: str, frame: bytes) -> None:
        """Append one frame.

        Raises
        ------
        CaptureError
            The frame cannot be held by the format, or the disk refused it.
        """
        if conn not in CONNECTIONS:
            raise CaptureError(f"conn is {conn!r}: it must be one of {', '.join(CONNECTIONS)}")
        if rx_ns < 0:
            raise CaptureError(f"rx_ns is {rx_ns}: it must be nanoseconds since the epoch, not below 0")
        if not frame or b"\n" in frame:
            raise CaptureError(f"a frame must be one line, not empty: {_shown(frame)}; send it without line breaks")
        line = b"%d %s %s\n" % (rx_ns, conn.encode(), frame)
        self._lines.append(line)
        self._gathered += len(line)
        self.frames += 1
        if self._gathered >= MEMBER_BYTES:
            self._put()

    def flush(self) -> None:
        """Bring everything so far to the disk, so that neither a kill nor a power cut takes it.

        Raises
        ------
        CaptureError
            The disk refused it.
        """
        if self._gathered:
            self._put()
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                raise CaptureError(f"cannot write {self.part}: {error.strerror}; free some space") from error

    def _put(self) -> None:
        content = b"".join(self._lines)
        self._lines.clear()
        self._gathered = 0
        block = memoryview(gzip.compress(content, self._level, mtime=0) if self._zipped else content)
        begin = self.size_bytes
        try:
            while block:
                written = self._file.write(block)
                self.size_bytes += written
                block = block[written:]
        except OSError as error:
            # A member cut short would make everything behind it unreadable.
            os.truncate(self._file.fileno(), begin)
            self.size_bytes = begin
            raise CaptureError(f"cannot write {self.part}: {error.strerror}; free some space") from error

    def close(self) -> None:
        """Finish the file and give it its name. A second call does nothing.

        Raises
        ------
        CaptureError
            The disk refused it, or the name has been taken meanwhile.
        """
        if self._file.closed:
            return
        if self.frames == 0:
            self._file.close()
            self.part.unlink(missing_ok=True)
            return
        try:
            self.flush()
            self._file.close()
            # Unlike a rename, a link does not replace what somebody else has put there since.
            os.link(self.part, self.path)
            self.part.unlink()
            _sync_folder(self.path.parent)
        except OSError as error:
            raise CaptureError(f"cannot finish {self.path}: {error.strerror}; {self.part} holds it all") from error

    def abandon(self) -> None:
        """Stop recording and leave the part, readable up to its last frame where the disk still takes it."""
        if self._file.closed:
            return
        try:
            if self._gathered:
                self._put()
        except CaptureError:
            pass  # whoever abandons a recording has the first error in hand already
        finally:
            self._file.close()

    def __enter__(self) -> CaptureWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


def _sync_folder(folder: Path) -> None:
    """Make the new name itself survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _HashingReader(io.RawIOBase):
    """Passes bytes on and digests them on the way, so that one pass gives the frames and the file's hash."""

    def __init__(self, file: BinaryIO, digest: hashlib._Hash) -> None:
        self._file = file
        self._digest = digest

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._digest.update(data)
        return data


def _blocks(path: Path, digest: hashlib._Hash | None) -> Iterator[bytes]:
    """The text in blocks. Ends with an empty block where a gzip stops short of its end."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise CaptureError(f"cannot read the capture {path}: {error.strerror}; give the path of a recording") from error
    with file:
        zipped = file.read(2) == _GZIP_MAGIC
        file.seek(0)
        raw: BinaryIO = file if digest is None else _HashingReader(file, digest)  # type: ignore[assignment]
        yield from _gunzipped(path, raw) if zipped else iter(lambda: raw.read(_BLOCK_BYTES), b"")


def _gunzipped(path: Path, raw: BinaryIO) -> Iterator[bytes]:
    """Decompress, member after member. zlib directly: GzipFile loses what came before a truncation."""
    inflate = zlib.decompressobj(wbits=31)
    started = False
    while True:
        data = raw.read(_BLOCK_BYTES)
        if not data:
            break
        while data:
            if inflate.eof:
                data = data.lstrip(b"\0")
                if not data:
                    break
                inflate = zlib.decompressobj(wbits=31)
            try:
                block = inflate.decompress(data, _BLOCK_BYTES)
            except zlib.error as error:
                raise CaptureError(f"{path} is a damaged gzip ({error}): fetch or record it again") from error
            started = True
            data = inflate.unused_data if inflate.eof else inflate.unconsumed_tail
            if block:
                yield block
    while started and not inflate.eof:
        block = inflate.decompress(inflate.unconsumed_tail, _BLOCK_BYTES)
        if not block:
            yield b""
            return
        yield block


def _parsed(path: Path, blocks: Iterator[bytes]) -> Iterator[tuple[int, str, bytes]]:
    """Split blocks into lines and lines into their three parts; the hot loop of every replay."""
    names = {conn.encode(): conn for conn in CONNECTIONS}
    rest = b""
    count = 0
    truncated = False
    for block in blocks:
        if not block:
            truncated = True
            break
        lines = (rest + block).split(b"\n")
        rest = lines.pop()
        if len(rest) > _LINE_MOST_BYTES:
            raise _garbage(path, count + 1, rest)
        for line in lines:
            try:
                stamp, conn, frame = line.split(b" ", 2)
                parsed = (int(stamp), names[conn], frame)
            except (ValueError, KeyError):
                raise _garbage(path, count + 1, line) from None
            count += 1
            yield parsed
    if truncated:
        raise CaptureError(
            f"{path} is a truncated gzip: it ends after frame {count}, inside frame {count + 1}; fetch or record it again"
        )
    if rest:
        try:
            stamp, conn, frame = rest.split(b" ", 2)
            parsed = (int(stamp), names[conn], frame)
        except (ValueError, KeyError):
            raise _garbage(path, count + 1, rest) from None
        if not rest.endswith(b"}"):
            raise CaptureError(f"{path} stops inside frame {count + 1}: fetch or record it again")
        count += 1
        yield parsed
    if count == 0:
        raise CaptureError(f"{path} holds no frame: give a recording that is not empty")


def _garbage(path: Path, line: int, content: bytes) -> CaptureError:
    return CaptureError(f"{path}: line {line} is not of the capture format: {_shown(content)}; {_FORMAT_REMEDY}")


def _shown(content: bytes) -> str:
    return repr(content[:_SHOWN_BYTES])[1:] + (" ..." if len(content) > _SHOWN_BYTES else "")
