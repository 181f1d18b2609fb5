"""Open the sequences to score or embed: records of files, intervals, and texts in memory.

A sequence of more than 1 MiB is kept in a temporary file, so the memory in use does not grow with
its length. Every part of the file can be read, so the other strand can be read from its own
beginning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any, Protocol

import numpy as np

from gramian.tasks import Document, Encoder, genomes, read_documents
from gramian.tasks.bed import read_bed
from gramian.tasks.documents import blocks, is_fasta
from gramian.tasks.indexed import IndexedGenome

__all__ = ["Alphabet", "Codes", "Genome", "Letters", "Records", "Reverse", "Source", "open_records"]

_IN_MEMORY = 2**20
_UNKNOWN = np.ones(256, dtype=bool)
_UNKNOWN[list(b"ACGT")] = False

Records = str | Path | Mapping[str, str] | Iterable[Document | tuple[str, str]]
"""The records that `score` and `embed` accept."""


class Letters(Protocol):
    """A sequence of codes of nucleotides that can be read anywhere."""

    def __len__(self) -> int:
        """Return the number of codes."""

    def read(self, start: int, stop: int) -> bytes:
        """Return the codes from `start` to `stop` (excluded), which lie inside the sequence."""


class Codes:
    """A sequence in memory or, if it is long, in a temporary file.

    Args:
        pieces: the codes of the sequence, as byte strings that follow each other.
    """

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._file = SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 (it stays open)
        self._length = sum(self._file.write(piece) for piece in pieces)

    def __len__(self) -> int:
        return self._length

    def __del__(self) -> None:
        self._file.close()

    def read(self, start: int, stop: int) -> bytes:
        """Return the codes from `start` to `stop` (excluded)."""
        self._file.seek(start)
        return self._file.read(stop - start)


class Reverse:
    """The other strand of a sequence, read in the direction of that strand.

    Args:
        sequence: the sequence on its first strand.
    """

    def __init__(self, sequence: Letters) -> None:
        self._sequence = sequence

    def __len__(self) -> int:
        return len(self._sequence)

    def read(self, start: int, stop: int) -> bytes:
        """Return the codes from `start` to `stop` (excluded) of the other strand."""
        length = len(self)
        return genomes.reverse_complement(self._sequence.read(length - stop, length - start))


class Alphabet:
    """The token ids of nucleotides.

    Args:
        tokenizer: a tokenizer that has one token for each code of a nucleotide.
        vocab_size: number of tokens of the model.

    Raises:
        ValueError: if a nucleotide has no token of its own, or its token id is not below
            `vocab_size`.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self.encoder = Encoder(tokenizer, special_tokens=False)
        self.tokenizer = tokenizer
        if self.encoder.letters is None:
            raise ValueError(
                f"tokenizer must have one token for each nucleotide; got "
                f"{type(tokenizer).__name__}, which has not."
            )
        largest = int(self.encoder.letters.max())
        if largest >= vocab_size:
            raise ValueError(
                f"the tokenizer has the id {largest} for a nucleotide and the model only "
                f"{vocab_size} tokens; they do not belong together."
            )

    def ids(self, codes: bytes) -> np.ndarray:
        """Return the token ids of codes, (codes,), int64."""
        if not codes:
            return np.empty(0, dtype=np.int64)
        (ids,) = self.encoder.encode_pieces([codes])
        return ids

    @property
    def begin(self) -> int:
        """Return the id of the token that begins a sequence: the BOS token, or else the EOS token.

        Raises:
            ValueError: if the tokenizer has neither.
        """
        for name in ("bos_token_id", "eos_token_id"):
            found = getattr(self.tokenizer, name, None)
            if found is not None:
                return int(found)
        raise ValueError(
            "bos needs a token that begins a sequence, and the tokenizer has neither a token of "
            "the beginning nor one of the end; leave bos out."
        )


def unknown(codes: bytes) -> np.ndarray:
    """Return which codes are not A, C, G or T, (codes,), boolean."""
    return _UNKNOWN[np.frombuffer(codes, dtype=np.uint8)]


class Genome(Protocol):
    """Sequences with names, of which any part can be fetched."""

    @property
    def lengths(self) -> Mapping[str, int]:
        """Return a mapping from the name of each sequence to its length."""

    def fetch(self, name: str, start: int, stop: int) -> str:
        """Return the codes from `start` to `stop` (excluded) of the sequence `name`."""


