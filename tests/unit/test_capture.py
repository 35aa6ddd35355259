"""The capture format: reading, scanning, what is refused and how, and recording."""

from __future__ import annotations

import gzip
import hashlib
import random
import resource
from pathlib import Path

import msgspec
import pytest
from orderflow.capture import (
    MEMBER_BYTES,
    CaptureWriter,
    frames,
    rest_body,
    rest_frame,
    rest_symbol,
    scan,
    stream_of,
    why_unheld,
)
from orderflow.errors import CaptureError

QUOTE = b'{"stream":"btcusdt@bookTicker","data":{"e":"bookTicker","s":"BTCUSDT","note":"two words"}}'
TRADE = b'{"stream":"ethusdt@aggTrade","data":{"e":"aggTrade","s":"ETHUSDT"}}'
ARRAY = b'{"stream":"!markPrice@arr","data":[]}'
REST = b'{"symbol":"BTCUSDT","lastUpdateId":5,"bids":[["1.0","2"]],"asks":[]}'
LINES = [(10, "public", QUOTE), (30, "market", TRADE), (20, "rest", REST), (40, "market", ARRAY)]
TEXT = b"".join(b"%d %s %s\n" % (rx, conn.encode(), frame) for rx, conn, frame in LINES)


def written(tmp_path: Path, content: bytes, name: str = "capture.gz", zipped: bool = True) -> Path:
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if zipped else content)
    return path


@pytest.mark.parametrize("zipped", [True, False])
def test_frames_come_as_recorded(tmp_path: Path, zipped: bool) -> None:
    assert list(frames(written(tmp_path, TEXT, zipped=zipped))) == LINES


def test_scan_says_what_is_there(tmp_path: Path) -> None:
    path = written(tmp_path, TEXT)
    info = scan(path)
    assert info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (info.frames, info.frames_by_conn) == (4, {"public": 1, "market": 2, "rest": 1})
    assert info.symbols == ("BTCUSDT", "ETHUSDT")
    assert info.streams == {"!markPrice@arr": 1, "btcusdt@bookTicker": 1, "ethusdt@aggTrade": 1}
    assert info.snapshots == {"BTCUSDT": 1}
    assert (info.first_rx_ns, info.last_rx_ns, info.rx_back) == (10, 40, 1)


def test_gzip_of_several_members_is_one_capture(tmp_path: Path) -> None:
    path = tmp_path / "two.gz"
    path.write_bytes(gzip.compress(TEXT[:200]) + gzip.compress(TEXT[200:]))
    assert list(frames(path)) == LINES


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_lines_across_blocks(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orderflow.capture._BLOCK_BYTES", size)
    assert list(frames(written(tmp_path, TEXT))) == LINES
    assert list(frames(written(tmp_path, TEXT, "plain.txt", zipped=False))) == LINES


def test_plain_text_may_end_without_a_line_break(tmp_path: Path) -> None:
    assert list(frames(written(tmp_path, TEXT[:-1], zipped=False))) == LINES


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no frame"),
        (TEXT + b"not a frame\n", r"line 5 is not of the capture format: 'not a frame'"),
        (TEXT + b"12 private {}\n", r"line 5 .*one of public, market, rest"),
        (b"1x public {}\n", "line 1 is not"),
        (TEXT[:-10], "stops inside frame 4"),
    ],
)
def test_what_is_no_capture_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    with pytest.raises(CaptureError, match=said):
        list(frames(written(tmp_path, content, zipped=False)))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"cannot read the capture .*none\.gz: No such file"):
        scan(tmp_path / "none.gz")


def test_an_empty_gzip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="holds no frame"):
        scan(written(tmp_path, b""))


