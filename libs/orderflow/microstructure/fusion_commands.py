"""Commands to fusion and signal: their forms, and when they take hold.

A command reaches a processor as a record of `market.ticks` of kind `command`, whose payload is the JSON of
`{"command_id", "origin", "apply_at_ns", "payload"}`. It holds from the first record of `market.ticks` whose clock is at
or beyond `apply_at_ns`; an id seen before is ignored. Both services read the same records, so both agree; fusion alone
reports what became of each command.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec

from orderflow.processor import Record

SEEN_LIMIT: Final = 1024
PENDING_LIMIT: Final = 256
OVERRIDE_LIMIT: Final = 1024

Slice: TypeAlias = Literal["active", "quiet", "tokyo", "london", "newyork", "q1", "mid", "q3"]
"""A part of the time: by regime, by session, by volatility."""

Weight: TypeAlias = Annotated[float, msgspec.Meta(ge=0.0, le=1.0, description="weight of a factor in the score")]
_Coefficient: TypeAlias = Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)]


def check_weights(ofi: float, cvd: float) -> None:
    """Raise ValueError unless 0 < ofi + cvd <= 1 (below 1 the score is weighted down)."""
    if not 0.0 < ofi + cvd <= 1.0 + 1e-9:
        raise ValueError(f"weights: ofi {ofi!r} + cvd {cvd!r} must be above 0 and at most 1")


class _Scoped(msgspec.Struct, tag_field="type", forbid_unknown_fields=True, frozen=True, kw_only=True):
    symbol: str | None = None
    """None: every symbol."""


class WeightsCommand(_Scoped, tag="weights", frozen=True, kw_only=True):
    """Weights of a slice (None: the base weights). Both null: back to the configuration."""

    w_ofi: Weight | None
    w_cvd: Weight | None
    slice: Slice | None = None

    def __post_init__(self) -> None:
        if self.w_ofi is None or self.w_cvd is None:
            if self.w_ofi is not self.w_cvd:
                raise ValueError("weights: give both w_ofi and w_cvd, or null for both to go back to the configuration")
        else:
            check_weights(self.w_ofi, self.w_cvd)


class CalibrationCommand(_Scoped, tag="calibration", frozen=True, kw_only=True):
    """Platt: proba = 1 / (1 + exp(a * score + b)), so a < 0 where a higher score means a rise.

    Nulls suspend it: that of the symbol, or every one where no symbol is named.
    """

    a: _Coefficient | None
    b: _Coefficient | None
    version: str = ""

    def __post_init__(self) -> None:
        if (self.a is None) is not (self.b is None):
            raise ValueError("calibration: give both a and b, or null for both to suspend it")


class DirectionCommand(_Scoped, tag="direction", frozen=True, kw_only=True):
    """Sign put on z_cvd: 1 as is, -1 flipped."""

    cvd_direction: Literal[-1, 1]


class PauseCommand(_Scoped, tag="pause", frozen=True, kw_only=True):
    """Block every signal of a symbol, a slice, or both; nothing named: all."""

    slice: Slice | None = None


class ResumeCommand(_Scoped, tag="resume", frozen=True, kw_only=True):
    """Undo the pause of the same symbol and slice; nothing named: undo all."""

    slice: Slice | None = None


Body: TypeAlias = WeightsCommand | CalibrationCommand | DirectionCommand | PauseCommand | ResumeCommand
_KINDS: Final = frozenset({"weights", "calibration", "direction", "pause", "resume"})


class Outcome(msgspec.Struct, frozen=True):
    """What became of a command: `command_applied`, `command_refused` or `command_ignored`, with details."""

    event_type: str
    symbol: str
    meta: dict[str, Any]


class _Envelope(msgspec.Struct):
    command_id: str
    payload: msgspec.Raw
    origin: str = ""
    apply_at_ns: int = 0


class _Kind(msgspec.Struct):
    type: str


class Pending(msgspec.Struct, frozen=True):
    """A command that waits for its time."""

    command_id: str
    origin: str
    apply_at_ns: int
    body: Body


class Calibration(msgspec.Struct, frozen=True):
    """Platt coefficients in force."""

    a: float
    b: float
    version: str


class ControlState(msgspec.Struct):
    """What commands have set. Keys are `symbol` or `symbol/slice`, an empty part meaning all."""

    clock_ns: int = 0
    seen: list[str] = []
    pending: list[Pending] = []
    weights: dict[str, tuple[float, float]] = {}
    calibrations: dict[str, Calibration] = {}
    directions: dict[str, int] = {}
    paused: dict[str, bool] = {}


_decode_envelope = msgspec.json.Decoder(_Envelope).decode
_decode_kind = msgspec.json.Decoder(_Kind).decode
_decode_body = msgspec.json.Decoder(Body).decode


def scope_key(symbol: str | None, part: str | None) -> str:
    """Key of an override of weights or of a pause."""
    return f"{symbol or ''}/{part or ''}"


def meta_json(meta: dict[str, Any]) -> str:
    """JSON with sorted keys and no spaces: the same bytes whatever the order in which `meta` was built."""
    return json.dumps(meta, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


class Controls:
    """Takes the records of `market.ticks` and holds what the commands among them have set."""

    def __init__(self) -> None:
        self.state = ControlState()

    def take(self, record: Record) -> list[Outcome]:
        """Queue a command, then apply whatever has come due. Never raises; what is wrong is refused with a reason."""
        state = self.state
        clock_ns: int = record["clock_ts_ns"]
        if clock_ns > state.clock_ns:
            state.clock_ns = clock_ns
        outcomes: list[Outcome] = []
        if record["kind"] == "command":
            refused = self._queue(record.get("payload") or "")
            if refused is not None:
                outcomes.append(refused)
        if state.pending:
            outcomes.extend(self._apply_due())
        return outcomes

    def weights(self, symbol: str, part: str) -> tuple[float, float] | None:
        """Weights (ofi, cvd) set for a symbol and slice ("" = base): the symbol's own before those of all symbols."""
        found = self.state.weights.get(f"{symbol}/{part}")
        return found if found is not None else self.state.weights.get(f"/{part}")

    def calibration(self, symbol: str) -> Calibration | None:
        """Calibration in force for a symbol: its own before that of all symbols."""
        found = self.state.calibrations.get(symbol)
        return found if found is not None else self.state.calibrations.get("")

    def direction(self, symbol: str, default: int) -> int:
        """Sign of z_cvd in force for a symbol."""
        directions = self.state.directions
        return directions.get(symbol, directions.get("", default)) if directions else default

    def is_paused(self, symbol: str, slices: tuple[str, ...]) -> bool:
        """Whether a pause covers the symbol in one of the slices that hold now."""
        paused = self.state.paused
        if not paused:
            return False
        return any(f"{name}/{part}" in paused for name in (symbol, "") for part in ("", *slices))

    def _queue(self, payload: str) -> Outcome | None:
        state = self.state
        try:
            envelope = _decode_envelope(payload)
            raw = bytes(envelope.payload)
            if raw.startswith(b'"'):
                raw = msgspec.json.decode(raw, type=str).encode()
            kind = _decode_kind(raw).type
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            return Outcome("command_refused", "", {"reason": "malformed", "detail": str(error)})
        about = {"command_id": envelope.command_id, "origin": envelope.origin, "type": kind}
        if envelope.command_id in state.seen:
            return Outcome("command_ignored", "", {**about, "reason": "duplicate"})
        self._remember(envelope.command_id)
        if kind not in _KINDS:
            return Outcome("command_ignored", "", {**about, "reason": "not_for_fusion_or_signal"})
        try:
            body = _decode_body(raw)
        except msgspec.DecodeError as error:
            return Outcome("command_refused", "", {**about, "reason": "invalid", "detail": str(error)})
        if len(state.pending) >= PENDING_LIMIT:
            return Outcome("command_refused", "", {**about, "reason": "queue_full", "limit": PENDING_LIMIT})
        state.pending.append(Pending(envelope.command_id, envelope.origin, envelope.apply_at_ns, body))
        state.pending.sort(key=lambda one: one.apply_at_ns)
        return None

    def _remember(self, command_id: str) -> None:
        seen = self.state.seen
        seen.append(command_id)
        if len(seen) > SEEN_LIMIT:
            del seen[0]

    def _apply_due(self) -> list[Outcome]:
        state = self.state
        outcomes = []
        while state.pending and state.pending[0].apply_at_ns <= state.clock_ns:
            one = state.pending.pop(0)
            meta = {"command_id": one.command_id, "origin": one.origin, "payload": msgspec.to_builtins(one.body)}
            if self._full(one.body):
                meta |= {"reason": "too_many_overrides", "limit": OVERRIDE_LIMIT}
                outcomes.append(Outcome("command_refused", one.body.symbol or "", meta))
                continue
            self._apply(one.body)
            outcomes.append(Outcome("command_applied", one.body.symbol or "", meta))
        return outcomes

    def _full(self, body: Body) -> bool:
        """Whether one more override would pass the bound. Undoing and changing one that exists are always possible."""
        state = self.state
        match body:
            case WeightsCommand(w_ofi=None) | CalibrationCommand(a=None) | ResumeCommand():
                return False
            case WeightsCommand():
                return _no_room(state.weights, scope_key(body.symbol, body.slice))
            case CalibrationCommand():
                return _no_room(state.calibrations, body.symbol or "")
            case DirectionCommand():
                return _no_room(state.directions, body.symbol or "")
            case PauseCommand():
                return _no_room(state.paused, scope_key(body.symbol, body.slice))

    def _apply(self, body: Body) -> None:
        state = self.state
        match body:
            case WeightsCommand():
                key = scope_key(body.symbol, body.slice)
                if body.w_ofi is None or body.w_cvd is None:
                    state.weights.pop(key, None)
                else:
                    state.weights[key] = (body.w_ofi, body.w_cvd)
            case CalibrationCommand():
                key = body.symbol or ""
                if body.a is None or body.b is None:
                    if key:
                        state.calibrations.pop(key, None)
                    else:
                        state.calibrations.clear()
                else:
                    state.calibrations[key] = Calibration(body.a, body.b, body.version)
            case DirectionCommand():
                state.directions[body.symbol or ""] = body.cvd_direction
            case PauseCommand():
                state.paused[scope_key(body.symbol, body.slice)] = True
            case ResumeCommand():
                if body.symbol is None and body.slice is None:
                    state.paused.clear()
                else:
                    state.paused.pop(scope_key(body.symbol, body.slice), None)


def _no_room(overrides: dict[str, Any], key: str) -> bool:
    return key not in overrides and len(overrides) >= OVERRIDE_LIMIT
