"""Recomputes the previous hour of the journal again and again, and counts what differs."""
