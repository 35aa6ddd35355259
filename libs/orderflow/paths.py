"""Where the project's own files lie: schemas, configuration, locks."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(os.environ.get("ORDERFLOW_ROOT", Path(__file__).resolve().parents[2]))
SCHEMAS = ROOT / "schemas"
CONFIG = ROOT / "infra" / "config"
KAFKA_LOCK = ROOT / "infra" / "kafka"
