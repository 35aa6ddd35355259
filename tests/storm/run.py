"""A storm from its options to its result, on a loop of its own."""

from __future__ import annotations

import hashlib
import sys

import msgspec

from tests.storm import virtual_loop
from tests.storm.world import Options, Result, Storm


def storm(options: Options) -> Result:
    """Run it. The same options give the same result, byte for byte.

    Raises
    ------
    DeadlockError, LivelockError
        The program waits for ever, or runs without getting on.
    """

    async def main() -> Result:
        return await Storm(options).run()

    return virtual_loop.run(main())


def digest(result: Result) -> str:
    """SHA-256 over the journal as stored, headers included, and over everything that the normaliser gave."""
    state = hashlib.sha256()
    for partition, records in sorted(result.journal.items()):
        for record in records:
            state.update(msgspec.json.encode([partition, record.offset, record.timestamp, record.headers]))
            state.update(record.value or b"")
    for outputs in (result.rows, result.events, result.rejects):
        for output in outputs:
            state.update(msgspec.json.encode([output.partition, output.session, output.record], order="sorted"))
    return state.hexdigest()


if __name__ == "__main__":
    # In a process of its own, for the test that another process with another hash seed does the same.
    print(digest(storm(msgspec.json.decode(sys.argv[1], type=Options))))
