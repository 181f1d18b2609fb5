"""Read genomes in FASTA, block by block in bounded memory.

A record is a header and the lines up to the next header. A header is a line that begins with `>`,
and its first word is the record's name. The other lines are read as follows:

- Lines end in LF, CRLF or CR. Blank lines, white space and numbers that do not follow a letter are
  skipped.
- Lines that begin with `;` are comments.
- Case is ignored, so soft-masked bases are read as bases. U is read as T.
- A, C, G, T and N are nucleotides, and the other IUPAC codes (and X) are ambiguous nucleotides.
- The marks `-`, `.`, `~`, `?` and `*` are kept as unknown positions, and a warning is given.
- Any other character is an error, so that a protein is not silently read as a genome.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator

__all__ = [
    "AMBIGUOUS",
    "MARKS",
    "NUCLEOTIDES",
    "clean",
    "name_of",
    "names",
    "records",
    "reverse_complement",
    "warn_of",
]

NUCLEOTIDES = b"ACGTN"
AMBIGUOUS = b"RYSWKMBDHVX"
MARKS = b"-.~?*"

_SKIPPED = b" \t\n\v\f\r0123456789"
_COMMON = b"ACGTNUacgtnu \t\n\r"
_DIGIT = re.compile(rb"[0-9]")
_DIGIT_AFTER_LETTER = re.compile(rb"[^\s0-9][0-9]")
_AMINO_ACIDS = b"EFIJLOPQZ"  # the letters of amino acids that are not codes of nucleotides
_UPPER = bytes.maketrans(b"abcdefghijklmnopqrstuvwxyzuU", b"ABCDEFGHIJKLMNOPQRSTUVWXYZTT")
_COMPLEMENT = bytes.maketrans(b"ACGTRYKMBVDH", b"TGCAYRMKVBHD")  # S, W, N, X, marks are kept
_MARKED_LINE = re.compile(rb"\n[>;]")
_LONGEST_HEADER = 2**20
_SUSPICIOUS = 0.1  # if the share of ambiguous codes is larger, a warning asks if it is a genome


def clean(
    letters: bytes,
    where: str,
    odd: Counter[int] | None = None,
    *,
    numbers: bool = True,
    before: bytes = b"",
) -> bytes:
    """Return sequence lines as upper-case codes, with T for U, and without white space and numbers.

    Args:
        letters: bytes of any number of lines, complete or not.
        where: name of the lines in error messages.
        odd: counter to which the characters that are not in `NUCLEOTIDES` are added, or None.
        numbers: whether to skip digits that do not follow a letter. If not, they are errors.
        before: the bytes before `letters`. Only the last of them is used.

    Raises:
        ValueError: if a character is neither an IUPAC code nor one of `MARKS`, or if a digit
            follows a letter.
    """
    if letters.translate(None, _COMMON):
        if not numbers and (found := _DIGIT.search(letters)) is not None:
            raise ValueError(_refusal(found[0], where))
        if (found := _DIGIT_AFTER_LETTER.search(before[-1:] + letters)) is not None:
            raise ValueError(
                f"{where}: a digit follows a letter in {found[0].decode(errors='replace')!r}; "
                "color-space codes are not nucleotides, and only numbers apart are skipped."
            )
        codes = letters.translate(_UPPER, _SKIPPED)
        others = codes.translate(None, NUCLEOTIDES)
        strange = others.translate(None, AMBIGUOUS + MARKS)
        if strange:
            raise ValueError(_refusal(strange, where))
        if odd is not None:
            odd.update(others)
        return codes
    return letters.translate(_UPPER, _SKIPPED)


def reverse_complement(codes: bytes) -> bytes:
    """Return the other strand of upper-case codes, read in its own direction.

    A code for several nucleotides becomes the code for their complements. N, X and marks do not
    change.
    """
    return codes.translate(_COMPLEMENT)[::-1]


def records(
    blocks: Iterable[bytes], source: str, *, warn: bool = True
) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Yield the name and the sequence of each record. `clean` makes the pieces of a sequence.

    The pieces must be read in order or not at all. A record may have an empty sequence.

    Args:
        blocks: the decompressed bytes of a file, in blocks of any size.
        source: the file's name, for errors and warnings.
        warn: whether to warn at the end if there are marks or many ambiguous codes.

    Raises:
        ValueError: if the text is not FASTA, or its letters are not codes of nucleotides.
    """
    events = _events(blocks, source)
    header = next(events, None)
    if header is None:
        raise ValueError(f"{source} is empty: it holds no FASTA record.")
    if not header[0]:
        raise ValueError(_not_fasta(header[1], source))
    odd: Counter[int] = Counter()
    total = 0
    while header is not None:
        name = name_of(header[1])
        where = f"{source}, record {name!r}" if name else f"{source}, a record without a name"
        header = None

        def pieces(where: str = where) -> Iterator[bytes]:
            nonlocal header, total
            before = b""
            for event in events:
                if event[0]:
                    header = event
                    return
                codes = clean(event[1], where, odd, before=before)
                before = event[1][-1:]
                total += len(codes)
                if codes:
                    yield codes

        body = pieces()
        yield name, body
        for _ in body:  # pieces that the caller did not read
            pass
    if total == 0:
        raise ValueError(f"{source} holds no bases: none of its FASTA records has a sequence.")
    if warn:
        warn_of(odd, total, source)


