"""Embeddings of records: hidden states of one layer, pooled over a record or not."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from gramian.genomics._hidden_states import Layer, Taps, base_of
from gramian.genomics._score import BLOCK
from gramian.genomics._sequences import Alphabet, Codes, Records, Source, open_records
from gramian.models import GramianCache, GramianPreTrainedModel

__all__ = ["POOLS", "Embedder", "Embedding", "embed"]

POOLS = ("mean", "last", "none")

Progress = Callable[[int, int], None]


class Embedding(NamedTuple):
    """The embedding of a record.

    Attributes:
        name: name of the record.
        length: number of its bases.
        values: (width), or (length, width) without pooling; float32, or float64 of a model in
            float64.
    """

    name: str
    length: int
    values: np.ndarray


def embed(
    model: GramianPreTrainedModel,
    records: Records,
    *,
    tokenizer: Any,
    layer: Layer,
    pool: str = "mean",
    intervals: str | Path | None = None,
    batch_size: int = 8,
    chunk_size: int = 16_384,
    progress: Progress | None = None,
) -> Iterator[Embedding]:
    """Embed records as hidden states of one layer.

    Records of any length are read in chunks through the model's state, in memory that does not grow
    with the length. Without pooling an embedding has one vector for each base; for a long record
    `hidden_states` yields them chunk by chunk, and `write_embeddings` writes them so.

    Args:
        model: a model of ours that reads tokens, also inside of an adapter of peft.
        records: a FASTA file, as a path; or sequences by name; or documents or pairs of a name and
            a sequence.
        tokenizer: the model's tokenizer, which has one token for each nucleotide.
        layer: number or name of a layer, as for `hidden_states`: 0 is the embeddings, -1 the output
            of the last norm.
        pool: `"mean"` over the bases of a record, `"last"` for its last base, or `"none"`.
        intervals: a BED file; its intervals, on their strands, are embedded in place of the
            records.
        batch_size: number of records that are read together.
        chunk_size: largest number of tokens of a record that are read at once.
        progress: called as `progress(bases done, bases)`.

    Returns:
        An iterator over the embeddings in the order of the records, which computes them as it goes
        on.

    Raises:
        TypeError: on another kind of model.
        OSError: if a file cannot be read.
        ValueError: on records that are no genome, a record without sequence with `"mean"` and
            `"last"`, a tokenizer that does not fit, and as `hidden_states` does.
        ImportError: for intervals of a file, without `pyfaidx`.
    """
    embedder = Embedder(
        model,
        records,
        tokenizer=tokenizer,
        layer=layer,
        pool=pool,
        intervals=intervals,
        batch_size=batch_size,
        chunk_size=chunk_size,
        progress=progress,
    )
    return _whole(embedder)


def _whole(embedder: Embedder) -> Iterator[Embedding]:
    names, lengths = embedder.source.names, embedder.source.lengths
    pieces = embedder.pieces()
    for index, group in itertools.groupby(pieces, lambda piece: piece[0]):
        values = np.concatenate([rows for _, rows in group])
        pooled = values if embedder.pool == "none" else values[0]
        yield Embedding(names[index], lengths[index], pooled)


class Embedder:
    """What `embed` computes, in pieces; its arguments are those of `embed`.

    Attributes:
        source: the records.
        dtype: dtype of the embeddings.
        width: number of values of a vector.
    """

    def __init__(
        self,
        model: GramianPreTrainedModel,
        records: Records,
        *,
        tokenizer: Any,
        layer: Layer,
        pool: str = "mean",
        intervals: str | Path | None = None,
        batch_size: int = 8,
        chunk_size: int = 16_384,
        progress: Progress | None = None,
    ) -> None:
        if pool not in POOLS:
            raise ValueError(f"pool must be 'mean', 'last' or 'none'; got {pool!r}.")
        for name, value in (("batch_size", batch_size), ("chunk_size", chunk_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}.")
        self.pool, self.batch_size, self.chunk_size = pool, batch_size, chunk_size
        self.model = base_of(model)
        self.taps = Taps(self.model, [layer])
        [(dtype, self.width)] = self.taps.shapes
        self.dtype = np.dtype("<f8" if dtype == torch.float64 else "<f4")
        self._alphabet = Alphabet(tokenizer, self.model.config.vocab_size)
        self.source: Source = open_records(records, intervals)
        lengths = self.source.lengths
        if 0 in lengths and pool != "none":
            raise ValueError(
                f"the record {self.source.names[lengths.index(0)]!r} has no sequence, so there is "
                "nothing to pool; remove it, or take pool 'none'."
            )
        self._progress = progress
        self._done, self._bases = 0, sum(lengths)

    def pieces(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the index of a record, and one or more of its vectors, (vectors, width), in order.

        With pooling there is one vector of each record, otherwise as many as it has bases, in
        pieces of at most `chunk_size`. A record without sequence has one piece of no vectors.
        """
        self._tell(0)
        numbered = enumerate(self.source.read())
        if self.pool == "none":
            for index, codes in numbered:
                if not len(codes):
                    yield index, np.empty((0, self.width), dtype=self.dtype)
                for states, _ in self._read([codes]):
                    yield index, self._array(states[0])
            return
        while block := list(itertools.islice(numbered, BLOCK * self.batch_size)):
            pooled: dict[int, np.ndarray] = {}
            for batch in self._batches(block):
                rows = self._pooled([codes for _, codes in batch])
                pooled |= {index: row for (index, _), row in zip(batch, rows, strict=True)}
            for index, _ in block:
                yield index, pooled[index][None]

    def _batches(self, block: list[tuple[int, Codes]]) -> Iterator[list[tuple[int, Codes]]]:
        """Cut a block into batches of similar lengths, or of equal ones if there is no padding."""

        def kind(one: tuple[int, Codes]) -> int:
            length = len(one[1])
            return int(length > self.chunk_size) if self.taps.padded else length

        for _, group in itertools.groupby(sorted(block, key=lambda one: len(one[1])), kind):
            while batch := list(itertools.islice(group, self.batch_size)):
                yield batch

    def _pooled(self, texts: list[Codes]) -> np.ndarray:
        """Return one vector of each record, (records, width)."""
        found = np.zeros((len(texts), self.width), dtype=np.float64)
        for states, mask in self._read(texts):
            real = np.ones(states.shape[:2], dtype=bool) if mask is None else mask
            tokens = real.sum(1)
            if self.pool == "last":
                some = tokens > 0
                rows = torch.from_numpy(np.flatnonzero(some)).to(states.device)
                last = torch.from_numpy(tokens[some] - 1).to(states.device)
                found[some] = states[rows, last].cpu().double().numpy()
                continue
            wide = torch.float32 if states.device.type == "mps" else torch.float64
            if mask is not None:
                hidden = torch.from_numpy(~mask).to(states.device)
                states = states.masked_fill(hidden.unsqueeze(-1), 0)
            found += states.sum(1, dtype=wide).cpu().double().numpy()
        if self.pool == "mean":
            found /= np.array([[len(text)] for text in texts])
        return found.astype(self.dtype)

    def _read(self, texts: list[Codes]) -> Iterator[tuple[torch.Tensor, np.ndarray | None]]:
        """Yield hidden states (records, tokens, width) of chunks, and where their tokens are."""
        longest = max(map(len, texts))
        cache = GramianCache(self.model.config)
        device = next(self.model.parameters()).device
        for begin in range(0, longest, self.chunk_size):
            end = min(begin + self.chunk_size, longest)
            ids = np.zeros((len(texts), end - begin), dtype=np.int64)
            mask = np.zeros(ids.shape, dtype=bool)
            for row, text in enumerate(texts):
                stop = min(end, len(text))
                if stop > begin:
                    ids[row, : stop - begin] = self._alphabet.ids(text.read(begin, stop))
                    mask[row, : stop - begin] = True
            padding = None if mask.all() else torch.from_numpy(mask).long().to(device)
            (states,) = self.taps(torch.from_numpy(ids).to(device), padding, cache)
            yield states, None if padding is None else mask
            self._tell(int(mask.sum()))

    def _array(self, states: torch.Tensor) -> np.ndarray:
        wide = states if states.dtype == torch.float64 else states.float()
        return wide.cpu().numpy().astype(self.dtype, copy=False)

    def _tell(self, bases: int) -> None:
        self._done += bases
        if self._progress is not None:
            self._progress(self._done, self._bases)
