"""Is there a Kafka broker, and which? One Metadata exchange on a plain socket: an open port proves nothing."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from typing import Final

METADATA: Final = 3
METADATA_VERSION: Final = 4
"""Answered by every broker from 0.11 to 4.x; the newest one without tagged fields."""
CLIENT: Final = b"orderflow"
MAX_ANSWER_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class ClusterAnswer:
    """What a broker says of its cluster."""

    cluster_id: str | None
    brokers: tuple[tuple[int, str, int], ...]
    """(node id, host, port) of every broker that takes requests."""


def probe(host: str, port: int, timeout_sec: float = 1.0) -> ClusterAnswer | None:
    """The cluster's answer, or None where nothing answers in Kafka's protocol within the time given."""
    body = struct.pack(">i?", 0, False)  # no topics asked for, none to be created
    header = struct.pack(">hhih", METADATA, METADATA_VERSION, 1, len(CLIENT)) + CLIENT
    try:
        with socket.create_connection((host, port), timeout=timeout_sec) as connection:
            connection.sendall(struct.pack(">i", len(header) + len(body)) + header + body)
            (length,) = struct.unpack(">i", _exactly(connection, 4))
            if not 0 < length <= MAX_ANSWER_BYTES:
                return None
            return _decode(_exactly(connection, length))
    except (OSError, ValueError, struct.error):
        return None


def _exactly(connection: socket.socket, count: int) -> bytes:
    received = bytearray()
    while len(received) < count:
        chunk = connection.recv(count - len(received))
        if not chunk:
            raise ValueError("the connection was closed within an answer")
        received += chunk
    return bytes(received)


def _decode(answer: bytes) -> ClusterAnswer:
    correlation, _, count = struct.unpack_from(">iii", answer)
    if correlation != 1 or not 0 <= count <= len(answer):
        raise ValueError("not an answer to this request")
    position = 12
    brokers: list[tuple[int, str, int]] = []
    for _ in range(count):
        (node,) = struct.unpack_from(">i", answer, position)
        host, position = _string(answer, position + 4)
        (port,) = struct.unpack_from(">i", answer, position)
        _, position = _string(answer, position + 4)  # rack
        brokers.append((node, host or "", port))
    cluster_id, _ = _string(answer, position)
    return ClusterAnswer(cluster_id, tuple(brokers))


def _string(answer: bytes, position: int) -> tuple[str | None, int]:
    (length,) = struct.unpack_from(">h", answer, position)
    if length < 0:
        return None, position + 2
    end = position + 2 + length
    if end > len(answer):
        raise ValueError("a string runs beyond the answer")
    return answer[position + 2 : end].decode(), end
