"""Wiring of the `cvd` service."""
