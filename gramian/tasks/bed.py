"""Read the intervals of a genome from BED files.

A line has three to six columns, separated by tabs or spaces: the record's name, the start and the
end of a half-open interval counted from 0, a name, a score and a strand (`+`, `-`, or `.` for
none). Further columns are skipped. But if a line has twelve columns, the tenth column, the number
of blocks, must be 1. Blank lines and lines that begin with `#`, `track` or `browser` are skipped.
Files may be compressed, and their lines may end in LF, CRLF or CR.
"""

from __future__ import annotations

import bisect
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gramian.tasks.documents import blocks

__all__ = ["Interval", "count_overlaps", "read_bed", "unknown_record"]


@dataclass(frozen=True)
class Interval:
    """A part of a record, on one strand.

    Attributes:
        record: name of the record.
        start: first position, counted from 0.
        end: the position after the last position.
        name: name of the interval, or "" if it has no name.
        strand: `"+"` or `"-"`.
    """

    record: str
    start: int
    end: int
    name: str = ""
    strand: str = "+"

    @property
    def label(self) -> str:
        """Return the name; if there is none, return the place as `record:start-end(strand)`."""
        return self.name or f"{self.record}:{self.start}-{self.end}({self.strand})"


def read_bed(file: str | Path, lengths: Mapping[str, int] | None = None) -> list[Interval]:
    """Read the intervals of a BED file.

    Args:
        file: the file, plain or compressed.
        lengths: a mapping from the names of the records to their lengths. The intervals must lie
            in these records. If it is None, any interval is accepted.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the file has no intervals; if a line is no interval; or if an interval's
            record is not in `lengths` or is too short. The message names the line.
    """
    text = b"".join(blocks(file)).decode("utf-8", errors="replace")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    found = []
    for number, line in enumerate(lines, 1):
        words = line.split("\t") if "\t" in line else line.split()
        if not line.strip() or line.startswith("#") or words[0].split()[0] in ("track", "browser"):
            continue
        try:
            interval = _interval([word.strip() for word in words])
            if lengths is not None:
                _require_inside(interval, lengths)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from None
        found.append(interval)
    if not found:
        raise ValueError(f"{file} has no intervals.")
    return found


def _interval(words: list[str]) -> Interval:
    if len(words) < 3:
        raise ValueError(f"an interval has at least three columns; got {len(words)}.")
    if len(words) == 12 and words[9] != "1":
        raise ValueError(f"an interval must be one block; got {words[9]} blocks.")
    if not (words[1].isascii() and words[1].isdecimal()):
        raise ValueError(f"the start must be an integer of at least 0; got {words[1]!r}.")
    if not (words[2].isascii() and words[2].isdecimal()):
        raise ValueError(f"the end must be an integer of at least 1; got {words[2]!r}.")
    start, end = int(words[1]), int(words[2])
    if end <= start:
        raise ValueError(f"the end must lie after the start, {start}; got {end}.")
    strand = words[5] if len(words) > 5 else "+"
    if strand not in ("+", "-", "."):
        raise ValueError(f"the strand must be +, - or .; got {strand!r}.")
    name = words[3] if len(words) > 3 and words[3] != "." else ""
    return Interval(words[0], start, end, name, "-" if strand == "-" else "+")


def _require_inside(interval: Interval, lengths: Mapping[str, int]) -> None:
    if interval.record not in lengths:
        raise ValueError(unknown_record(interval.record, lengths))
    if interval.end > lengths[interval.record]:
        raise ValueError(
            f"the interval ends at {interval.end:,}, and {interval.record} has "
            f"{lengths[interval.record]:,} bases."
        )


def count_overlaps(places: list[Interval], others: list[Interval], margin: int = 0) -> int:
    """Return how many of the intervals `places` share a base with an interval of `others`.

    Args:
        places: the intervals to count.
        others: the other intervals.
        margin: number of bases by which the intervals `places` are widened at both ends.
    """
    starts: dict[str, list[int]] = {}
    ends: dict[str, list[int]] = {}
    for one in others:
        starts.setdefault(one.record, []).append(one.start)
        ends.setdefault(one.record, []).append(one.end)
    for positions in (*starts.values(), *ends.values()):
        positions.sort()
    count = 0
    for one in places:
        if one.record in starts:
            begun = bisect.bisect_left(starts[one.record], one.end + margin)
            over = bisect.bisect_right(ends[one.record], one.start - margin)
            count += begun > over
    return count


def unknown_record(name: str, lengths: Mapping[str, int]) -> str:
    """Return a message that no record is called `name`.

    The message suggests the nearest name, and lists all names if there are at most 20.
    """
    other = name.removeprefix("chr") if name.startswith("chr") else f"chr{name}"
    close = [other] if other in lengths else difflib.get_close_matches(name, lengths, 1, 0.5)
    meant = f" Did you mean {close[0]!r}?" if close else ""
    named = ", ".join(lengths) if len(lengths) <= 20 else f"{len(lengths):,} records"
    return f"unknown record {name!r}.{meant} The genome has {named}."
