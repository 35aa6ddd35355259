"""Wiring of the `fusion` service."""
