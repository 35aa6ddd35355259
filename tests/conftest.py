"""What the tests share: the repository's packages on the path, real captures, one broker for a whole run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "tests", ROOT / "tests" / "unit", ROOT / "tests" / "replay"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from kafka_fixture import kafka_bootstrap  # noqa: E402, F401 - a fixture is used by name

# Examples are judged by what they find, never by how long a loaded machine takes for them.
settings.register_profile("orderflow", deadline=None)
settings.load_profile("orderflow")


@pytest.fixture(scope="session")
def captures() -> Path:
    """Folder of the recorded market data; tests that need it skip where it is missing."""
    folder = Path(os.environ.get("ORDERFLOW_CAPTURES", ROOT.parent / "shared" / "data" / "replay"))
    if not folder.is_dir():
        pytest.skip(f"no recorded market data at {folder}; set ORDERFLOW_CAPTURES")
    return folder
