"""SOURCE=auto: what is decided from what answers, and what is made of each kind of answer."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from orderflow.config import IngestionConfig
from orderflow.errors import ConfigError
from orderflow.ingest.choice import ask, chosen, settled

AUTO = IngestionConfig(source="auto", sim_address="simexchange:9443")


@contextmanager
def server(status: int, body: bytes) -> Iterator[str]:
    """Answers every GET so; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"127.0.0.1:{made.server_address[1]}"
    finally:
        made.shutdown()
        thread.join()
        made.server_close()


def test_the_simulated_exchange_is_taken_where_it_answers() -> None:
    found = chosen(AUTO, "simulated")
    assert (found.source, found.ws_url, found.rest_url) == (
        "sim",
        "ws://simexchange:9443",
        "http://simexchange:9443",
    )


def test_an_unknown_host_means_live_and_keeps_the_addresses() -> None:
    found = chosen(AUTO, "unknown host")
    assert (found.source, found.ws_url, found.rest_url) == ("live", AUTO.ws_url, AUTO.rest_url)


@pytest.mark.parametrize(
    ("answer", "words"), [("no answer", "does not answer"), ("something else", "is no simulated exchange")]
)
def test_a_host_that_is_there_and_unfit_never_becomes_live(answer: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"simexchange:9443.*{words}.*SOURCE=live or SOURCE=sim"):
        chosen(AUTO, answer)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("status", "body", "answer"),
    [
        (200, json.dumps({"service": "simexchange"}).encode(), "simulated"),
        (200, json.dumps({"service": "ofi"}).encode(), "something else"),
        (200, b"[]", "something else"),
        (200, b"<html>", "something else"),
        (200, b"\xff\xfe", "something else"),
        (404, b"{}", "something else"),
    ],
)
def test_what_answers_is_told_by_its_page(status: int, body: bytes, answer: str) -> None:
    with server(status, body) as address:
        assert ask(address) == answer


def test_a_port_that_nobody_listens_on_is_no_answer() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        assert ask(f"127.0.0.1:{taken.getsockname()[1]}") == "no answer"


def test_what_speaks_no_http_is_something_else() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def speak() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"220 mail ready\r\n")

        thread = threading.Thread(target=speak)
        thread.start()
        try:
            assert ask(f"127.0.0.1:{listening.getsockname()[1]}") == "something else"
        finally:
            thread.join()


def test_a_name_that_nobody_knows_is_an_unknown_host() -> None:
    assert ask("simexchange.invalid:9443") == "unknown host"


@pytest.mark.parametrize("address", ["simexchange", ":9443", "simexchange:", "simexchange:port"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"SIM_ADDRESS is .*must be host:port"):
        ask(address)


@pytest.mark.parametrize("source", ["live", "sim", "capture"])
def test_a_source_that_was_named_is_kept_and_nobody_is_asked(source: str) -> None:
    config = IngestionConfig(source=source, sim_address="no address")  # type: ignore[arg-type]
    assert settled(config) is config


def test_one_line_says_what_it_became(caplog: pytest.LogCaptureFixture) -> None:
    def line_of(config: IngestionConfig) -> tuple[str, str]:
        caplog.clear()
        found = settled(config)
        (record,) = caplog.records
        return found.source, record.getMessage()

    caplog.set_level(logging.INFO)
    with server(200, b'{"service": "simexchange"}') as address:
        source, line = line_of(IngestionConfig(source="auto", sim_address=address))
    assert source == "sim" and f"answers at {address}" in line
    source, line = line_of(IngestionConfig(source="auto", sim_address="simexchange.invalid:9443"))
    assert source == "live" and "no host 'simexchange.invalid' is known" in line and "fapi.binance.com" in line
    source, line = line_of(IngestionConfig(source="auto"))
    assert source == "live" and "no SIM_ADDRESS" in line
