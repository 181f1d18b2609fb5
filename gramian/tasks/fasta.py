"""Genomes from FASTA files, as HyenaDNA reads them: one token per nucleotide.

Each record is cut into its own windows, so no row spans two records.
"""

from __future__ import annotations

import difflib
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from gramian.tasks import genomes
from gramian.tasks._task import (
    SPLITS,
    Row,
    register,
    require_files,
    require_patterns,
)
from gramian.tasks.documents import blocks
from gramian.tasks.encoding import Encoder
from gramian.tasks.tokenized import TokenizedTask, dna_tokenizer, windows

__all__ = ["Fasta"]


@register("fasta")
@dataclass(frozen=True, kw_only=True)
class Fasta(TokenizedTask):
    """Next-nucleotide prediction on FASTA files, plain or compressed.

    `gramian.tasks.genomes` defines how FASTA is read. Token ids are those of the model's own
    tokenizer if it is known, otherwise HyenaDNA's, which maps everything but A, C, G, T and N to
    `[UNK]`. A record of a single base gives no row, because there is nothing to predict. The seed
    has no effect.

    Args:
        train: path or pattern of the training split's files, or a list of them.
        validation: the same for the validation split, unless `validation_records` is given.
        test: the same for the test split, unless `test_records` is given.
        validation_records: name of a record in the files of `train` that belongs to the validation
            split instead, or a list of names. A name is the first word of a record's header.
        test_records: the same for the test split.
        length: number of nucleotides in a row.
        tokenizer: a tokenizer of transformers, its folder or its name; by default that of the model
            if it is known, otherwise HyenaDNA's.

    Raises:
        ValueError: when files are read, if no record has one of the names, or if
            `gramian.tasks.genomes.records` refuses a file.
        FileNotFoundError: when files are read, if a path or pattern matches none.
    """

    train: str | list[str] | None = None
    validation: str | list[str] | None = None
    test: str | list[str] | None = None
    validation_records: str | list[str] | None = None
    test_records: str | list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_patterns(self)
        if all(getattr(self, split) is None for split in SPLITS):
            raise ValueError("the task fasta needs files: give train, validation or test.")
        for split in SPLITS[1:]:
            names = self._held_out(split)
            if names and getattr(self, split):
                raise ValueError(f"give {split} or {split}_records, not both.")
            if names and self.train is None:
                raise ValueError(f"{split}_records are records of train; give train too.")
        both = self._held_out("validation") & self._held_out("test")
        if both:
            raise ValueError(
                f"the record {min(both)!r} is named in validation_records and test_records; it can "
                "be in one of them."
            )

    def default_tokenizer(self) -> Any:
        return dna_tokenizer()

    def rows(self, split: str, seed: int) -> Iterator[Row]:
        encoder = Encoder(self.own_tokenizer(), special_tokens=False)
        records = (encoder.encode_pieces(pieces) for pieces in self._records(split))
        return windows(records, self.length, "document", None)

    def _held_out(self, split: str) -> set[str]:
        names = getattr(self, f"{split}_records")
        if names is None:
            return set()
        if not isinstance(names, list | tuple):
            names = [names]
        if any(not isinstance(name, str | int) or isinstance(name, bool) for name in names):
            raise ValueError(f"{split}_records must be names of records; got {names!r}.")
        return {str(name) for name in names}

    def _records(self, split: str) -> Iterator[Iterator[bytes]]:
        kept = self._held_out(split) if split != "train" else set()
        if split != "train" and not kept and getattr(self, split) is None:
            raise ValueError(
                f"the task fasta has no {split} files; give {split} or {split}_records."
            )
        files = require_files(self, "fasta", "train" if kept else split)
        left_out = set()
        if split == "train" or kept:
            left_out = self._held_out("validation") | self._held_out("test")
            _require_records(left_out, files)
        for file in files:
            for name, pieces in genomes.records(blocks(file), file):
                if name in kept if kept else name not in left_out:
                    yield pieces


def _require_records(wanted: set[str], files: list[str]) -> None:
    """Check that a record exists for every name, and warn of names that several records share."""
    if not wanted:
        return
    there: Counter[str] = Counter()
    for file in files:
        status = os.stat(file)
        there += _names(file, status.st_size, status.st_mtime_ns)
    missing = sorted(wanted - there.keys())
    if missing:
        close = difflib.get_close_matches(missing[0], sorted(there), n=3, cutoff=0.5)
        meant = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        some = ", ".join(map(repr, list(there)[:5])) + (", …" if len(there) > 5 else "")
        raise ValueError(
            f"no record of the training files is called {missing[0]!r}.{meant} There are "
            f"{len(there):,} names: {some}."
        )
    several = {name: there[name] for name in sorted(wanted) if there[name] > 1}
    for name, count in several.items():
        warnings.warn(
            f"{count} records of the training files are called {name!r}; all of them are held out.",
            stacklevel=3,
        )


@lru_cache(maxsize=64)
def _names(file: str, size: int, changed: int) -> Counter[str]:
    """Count the records of each name; `size` and `changed` distinguish versions in the cache."""
    return Counter(genomes.names(blocks(file), file))
