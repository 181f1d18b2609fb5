"""From hidden states to one vector a sequence, over the tokens that a mask calls real."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pool", "recent_mask"]


def recent_mask(mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """The last `length` columns as booleans, or None if they are seen to hide nothing."""
    if mask is None:
        return None
    if mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] < length:
        raise ValueError(
            "attention_mask must be (batch, length) with 1 for real tokens, here "
            f"({batch}, {length}) or longer; got {tuple(mask.shape)}."
        )
    recent = mask[:, -length:].bool()
    if torch.compiler.is_compiling():  # a traced graph cannot depend on values
        return recent
    return None if recent.all() else recent


def pool(hidden_states: Tensor, attention_mask: Tensor | None, pooling: str) -> Tensor:
    """(batch, length, width) to (batch, width): the `"mean"` of real tokens, or the `"last"` one.

    Raises:
        ValueError: on a mask of another shape, or one that hides a whole sequence.
    """
    batch, length = hidden_states.shape[:2]
    mask = recent_mask(attention_mask, batch, length)
    if mask is not None and not torch.compiler.is_compiling() and not mask.any(-1).all():
        hidden = (~mask.any(-1)).nonzero().flatten().tolist()
        raise ValueError(
            "attention_mask must leave a real token in every sequence; it hides all of "
            f"{', '.join(map(str, hidden))}."
        )
    if pooling == "last":
        if mask is None:
            return hidden_states[:, -1]
        last = length - 1 - mask.flip(-1).long().argmax(-1)
        return hidden_states[torch.arange(batch, device=last.device), last]
    if mask is None:
        return hidden_states.mean(1)
    total = (hidden_states * mask.unsqueeze(-1)).sum(
        1, dtype=torch.promote_types(hidden_states.dtype, torch.float32)
    )
    return (total / mask.sum(-1, keepdim=True)).to(hidden_states.dtype)
