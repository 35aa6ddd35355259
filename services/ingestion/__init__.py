"""Wiring of the `ingestion` service: recorder and normaliser."""
