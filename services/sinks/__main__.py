"""Runs as `python -m services.sinks`."""

import sys

from orderflow.lake.service import sinks_build
from orderflow.lake.signals import SignalSink
from orderflow.streaming.service import run_service

if __name__ == "__main__":
    sys.exit(run_service("sinks", SignalSink.inputs, (*SignalSink.inputs, "state.sinks"), sinks_build()))
