"""Runs as `python -m services.normaliser`."""

import sys

from orderflow.streaming.service import run_stage

if __name__ == "__main__":
    sys.exit(run_stage("normaliser"))
