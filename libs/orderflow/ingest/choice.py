"""SOURCE=auto: the simulated exchange where it runs beside us, the live one otherwise. Decided once, at the start.

Containers find each other by name, and a name is known exactly while its container runs: that tells a deployment
without a simulated exchange from one whose simulated exchange is starting or ill. The second never becomes live.
"""

from __future__ import annotations

import http.client
import json
import logging
import socket
from typing import Final, Literal

import msgspec

from orderflow.config import IngestionConfig
from orderflow.errors import ConfigError

logger = logging.getLogger(__name__)

Answer = Literal["simulated", "unknown host", "no answer", "something else"]

TIMEOUT_SEC: Final = 3.0
MAX_BODY_BYTES: Final = 1 << 20


def chosen(config: IngestionConfig, answer: Answer) -> IngestionConfig:
    """The settings with `auto` decided by what stands at `sim_address`.

    Raises
    ------
    ConfigError
        The host exists and is no simulated exchange, or does not answer.
    """
    if answer == "simulated":
        address = config.sim_address
        return msgspec.structs.replace(config, source="sim", ws_url=f"ws://{address}", rest_url=f"http://{address}")
    if answer == "unknown host":
        return msgspec.structs.replace(config, source="live")
    raise ConfigError(
        f"SOURCE=auto: SIM_ADDRESS is {config.sim_address!r}, and that host exists but "
        + ("does not answer" if answer == "no answer" else "is no simulated exchange")
        + ": start or remove it, or say SOURCE=live or SOURCE=sim"
    )


def ask(address: str) -> Answer:
    """What answers at `host:port`; waits for at most a few seconds.

    Raises
    ------
    ConfigError
        It is no address.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"SIM_ADDRESS is {address!r}: it must be host:port, as simexchange:9443")
    try:
        socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except socket.gaierror:
        return "unknown host"
    connection = http.client.HTTPConnection(host, int(port), timeout=TIMEOUT_SEC)
    try:
        connection.request("GET", "/sim/status")
        reply = connection.getresponse()
        content = json.loads(reply.read(MAX_BODY_BYTES))
    except OSError:
        return "no answer"
    except (http.client.HTTPException, ValueError):
        return "something else"
    finally:
        connection.close()
    named = isinstance(content, dict) and content.get("service") == "simexchange"
    return "simulated" if named else "something else"


def settled(config: IngestionConfig) -> IngestionConfig:
    """The settings without `auto`; says in one line what it became.

    Raises
    ------
    ConfigError
        See `chosen` and `ask`.
    """
    if config.source != "auto":
        return config
    answer: Answer = ask(config.sim_address) if config.sim_address else "unknown host"
    found = chosen(config, answer)
    if found.source == "sim":
        logger.info("SOURCE=auto: the simulated exchange answers at %s, so its market is recorded", config.sim_address)
    else:
        where = (
            f"no host {config.sim_address.rpartition(':')[0]!r} is known" if config.sim_address else "no SIM_ADDRESS"
        )
        logger.info("SOURCE=auto: %s, so the live market of %s is recorded", where, found.rest_url)
    return found
