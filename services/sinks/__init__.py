"""Wiring of the `sinks` service: signals as JSON Lines."""
