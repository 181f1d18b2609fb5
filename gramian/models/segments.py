"""Find which positions of a model's rows are tokens, and to which sequences they belong.

Rows may be padded; an `attention_mask` describes the padding. Rows may also be packed, which means
that several sequences follow each other in a row. Packed rows are described by `position_ids` that
restart, by `seq_idx`, or by `cu_seq_lens_q` and `cu_seq_lens_k`. transformers'
`DataCollatorWithFlattening` and TRL's padding-free collators make these arguments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gramian.mixers import Segments
from gramian.mixers.segments import Part, has_values, read_values
from gramian.models.labels import IGNORED

__all__ = [
    "check_arguments",
    "items_due",
    "last_tokens",
    "next_labels",
    "read_rows",
    "recent_mask",
    "token_segments",
]


def recent_mask(mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """Return the last `length` columns of a mask as booleans, or None if all of them are 1.

    Args:
        mask: (batch, length or more), 1 for real tokens and 0 for padding; or None.
        batch: number of rows.
        length: number of columns to return.

    Raises:
        ValueError: if the mask has another shape, or holds numbers other than 0 and 1.
    """
    if mask is None:
        return None
    if mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] < length:
        raise ValueError(
            "attention_mask must be (batch, length) with 1 for real tokens, here "
            f"({batch}, {length}) or longer; got {tuple(mask.shape)}."
        )
    recent = mask[:, -length:]
    if not has_values(recent):
        return recent.bool()
    if recent.dtype == torch.bool:
        return None if bool(recent.all()) else recent
    if length == 0:
        return None
    allowed, hides = read_values(
        torch.stack([((recent == 0) | (recent == 1)).all(), (recent == 0).any()])
    )
    if not allowed:
        raise ValueError(
            "attention_mask must be 1 for real tokens and 0 for padding; it holds other numbers, "
            f"such as {recent[(recent != 0) & (recent != 1)][0].item():g}. Packed rows need "
            "position_ids that restart, or by seq_idx."
        )
    return recent.bool() if hides else None


def token_segments(
    batch: int,
    length: int,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
) -> Segments | None:
    """Return the sequences in rows (batch, length), or None if each row is one whole sequence.

    Args:
        batch: number of rows.
        length: length of every row.
        attention_mask: (batch, length or more), 1 for real tokens. The last `length` columns are
            used.
        position_ids: (batch, length) or (1, length). Only the differences between successive real
            tokens of a row are used: a difference of 1 continues a sequence, and a difference of 0
            or less begins the next sequence.
        seq_idx: (batch, length) or (1, length). A sequence begins where the value changes.
        cu_seq_lens_q: (sequences + 1), the number of positions in the flattened rows before each
            sequence, followed by the number of all positions.
        cu_seq_lens_k: a tensor equal to `cu_seq_lens_q`.

    Raises:
        ValueError: if an argument has another shape; if positions jump ahead; if the cumulative
            lengths do not end at the number of all positions; or if two arguments describe
            different sequences.
    """
    real = recent_mask(attention_mask, batch, length)
    _check_shapes(batch, length, position_ids=position_ids, seq_idx=seq_idx)
    numbers = None
    if torch.compiler.is_compiling():
        _refuse_packing(length, real, position_ids, seq_idx, cu_seq_lens_q)
    elif length > 1:
        packing = (position_ids, seq_idx, cu_seq_lens_q, cu_seq_lens_k)
        numbers = _sequence_numbers(batch, length, real, *packing)
    return None if real is None and numbers is None else Segments(real, numbers)


def _check_shapes(batch: int, length: int, **arguments: Tensor | None) -> None:
    """Raise a ValueError unless all arguments are (batch, length), (1, length) or None."""
    for name, value in arguments.items():
        if value is not None and tuple(value.shape) not in ((batch, length), (1, length)):
            raise ValueError(
                f"{name} must be (batch, length) = ({batch}, {length}) or (1, {length}); got "
                f"{tuple(value.shape)}."
            )


def _refuse_packing(
    length: int,
    real: Tensor | None,
    position_ids: Tensor | None,
    seq_idx: Tensor | None,
    cu_seq_lens_q: Tensor | None,
) -> None:
    """Raise a ValueError for arguments of packed rows, because a traced graph cannot read them.

    `position_ids` are accepted if each row is one sequence. The graph checks this when it runs.
    """
    if seq_idx is not None or cu_seq_lens_q is not None:
        raise ValueError("packed rows cannot be traced: give each sequence a row of its own.")
    if position_ids is not None and length > 1:
        _assert_one_sequence(position_ids, real)


def _sequence_numbers(
    batch: int,
    length: int,
    real: Tensor | None,
    position_ids: Tensor | None,
    seq_idx: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
) -> Tensor | None:
    """Return a number for every real token, (batch, length), so that sequences can be told apart.

    The numbers are int64. They are equal within a sequence, and rise from one sequence of a row to
    the next. If every row is one sequence, None is returned.
    """
    given = [x for x in (position_ids, seq_idx, cu_seq_lens_q, cu_seq_lens_k) if x is not None]
    if not given:
        return None
    device = given[0].device if real is None else real.device
    tokens = torch.arange(batch * length, device=device)  # positions in the flattened rows
    if real is not None:
        tokens = tokens[real.flatten().to(device)]
    same_row = tokens[1:] // length == tokens[:-1] // length

    def differences(values: Tensor) -> Tensor:
        """Return the difference between the values at each real token and the token before."""
        return values.to(device).expand(batch, length).flatten()[tokens].diff()

    begins: dict[str, Tensor] = {}  # whether each real token but the first begins a sequence
    if position_ids is not None:
        begins["position_ids"] = _restarts(differences(position_ids), same_row)
    if seq_idx is not None:
        begins["seq_idx"] = same_row & (differences(seq_idx) != 0)
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        borders = _begins(cu_seq_lens_q, cu_seq_lens_k, batch * length).to(device)
        begins["cu_seq_lens_q"] = same_row & (
            torch.bucketize(tokens, borders, right=True).diff() != 0
        )
    begin = _agreed(begins)
    if begin is None:
        return None
    numbers = torch.zeros(batch * length, dtype=torch.int64, device=device)
    numbers[tokens[1:]] = begin.cumsum(0)
    return numbers.unflatten(0, (batch, length))


def _restarts(steps: Tensor, same_row: Tensor) -> Tensor:
    """Return for every real token but the first whether the positions restart there.

    Args:
        steps: the position of each of these tokens, minus the position of the token before.
        same_row: for each of these tokens, whether the token before is in the same row.

    Raises:
        ValueError: if positions of one row jump ahead.
    """
    if bool((same_row & (steps > 1)).any()):
        raise ValueError(
            "position_ids must count the real tokens of a sequence one by one, since padding "
            f"is not time; they jump ahead by {int(steps[same_row].max())}."
        )
    return same_row & (steps < 1)


def _agreed(begins: dict[str, Tensor]) -> Tensor | None:
    """Return where sequences begin within rows, or None if every row is one sequence.

    Args:
        begins: a mapping from the name of each argument to booleans, which say for every real token
            but the first whether it begins a sequence within a row. An argument is ignored if its
            booleans are all False.

    Raises:
        ValueError: if two arguments describe different sequences.
    """
    packing = {name: begin for name, begin in begins.items() if bool(begin.any())}
    if not packing:
        return None
    name, begin = packing.popitem()
    for other, differs in packing.items():
        if not torch.equal(begin, differs):
            raise ValueError(f"{other} and {name} describe different sequences.")
    return begin


def _begins(query: Tensor | None, key: Tensor | None, total: int) -> Tensor:
    """Return from cumulative lengths the positions at which all sequences but the first begin.

    Raises:
        ValueError: unless both tensors are equal and rise from 0 to `total`.
    """
    if query is None or key is None or not torch.equal(query, key):
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k must be given together, and be equal.")
    if (
        query.ndim != 1
        or len(query) < 2
        or int(query[0]) != 0
        or int(query[-1]) != total
        or bool((query.diff() < 0).any())
    ):
        raise ValueError(
            f"cu_seq_lens_q must rise from 0 to {total}, the positions of all rows; got "
            f"{query.flatten().tolist()[:8]} of shape {tuple(query.shape)}."
        )
    return query[1:-1].to(torch.int64)


def _assert_one_sequence(position_ids: Tensor, real: Tensor | None) -> None:
    """Make a traced graph fail when it runs, unless the positions describe one sequence per row."""
    message = "position_ids of packed rows cannot be traced: give each sequence a row of its own."
    assert_async = torch._assert_async  # noqa: SLF001 (no public function asserts in a graph)
    if real is None:
        assert_async((position_ids.diff() == 1).all(), message)
        return
    offset = position_ids - real.long().cumsum(1)
    low, high = torch.iinfo(offset.dtype).min, torch.iinfo(offset.dtype).max
    spread = offset.masked_fill(~real, low).amax(1) > offset.masked_fill(~real, high).amin(1)
    assert_async(~(spread & real.any(1)).any(), message)


def next_labels(labels: Tensor, segments: Segments) -> Tensor:
    """Return, for every token, the label of the next token of its sequence.

    Nothing is predicted across the border of two sequences or from padding, and labels at padding
    are not scored.

    Args:
        labels: (batch, length).
        segments: the positions of tokens and sequences.

    Returns:
        (batch, length), with -100 at the last token of every sequence and at padding.
    """
    batch, length = labels.shape
    columns = torch.arange(length, device=labels.device).expand(batch, length)
    if segments.real is not None:
        columns = columns.masked_fill(~segments.real.to(labels.device), length)
    later = columns.flip(1).cummin(1).values.flip(1)[:, 1:]  # the first token from this column on
    later = torch.cat([later, columns.new_full((batch, 1), length)], dim=1)  # no padding by symbols
    due = later < length
    if segments.real is not None:
        due = due & segments.real.to(labels.device)
    later = later.clamp_max(length - 1)
    if segments.numbers is not None:
        numbers = segments.numbers.to(labels.device)
        due = due & (numbers.gather(1, later) == numbers)
    return torch.where(due, labels.gather(1, later), IGNORED)


def items_due(items: Tensor | int, labels: Tensor, due: Tensor) -> Tensor | int:
    """Return the divisor of a loss, given a trainer's count of labels over all of its batches.

    Trainers count all labels after the first column. They also count labels at padding, and labels
    of the first token of a sequence, which no token predicts. So the count is multiplied by the
    share of this batch's labels that are scored. If no label of the batch is scored, the count is
    returned unchanged.

    Args:
        items: the count of the trainer.
        labels: (batch, length).
        due: (batch, length), the labels that `next_labels` returned.
    """
    counted, scored = (labels[:, 1:] != IGNORED).sum(), (due != IGNORED).sum()
    return items * torch.where(scored > 0, scored / counted.clamp_min(1), 1)


def last_tokens(hidden_states: Tensor, segments: Segments | None, count: int) -> Tensor:
    """Return the entries at the last `count` tokens of each row.

    Args:
        hidden_states: (batch, length, …).
        segments: the positions of tokens in these rows; None if there is no padding.
        count: number of tokens, at least 1.

    Returns:
        (batch, count, …). If a row has fewer tokens, zeros come before them. If the rows are
        packed, the last columns are returned.
    """
    if segments is None or segments.packed or segments.aligned:
        return hidden_states[:, -count:]
    (part,) = segments.parts
    assert part.real is not None
    return Part(part.source[:, -count:], part.real[:, -count:]).take(hidden_states)


def read_rows(
    inputs: tuple[Tensor | None, ...],
    attention_mask: Tensor | Segments | None,
    position_ids: Tensor | None,
    arguments: dict[str, Any],
    suffix: str = "",
) -> Segments | None:
    """Return the segments of the rows of a forward pass.

    Args:
        inputs: the possible inputs, (batch, length, …); the first that is not None is used.
        attention_mask: the mask, as for `token_segments`; or segments, which are returned.
        position_ids: the positions, as for `token_segments`.
        arguments: the other arguments of the pass. The arguments of packed rows are removed from
            this dictionary. These are `seq_idx`, `cu_seq_lens_q` and `cu_seq_lens_k`, which are
            used, and `max_length_q` and `max_length_k`, which add no information.
        suffix: text at the end of the names of the arguments of packed rows.

    Raises:
        ValueError: in the same cases as `token_segments`.
    """
    packing = {
        name: arguments.pop(f"{name}{suffix}", None)
        for name in ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k")
    }
    for name in ("max_length_q", "max_length_k"):
        arguments.pop(f"{name}{suffix}", None)
    rows = next((x for x in inputs if x is not None), None)
    if rows is None or rows.ndim < 2:  # the model will raise an error
        return None
    if isinstance(attention_mask, Segments):
        return attention_mask
    batch, length = rows.shape[:2]
    return token_segments(batch, length, attention_mask, position_ids, **packing)


def check_arguments(name: str, arguments: dict[str, Any], *known: str) -> None:
    """Raise a TypeError for an argument of a forward pass that would be ignored.

    Args:
        name: name of the model's class, for the message.
        arguments: the remaining arguments. An argument that is None is not checked.
        known: names of arguments that this model accepts and other models do not.
    """
    unknown = sorted(
        key
        for key, value in arguments.items()
        if value is not None and key not in known and key not in _HARMLESS
    )
    if unknown:
        raise TypeError(
            f"{name} does not take {', '.join(unknown)}: nothing here does what it asks for."
        )


_HARMLESS = {
    "num_items_in_batch",  # trainers pass it; losses read it
    "output_attentions",
    "return_dict",
    "token_type_ids",  # tokenizers return them by default; no model here has an embedding of types
    "use_cache",
}
