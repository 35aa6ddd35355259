"""Runs as `python -m services.lake`."""

import os
import sys

from orderflow.lake.parquet import LakeSink
from orderflow.lake.service import NICENESS, lake_build
from orderflow.streaming.service import run_service

if __name__ == "__main__":
    os.nice(NICENESS)
    sys.exit(run_service("lake", LakeSink.inputs, (*LakeSink.inputs, "state.lake"), lake_build()))
