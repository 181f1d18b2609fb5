"""Describe the positions of tokens in a batch of rows, and the sequences that they form.

Padding does not count as time: a sequence consists of its tokens only. So before mixing, the tokens
of every sequence are moved together such that all sequences end at the last column (`Part.take`).
Afterwards, the outputs are moved back (`Segments.restore`). Rows that already have this order are
not moved.

Several sequences may share a row, which is then called packed. In that case sequences of similar
length form a part, which is a separate batch. So a long sequence does not make short sequences
expensive.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gramian.ops.devices import from_host
from gramian.systems import Pause

__all__ = ["Part", "Segments", "has_values", "read_values"]

_OVERHEAD = 4096  # the number of padded positions that cost about as much as one more part


def has_values(x: Tensor) -> bool:
    """Return whether control flow may depend on the values of x.

    Control flow must not depend on values in a traced graph or under `torch.vmap`, where x has
    several values at once.
    """
    if torch.compiler.is_compiling() or x.is_meta:
        return False
    functorch = torch._C._functorch  # noqa: SLF001 (torch.func has no public names for these)
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return False
        x = functorch.get_unwrapped(x)
    return True


def read_values(x: Tensor) -> list[Any]:
    """Return the values of x, (n), as a list, also in a transform such as `torch.func.grad`.

    There `x.tolist()` fails in PyTorch 2.6. `has_values` says whether x has values to read.
    """
    if torch._C._functorch.is_functorch_wrapped_tensor(x):  # noqa: SLF001
        return [one.item() for one in x]
    return x.tolist()


class Part(NamedTuple):
    """A batch of sequences, one in each row, which all end at the last column."""

    source: Tensor
    """(sequences, length), int64: the index of each column in the flattened batch of rows."""
    real: Tensor | None
    """(sequences, length), boolean: false before a sequence begins.

    It is None if all sequences have the same length.
    """

    def take(self, x: Tensor) -> Tensor:
        """Return the entries of x (batch, length, …) at the sequences' tokens.

        The result is (sequences, length, …), with zeros before a sequence begins.
        """
        taken = x.flatten(0, 1).index_select(0, self.source.flatten())
        taken = taken.unflatten(0, tuple(self.source.shape))
        if self.real is None:
            return taken
        hidden = self.real.logical_not().reshape(*self.real.shape, *(1,) * (x.ndim - 2))
        return taken.masked_fill(hidden, 0)


class Segments:
    """The positions of the tokens of every sequence in a batch of rows.

    Args:
        real: (batch, length), boolean: true for tokens, false for padding. If None, all positions
            are tokens.
        numbers: (batch, length), integers: tokens of a row that have the same number form a
            sequence, and only padding may come between them. If None, every row is one sequence.

    Raises:
        ValueError: if a tensor has another shape. The parts of packed rows also raise it if a
            number occurs in a row again after another number.

    In a traced graph, and under `torch.vmap`, control flow must not depend on values. So there,
    rows are always moved, and packed rows raise a ValueError.
    """

    def __init__(self, real: Tensor | None, numbers: Tensor | None = None) -> None:
        # Lengths of a traced graph may be symbols, which cannot be elements of a set.
        shapes = [tuple(x.shape) for x in (real, numbers) if x is not None]
        if not shapes or len(shapes[0]) != 2 or shapes[0] != shapes[-1]:
            raise ValueError(
                "segments are described by a mask and numbers of one shape (batch, length); got "
                f"{' and '.join(map(str, shapes)) or 'neither'}."
            )
        batch, length = shapes[0]
        self.shape = batch, length
        self.real = None if real is None else real != 0
        self.numbers = numbers
        self.device = (real if numbers is None else numbers).device  # type: ignore[union-attr]
        self._plan: tuple[tuple[Part, ...], Tensor] | None = None
        self._counts: list[int] | None = None
        self.aligned = False
        """Whether every row is one sequence that ends at the last column."""
        self.unbroken = False
        """Whether every row is one sequence without padding between its tokens."""
        self.has_empty_rows = False
        """Whether a row has no token at all."""
        if numbers is not None and not has_values(numbers):
            raise ValueError("packed rows cannot be traced: give each sequence a row of its own.")
        if numbers is None and self.real is not None and has_values(self.real):
            rises = (self.real[:, 1:] > self.real[:, :-1]).sum(1)
            broken = (rises + self.real[:, :1].sum(1) > 1).any()
            empty = ~self.real.any(1)
            aligned = (self.real[:, -1] | empty).all() & ~broken
            flags = read_values(torch.stack([aligned, broken, empty.any()]))
            self.aligned, is_broken, self.has_empty_rows = flags
            self.unbroken = not is_broken

    @classmethod
    def of(cls, mask: Tensor | Segments | None) -> Segments | None:
        """Return the segments of a mask (batch, length) that is nonzero for real tokens.

        Segments are returned unchanged, and None gives None.
        """
        if mask is None or isinstance(mask, Segments):
            return mask
        return cls(mask)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Segments:
        """Return the same segments on another device."""
        if self.device == torch.device(device):
            return self
        real, numbers = (
            None if x is None else x.to(device, non_blocking=non_blocking)
            for x in (self.real, self.numbers)
        )
        return Segments(real, numbers)

    @property
    def packed(self) -> bool:
        """Whether a row may hold several sequences."""
        return self.numbers is not None

    @property
    def parts(self) -> tuple[Part, ...]:
        """The batches that together contain every sequence once.

        If every row is one sequence, there is one part, with the sequences in the order of the
        rows. The sequences of packed rows are sorted by length.
        """
        return self._planned()[0]

    @property
    def places(self) -> Tensor:
        """The position of each token in the flattened and concatenated parts.

        The result is (batch, length), int64.
        """
        return self._planned()[1]

    def _planned(self) -> tuple[tuple[Part, ...], Tensor]:
        if self._plan is None:
            self._plan = self._packed() if self.packed else self._turned()
        return self._plan

    def restore(self, made: list[Tensor]) -> Tensor:
        """Move the outputs of all parts back into the rows.

        Args:
            made: The output of each part, (sequences, length, …).

        Returns:
            (batch, length, …), zero at padding.
        """
        flat = (
            torch.cat([y.flatten(0, 1) for y in made]) if len(made) > 1 else made[0].flatten(0, 1)
        )
        rows = flat.index_select(0, self.places.flatten()).unflatten(0, self.shape)
        if self.real is None:
            return rows
        hidden = self.real.logical_not().reshape(*self.shape, *(1,) * (rows.ndim - 2))
        return rows.masked_fill(hidden, 0)

    def pause(self) -> Pause:
        """Return the number of columns before the first token of each row.

        If the rows are not aligned, the columns of the part into which the rows are moved are
        counted.
        """
        assert self.real is not None
        length = self.shape[1] if self.aligned else self.parts[0].source.shape[1]
        if self._counts is None:
            self._counts = read_values(self.real.sum(1))
        return Pause([length - count for count in self._counts], length)

    def _turned(self) -> tuple[tuple[Part, ...], Tensor]:
        """Plan one part, in which the tokens of each row come at the end of the row.

        The part has as many columns as the row with the most tokens needs.
        """
        assert self.real is not None
        real, (batch, length) = self.real, self.shape
        count = real.sum(1, keepdim=True)
        width = length
        if has_values(real):
            self._counts = read_values(count.flatten())
            width = max(1, *self._counts)
        rows = torch.arange(batch, device=real.device)[:, None]
        columns = torch.arange(length, device=real.device)
        among = real.cumsum(1) - 1  # the index of each token among the tokens of its row
        moved = torch.where(real, length - count + among, columns - among - 1)
        order = torch.zeros_like(moved).scatter(1, moved, columns.expand(batch, -1))
        source = (order + rows * length)[:, length - width :]
        part = Part(source, columns[:width] >= width - count)
        return (part,), torch.where(real, rows * width + width - count + among, 0)

    def _packed(self) -> tuple[tuple[Part, ...], Tensor]:
        """Plan parts of sequences of similar length.

        A part has at most twice as many positions as tokens, unless it is small.
        """
        assert self.numbers is not None
        tokens, begins, lengths = self.sequences()
        sizes = read_values(lengths)
        groups: dict[int, list[int]] = {}
        for sequence in sorted(range(len(sizes)), key=sizes.__getitem__):
            groups.setdefault((sizes[sequence] - 1).bit_length(), []).append(sequence)
        buckets = list(groups.values())
        for later in range(
            len(buckets) - 1, 0, -1
        ):  # merge small groups into groups of longer sequences
            earlier = buckets[later - 1]
            if len(earlier) * sizes[buckets[later][-1]] <= _OVERHEAD:
                buckets[later - 1 : later + 1] = [earlier + buckets[later]]
        parts = []
        places = tokens.new_zeros(self.shape[0] * self.shape[1])
        offset = 0
        for bucket in buckets:
            chosen = from_host(bucket, tokens.device)
            width = sizes[bucket[-1]]
            first = width - lengths[chosen, None]  # the column of the first token
            columns = torch.arange(width, device=tokens.device)
            real = columns >= first
            index = tokens[(begins[chosen, None] + columns - first).clamp_min(0)]
            at = offset + torch.arange(len(bucket), device=tokens.device)[:, None] * width + columns
            places[index[real]] = at[real]
            parts.append(Part(index, None if sizes[bucket[0]] == width else real))
            offset += index.numel()
        return tuple(parts), places.unflatten(0, self.shape)

    def sequences(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return all sequences in the order of rows and columns.

        Returns:
            Three int64 tensors: the position of every token in the flattened rows, (tokens); the
            number of tokens before every sequence, (sequences); and the length of every sequence,
            (sequences).

        Raises:
            ValueError: if a number occurs in a row again after another number.
        """
        batch, length = self.shape
        device = self.device
        if self.real is None:
            tokens = torch.arange(batch * length, device=device)
        else:
            tokens = self.real.flatten().nonzero().squeeze(1)
        new = torch.ones(len(tokens), dtype=torch.bool, device=device)
        rows = tokens // length
        new[1:] = rows[1:] != rows[:-1]
        if self.numbers is not None:
            numbers = self.numbers.flatten()[tokens]
            new[1:] |= numbers[1:] != numbers[:-1]
        begins = new.nonzero().squeeze(1)
        ends = torch.nn.functional.pad(begins[1:], (0, 1), value=len(tokens))
        if self.numbers is not None:
            pairs = torch.stack([rows[begins], numbers[begins]], 1)
            if len(pairs.unique(dim=0)) < len(pairs):
                raise ValueError("the tokens of a sequence must follow each other in its row.")
        return tokens, begins, ends - begins
