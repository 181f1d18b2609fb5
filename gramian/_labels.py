"""Define the label of positions without an answer, for all models and tasks."""

__all__ = ["IGNORED"]

IGNORED = -100
"""The label that is never scored. PyTorch's losses ignore it by default."""