def test_a_damaged_gzip_is_refused(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(random.Random(1).randbytes(5_000)))
    content[len(content) // 2 :] = b"\xff" * (len(content) // 2)
    path = tmp_path / "damaged.gz"
    path.write_bytes(content)
    with pytest.raises(CaptureError):
        list(frames(path))


def test_a_truncated_gzip_gives_what_it_has_and_says_where_it_ends(tmp_path: Path) -> None:
    noise = random.Random(1)
    lines = [
        b'%d public {"stream":"s@t","data":"%s"}\n' % (n, noise.randbytes(40).hex().encode()) for n in range(3_000)
    ]
    path = written(tmp_path, b"".join(lines))
    path.write_bytes(path.read_bytes()[:60_000])
    taken = []
    with pytest.raises(CaptureError, match="truncated gzip") as raised:
        for each in frames(path):
            taken.append(each)
    assert len(taken) > 500
    assert f"ends after frame {len(taken)}, inside frame {len(taken) + 1}" in str(raised.value)


def test_a_gzip_cut_within_its_trailer_is_truncated(tmp_path: Path) -> None:
    path = written(tmp_path, TEXT)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CaptureError, match="ends after frame 4"):
        list(frames(path))


@pytest.mark.parametrize(
    ("line", "said"),
    [(b'1 public {"e":"aggTrade"}\n', "combined-stream"), (b'1 rest {"lastUpdateId":1}\n', "without the key `symbol`")],
)
def test_scan_refuses_frames_that_cannot_be_routed(tmp_path: Path, line: bytes, said: str) -> None:
    with pytest.raises(CaptureError, match=said):
        scan(written(tmp_path, line))


def test_parts_of_frames() -> None:
    assert stream_of(QUOTE) == b"btcusdt@bookTicker"
    assert stream_of(b'{"result":null,"id":1}') is None
    assert rest_symbol(REST) == "BTCUSDT"
    assert rest_body(REST) == b'{"lastUpdateId":5,"bids":[["1.0","2"]],"asks":[]}'
    assert rest_body(b'{"lastUpdateId":5}') == b'{"lastUpdateId":5}'


