"""Read variants from VCF and TSV files, check them against the genome, and cut their windows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from gramian.genomics._sequences import Codes, Genome
from gramian.tasks import genomes
from gramian.tasks.bed import unknown_record
from gramian.tasks.documents import blocks

__all__ = ["Variant", "Window", "check_variants", "read_variants", "window_around"]

_COLUMNS = ("chrom", "pos", "ref", "alt")
_ALLELE = re.compile(r"[ACGTUNRYSWKMBDHVX]+", re.IGNORECASE)


@dataclass(frozen=True)
class Variant:
    """A change of a genome: some of its bases, and the bases that replace them.

    Attributes:
        chrom: name of the record.
        pos: position of the first base of `ref`, counted from 1 as in VCF.
        ref: bases of the genome, at least one.
        alt: bases that replace `ref`, at least one. For an insertion or a deletion, `ref` and `alt`
            both contain a base beside the change, as in VCF.
        id: name of the variant; "" if it has none.
        where: origin of the variant for error messages, such as a line of a file.
    """

    chrom: str
    pos: int
    ref: str
    alt: str
    id: str = ""
    where: str = ""


def read_variants(file: str | Path) -> list[Variant]:
    """Read the variants of a VCF file, or of a table with the columns chrom, pos, ref and alt.

    A file whose first line begins with `##fileformat=VCF` or `#CHROM` is VCF. Any other file is a
    tab-separated table. Its first line names the columns, in upper or lower case and in any order.
    A column `id` is read too, and other columns are skipped. In both formats, positions count from
    1. Commas separate several alternatives in a row, and each of them becomes one variant. Files
    may be compressed.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the file has no variants, if a row has too few columns or an invalid
            position, or if an allele is not written as bases, such as `<DEL>`, `*`, a breakend or
            `.`. The message names the line.
    """
    text = b"".join(blocks(file)).decode("utf-8", errors="replace")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    is_vcf = lines[0].startswith(("##fileformat=VCF", "#CHROM"))
    places = {"chrom": 0, "pos": 1, "id": 2, "ref": 3, "alt": 4} if is_vcf else None
    found: list[Variant] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or (line.startswith("#") and (is_vcf or places is not None)):
            continue
        words = [word.strip() for word in line.split("\t")]
        if places is None:
            places = _columns(words, str(file))
            continue
        where = f"{file}, line {number}"
        if len(words) <= max(places.values()):
            raise ValueError(
                f"{where}: a variant has at least {max(places.values()) + 1} columns, separated by "
                f"tabs; got {len(words)}."
            )
        row = {name: words[place] for name, place in places.items()}
        found += _of_row(row, where)
    if not found:
        raise ValueError(f"{file} has no variants.")
    return found


def _columns(words: list[str], file: str) -> dict[str, int]:
    names = [word.removeprefix("#").lower() for word in words]
    missing = [name for name in _COLUMNS if name not in names]
    if missing:
        raise ValueError(
            f"{file} is neither VCF nor a table of variants: its first line must name the columns "
            f"chrom, pos, ref and alt, separated by tabs; {' and '.join(missing)} is missing."
        )
    return {name: names.index(name) for name in (*_COLUMNS, "id") if name in names}


def _of_row(row: Mapping[str, str], where: str) -> Iterator[Variant]:
    position = row["pos"]
    if not (position.isascii() and position.isdecimal() and int(position) >= 1):
        raise ValueError(f"{where}: the position must be an integer of at least 1; got {position}.")
    ref = row["ref"]
    if _ALLELE.fullmatch(ref) is None:
        raise ValueError(f"{where}: the reference allele must be bases; got {ref!r}.")
    name = row.get("id", "")
    for alt in row["alt"].split(","):
        if _ALLELE.fullmatch(alt) is None:
            raise ValueError(
                f"{where}: the alternative allele {alt!r} is {_kind(alt)}; only alleles that are "
                "written as bases can be scored, so leave the row out."
            )
        bases, other = (genomes.clean(x.encode(), where).decode("ascii") for x in (ref, alt))
        if bases == other:
            raise ValueError(f"{where}: the alternative allele is the reference, {ref!r}.")
        yield Variant(row["chrom"], int(position), bases, other, "" if name == "." else name, where)


def _kind(alt: str) -> str:
    if alt.startswith("<"):
        return "symbolic"
    if alt == "*":
        return "an overlapping deletion"
    if any(mark in alt for mark in "[]") or alt.startswith(".") != alt.endswith("."):
        return "a breakend"
    return "missing" if alt in (".", "") else "no sequence"


def check_variants(variants: Iterable[Variant], genome: Genome, window: int) -> None:
    """Check every variant: its place in the genome, its reference allele and its length.

    Raises:
        ValueError: if a variant fails a check. The message describes the first one that does.
    """
    lengths = genome.lengths
    for one in variants:
        where = f"{one.where}: " if one.where else ""
        if one.chrom not in lengths:
            raise ValueError(where + unknown_record(one.chrom, lengths))
        end = one.pos - 1 + len(one.ref)
        if one.pos < 1 or end > lengths[one.chrom]:
            raise ValueError(
                f"{where}the reference allele ends at {end:,}, and {one.chrom} has "
                f"{lengths[one.chrom]:,} bases."
            )
        there = genome.fetch(one.chrom, one.pos - 1, end)
        if there != one.ref:
            raise ValueError(
                f"{where}the reference allele is {_short(one.ref)}, and the genome has "
                f"{_short(there)} at {one.chrom}:{one.pos}."
            )
        if len(one.ref) > window:
            raise ValueError(
                f"{where}a reference allele of {len(one.ref):,} bases needs a window of as many; "
                f"got {window:,}."
            )


def _short(allele: str) -> str:
    return repr(allele if len(allele) <= 20 else f"{allele[:17]}…")


@dataclass(frozen=True)
class Window:
    """The surroundings of a variant.

    Attributes:
        start: first position of the window in the record, from 0.
        end: position after the last position of the window.
        reference: the bases of the window.
        alternatives: for each alternative allele, the bases of the window with this allele in place
            of the reference allele.
    """

    start: int
    end: int
    reference: Codes
    alternatives: tuple[Codes, ...]


def window_around(genome: Genome, variants: list[Variant], size: int) -> Window:
    """Cut the window around variants that replace the same bases.

    Args:
        genome: the genome that the variants change.
        variants: variants with the same position and the same reference allele.
        size: number of bases in the window, including the reference allele.
    """
    one = variants[0]
    first, length = one.pos - 1, len(one.ref)
    left = (size - length + 1) // 2
    start = max(0, first - left)
    end = min(genome.lengths[one.chrom], first + length + size - length - left)
    before = genome.fetch(one.chrom, start, first).encode("ascii")
    after = genome.fetch(one.chrom, first + length, end).encode("ascii")
    texts = [
        Codes([before, allele.encode("ascii"), after]) for allele in (one.ref, *_alts(variants))
    ]
    return Window(start, end, texts[0], tuple(texts[1:]))


def _alts(variants: list[Variant]) -> list[str]:
    return [one.alt for one in variants]
