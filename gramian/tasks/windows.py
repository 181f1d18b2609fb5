"""Cut documents into windows of tokens of equal length. No window spans two documents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["cut_windows", "spread_windows"]


def cut_windows(documents: Sequence[Tensor], length: int) -> Tensor:
    """Cut documents into adjacent windows, and drop the remainder of each document.

    Args:
        documents: token ids of each document, (count,).
        length: length of a window, at least 1.

    Returns:
        The windows, (count, length).
    """
    whole = [ids[: len(ids) // length * length].reshape(-1, length) for ids in documents]
    return torch.cat([torch.empty(0, length, dtype=torch.long), *whole])


def spread_windows(documents: Sequence[Tensor], length: int, max_tokens: int) -> Tensor:
    """Select windows that are spread evenly over documents.

    If more than half of all tokens would be dropped, windows are made shorter than `length`.

    Args:
        documents: token ids of each document, (count,).
        length: largest length of a window.
        max_tokens: largest number of tokens in all windows together. At least one window is
            returned in any case.

    Returns:
        The windows, (count, length).

    Raises:
        ValueError: if no document has at least two tokens.
    """
    longest = max(map(len, documents), default=0)
    length = min(length, longest)
    if length < 2:
        raise ValueError(f"the text has too few tokens: {longest}.")
    total = sum(map(len, documents))
    while length > 2 and 2 * sum(len(one) // length * length for one in documents) < total:
        length = (length + 1) // 2
    windows = cut_windows(documents, length)
    count = min(len(windows), max(1, max_tokens // length))
    return windows[[i * len(windows) // count for i in range(count)]]
