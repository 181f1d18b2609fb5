"""Cut texts into windows of tokens: some to choose by, and others to measure losses on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gramian.tasks import Encoder, documents_in
from gramian.tasks.windows import cut_windows

__all__ = ["split_windows", "windows_of"]

_HELD_OUT = 4  # one window of so many is held out


def windows_of(texts: Any, tokenizer: Any, context: int, max_tokens: int) -> Tensor:
    """Return windows of tokens, (count, length), spread evenly over the texts.

    Args:
        texts: token ids (count, length), which are the windows; or token ids (length), a text, or
            several of either.
        tokenizer: tokenizer of texts, or None.
        context: number of tokens of a window.
        max_tokens: largest number of tokens.

    Raises:
        TypeError: if the texts are neither texts nor token ids.
        ValueError: if the texts have fewer than two windows, or if a text has no tokenizer.
    """
    if isinstance(texts, Tensor) and texts.ndim == 2:
        if texts.is_floating_point() or texts.shape[1] < 2:
            raise ValueError(
                "windows must be token ids (count, length) with a length of at least 2; got "
                f"{texts.dtype} {tuple(texts.shape)}."
            )
        windows = texts.long()
    else:
        several = [texts] if isinstance(texts, str | Tensor) else list(texts)
        documents = [ids for text in several for ids in _token_ids(text, tokenizer)]
        windows = cut_windows(documents, context)
        if len(windows) < 2:
            longest = max(map(len, documents), default=0)
            raise ValueError(
                f"the texts must have at least two windows of {context} tokens, the context; got "
                f"{len(windows)}, and {longest} tokens in the longest text."
            )
    count = min(len(windows), max(2, max_tokens // windows.shape[1]))
    windows = windows[[i * len(windows) // count for i in range(count)]]
    if len(windows) < 2:
        raise ValueError(
            "at least two windows are needed, one to choose by and one to measure on; got "
            f"{len(windows)}."
        )
    return windows


def split_windows(windows: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return the windows to choose by, and the held-out ones: a quarter, and at least one."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(windows), generator=generator)
    held = -(-len(windows) // _HELD_OUT)
    return windows[order[held:].sort().values], windows[order[:held].sort().values]


def _token_ids(text: Any, tokenizer: Any) -> list[Tensor]:
    if isinstance(text, str):
        if tokenizer is None:
            raise ValueError("a text needs a tokenizer: give `tokenizer`, or token ids.")
        encode = Encoder(tokenizer)
        return [torch.from_numpy(encode(document)).long() for document in documents_in(text)]
    try:
        ids = torch.as_tensor(text)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"texts or token ids are needed; got {type(text).__name__}.") from error
    if ids.ndim != 1 or ids.is_floating_point():
        raise ValueError(f"the token ids of a text must be (length); got {tuple(ids.shape)}.")
    return [ids.long()]
