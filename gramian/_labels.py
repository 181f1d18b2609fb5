"""The label of positions without an answer, for every model and task."""

__all__ = ["IGNORED"]

IGNORED = -100
"""The label that is never scored; PyTorch's losses ignore it by default."""
