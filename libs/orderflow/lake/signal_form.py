"""What the forms in which signals are kept have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple, Protocol

from orderflow.lake.packed import PackedRows
from orderflow.lake.sink import FileWritten


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

    def write(self, cut: SignalCut, signals: Mapping[str, PackedRows]) -> list[FileWritten]:
        """Write the signals of a cut, durably but for the entries of folders; the same again where it is called again.

        Parameters
        ----------
        signals
            By symbol; each a row of the values of the topic's schema, in its order.

        Raises
        ------
        LakeError
            They could not be written.
        """
        ...
