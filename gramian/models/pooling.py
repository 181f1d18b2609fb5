"""Pool the hidden states of real tokens to one vector per sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from gramian.mixers import Segments
from gramian.mixers.segments import has_values

__all__ = ["pool"]


def pool(hidden_states: Tensor, segments: Segments | None, pooling: str) -> Tensor:
    """Pool hidden states over the real tokens of every sequence.

    Args:
        hidden_states: (batch, length, width).
        segments: the positions of tokens and sequences; None if there is no padding.
        pooling: "mean" for the mean over the real tokens, or "last" for the last real token.

    Returns:
        (sequences, width). Without packing, every row is one sequence. With packing, the sequences
        of the first row come first, in their order.

    Raises:
        ValueError: if the mask hides a whole sequence.
    """
    batch, length = hidden_states.shape[:2]
    if segments is None:
        return hidden_states[:, -1] if pooling == "last" else hidden_states.mean(1)
    if segments.packed:
        return _pool_packed(hidden_states, segments, pooling)
    mask = segments.real
    assert mask is not None
    if has_values(mask) and not mask.any(-1).all():
        hidden = (~mask.any(-1)).nonzero().flatten().tolist()
        raise ValueError(
            "attention_mask must leave a real token in every sequence; it hides all of "
            f"{', '.join(map(str, hidden))}."
        )
    if pooling == "last":
        last = length - 1 - mask.flip(-1).long().argmax(-1)
        return hidden_states[torch.arange(batch, device=last.device), last]
    total = (hidden_states.masked_fill(~mask.unsqueeze(-1), 0)).sum(
        1, dtype=torch.promote_types(hidden_states.dtype, torch.float32)
    )
    return (total / mask.sum(-1, keepdim=True)).to(hidden_states.dtype)


def _pool_packed(hidden_states: Tensor, segments: Segments, pooling: str) -> Tensor:
    tokens, begins, lengths = segments.sequences()
    flat = hidden_states.flatten(0, 1).index_select(0, tokens)
    if pooling == "last":
        return flat.index_select(0, begins + lengths - 1)
    wide = flat.to(torch.promote_types(flat.dtype, torch.float32))
    sequence = torch.repeat_interleave(lengths)
    total = wide.new_zeros(len(lengths), wide.shape[1]).index_add(0, sequence, wide)
    return (total / lengths.unsqueeze(1)).to(flat.dtype)