@pytest.mark.parametrize("name", ["out.gz", "out.txt"])
def test_a_recording_reads_back(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with CaptureWriter(path) as writer:
        for each in LINES:
            writer.write(*each)
        assert not path.exists()
    assert list(frames(path)) == LINES
    assert [each.name for each in tmp_path.iterdir()] == [name]


def test_the_same_frames_give_the_same_file(tmp_path: Path) -> None:
    for name in ("a.gz", "b.gz"):
        with CaptureWriter(tmp_path / name) as writer:
            writer.write(*LINES[0])
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()


def test_a_recording_that_fails_leaves_the_part(tmp_path: Path) -> None:
    path = tmp_path / "out.gz"
    with pytest.raises(RuntimeError), CaptureWriter(path) as writer:
        writer.write(*LINES[0])
        raise RuntimeError("the socket is gone")
    assert not path.exists()
    assert list(frames(path.with_name("out.gz.part"))) == LINES[:1]


def test_a_recording_without_frames_leaves_nothing(tmp_path: Path) -> None:
    with CaptureWriter(tmp_path / "out.gz"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_recording_never_overwrites(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="there already"):
        CaptureWriter(written(tmp_path, TEXT))


@pytest.mark.parametrize(
    ("rx_ns", "conn", "frame", "said"),
    [
        (1, "private", QUOTE, "conn is 'private'"),
        (-1, "public", QUOTE, "rx_ns is -1"),
        (1, "public", b'{"a":\n1}', "one line"),
        (1, "public", b"", "not empty"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path: Path, rx_ns: int, conn: str, frame: bytes, said: str) -> None:
    writer = CaptureWriter(tmp_path / "out.gz")
    with pytest.raises(CaptureError, match=said):
        writer.write(rx_ns, conn, frame)
    writer.abandon()


@pytest.mark.capture
def test_real_captures_are_read_whole(captures: Path) -> None:
    path = captures / "usdm_btc_eth_20240718.gz"
    assert sum(1 for _ in frames(path)) == 118_001
    info = scan(path)
    assert (info.symbols, info.rx_back) == (("BTCUSDT", "ETHUSDT"), 0)
    assert info.frames_by_conn == {"public": 109_137, "market": 8_862, "rest": 2}


def test_what_was_flushed_survives_whatever_ends_the_process(tmp_path: Path) -> None:
    writer = CaptureWriter(tmp_path / "out.gz")
    for number, each in enumerate(LINES, 1):
        writer.write(*each)
        writer.flush()
        assert list(frames(writer.part)) == LINES[:number], "a whole capture at every flush"
    writer.abandon()


def test_members_are_cut_by_size_so_that_a_kill_costs_little(tmp_path: Path) -> None:
    writer = CaptureWriter(tmp_path / "out.gz")
    count = 3 * MEMBER_BYTES // len(QUOTE)
    for number in range(count):
        writer.write(number, "public", QUOTE)
    on_disk = sum(1 for _ in frames(writer.part))
    assert count - on_disk < MEMBER_BYTES // len(QUOTE)
    assert writer.size_bytes == writer.part.stat().st_size
    writer.close()
    assert sum(1 for _ in frames(tmp_path / "out.gz")) == count


def test_the_part_of_another_recording_is_left_alone(tmp_path: Path) -> None:
    first = CaptureWriter(tmp_path / "out.gz")
    first.write(*LINES[0])
    with pytest.raises(CaptureError, match=r"out\.gz\.part is there already.*rename it"):
        CaptureWriter(tmp_path / "out.gz")
    first.close()
    assert list(frames(tmp_path / "out.gz")) == LINES[:1]


def test_a_name_that_was_taken_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "out.gz"
    writer = CaptureWriter(path)
    writer.write(*LINES[0])
    path.write_bytes(b"somebody else's")
    with pytest.raises(CaptureError, match=r"out\.gz\.part holds it all"):
        writer.close()
    assert path.read_bytes() == b"somebody else's"
    assert list(frames(writer.part)) == LINES[:1]


@pytest.mark.parametrize("name", ["out.gz", "out.txt"])
def test_a_full_disk_leaves_what_was_flushed_readable(tmp_path: Path, name: str) -> None:
    noise = random.Random(3)
    writer = CaptureWriter(tmp_path / name)
    writer.write(*LINES[0])
    writer.flush()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (writer.size_bytes + 1000, hard))
    try:
        with pytest.raises(CaptureError, match=r"cannot write .*\.part: File too large; free some space"):
            for _ in range(10_000):
                writer.write(1, "public", b'{"stream":"a@b","data":"%s"}' % noise.randbytes(100).hex().encode())
                writer.flush()
        writer.abandon()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    kept = list(frames(writer.part))
    assert kept[0] == LINES[0]
    assert all(frame.endswith(b"}") for _, _, frame in kept)


@pytest.mark.parametrize(
    ("symbol", "body", "frame"),
    [
        ("BTCUSDT", b'{"lastUpdateId":5,"bids":[]}', b'{"symbol":"BTCUSDT","lastUpdateId":5,"bids":[]}'),
        ("BTCUSDT", b'{\n "lastUpdateId": 5\r\n}\n', b'{"symbol":"BTCUSDT",  "lastUpdateId": 5  }'),
        ("BTCUSDT", REST, REST),
        ("币安USDT", b'{"lastUpdateId":5}', '{"symbol":"币安USDT","lastUpdateId":5}'.encode()),
    ],
)
def test_a_snapshot_is_given_its_symbol(tmp_path: Path, symbol: str, body: bytes, frame: bytes) -> None:
    assert rest_frame(symbol, body) == frame
    assert rest_symbol(frame) == symbol
    assert msgspec.json.decode(rest_body(frame)) == {
        key: value for key, value in msgspec.json.decode(body).items() if key != "symbol"
    }


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b"<html>", b"{ }"])
def test_a_snapshot_that_is_none_is_refused(body: bytes) -> None:
    with pytest.raises(CaptureError, match="the snapshot of BTCUSDT is no JSON object"):
        rest_frame("BTCUSDT", body)


def test_frames_that_the_format_cannot_hold_are_told_apart() -> None:
    assert why_unheld(QUOTE) is None
    assert why_unheld(QUOTE + b"\n") == "line_break"
    assert why_unheld(b'{"result":null,"id":1}') == why_unheld(b"") == "no_stream"
