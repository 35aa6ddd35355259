"""Recomputing what a journal says: replay into other topics, verification, comparison, tracing."""
