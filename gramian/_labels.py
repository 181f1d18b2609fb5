"""The label that marks a position without an answer, for every model and task."""

__all__ = ["IGNORED"]

IGNORED = -100
"""The label that nobody scores; PyTorch's losses leave it out by default."""