class _InMemory:
    def __init__(self, documents: list[Document]) -> None:
        self._texts: dict[str, str] = {}
        for document in documents:
            if document.name in self._texts:
                raise ValueError(f"several records are called {document.name!r}.")
            self._texts[document.name] = document.text

    @property
    def lengths(self) -> Mapping[str, int]:
        return {name: len(text) for name, text in self._texts.items()}

    def fetch(self, name: str, start: int, stop: int) -> str:
        return self._texts[name][start:stop]


class Source:
    """Records with their names and lengths. They can be read in order, several times.

    Args:
        names: name of each record.
        lengths: number of codes of each record.
        file: FASTA file of the records, or None.
        documents: the records themselves, if there is no file.
    """

    def __init__(
        self,
        names: list[str],
        lengths: list[int],
        file: str | None = None,
        documents: list[Document] | None = None,
    ) -> None:
        self.names, self.lengths = names, lengths
        self._file, self._documents = file, documents

    def read(self, skip: int = 0) -> Iterator[Codes]:
        """Yield the sequence of every record except the first `skip` records."""
        if self._documents is not None:
            for document in self._documents[skip:]:
                yield Codes([document.text.encode("ascii")])
            return
        assert self._file is not None
        records = genomes.records(blocks(self._file), self._file, warn=False)
        for number, (_, pieces) in enumerate(records):
            if number >= skip:
                yield Codes(pieces)

    def genome(self) -> Genome:
        """Return random access to the records.

        Raises:
            ValueError: if several records in memory have the same name.
            ImportError: if the records are in a file and `pyfaidx` is not installed.
        """
        if self._file is not None:
            return IndexedGenome(self._file)
        assert self._documents is not None
        return _InMemory(self._documents)


class _Intervals(Source):
    """Intervals of a genome, as records. Each interval is fetched when it is read."""

    def __init__(self, genome: Genome, file: str | Path) -> None:
        self._genome = genome
        self._intervals = read_bed(file, genome.lengths)
        super().__init__(
            [one.label for one in self._intervals], [one.end - one.start for one in self._intervals]
        )

    def read(self, skip: int = 0) -> Iterator[Codes]:
        for one in self._intervals[skip:]:
            codes = self._genome.fetch(one.record, one.start, one.end).encode("ascii")
            yield Codes([genomes.reverse_complement(codes) if one.strand == "-" else codes])

    def genome(self) -> Genome:
        return self._genome


def open_records(records: Records, intervals: str | Path | None = None) -> Source:
    """Open records, and check every letter of them.

    Args:
        records: the path of a file; or a mapping from names to sequences; or a series of documents,
            or of pairs of a name and a sequence.
        intervals: path of a BED file, or None. If it is given, its intervals are opened instead of
            the records.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if a letter is not the code of a nucleotide, if there is no record, or if an
            interval lies outside the records.
        ImportError: if intervals of a FASTA file are requested and `pyfaidx` is not installed.
    """
    if isinstance(records, str | Path):
        source = _of_file(str(records))
    else:
        pairs = records.items() if isinstance(records, Mapping) else records
        source = _of_documents([_document(one, index) for index, one in enumerate(pairs)])
    return source if intervals is None else _Intervals(source.genome(), intervals)


def _of_file(file: str) -> Source:
    if not is_fasta(file):
        return _of_documents([_cleaned(document) for document in read_documents(file)], file)
    names, lengths = [], []
    for name, pieces in genomes.records(blocks(file), file):
        names.append(name)
        lengths.append(sum(map(len, pieces)))
    return Source(names, lengths, file)


def _of_documents(documents: list[Document], where: str = "records") -> Source:
    if not documents:
        raise ValueError(f"{where} must hold at least one record; got none.")
    lengths = [len(document.text) for document in documents]
    return Source([document.name for document in documents], lengths, None, documents)


def _document(given: Any, index: int) -> Document:
    if isinstance(given, Document):
        return _cleaned(given)
    if isinstance(given, tuple) and len(given) == 2 and all(isinstance(x, str) for x in given):
        return _cleaned(Document(given[1], given[0]))
    raise ValueError(
        "records must be a file, sequences by name, documents, or pairs of names and sequences; "
        f"got {type(given).__name__} as record {index + 1}."
    )


def _cleaned(document: Document) -> Document:
    if document.genome:
        return document
    raw = document.text.encode("utf-8", errors="surrogateescape")
    where, odd = document.name or "a record", Counter[int]()
    codes = genomes.clean(raw, where, odd, numbers=False)
    genomes.warn_of(odd, len(codes), where)
    return Document(codes.decode("ascii"), document.name, genome=True)
