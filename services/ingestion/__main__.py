"""Runs as `python -m services.ingestion`."""

import sys

from orderflow.ingest.service import build
from orderflow.pipeline import BY_NAME
from orderflow.streaming.service import run_service
from orderflow.topics import COMMANDS

if __name__ == "__main__":
    stage = BY_NAME["normaliser"]
    topics = (*stage.inputs, *stage.outputs, COMMANDS)
    sys.exit(run_service("ingestion", topics, (*topics, "state.normaliser"), build))
