"""Write the dashboards: `python -m grafana.build` (after a change of grafana/boards.py)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Final

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from grafana.boards import BOARDS
from grafana.panels import build

FOLDER: Final = Path(__file__).resolve().parent / "dashboards"


def contents() -> dict[str, str]:
    """File name -> content, of every dashboard."""
    return {
        f"{board.uid.removeprefix('orderflow-')}.json": json.dumps(
            build(board), cls=JSONEncoder, indent=1, sort_keys=True, ensure_ascii=False
        )
        + "\n"
        for board in BOARDS
    }


def main() -> int:
    """Write what has changed, remove what is no more."""
    FOLDER.mkdir(exist_ok=True)
    made = contents()
    for path in FOLDER.glob("*.json"):
        if path.name not in made:
            path.unlink()
    for name, content in made.items():
        (FOLDER / name).write_text(content, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
