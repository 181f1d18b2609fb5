"""Cut texts into windows of tokens: some to choose by, and others to measure losses on.

The tokens that count may be given by labels, in the names of transformers. `labels` are aligned
with the tokens, so that position t predicts `labels[t + 1]`. `shift_labels` are shifted already:
position t predicts `shift_labels[t]`. Where a label is -100, nothing is predicted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from gramian._labels import IGNORED
from gramian.tasks import Encoder, documents_in
from gramian.tasks.windows import cut_windows

__all__ = ["Windows", "split_windows", "windows_of"]

_HELD_OUT = 4  # one window of so many is held out
_LOST = 0.25  # the largest share of labels that windows may lose


@dataclass(frozen=True)
class Windows:
    """Windows of tokens, and what is to be predicted in them.

    Attributes:
        ids: token ids, (count, length).
        answers: the token that each position is to predict, or -100 if none is, (count, length).
        labelled: whether the answers were given, so that not every token counts.
    """

    ids: Tensor
    answers: Tensor
    labelled: bool = False

    @classmethod
    def of(cls, ids: Tensor) -> Windows:
        """Return windows in which every token is to be predicted."""
        return cls(ids, _shifted(ids))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def length(self) -> int:
        """The number of tokens of a window."""
        return self.ids.shape[1]

    def __getitem__(self, index: Any) -> Windows:
        return Windows(self.ids[index], self.answers[index], self.labelled)

    def split(self, size: int) -> Iterator[Windows]:
        """Yield some windows after the others, as `Tensor.split` does."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def first(self, tokens: int) -> Windows:
        """Return the first windows, of so many tokens in all, and at least one."""
        return self[: max(1, tokens // self.length)]


def windows_of(texts: Any, tokenizer: Any, context: int, max_tokens: int) -> Windows:
    """Return windows of tokens, spread evenly over the texts.

    Args:
        texts: token ids (count, length), which are the windows; or token ids (length), a text, or
            several of either; or tokens with labels, as the docstring of `shrink` says.
        tokenizer: tokenizer of texts, or None.
        context: number of tokens of a window.
        max_tokens: largest number of tokens.

    Raises:
        TypeError: if the texts are neither texts nor token ids.
        ValueError: if the texts have fewer than two windows, if a text has no tokenizer, or if
            labels do not fit their tokens.
    """
    columns = _columns(texts)
    if columns is not None:
        windows = _labelled(columns, context)
    elif isinstance(texts, Tensor) and texts.ndim == 2:
        windows = Windows.of(_as_windows(texts))
    else:
        several = [texts] if isinstance(texts, str | Tensor) else list(texts)
        documents = [ids for text in several for ids in _token_ids(text, tokenizer)]
        windows = Windows.of(_cut(documents, context))
    count = min(len(windows), max(2, max_tokens // windows.length))
    windows = windows[[i * len(windows) // count for i in range(count)]]
    if len(windows) < 2:
        raise ValueError(
            "at least two windows are needed, one to choose by and one to measure on; got "
            f"{len(windows)}{' with labels' * windows.labelled}."
        )
    return windows


def split_windows(windows: Windows, seed: int) -> tuple[Windows, Windows]:
    """Return the windows to choose by, and the held-out ones: a quarter, and at least one."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(windows), generator=generator)
    held = -(-len(windows) // _HELD_OUT)
    return windows[order[held:].sort().values], windows[order[:held].sort().values]


def _shifted(labels: Tensor) -> Tensor:
    """Return the labels that each position is to predict."""
    return pad(labels[:, 1:], (0, 1), value=IGNORED)


def _columns(texts: Any) -> Mapping[str, Any] | None:
    """Return columns of tokens and labels, or None if the texts are no rows of them."""
    names = ("input_ids", "labels", "shift_labels", "attention_mask")
    if isinstance(texts, Mapping):
        columns = {name: texts[name] for name in names if name in texts}
    elif hasattr(texts, "column_names"):  # a table of `datasets`
        columns = {name: list(texts[name]) for name in names if name in texts.column_names}
    elif isinstance(texts, Sequence) and len(texts) and isinstance(texts[0], Mapping):
        columns = {
            name: _column(name, texts) for name in names if any(name in row for row in texts)
        }
    else:
        return None
    if "input_ids" not in columns:
        raise ValueError("tokens with labels need the column input_ids; got a table without it.")
    if "labels" in columns and "shift_labels" in columns:
        raise ValueError("give one of labels and shift_labels; got both.")
    return columns


def _column(name: str, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    for number, row in enumerate(rows):
        if name not in row:
            raise ValueError(f"rows must have the same columns; got no {name} in row {number}.")
    return [row[name] for row in rows]


def _labelled(columns: Mapping[str, Any], context: int) -> Windows:
    """Return the windows of a table that have labels; all windows if it has no labels."""
    rows = {name: _rows(name, column) for name, column in columns.items()}
    sizes = {name: [len(row) for row in column] for name, column in rows.items()}
    for name, found in sizes.items():
        if found != sizes["input_ids"]:
            raise ValueError(f"{name} must have the shape of input_ids; got other lengths.")
    for mask in rows.get("attention_mask", ()):
        if not bool(mask.all()):
            raise ValueError("tokens with labels must not be padded; got an attention_mask with 0.")
    cut = {}
    for name in rows.keys() - {"attention_mask"}:
        equal = len(set(sizes[name])) == 1 and len(rows[name]) > 1
        cut[name] = _as_windows(torch.stack(rows[name])) if equal else _cut(rows[name], context)
    ids = cut.pop("input_ids")
    if not cut:
        return Windows.of(ids)
    answers = cut["shift_labels"] if "shift_labels" in cut else _shifted(cut["labels"])
    _check_kept(answers, rows.get("shift_labels") or [row[1:] for row in rows["labels"]], context)
    due = (answers != IGNORED).any(1)
    return Windows(ids[due], answers[due], labelled=True)


def _check_kept(answers: Tensor, rows: Sequence[Tensor], context: int) -> None:
    """Raise a ValueError if windows lose more than a quarter of the labels of their rows."""
    given = sum(int((row != IGNORED).sum()) for row in rows)
    lost = given - int((answers != IGNORED).sum())
    if lost > _LOST * given:
        raise ValueError(
            f"the rows are cut to windows of {context} tokens, the context, which lose {lost} of "
            f"{given} labels; give rows of one length, which are windows themselves."
        )


def _rows(name: str, column: Any) -> list[Tensor]:
    """Return the rows of a column, each (length)."""
    try:
        one = isinstance(column, Tensor) or not len(column) or not hasattr(column[0], "__len__")
        rows = torch.as_tensor(column) if one else [torch.as_tensor(row) for row in column]
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be integers; got {type(column).__name__}.") from error
    rows = list(rows) if not isinstance(rows, Tensor) or rows.ndim == 2 else [rows]
    for row in rows:
        if row.ndim != 1 or row.is_floating_point():
            raise ValueError(
                f"{name} must be integers, (length) or (count, length); got {row.dtype} "
                f"{tuple(row.shape)}."
            )
    return [row.long().cpu() for row in rows]


def _as_windows(ids: Tensor) -> Tensor:
    if ids.is_floating_point() or ids.shape[1] < 2:
        raise ValueError(
            "windows must be token ids (count, length) with a length of at least 2; got "
            f"{ids.dtype} {tuple(ids.shape)}."
        )
    return ids.long()


def _cut(documents: Sequence[Tensor], context: int) -> Tensor:
    windows = cut_windows(documents, context)
    if len(windows) < 2:
        longest = max(map(len, documents), default=0)
        raise ValueError(
            f"the texts must have at least two windows of {context} tokens, the context; got "
            f"{len(windows)}, and {longest} tokens in the longest text."
        )
    return windows


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
