"""Log-likelihoods of records and of variants."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gramian.genomics._likelihood import LogLikelihood, Reader, language_model
from gramian.genomics._sequences import (
    Alphabet,
    Genome,
    Letters,
    Records,
    Reverse,
    Source,
    open_records,
)
from gramian.genomics._variants import (
    Variant,
    check_variants,
    read_variants,
    window_around,
)
from gramian.models import GramianForCausalLM

__all__ = ["BLOCK", "STRANDS", "RecordScore", "VariantScore", "default_window", "score"]

STRANDS = ("no", "average", "both")
BLOCK = 16
"""Number of batches of records that are sorted by length together."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class RecordScore:
    """The log-likelihood of a record.

    Attributes:
        name: name of the record.
        length: number of its bases.
        strands: log-likelihood of the record as it stands and, unless `reverse_complement` is
            `"no"`, of its reverse complement.
    """

    name: str
    length: int
    strands: tuple[LogLikelihood, ...]

    @property
    def total(self) -> float:
        """Return the total log-likelihood in nats, averaged over the strands."""
        return sum(one.total for one in self.strands) / len(self.strands)

    @property
    def mean(self) -> float:
        """Return the mean log-likelihood of a token in nats, averaged over the strands."""
        return sum(one.mean for one in self.strands) / len(self.strands)


@dataclass(frozen=True)
class VariantScore:
    """The log-likelihoods of a window with and without a variant.

    Attributes:
        variant: the variant.
        start: first position of the window in the record, from 0.
        end: position after the last one, with the reference allele.
        reference: log-likelihood of the window with the reference allele, on each strand.
        alternative: the same with the alternative allele.
    """

    variant: Variant
    start: int
    end: int
    reference: tuple[LogLikelihood, ...]
    alternative: tuple[LogLikelihood, ...]

    @property
    def difference(self) -> float:
        """Return the total log-likelihood of the alternative minus that of the reference, in nats,
        averaged over the strands; it is below 0 where the model finds the variant less likely.
        """
        return sum(self.differences) / len(self.reference)

    @property
    def differences(self) -> tuple[float, ...]:
        """Return the difference on each strand."""
        pairs = zip(self.alternative, self.reference, strict=True)
        return tuple(alternative.total - reference.total for alternative, reference in pairs)


def score(
    model: GramianForCausalLM,
    records: Records,
    *,
    tokenizer: Any,
    variants: str | Path | Iterable[Variant] | None = None,
    intervals: str | Path | None = None,
    reverse_complement: str = "no",
    bos: bool = False,
    count_unknown: bool = True,
    window: int | None = None,
    batch_size: int = 8,
    chunk_size: int = 16_384,
    skip: int = 0,
    progress: Progress | None = None,
) -> Iterator[RecordScore] | Iterator[VariantScore]:
    """Score records, or variants of them, by their log-likelihood in nats.

    A record of any length is read from its beginning to its end through the model's state, in
    chunks and in memory that does not grow with the length (but for the keys and values of
    attention). Every token counts once, and the first one has no prediction unless `bos` is set.
    Neither the order of the records nor `batch_size` nor `chunk_size` changes a score beyond
    rounding. Lower case (a soft mask) is read as upper case.

    The window around a variant has `window` bases with the reference allele, which stands in its
    middle: the left flank has `(window - len(ref) + 1) // 2` bases and the right flank the rest,
    and both end where the record ends. The alternative window has the same two flanks around the
    alternative allele, so after an insertion it is longer and after a deletion shorter. What the
    windows of a row share at their beginning is read once, and the state is continued with each.

    Args:
        model: the language model, also inside of an adapter of peft.
        records: a FASTA file, as a path; or sequences by name; or documents or pairs of a name and
            a sequence.
        tokenizer: the model's tokenizer, which has one token for each nucleotide.
        variants: a VCF file, or a table with the columns chrom, pos, ref and alt
            (`read_variants`), or variants; by default the records themselves are scored.
        intervals: a BED file; its intervals, on their strands, are scored in place of the records.
        reverse_complement: `"no"` scores each sequence as it stands; `"average"` and `"both"` score
            its reverse complement too. They differ only in what a table of the scores shows.
        bos: whether the tokenizer's token of the beginning, or else that of the end (as Evo's,
            which has one between sequences), stands before every sequence.
        count_unknown: whether letters other than A, C, G and T count, such as N; they are read in
            any case, as the tokens that the tokenizer has for them.
        window: number of bases around a variant; by default 8,192, or the length of the model's
            filters if that is less.
        batch_size: number of sequences that are read together.
        chunk_size: largest number of tokens of a sequence that are read at once.
        skip: number of scores to leave out at the beginning; the others are what they are without
            it, to the last bit.
        progress: called as `progress(done, all)`, of bases or variants.

    Returns:
        An iterator over the scores, in the order of the records or variants, which computes them as
        it goes on.

    Raises:
        TypeError: on another kind of model.
        OSError: if a file cannot be read.
        ValueError: on records that are no genome; on a tokenizer that does not fit; on a variant
            that is not written as bases, lies outside of the genome or whose reference allele is
            not there, before anything is computed; and on log-likelihoods that are not finite.
        ImportError: for variants or intervals of a file, without `pyfaidx`.
    """
    model = language_model(model)
    if reverse_complement not in STRANDS:
        raise ValueError(
            f"reverse_complement must be 'no', 'average' or 'both'; got {reverse_complement!r}."
        )
    for name, value in (("batch_size", batch_size), ("chunk_size", chunk_size), ("window", window)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}.")
    if skip < 0:
        raise ValueError(f"skip must be at least 0; got {skip}.")
    if window is not None and variants is None:
        raise ValueError("window is the number of bases around a variant; give variants too.")
    if variants is not None and intervals is not None:
        raise ValueError("give variants or intervals, not both.")
    alphabet = Alphabet(tokenizer, model.config.vocab_size)
    reader = Reader(model, alphabet, bos, count_unknown, chunk_size)
    source = open_records(records, intervals)
    both = reverse_complement != "no"
    if variants is None:
        return _score_records(reader, source, both, batch_size, skip, progress)
    size = default_window(model) if window is None else window
    genome = source.genome()
    found = read_variants(variants) if isinstance(variants, str | Path) else list(variants)
    check_variants(found, genome, size)
    return _score_variants(reader, genome, found, size, both, batch_size, skip, progress)