def names(blocks: Iterable[bytes], source: str) -> Iterator[str]:
    """Yield the names of the records, without checking their sequences."""
    for is_header, data in _events(blocks, source):
        if is_header:
            yield name_of(data)


def name_of(header: bytes) -> str:
    """Return the first word of a header, which is the record's name, or "" if there is none.

    Args:
        header: the header without its '>'.
    """
    words = header.split(maxsplit=1)
    return words[0].decode("utf-8", errors="replace") if words else ""


def _events(blocks: Iterable[bytes], source: str) -> Iterator[tuple[bool, bytes]]:
    """Yield (True, a header without its '>') or (False, lines of sequence), in order.

    Comments are left out.
    """
    line: bytearray | None = None  # the unfinished header or comment
    fresh = True  # whether the next byte begins a line
    begun = False  # whether anything was yielded
    for block in blocks:
        block = block.replace(b"\r", b"\n")
        place = 0
        while place < len(block):
            if line is None and fresh and block[place] in b">;":
                line = bytearray()
            if line is not None:
                end = block.find(b"\n", place)
                line += block[place : len(block) if end < 0 else end]
                if len(line) > _LONGEST_HEADER:
                    raise ValueError(f"{source} is not FASTA: a header has over a million bytes.")
                if end < 0:
                    break
                if line.startswith(b">"):
                    begun = True
                    yield True, bytes(line[1:])
                line, fresh, place = None, True, end + 1
                continue
            found = _MARKED_LINE.search(block, place)
            end = len(block) if found is None else found.start() + 1
            if begun or not block[place:end].isspace():
                begun = True
                yield False, block[place:end]
            fresh, place = block[end - 1] == 10, end
    if line is not None and line.startswith(b">"):
        yield True, bytes(line[1:])


def _not_fasta(beginning: bytes, source: str) -> str:
    lines = beginning.split(maxsplit=1)
    first = beginning.strip().split(b"\n")[0][:20].decode("utf-8", errors="replace")
    if lines and lines[0].startswith(b"@"):
        return (
            f"{source} is FASTQ, not FASTA: its first record begins with '@'; give the sequences "
            "without their qualities, each record beginning with '>'."
        )
    return f"{source} is not FASTA: it begins with {first!r}, and a record must begin with '>'."


def _refusal(strange: bytes, where: str) -> str:
    found = Counter(strange.decode("utf-8", errors="replace"))
    named = ", ".join(repr(letter) for letter, _ in found.most_common(6))
    verb = "is no code" if len(found) == 1 else "are no codes"
    more = "" if len(found) <= 6 else " and others"
    if strange.translate(None, _AMINO_ACIDS) == b"":
        return (
            f"{where}: {named}{more} {verb} of nucleotides but of amino acids; a protein cannot be "
            "read as a genome."
        )
    return (
        f"{where}: {named}{more} {verb} of "
        "nucleotides; accepted are A, C, G, T, U, N, the other letters of the IUPAC, and the marks "
        f"{' '.join(MARKS.decode())}."
    )


def warn_of(odd: Counter[int], total: int, source: str) -> None:
    """Warn if there are marks or too many ambiguous codes among `total` letters."""
    marks = {chr(code): count for code, count in odd.items() if code in MARKS}
    if marks:
        named = ", ".join(f"{count:,} {mark!r}" for mark, count in sorted(marks.items()))
        warnings.warn(
            f"{source} has {named} among {total:,} letters; each keeps its place as something "
            "unknown.",
            stacklevel=3,
        )
    unknown = sum(count for code, count in odd.items() if code in AMBIGUOUS)
    if unknown > _SUSPICIOUS * total:
        warnings.warn(
            f"{source} has {unknown:,} ambiguous codes among {total:,} letters "
            f"({unknown / total:.0%}): is it a genome? They are read as something unknown.",
            stacklevel=3,
        )
