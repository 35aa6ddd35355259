"""Wiring of the `lake` service: Parquet and NDJSON."""
