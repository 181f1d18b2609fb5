"""Embed records as hidden states of one layer, with or without pooling over a record."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from gramian.genomics._hidden_states import Layer, Taps, base_of
from gramian.genomics._score import blocks_of
from gramian.genomics._sequences import Alphabet, Codes, Records, Source, open_records
from gramian.genomics._tokenizers import tokenizer_of
from gramian.models import GramianCache, GramianPreTrainedModel
from gramian.ops.devices import has_float64

__all__ = ["POOLS", "Embedder", "Embedding", "embed"]

POOLS = ("mean", "last", "none")

Progress = Callable[[int, int], None]


class Embedding(NamedTuple):
    """The embedding of a record.

    Attributes:
        name: name of the record.
        length: number of its bases.
        values: the embedding, (width), or (length, width) without pooling. Its dtype is float64 if
            the hidden states are in float64, and float32 otherwise.
    """

    name: str
    length: int
    values: np.ndarray


def embed(
    model: GramianPreTrainedModel,
    records: Records,
    *,
    layer: Layer = -1,
    tokenizer: Any = None,
    pool: str = "mean",
    intervals: str | Path | None = None,
    batch_size: int = 8,
    chunk_size: int = 16_384,
    progress: Progress | None = None,
) -> Iterator[Embedding]:
    """Embed records as hidden states of one layer.

    Records of any length are read in chunks, and the model's state is carried from chunk to chunk.
    So the memory for reading does not grow with the length. Without pooling, an embedding has one
    vector for each base, so the embedding itself grows. If a record is long, `hidden_states` can
    yield its vectors chunk by chunk, and `write_embeddings` can write them.

    Args:
        model: a Gramian model that reads tokens. It may be inside an adapter of peft.
        records: the path of a FASTA file; or a mapping from names to sequences; or a series of
            documents, or of pairs of a name and a sequence.
        tokenizer: the model's tokenizer, which has one token for each nucleotide. By default, it is
            the one in the model's folder, or that of a converted HyenaDNA, Evo or model of bytes.
        layer: number or name of a layer, as for `hidden_states`. 0 means the embeddings of tokens,
            and -1 the output of the last norm.
        pool: `"mean"` returns the mean over the bases of a record, `"last"` the vector of its last
            base, and `"none"` the vectors of all bases.
        intervals: path of a BED file, or None. If it is given, its intervals are embedded instead
            of the records, each on its strand.
        batch_size: number of records that are read together.
        chunk_size: largest number of tokens of a record that are read at once.
        progress: function that is called as `progress(done, total)` with numbers of bases, or None.

    Returns:
        An iterator over the embeddings, in the order of the records. It computes each embedding
        when it is needed.

    Raises:
        TypeError: if the model is not a Gramian model.
        OSError: if a file cannot be read.
        ValueError: if a record contains letters that are not codes of nucleotides, if there is no
            record, if a record without a sequence is to be pooled, if the tokenizer does not fit
            the model, or if `hidden_states` refuses the model or the layer.
        ImportError: if intervals of a FASTA file are requested and `pyfaidx` is not installed.
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
    """Compute in pieces what `embed` computes. The arguments are those of `embed`.

    Attributes:
        source: the records.
        dtype: dtype of the embeddings.
        width: number of values in a vector.
    """

    def __init__(
        self,
        model: GramianPreTrainedModel,
        records: Records,
        *,
        layer: Layer = -1,
        tokenizer: Any = None,
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
        tokenizer = tokenizer_of(self.model) if tokenizer is None else tokenizer
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
        """Yield the index of each record with some of its vectors, (vectors, width), in order.

        With pooling, a record has one vector. Without pooling, it has one vector for each base, in
        pieces of at most `chunk_size` vectors. A record without a sequence then has one empty
        piece.
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
        for first, last in blocks_of(self.source.lengths, self.batch_size, self.chunk_size):
            block = list(itertools.islice(numbered, last - first))
            pooled: dict[int, np.ndarray] = {}
            for batch in self._batches(block):
                rows = self._pooled([codes for _, codes in batch])
                pooled |= {index: row for (index, _), row in zip(batch, rows, strict=True)}
            for index, _ in block:
                yield index, pooled[index][None]

    def _batches(self, block: list[tuple[int, Codes]]) -> Iterator[list[tuple[int, Codes]]]:
        """Cut a block into batches of similar lengths, or of equal ones if padding is refused."""

        def kind(one: tuple[int, Codes]) -> int:
            length = len(one[1])
            return int(length > self.chunk_size) if self.taps.padded else length

        for _, group in itertools.groupby(sorted(block, key=lambda one: len(one[1])), kind):
            while batch := list(itertools.islice(group, self.batch_size)):
                yield batch

    def _pooled(self, texts: list[Codes]) -> np.ndarray:
        """Return one vector for each record, (records, width)."""
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
            wide = torch.float64 if has_float64(states.device) else torch.float32
            if mask is not None:
                hidden = torch.from_numpy(~mask).to(states.device)
                states = states.masked_fill(hidden.unsqueeze(-1), 0)
            found += states.sum(1, dtype=wide).cpu().double().numpy()
        if self.pool == "mean":
            found /= np.array([[len(text)] for text in texts])
        return found.astype(self.dtype)

    def _read(self, texts: list[Codes]) -> Iterator[tuple[torch.Tensor, np.ndarray | None]]:
        """Yield the hidden states of each chunk, (records, tokens, width), and its mask.

        The mask is (records, tokens) and true for real tokens. It is None if there is no padding.
        """
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
