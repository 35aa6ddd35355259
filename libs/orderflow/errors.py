"""Errors that a user or an operator is meant to read: what was wrong, the value, and what to do."""

from __future__ import annotations


class OrderflowError(Exception):
    """A failure with a clear cause. The command line prints it as one line and exits with 2; nothing is swallowed.

    The message names what was wrong, the value, and the remedy.
    """


class ConfigError(OrderflowError):
    """A setting that is unknown, of the wrong type, or out of range."""


class CaptureError(OrderflowError):
    """A capture file that is missing, truncated, or not in the capture format."""


class FencedError(OrderflowError):
    """Another recorder has taken over this journal; this one must stop writing."""


class LogError(OrderflowError):
    """The broker refused or lost a request beyond the bounded retries."""


class BrokerAwayError(LogError):
    """The broker did not answer or acknowledge: it may do so later, and a service can go on from its snapshot."""
