"""Wiring of the `ofi` service."""
