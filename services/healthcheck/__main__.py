"""Runs as `python -m services.healthcheck`: whether this container's service is ready. Exit code 0 or 1.

Asks `/readyz` at 127.0.0.1:METRICS_PORT, or at HEALTH_ADDRESS (host:port) where that is set: a service whose pages are
elsewhere. Run every few seconds in every container, so it is bare sockets: Python's HTTP client takes ten times as long
to import.
"""

import os
import socket
import sys

TIMEOUT_SEC = 2.0


def status_line(address: str) -> str:
    """First line of the answer to `GET /readyz`. Raises OSError, ValueError."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), TIMEOUT_SEC) as connection:
        connection.sendall(f"GET /readyz HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode())
        with connection.makefile("rb") as answer:
            return answer.readline(1000).decode("latin-1").strip()


def main() -> int:
    address = os.environ.get("HEALTH_ADDRESS") or f"127.0.0.1:{os.environ.get('METRICS_PORT') or 9100}"
    try:
        line = status_line(address)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{address}: {error}\n")
        return 1
    if line.split(" ")[1:2] == ["200"]:
        return 0
    sys.stderr.write(f"{address}/readyz: {line}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
