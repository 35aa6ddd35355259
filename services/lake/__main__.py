"""Runs as `python -m services.lake`."""

import sys

from orderflow.lake.parquet import LakeSink
from orderflow.lake.service import lake_build
from orderflow.streaming.service import run_service

if __name__ == "__main__":
    sys.exit(run_service("lake", LakeSink.inputs, (*LakeSink.inputs, "state.lake"), lake_build()))
