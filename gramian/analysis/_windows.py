r"""Let attention see a sliding window of the text, in place of all of it.

Query t of a windowed head sees the last w tokens, t - w < s <= t, and the first tokens s < m, the
*sinks*, on which much attention rests whatever they are (arXiv 2309.17453). The softmax runs over
these tokens alone. So the state of the head is w + m keys and values, however long the text is.

The maps of a windowed head follow from those of the head: entries outside of the window are 0, and
the others of a row are divided by what is left of its softmax.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gramian.analysis._calls import Attended, AttentionCall, replace_attention

__all__ = ["check_window", "window_attention", "window_maps", "window_mask"]

_ROUNDING = 16
"""The multiple of the dtype's precision up to which the sum of a softmax may differ from 1."""


@contextmanager
def window_attention(
    model: nn.Module,
    heads: Mapping[str, Sequence[int] | None],
    window: int,
    sinks: int = 0,
) -> Iterator[None]:
    """Let some heads of a model attend to a sliding window of the text within this context.

    The layers may be any whose attention goes through transformers' attention interface, and
    `gramian.mixers.SoftmaxAttention`. They read whole sequences, without a cache. Within the
    context, the model's attention functions are the eager ones, in this thread; afterwards, and
    after an exception, everything is as before. Weights are not changed.

    Args:
        model: The model.
        heads: The windowed heads of every layer by the path of its module, as `StateReport` names
            them; None for all heads of the layer.
        window: Number w of the last tokens that a query sees, its own included.
        sinks: Number of the first tokens that a query sees, too.

    Raises:
        TypeError: if the model is not a module.
        ValueError: if the window is below 1, or the number of sinks below 0; if the model has no
            module of a path, or no head of a number; and, when the model runs, if a module calls no
            attention function, or if it does not read whole sequences.
    """
    check_window(window, sinks)

    def attend(call: AttentionCall) -> Attended:
        return call.run(_narrowed(call, heads[call.path], window, sinks))

    with replace_attention(model, dict.fromkeys(heads, attend)):
        yield


def window_maps(maps: Tensor, window: int, sinks: int = 0) -> Tensor:
    """Compute the maps of windowed heads from those of the heads.

    Args:
        maps: Maps of softmax attention, (*C, L, L). If a row sums to less than 1, the rest of its
            softmax is on no token, and stays there.
        window: Number of the last tokens that a query sees, its own included.
        sinks: Number of the first tokens that it sees, too.

    Returns:
        (*C, L, L), in the dtype of the maps.

    Raises:
        ValueError: if the window is below 1, or the number of sinks below 0.
    """
    check_window(window, sinks)
    seen = _seen(maps.shape[-1], window, sinks, maps.device)
    nowhere = 1 - maps.double().sum(-1, keepdim=True)
    rounding = _ROUNDING * torch.finfo(maps.dtype).eps
    nowhere = torch.where(nowhere > rounding, nowhere, 0).to(maps.dtype)
    kept = maps * seen
    return kept / (kept.sum(-1, keepdim=True) + nowhere).clamp_min(torch.finfo(maps.dtype).tiny)


def check_window(window: int, sinks: int) -> None:
    """Check the sizes of a window.

    Raises:
        ValueError: if one is out of range.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1 token; got {window}.")
    if sinks < 0:
        raise ValueError(f"sinks must be at least 0 tokens; got {sinks}.")


def window_mask(call: AttentionCall, window: int, sinks: int) -> Tensor:
    """Return which keys are in the window of each query, or among the first, (batch or 1, L, L).

    Padding does not count as time: the first tokens are the first that are real. What the layer
    itself hides, such as padding and the future, may be in the window.
    """
    place = call.real.long().cumsum(-1)  # (batch or 1, L), from 1
    away = place[:, :, None] - place[:, None]
    return (away < window) | (place <= sinks)[:, None]


def _seen(length: int, window: int, sinks: int, device: torch.device) -> Tensor:
    """Return which keys each query sees, (L, L)."""
    index = torch.arange(length, device=device)
    away = index[:, None] - index
    return (away >= 0) & ((away < window) | (index < sinks))


def _narrowed(call: AttentionCall, chosen: Sequence[int] | None, window: int, sinks: int) -> Tensor:
    """Return the mask of a call in which some heads see a window.

    Raises:
        ValueError: if the layer does not have one of the heads.
    """
    hidden = ~window_mask(call, window, sinks)[:, None]
    if chosen is not None:
        for head in chosen:
            call.check_head(head)
        windowed = torch.zeros(call.query.shape[1], dtype=torch.bool, device=hidden.device)
        windowed[list(chosen)] = True
        hidden = hidden & windowed[:, None, None]
    mask = call.mask
    if mask is None:
        length = call.query.shape[-2]
        mask = call.query.new_zeros(1, 1, length, length)
        hidden = hidden | ~call.visible
    if mask.dtype == torch.bool:
        return mask & ~hidden
    return torch.where(hidden, torch.finfo(mask.dtype).min, mask)
