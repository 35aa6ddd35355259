"""Wiring of the `signal` service."""
