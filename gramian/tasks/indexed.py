"""Provide random access to the records of a FASTA file, through pyfaidx.

pyfaidx reads files in which all lines of a record have one length. It finds the records by an
index, which has a name and four numbers for each record. This module makes the index. Some features
of a file are not read by pyfaidx, or not in the way of `gramian.tasks.genomes`. They are
compression, a byte order mark, lines that end in CR, lines of different lengths, blank lines,
comments, white space, and numbers inside of lines. If a file has such a feature, its records are
written once, as `genomes.records` reads them, into a temporary folder. An index beside the file
(`.fai`, as samtools writes it) is used if it is not older than the file and its positions are
right. In every case, the letters are the same as those of `genomes.records`.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gramian.tasks import genomes
from gramian.tasks.bed import unknown_record
from gramian.tasks.documents import blocks, is_compressed

__all__ = ["IndexedGenome"]

_PLAIN = genomes.NUCLEOTIDES + genomes.AMBIGUOUS + genomes.MARKS + b"U"
_PLAIN += _PLAIN.lower()
_WIDTH = 2**16


class _Entry(NamedTuple):
    """A line of an index.

    `length` is the number of bases of the record, and `offset` is the byte at which they begin. A
    full line has `bases` bases and `width` bytes.
    """

    name: str
    length: int
    offset: int
    bases: int
    width: int


class IndexedGenome:
    """Random access to the records of a FASTA file by their names.

    Args:
        file: the file, plain or compressed.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if `genomes.records` refuses the file.
        ImportError: if `pyfaidx` is not installed.
    """

    def __init__(self, file: str | Path) -> None:
        try:
            import pyfaidx
        except ImportError as error:
            raise ImportError(
                'intervals and variants of FASTA files need pyfaidx: pip install "gramian'
                '[genomics]".',
                name="pyfaidx",
            ) from error
        self._file = str(file)
        folder = tempfile.mkdtemp(prefix="gramian-")
        self._remove = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        index = Path(folder, "genome.fai")
        entries = _regular(self._file)
        read_from = self._file
        if entries is None:
            read_from = str(Path(folder, "genome.fa"))
            entries = list(_copied(self._file, Path(read_from)))
        counts = Counter(entry.name for entry in entries)
        self._several = {name for name, count in counts.items() if count > 1}
        self._numbers = {entry.name: str(n) for n, entry in enumerate(entries)}
        self._lengths = {entry.name: entry.length for entry in entries}
        lines = ("\t".join(map(str, (n, *entry[1:]))) for n, entry in enumerate(entries))
        index.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        self._reader: Any = pyfaidx.Faidx(
            read_from, indexname=str(index), as_raw=True, rebuild=False, build_index=False
        )

    @property
    def lengths(self) -> Mapping[str, int]:
        """Return a mapping from the names of the records to their lengths.

        If several records have the same name, the mapping has the length of the last of them.
        """
        return self._lengths

    def fetch(self, name: str, start: int, stop: int) -> str:
        """Return upper-case codes of a record, as `genomes.records` yields them.

        Args:
            name: name of the record.
            start: first position, counted from 0.
            stop: the position after the last position.

        Raises:
            ValueError: if no record or several records have the name; if the positions are not in
                the record; or if the file has changed.
        """
        if name not in self._lengths:
            raise ValueError(unknown_record(name, self._lengths))
        if name in self._several:
            raise ValueError(f"{self._file} has several records called {name!r}.")
        if not 0 <= start <= stop <= self._lengths[name]:
            raise ValueError(
                f"start and stop must lie in order from 0 to {self._lengths[name]}; got {start} "
                f"and {stop}."
            )
        if start == stop:
            return ""
        letters = self._reader.fetch(self._numbers[name], start + 1, stop)
        codes = genomes.clean(letters.encode("utf-8"), f"{self._file}, record {name!r}")
        if len(codes) != stop - start:
            raise ValueError(
                f"{self._file} has changed, or the index beside it is not its own; remove the "
                "index."
            )
        return codes.decode("ascii")

    def close(self) -> None:
        """Close the file and remove the temporary folder.

        This happens by itself when the object is no longer used.
        """
        self._reader.close()
        self._remove()

    def __enter__(self) -> IndexedGenome:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _copied(file: str, target: Path) -> Iterator[_Entry]:
    """Write the records of a file to `target` with lines of one length, and yield their entries."""
    with target.open("wb") as out:
        for name, pieces in genomes.records(blocks(file), file, warn=False):
            out.write(b">\n")
            offset, length, rest = out.tell(), 0, b""
            for piece in pieces:
                length += len(piece)
                rest += piece
                whole = len(rest) // _WIDTH * _WIDTH
                for place in range(0, whole, _WIDTH):
                    out.write(rest[place : place + _WIDTH] + b"\n")
                rest = rest[whole:]
            out.write(rest + b"\n" if rest else b"")
            yield _Entry(name, length, offset, _WIDTH, _WIDTH + 1)


def _regular(file: str) -> list[_Entry] | None:
    """Return the entries of a file if pyfaidx reads it as `genomes.records` does, else None."""
    if is_compressed(file):
        return None
    beside = Path(f"{file}.fai")
    if beside.is_file() and beside.stat().st_mtime_ns >= Path(file).stat().st_mtime_ns:
        found = _read_index(beside)
        if found and _fits(found, file):
            return found
    return _scanned(file)


def _scanned(file: str) -> list[_Entry] | None:
    entries: list[_Entry] = []
    name, offset, place = "", 0, 0
    length = bases = width = 0
    ended = True  # whether the record may have no further lines
    begun = False
    with open(file, "rb") as stream:
        for line in stream:
            place += len(line)
            if line.startswith(b">"):
                if b"\r" in line.removesuffix(b"\r\n"):
                    return None
                if begun:
                    entries.append(_Entry(name, length, offset, bases or 1, width or 2))
                name, offset, begun = genomes.name_of(line[1:]), place, True
                length = bases = width = 0
                ended = False
                continue
            letters = line.removesuffix(b"\n").removesuffix(b"\r")
            if begun and not letters:  # a record may end with blank lines
                ended = True
                continue
            if not begun or ended or letters.translate(None, _PLAIN):
                return None
            if not bases:
                bases, width = len(letters), len(line)
            elif len(letters) > bases or (len(letters) == bases and len(line) > width):
                return None
            if len(letters) < bases or len(line) < width:
                ended = True
            length += len(letters)
    if not begun or not sum(entry.length for entry in entries) + length:
        return None  # `genomes.records` refuses the file and gives the reason
    entries.append(_Entry(name, length, offset, bases or 1, width or 2))
    return entries


def _read_index(file: Path) -> list[_Entry] | None:
    entries = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        words = line.split("\t")
        if len(words) != 5 or not all(word.isdecimal() for word in words[1:]):
            return None
        length, offset, bases, width = map(int, words[1:])
        if length and (bases < 1 or width - bases not in (1, 2)):
            return None
        entries.append(_Entry(words[0], length, offset, bases or 1, width or 2))
    return entries


def _fits(entries: list[_Entry], file: str) -> bool:
    """Return whether the index is right about the header and the end of every record of the file.

    The file must not have further records.
    """
    with open(file, "rb") as stream:
        place = 0
        for entry in entries:
            stream.seek(place)
            header = stream.readline(2**20)
            if not header.startswith(b">") or stream.tell() != entry.offset:
                return False
            if genomes.name_of(header[1:]) != entry.name:
                return False
            lines, rest = divmod(entry.length, entry.bases)
            stream.seek(entry.offset + lines * entry.width)
            tail = stream.readline(entry.width + 2) if rest else b""
            if rest and len(tail.rstrip(b"\r\n")) != rest:
                return False
            place = stream.tell()
        stream.seek(place)
        return not stream.read(1)
