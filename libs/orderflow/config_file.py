"""Writes `infra/config/defaults.yaml` from the typed model, so that the file and the code can't drift apart.

`python -m orderflow.config_file` writes it; a test compares.
"""

from __future__ import annotations

import sys
from typing import Any

import msgspec
import yaml

from orderflow.config import Config
from orderflow.paths import CONFIG

HEAD = """\
# The defaults of every setting. Written from the typed model by `python -m orderflow.config_file`: change the model,
# not this file. Your own values go into overrides.d/*.yaml or the environment (see .env.example).
"""


def _description(info: Any) -> str:
    extra = getattr(info, "type", None)
    for note in getattr(extra, "__metadata__", ()):
        if isinstance(note, msgspec.Meta) and note.description:
            return str(note.description)
    return ""


def text() -> str:
    """The content of the file."""
    lines = [HEAD]
    config = Config()
    for section in Config.__struct_fields__:
        value = getattr(config, section)
        lines.append(f"{section}:")
        for info in msgspec.structs.fields(type(value)):
            plain = msgspec.to_builtins(getattr(value, info.name))
            dumped = yaml.safe_dump({info.name: plain}, allow_unicode=True, sort_keys=False, width=110).rstrip()
            note = _description(info)
            if note:
                lines.append(f"  # {note}")
            lines.extend(f"  {line}" for line in dumped.splitlines())
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    (CONFIG / "defaults.yaml").write_text(text(), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
