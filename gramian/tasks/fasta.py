"""Genomes from FASTA files, as HyenaDNA reads them: one nucleotide, one token.

No row holds two records: each is cut into windows of its own.
"""

from __future__ import annotations

import glob
import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gramian.tasks._task import SPLITS, Description, Row, Task, register, require_sizes
from gramian.tasks.text import windows

__all__ = ["Fasta"]

PAD, UNKNOWN = 4, 6
NUCLEOTIDES = "ACGTN"  # ids 7 … 11; 0 … 6 are HyenaDNA's special tokens
VOCABULARY = 12
_IDS = np.full(256, UNKNOWN, dtype=np.int64)
for _id, _letter in enumerate(NUCLEOTIDES, 7):
    _IDS[[ord(_letter), ord(_letter.lower())]] = _id


@register("fasta")
@dataclass(frozen=True, kw_only=True)
class Fasta(Task):
    """Next-nucleotide prediction on FASTA files, plain or gzipped, with HyenaDNA's token ids.

    Case is ignored. The seed changes nothing.

    Args:
        train: paths or patterns of the training split's files, one or a list.
        validation: likewise; or leave it out and name records.
        test: likewise.
        validation_records: names of the records of `train`'s files that are validation instead.
        test_records: likewise.
        length: nucleotides of a row.
    """

    train: str | list[str]
    validation: str | list[str] | None = None
    test: str | list[str] | None = None
    validation_records: list[str] | None = None
    test_records: list[str] | None = None
    length: int = 1024

    def __post_init__(self) -> None:
        require_sizes(self, "length")
        for split in SPLITS[1:]:
            if getattr(self, split) and getattr(self, f"{split}_records"):
                raise ValueError(f"give {split} or {split}_records, not both.")

    def description(self) -> Description:
        return Description("tokens", self.length, vocab_size=VOCABULARY, pad_token_id=PAD)

    def rows(self, split: str, seed: int) -> Iterator[Row]:
        records = (record for _, record in self._records(split))
        yield from windows(records, self.length, "document", None)

    def _records(self, split: str) -> Iterator[tuple[str, Iterator[np.ndarray]]]:
        held_out = {other: set(getattr(self, f"{other}_records") or ()) for other in SPLITS[1:]}
        if split == "train":
            files, keep = self.train, None
        elif held_out[split]:
            files, keep = self.train, held_out[split]
        else:
            files, keep = getattr(self, split), None
        if files is None:
            raise ValueError(
                f"the task fasta has no {split} files; give {split} or {split}_records."
            )
        left_out = held_out["validation"] | held_out["test"] if split == "train" else set()
        for name, lines in _read(files):
            if name not in left_out and (keep is None or name in keep):
                yield name, lines


def _read(files: str | list[str]) -> Iterator[tuple[str, Iterator[np.ndarray]]]:
    """Name of each record and its lines as token ids; the lines must be read in turn or not."""
    for pattern in [files] if isinstance(files, str) else files:
        found = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))
        if not found:
            raise FileNotFoundError(f"no file matches {pattern}.")
        for file in found:
            if file.endswith(".gz"):
                with gzip.open(file) as lines:
                    yield from _split(lines, file)
            else:
                with open(file, "rb") as lines:
                    yield from _split(lines, file)


def _split(
    lines: BinaryIO | gzip.GzipFile, file: str
) -> Iterator[tuple[str, Iterator[np.ndarray]]]:
    header = lines.readline()
    while header:
        if not header.startswith(b">"):
            raise ValueError(f"{file} is not FASTA: a record must begin with '>'.")
        following: list[bytes] = []

        def record(following: list[bytes] = following) -> Iterator[np.ndarray]:
            for line in lines:
                if line.startswith(b">"):
                    following.append(line)
                    return
                yield _IDS[np.frombuffer(line.strip(), dtype=np.uint8)]

        body = record()
        words = header[1:].split()
        yield (words[0].decode() if words else ""), body
        for _ in body:  # what the reader left
            pass
        header = following[0] if following else b""
