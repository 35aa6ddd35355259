"""What the forms in which signals are kept have in common."""

from __future__ import annotations

from typing import ClassVar, NamedTuple, Protocol

from orderflow.lake.sink import FileWritten
from orderflow.processor import Record


class SignalCut(NamedTuple):
    """Which signals a cut holds: those of a partition from `first_seq` to `last_seq`, both journal seqs.

    `minute` counts minutes of the clock since the epoch; `signals_before` is how many signals cuts before this one have
    written.
    """

    session: str
    partition: int
    minute: int
    first_seq: int
    last_seq: int
    signals_before: int


class SignalForm(Protocol):
    """One form in which signals are kept."""

    kind: ClassVar[str]
    """Under which its rows are counted."""
    tree: ClassVar[str | None]
    """Folder with files whose names depend on where the cuts lie; None where a cut made elsewhere does no harm."""

    def add(self, record: Record) -> None:
        """Buffer a signal."""
        ...

    def write(self, cut: SignalCut) -> list[FileWritten]:
        """Write what is buffered, durably but for the entries of folders; the same again where it is called again.

        Raises
        ------
        LakeError
            It could not be written; what is buffered is kept.
        """
        ...

    def clear(self) -> None:
        """Forget what is buffered."""
        ...
