"""Runs as `python -m services.fusion`."""

import sys

from orderflow.streaming.service import run_stage

if __name__ == "__main__":
    sys.exit(run_stage("fusion"))
