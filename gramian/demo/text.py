"""Provide English text that ships with Python, and the bigram model to outperform on it.

The text is the reference documentation that `help()` prints. It contains each paragraph once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gramian.tasks.documentation import python_topics

__all__ = ["BigramModel", "Corpus", "python_documentation"]


@dataclass(frozen=True)
class Corpus:
    """A text to train on, and a text that is held out.

    Attributes:
        train: (bytes,) uint8, the first part of the text.
        held_out: (bytes,) uint8, the rest of the text.
    """

    train: Tensor
    held_out: Tensor


def python_documentation(held_out_fraction: float = 0.1) -> Corpus:
    """Return the text that Python's `help()` prints, and hold out its last part.

    The text contains each paragraph once.

    Args:
        held_out_fraction: share of the bytes to hold out.

    Raises:
        RuntimeError: if this Python was installed without `pydoc_data`.
    """
    text = "\n\n".join(python_topics()).encode()
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    cut = round(len(data) * (1 - held_out_fraction))
    return Corpus(train=data[:cut], held_out=data[cut:])


class BigramModel:
    """A model of `P(next | previous)` from counts, with Witten-Bell smoothing towards `P(next)`.

    For a previous byte that occurs c times with t different successors, the counts have weight c /
    (c + t). In `P(next)`, 1 is added to every count, so every byte has a positive probability.
    """

    def __init__(self, train: Tensor) -> None:
        data = train.long()  # (bytes,)
        pairs = torch.bincount(data[:-1] * 256 + data[1:], minlength=256 * 256)
        counts = pairs.view(256, 256).double()  # (previous, next)
        unigram = torch.bincount(data, minlength=256).double() + 1
        unigram /= unigram.sum()
        seen = counts.sum(-1, keepdim=True)
        successors = (counts > 0).sum(-1, keepdim=True)
        smoothed = counts + successors * unigram
        self.probabilities = torch.where(
            seen > 0, smoothed / (seen + successors).clamp(min=1), unigram
        )  # (previous, next), rows sum to 1

    def bits_per_byte(self, windows: Tensor) -> float:
        """Return the mean `-log2 P` per byte on windows (count, length), without first bytes."""
        windows = windows.long()
        chosen = self.probabilities[windows[:, :-1], windows[:, 1:]]
        return -chosen.log2().mean().item()
