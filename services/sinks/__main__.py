"""Runs as `python -m services.sinks`."""

import sys

from orderflow.lake.jsonl import JsonlSink
from orderflow.lake.service import sinks_build
from orderflow.streaming.service import run_service

if __name__ == "__main__":
    sys.exit(run_service("sinks", JsonlSink.inputs, (*JsonlSink.inputs, "state.sinks"), sinks_build()))