def default_window(model: GramianForCausalLM) -> int:
    """Return the number of bases around a variant that `score` takes by default."""
    return min(8192, int(model.config.max_position_embeddings or 8192))


def _score_records(
    reader: Reader,
    source: Source,
    both: bool,
    batch_size: int,
    skip: int,
    progress: Progress | None,
) -> Iterator[RecordScore]:
    strands = 2 if both else 1
    lengths = source.lengths
    size = BLOCK * batch_size
    first = skip // size * size  # what is computed together stays together
    done, total = sum(lengths[:first]) * strands, sum(lengths) * strands

    def tell(bases: int) -> None:
        nonlocal done
        done += bases
        if progress is not None:
            progress(done, total)

    tell(0)
    records = source.read(first)
    while block := list(itertools.islice(records, size)):
        texts: list[Letters] = []
        for one in block:
            texts += [one, Reverse(one)] if both else [one]
        found = _read_by_length(reader, texts, batch_size, tell)
        for index, place in enumerate(range(first, first + len(block))):
            if place >= skip:
                results = tuple(found[index * strands : (index + 1) * strands])
                yield RecordScore(source.names[place], lengths[place], results)
        first += len(block)


def _read_by_length(
    reader: Reader, texts: list[Letters], batch_size: int, tell: Callable[[int], None]
) -> list[LogLikelihood]:
    """Read sequences, those of similar length together; those of one chunk apart from others."""
    found = [LogLikelihood(0.0, 0)] * len(texts)
    order = sorted(
        (index for index, text in enumerate(texts) if len(text)), key=lambda i: len(texts[i])
    )
    short = [i for i in order if len(texts[i]) < reader.chunk_size]
    for part in (short, order[len(short) :]):
        for first in range(0, len(part), batch_size):
            batch = part[first : first + batch_size]
            for index, (result,) in zip(
                batch, reader.read([[texts[i]] for i in batch]), strict=True
            ):
                found[index] = result
            tell(sum(len(texts[i]) for i in batch))
    return found


def _score_variants(
    reader: Reader,
    genome: Genome,
    variants: list[Variant],
    size: int,
    both: bool,
    batch_size: int,
    skip: int,
    progress: Progress | None,
) -> Iterator[VariantScore]:
    rows = (list(row) for _, row in itertools.groupby(variants, lambda v: (v.chrom, v.pos, v.ref)))
    done = 0
    together = max(1, batch_size // (4 if both else 2))  # of rows with two sequences on each strand
    while block := list(itertools.islice(rows, together)):
        count = sum(map(len, block))
        if done + count > skip:
            results = _score_rows(reader, genome, block, size, both)
            yield from itertools.islice(results, max(0, skip - done), None)
        done += count
        if progress is not None:
            progress(done, len(variants))


def _score_rows(
    reader: Reader, genome: Genome, rows: list[list[Variant]], size: int, both: bool
) -> Iterator[VariantScore]:
    """Score variants together, those of each row in windows of one reference."""
    windows = [window_around(genome, row, size) for row in rows]
    groups: list[list[Letters]] = []
    for one in windows:
        alleles: list[Letters] = [one.reference, *one.alternatives]
        groups.append(alleles)
        if both:
            groups.append([Reverse(allele) for allele in alleles])
    found = reader.read(groups)
    strands = 2 if both else 1
    for index, (row, one) in enumerate(zip(rows, windows, strict=True)):
        read = found[index * strands : (index + 1) * strands]
        for number, variant in enumerate(row, 1):
            yield VariantScore(
                variant,
                one.start,
                one.end,
                tuple(strand[0] for strand in read),
                tuple(strand[number] for strand in read),
            )
