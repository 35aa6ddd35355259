"""The outcome of one look."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

import aiohttp
import msgspec

Outcome: TypeAlias = Literal["ok", "warning", "wrong"]
MOST_BODY_BYTES: Final = 64 << 20


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One thing looked at."""

    name: str
    outcome: Outcome
    """warning: works, or is not needed now, and somebody should know. wrong: something will fail."""
    found: str
    remedy: str = ""
    """How to mend it; empty where nothing needs mending."""


def ok(name: str, found: str) -> Check:
    return Check(name=name, outcome="ok", found=found)


def warning(name: str, found: str, remedy: str) -> Check:
    return Check(name=name, outcome="warning", found=found, remedy=remedy)


def wrong(name: str, found: str, remedy: str) -> Check:
    return Check(name=name, outcome="wrong", found=found, remedy=remedy)


def several(items: list[str], most: int = 3) -> str:
    """The first of them, and how many more there are."""
    rest = len(items) - most
    return ", ".join(items[:most]) + (f" and {rest} more" if rest > 0 else "")


async def http_get(url: str, timeout_sec: float) -> tuple[int, bytes]:
    """Status and body.

    Raises
    ------
    OSError
        No answer within the time, or one of more than 64 MiB.
    """
    timeout = aiohttp.ClientTimeout(total=timeout_sec)
    try:
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url) as answer:
            body = bytearray()
            async for piece in answer.content.iter_any():
                body += piece
                if len(body) > MOST_BODY_BYTES:
                    raise OSError(f"{url} answered more than {MOST_BODY_BYTES} bytes")
            return answer.status, bytes(body)
    except TimeoutError as error:
        raise OSError(f"no answer within {timeout_sec:g} s") from error
    except (aiohttp.ClientError, ValueError) as error:
        raise OSError(str(error) or type(error).__name__) from error
