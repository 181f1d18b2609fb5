"""Random access to the records of a FASTA file, through pyfaidx.

pyfaidx reads files whose records have lines of one length, from an index of five numbers a record.
Here the index is made, and the file is checked for what pyfaidx reads otherwise than
`gramian.tasks.genomes` or not at all: compression, a byte order mark, lines that end in CR, lines
of different lengths, blank lines, comments, white space and numbers inside of lines. Such a file is
written out once, by `genomes.records`, into a temporary folder. An index that stands beside the
file (`.fai`, as samtools writes it) is used if it is not older than the file and its places are
right. Either way the letters are those that `genomes.records` gives.
"""

from __future__ import annotations

import tempfile
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
    """A line of an index: all of it but the name in numbers of bytes and bases."""

    name: str
    length: int
    offset: int
    bases: int
    width: int


class IndexedGenome:
    """Records of a FASTA file, found by name.

    Args:
        file: the file, plain or compressed.

    Raises:
        OSError: if it cannot be read.
        ValueError: if `genomes.records` refuses it.
        ImportError: without `pyfaidx`.
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
        self._folder = tempfile.TemporaryDirectory(prefix="gramian-")
        index = Path(self._folder.name, "genome.fai")
        entries = _regular(self._file)
        read_from = self._file
        if entries is None:
            read_from = str(Path(self._folder.name, "genome.fa"))
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
        """Return the length of each record by its name; of several with one name, the last's."""
        return self._lengths

    def fetch(self, name: str, start: int, stop: int) -> str:
        """Return upper-case codes, as `genomes.records` gives them.

        Args:
            name: name of the record.
            start: first position, from 0.
            stop: position after the last one.

        Raises:
            ValueError: if there is no record of that name or several, or positions outside of it.
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
        """Close the file and remove what was written."""
        self._reader.close()
        self._folder.cleanup()

    def __enter__(self) -> IndexedGenome:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _copied(file: str, target: Path) -> Iterator[_Entry]:
    """Write the records with lines of one length, and yield their entries."""
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
    """Return the entries of a file that pyfaidx reads as we do, or None for any other file."""
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
    ended = True  # whether the record's lines must have ended
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
            if begun and not letters:  # blank lines may stand at the end of a record
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
        return None  # which the reader refuses with a reason
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
    """Return whether each entry's header and end are where the index says, and no record more."""
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
