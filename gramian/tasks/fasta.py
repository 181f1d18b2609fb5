"""Define the task of predicting the next nucleotide in the records of FASTA files.

Each record is cut into windows separately, so no row spans two records.
"""

from __future__ import annotations

import difflib
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from gramian.tasks import genomes
from gramian.tasks._task import (
    SPLITS,
    Row,
    register,
    require_files,
    require_patterns,
    require_sizes,
)
from gramian.tasks.augmentation import Nucleotides
from gramian.tasks.bed import Interval, count_overlaps, read_bed
from gramian.tasks.documents import blocks
from gramian.tasks.encoding import Encoder
from gramian.tasks.indexed import IndexedGenome
from gramian.tasks.tokenized import TokenizedTask, dna_tokenizer, windows

__all__ = ["Fasta"]


@register("fasta")
@dataclass(frozen=True, kw_only=True)
class Fasta(TokenizedTask):
    """Next-nucleotide prediction on FASTA files, plain or compressed.

    `gramian.tasks.genomes` defines how FASTA is read. Token ids come from the model's own tokenizer
    if it is known. Otherwise they come from HyenaDNA's tokenizer, which maps everything but A, C,
    G, T and N to `[UNK]`. A record of a single base gives no row, because there is nothing to
    predict. The seed determines the augmentation and nothing else. Rows of different splits share
    no base of a record, unless intervals of two splits overlap or two splits have the same files.
    If one of these splits is the training split, a warning is given.

    Args:
        train: path or pattern of the training split's files, or a list of paths and patterns.
        validation: the same for the validation split, unless records, intervals or a share are
            given for this split.
        test: the same for the test split, unless records or intervals are given for this split.
        validation_records: name of a record in the files of `train` that belongs to the validation
            split instead, or a list of names. The name of a record is the first word of its header.
        test_records: the same for the test split.
        intervals: a BED file with intervals of the training files' records. The rows are then
            windows of these intervals, on the strands of the intervals (`gramian.tasks.read_bed`).
            Intervals need pyfaidx.
        validation_intervals: a BED file with intervals for the validation split. They are intervals
            of the files of `validation`, or of the files of `train` if `validation` is not given.
        test_intervals: the same for the test split.
        validation_share: share of `train` that belongs to the validation split instead, above 0 and
            below 1.
        validation_by: how the validation split gets its share. `"records"` gives it this share of
            the records, evenly spread over the files. `"positions"` gives it this share of every
            record, at the end of the record.
        reverse_complement: whether to read each training row from the other strand with probability
            1/2. The seed and the row's number determine the strand.
        shift: largest number of bases by which a training row is moved to either side. The seed and
            the row's number determine how far it is moved. A row stays within the part of its
            record that belongs to training, but may leave its interval. Shifts need pyfaidx.
        replace_n: whether the tokenizer's token for padding replaces letters other than A, C, G and
            T in the inputs. These letters are then not scored as labels, as in HyenaDNA's training.
            Rows without a label are left out.
        length: number of nucleotides in a row.
        tokenizer: a tokenizer of transformers, its folder or its name; by default the model's
            tokenizer if it is known, otherwise HyenaDNA's.

    Raises:
        ValueError: if the settings contradict each other. When the files are read: if no record has
            one of the names, if `gramian.tasks.read_bed` refuses the intervals, or if
            `gramian.tasks.genomes.records` refuses a file.
        FileNotFoundError: when the files are read, if a path or pattern matches no file.
        ImportError: if intervals or a shift are given and `pyfaidx` is not installed.
    """

    train: str | list[str] | None = None
    validation: str | list[str] | None = None
    test: str | list[str] | None = None
    validation_records: str | list[str] | None = None
    test_records: str | list[str] | None = None
    intervals: str | None = None
    validation_intervals: str | None = None
    test_intervals: str | None = None
    validation_share: float | None = None
    validation_by: str = "records"
    reverse_complement: bool = False
    shift: int = 0
    replace_n: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_patterns(self)
        require_sizes(self, "shift", least=0)
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
        self._check_intervals()
        self._check_share()

    def _check_intervals(self) -> None:
        given = [split for split in SPLITS if self._bed(split) is not None]
        for split in given:
            name = _interval_setting(split)
            if not isinstance(self._bed(split), str | os.PathLike):
                raise ValueError(
                    f"{name} must be the path of a BED file; got {self._bed(split)!r}."
                )
            if getattr(self, split) is None and self.train is None:
                raise ValueError(f"{name} are intervals of files; give {split} or train too.")
            if split != "train" and self._held_out(split):
                raise ValueError(f"give {split}_records or {name}, not both.")
        if self.intervals is not None and (
            self.validation_records or self.test_records or self.validation_share is not None
        ):
            raise ValueError(
                "intervals are the whole of the training split; give validation_intervals and "
                "test_intervals in place of records and a share."
            )

    def _check_share(self) -> None:
        if self.validation_by not in ("records", "positions"):
            raise ValueError(
                f"validation_by must be 'records' or 'positions'; got {self.validation_by!r}."
            )
        if self.validation_share is None:
            return
        if not isinstance(self.validation_share, int | float) or not 0 < self.validation_share < 1:
            raise ValueError(
                f"validation_share must lie between 0 and 1; got {self.validation_share!r}."
            )
        for name in ("validation", "validation_records", "validation_intervals"):
            if getattr(self, name) is not None:
                raise ValueError(f"give validation_share or {name}, not both.")
        if self.train is None:
            raise ValueError("validation_share is a share of train; give train too.")

    def default_tokenizer(self) -> Any:
        return dna_tokenizer()

    def rows(self, split: str, seed: int) -> Iterator[Row]:
        encoder = Encoder(self.own_tokenizer(), special_tokens=False)
        changed = split == "train" and (self.reverse_complement or self.shift > 0)
        nucleotides = None
        if changed or self.replace_n or self._bed(split) is not None:
            nucleotides = Nucleotides(encoder)
        if self._bed(split) is not None or (split == "train" and self.shift):
            found = self._rows_of_places(encoder, split, seed)
        else:
            records = (encoder.encode_pieces(pieces) for pieces in self._records(split))
            found = windows(records, self.length, "document", None)
        if nucleotides is None:
            yield from found
            return
        turned = split == "train" and self.reverse_complement
        complement = nucleotides.complement() if turned else None
        for number, row in enumerate(found):
            if complement is not None and self._draws(seed, number).random() < 0.5:
                window = complement[np.append(row["input_ids"], row["labels"][-1:])][::-1]
                row = {"input_ids": window[:-1], "labels": window[1:]}
            kept = nucleotides.hide_unknown(row) if self.replace_n else row
            if kept is not None:
                yield kept

    def _draws(self, seed: int, number: int) -> np.random.Generator:
        """Return the generator of a training row, which draws its strand and then its shift."""
        return np.random.default_rng([seed, number])

    def _rows_of_places(self, encoder: Encoder, split: str, seed: int) -> Iterator[Row]:
        """Yield the rows of intervals, or of records if rows are shifted."""
        files = self._files(split)
        genome = _Genome(files)
        if self._bed(split) is not None:
            places = read_bed(self._bed(split), genome.lengths)  # type: ignore[arg-type]
            if split == "train":
                self._warn_of_overlaps(places, genome.lengths)
            bounds = [(0, genome.lengths[one.record]) for one in places]
        else:
            parts = self._parts(split, files, list(genome.lengths), [*genome.lengths.values()])
            places = [Interval(name, *part) for name, part in parts if part[1] > part[0]]
            bounds = [(one.start, one.end) for one in places]
        number = 0
        for place, bound in zip(places, bounds, strict=True):
            size = place.end - place.start
            for first in range(0, size - 1, self.length):
                last = min(first + self.length + 1, size)
                if place.strand == "-":
                    start, end = place.end - last, place.end - first
                else:
                    start, end = place.start + first, place.start + last
                if split == "train" and self.shift:
                    draws = self._draws(seed, number)
                    draws.random()  # the number that determines the strand
                    moved = start + int(draws.integers(-self.shift, self.shift + 1))
                    moved = max(bound[0], min(moved, bound[1] - (end - start)))
                    start, end = moved, moved + end - start
                codes = genome.fetch(place.record, start, end).encode("ascii")
                if place.strand == "-":
                    codes = genomes.reverse_complement(codes)
                (ids,) = encoder.encode_pieces([codes])
                yield {"input_ids": ids[:-1], "labels": ids[1:]}
                number += 1

    def _bed(self, split: str) -> str | None:
        found: str | None = getattr(self, _interval_setting(split))
        return found

    def _warn_of_overlaps(self, places: list[Interval], lengths: Mapping[str, int]) -> None:
        """Warn if training rows may contain bases of held-out intervals."""
        for split in SPLITS[1:]:
            held_out = self._bed(split)
            if held_out is None or getattr(self, split) is not None:
                continue
            count = count_overlaps(places, read_bed(held_out, lengths), self.shift)
            if count:
                warnings.warn(
                    f"{count} of the training intervals share bases with {split}_intervals"
                    f"{' once they are shifted' if self.shift else ''}: what is measured on them "
                    "was seen.",
                    stacklevel=4,
                )

    def _held_out(self, split: str) -> set[str]:
        names = getattr(self, f"{split}_records")
        if names is None:
            return set()
        if not isinstance(names, list | tuple):
            names = [names]
        if any(not isinstance(name, str | int) or isinstance(name, bool) for name in names):
            raise ValueError(f"{split}_records must be names of records; got {names!r}.")
        return {str(name) for name in names}

    def _files(self, split: str) -> list[str]:
        """Return the files from which the rows of a split come."""
        own = getattr(self, split) is not None
        from_train = split != "train" and not own and self._divides(split)
        if split != "train" and not own and not from_train:
            more = " or validation_share" if split == "validation" else ""
            raise ValueError(
                f"the task fasta has no {split} files; give {split} or {split}_records{more}."
            )
        return require_files(self, "fasta", "train" if from_train else split)

    def _divides(self, split: str) -> bool:
        """Return whether a held-out split is a part of the files of `train`."""
        shared = split == "validation" and self.validation_share is not None
        return bool(self._held_out(split)) or shared or self._bed(split) is not None

    def _parts(
        self, split: str, files: list[str], names: list[str], lengths: list[int]
    ) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yield for each record its name and the bounds of the part that belongs to a split.

        If no part of a record belongs to the split, both bounds are 0.
        """
        named = self._held_out("validation") | self._held_out("test")
        divided = split == "train" or (self._divides(split) and getattr(self, split) is None)
        if divided:
            _require_records(named, files)
        share = self.validation_share if divided and split != "test" else None
        kept = self._held_out(split) if split != "train" else set()
        free = [name not in named for name in names]
        total = sum(free)
        chosen = 0 if share is None else max(1, round(share * total))
        if share is not None and self.validation_by == "records" and chosen >= total:
            raise ValueError(
                f"validation_share cannot divide {total} record{'s' if total != 1 else ''}; "
                "validation_by 'positions' divides every record."
            )
        place = 0
        for name, length in zip(names, lengths, strict=True):
            bounds = (0, length)
            if kept:
                bounds = bounds if name in kept else (0, 0)
            elif divided and name in named:
                bounds = (0, 0)
            elif share is not None and self.validation_by == "positions":
                cut = length - round(share * length)
                bounds = (0, cut) if split == "train" else (cut, length)
            elif share is not None:
                held_out = (place + 1) * chosen // total > place * chosen // total
                place += 1
                bounds = bounds if held_out == (split == "validation") else (0, 0)
            yield name, bounds

    def _records(self, split: str) -> Iterator[Iterator[bytes]]:
        files = self._files(split)
        parts = None
        if self._divides("validation") or self._divides("test"):
            names = [name for file in files for name in _names_in(file)]
            lengths = [sys.maxsize] * len(names)
            if self.validation_share is not None and self.validation_by == "positions":
                lengths = [length for file in files for length in _lengths_in(file)]
            parts = (bounds for _, bounds in self._parts(split, files, names, lengths))
        for file in files:
            for _, pieces in genomes.records(blocks(file), file):
                if parts is None:
                    yield pieces
                    continue
                start, end = next(parts)
                if end > start:
                    yield _cut(pieces, start, end)


class _Genome:
    """Random access to the records of several files."""

    def __init__(self, files: list[str]) -> None:
        self.lengths: dict[str, int] = {}
        self._owners: dict[str, IndexedGenome] = {}
        for file in files:
            genome = IndexedGenome(file)
            for name, length in genome.lengths.items():
                if name in self._owners:
                    raise ValueError(f"several files have a record called {name!r}.")
                self._owners[name], self.lengths[name] = genome, length

    def fetch(self, name: str, start: int, stop: int) -> str:
        """Return the codes of a record from position `start` to position `stop` - 1."""
        return self._owners[name].fetch(name, start, stop)


def _interval_setting(split: str) -> str:
    return "intervals" if split == "train" else f"{split}_intervals"


def _cut(pieces: Iterator[bytes], start: int, end: int) -> Iterator[bytes]:
    """Yield the codes from position `start` to position `end` - 1 of a sequence, in pieces."""
    place = 0
    for piece in pieces:
        kept = piece[max(0, start - place) : max(0, end - place)]
        place += len(piece)
        if kept:
            yield kept


def _require_records(wanted: set[str], files: list[str]) -> None:
    """Check that a record exists for every name, and warn if several records share a name.

    Raises:
        ValueError: if no record has one of the names.
    """
    if not wanted:
        return
    there: Counter[str] = Counter()
    for file in files:
        there.update(_names_in(file))
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


def _names_in(file: str) -> list[str]:
    """Return the names of the records of a file, in order."""
    status = os.stat(file)
    return _names(file, status.st_size, status.st_mtime_ns)


def _lengths_in(file: str) -> list[int]:
    """Return the lengths of the records of a file, in order."""
    status = os.stat(file)
    return _lengths(file, status.st_size, status.st_mtime_ns)


# The arguments `size` and `changed` distinguish versions of a file in the caches.
@lru_cache(maxsize=64)
def _names(file: str, size: int, changed: int) -> list[str]:
    return list(genomes.names(blocks(file), file))


@lru_cache(maxsize=64)
def _lengths(file: str, size: int, changed: int) -> list[int]:
    records = genomes.records(blocks(file), file, warn=False)
    return [sum(map(len, pieces)) for _, pieces in records]
