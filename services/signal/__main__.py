"""Runs as `python -m services.signal`."""

import sys

from orderflow.streaming.service import run_stage

if __name__ == "__main__":
    sys.exit(run_stage("signal"))
