"""Runs as `python -m services.verify`."""

import sys

from orderflow.replay.service import verify_build
from orderflow.streaming.service import run_service
from orderflow.topics import DERIVED, JOURNAL

if __name__ == "__main__":
    sys.exit(run_service("verify", (JOURNAL, *DERIVED), (JOURNAL, *DERIVED), verify_build))
