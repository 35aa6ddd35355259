"""The control protocol of Binance's market sockets, without sockets: messages in, replies and closings out.

Replies follow what production was measured to send where that differs from its documentation. As there, an
acknowledgement proves nothing: streams that do not exist are subscribed and stay silent.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

STREAMS_MOST: Final = 1024
MESSAGES_PER_SEC: Final = 10.0
MESSAGE_BURST: Final = 15.0
"""Of 40 messages at once production answered 15, then closed."""
CLOSE_POLICY: Final = 1008
ID_MOST: Final = (1 << 64) - 1

_METHODS: Final = ("SUBSCRIBE", "UNSUBSCRIBE", "LIST_SUBSCRIPTIONS", "SET_PROPERTY", "GET_PROPERTY")
_UNKNOWN_PROPERTY: Final = 0
_NOT_BOOLEAN: Final = 1
_INVALID_REQUEST: Final = 2
_INVALID_JSON: Final = 3
_TOO_MANY_STREAMS: Final = 4


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one control message causes. `close` is (code, reason), after the reply."""

    reply: str | None = None
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    close: tuple[int, str] | None = None


class ControlError(Exception):
    """A request that the exchange refuses; becomes an error reply."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class ControlSession:
    """One connection's subscriptions and properties."""

    def __init__(self, combined: bool) -> None:
        """`combined`: whether payloads are wrapped with the stream's name; by path, until SET_PROPERTY."""
        self.combined = combined
        self.streams: dict[str, None] = {}
        """In the order of subscription."""
        self.errors = 0

    def subscribe(self, names: Iterable[str]) -> Outcome:
        """Add streams, as from the URL. One too many ends the connection and with it every stream."""
        fresh = tuple(dict.fromkeys(name for name in names if name not in self.streams))
        if len(self.streams) + len(fresh) > STREAMS_MOST:
            self.errors += 1
            error = {"error": {"code": _TOO_MANY_STREAMS, "msg": "Too many subscriptions"}}
            return Outcome(reply=_encode(error), close=(CLOSE_POLICY, "Invalid request"))
        self.streams.update(dict.fromkeys(fresh))
        return Outcome(added=fresh)

    def handle(self, text: str) -> Outcome:
        """Take one text message. Total: whatever comes in, an outcome goes out."""
        number: int | None = None
        try:
            request = _parse(text)
            number = _request_id(request)
            return self._dispatch(request, number)
        except ControlError as error:
            self.errors += 1
            body: dict[str, Any] = {"error": {"code": error.code, "msg": error.message}}
            if number is not None:
                body["id"] = number
            return Outcome(reply=_encode(body))

    def _dispatch(self, request: dict[str, Any], number: int) -> Outcome:
        method = request["method"]
        if method == "LIST_SUBSCRIPTIONS":
            return Outcome(reply=_result(list(self.streams), number))
        if method == "GET_PROPERTY":
            _property_of(request, 1)
            return Outcome(reply=_result(self.combined, number))
        if method == "SET_PROPERTY":
            value = _property_of(request, 2)[1]
            if not isinstance(value, bool):
                raise ControlError(_NOT_BOOLEAN, "Invalid value type: expected Boolean")
            self.combined = value
            return Outcome(reply=_result(None, number))
        names = _names_of(request)
        if method == "UNSUBSCRIBE":
            removed = tuple(dict.fromkeys(name for name in names if name in self.streams))
            for name in removed:
                del self.streams[name]
            return Outcome(reply=_result(None, number), removed=removed)
        outcome = self.subscribe(names)
        return outcome if outcome.close else Outcome(reply=_result(None, number), added=outcome.added)


class MessageRate:
    """Binance's limit on messages from a client, as a bucket of tokens. The time is given, in seconds."""

    def __init__(self, now_sec: float, per_sec: float = MESSAGES_PER_SEC, burst: float = MESSAGE_BURST) -> None:
        self._tokens = burst
        self._burst = burst
        self._per_sec = per_sec
        self._at_sec = now_sec

    def take(self, now_sec: float) -> bool:
        """Whether one more message is allowed now."""
        self._tokens = min(self._burst, self._tokens + (now_sec - self._at_sec) * self._per_sec)
        self._at_sec = now_sec
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True


def _parse(text: str) -> dict[str, Any]:
    try:
        request = json.loads(text)
    except json.JSONDecodeError as error:
        message = f"Invalid JSON: expected value at line {error.lineno} column {error.colno}"
        raise ControlError(_INVALID_JSON, message) from None
    except (RecursionError, ValueError):
        raise ControlError(_INVALID_JSON, "Invalid JSON: recursion limit exceeded at line 1 column 128") from None
    if not isinstance(request, dict):
        raise ControlError(_INVALID_REQUEST, "Invalid request: expected a JSON object")
    return request


def _request_id(request: dict[str, Any]) -> int:
    """The request's id, after its method has been found valid.

    Raises
    ------
    ControlError
        The method or the id is missing or not what it must be.
    """
    if "method" not in request:
        raise ControlError(_INVALID_REQUEST, "Invalid request: missing field `method` at line 1 column 1")
    number = request.get("id")
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= ID_MOST:
        raise ControlError(_INVALID_REQUEST, "Invalid request: request ID must be an unsigned integer")
    if request["method"] not in _METHODS:
        raise ControlError(
            _INVALID_REQUEST,
            f"Invalid request: unknown variant `{request['method']}`, expected one of {', '.join(_METHODS)} "
            "at line 1 column 1",
        )
    return number


def _names_of(request: dict[str, Any]) -> list[str]:
    names = request.get("params")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ControlError(_INVALID_REQUEST, "Invalid request: params must be an array of stream names")
    return names


def _property_of(request: dict[str, Any], count: int) -> list[Any]:
    params = request.get("params")
    if not isinstance(params, list) or not params or not isinstance(params[0], str):
        raise ControlError(_INVALID_REQUEST, "Invalid request: property name must be a string")
    if len(params) > count:
        raise ControlError(_INVALID_REQUEST, "Invalid request: too many parameters")
    if params[0] != "combined":
        raise ControlError(_UNKNOWN_PROPERTY, "Unknown property")
    return params if len(params) == count else [*params, None]


def _result(result: object, number: int) -> str:
    return _encode({"result": result, "id": number})


def _encode(body: dict[str, Any]) -> str:
    return json.dumps(body, separators=(",", ":"), ensure_ascii=False)
