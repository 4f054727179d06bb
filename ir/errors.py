"""Errors of ridgeline: what was expected, what was found, and what to do."""


class RidgelineError(Exception):
    """Base of every error that ridgeline raises on purpose."""
