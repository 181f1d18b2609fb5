"""Score records and variants by their log-likelihoods."""

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
from gramian.genomics._tokenizers import tokenizer_of
from gramian.genomics._variants import (
    Variant,
    check_variants,
    read_variants,
    window_around,
)
from gramian.models import GramianForCausalLM

__all__ = ["STRANDS", "RecordScore", "VariantScore", "blocks_of", "default_window", "score"]

STRANDS = ("no", "average", "both")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class RecordScore:
    """The log-likelihood of a record.

    Attributes:
        name: name of the record.
        length: number of its bases.
        strands: log-likelihood of the record as it is written and, unless `reverse_complement` is
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
        end: position after the last position of the window with the reference allele.
        reference: log-likelihood of the window with the reference allele, on each strand.
        alternative: log-likelihood of the window with the alternative allele, on each strand.
    """

    variant: Variant
    start: int
    end: int
    reference: tuple[LogLikelihood, ...]
    alternative: tuple[LogLikelihood, ...]

    @property
    def difference(self) -> float:
        """Return the total log-likelihood of the alternative minus that of the reference.

        The difference is in nats and averaged over the strands. It is below 0 if the model finds
        the alternative less likely than the reference.
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
    tokenizer: Any = None,
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

    A record of any length is read in chunks, from its beginning to its end, and the model's state
    is carried from chunk to chunk. So memory does not grow with the length, except for the keys and
    values of attention. A score includes every token once, except the first, which has no
    prediction unless `bos` is set. The order of the records, `batch_size` and `chunk_size` change a
    score by rounding errors only. Lower case (a soft mask) is read as upper case.

    The window around a variant has `window` bases and contains the reference allele in its middle.
    The left flank has `(window - len(ref) + 1) // 2` bases, and the right flank has the rest. If
    the record ends within a flank, the flank ends there too. The alternative window has the same
    two flanks around the alternative allele. So this window is longer for an insertion, and shorter
    for a deletion. The windows of one reference allele have a common beginning, which is read once.
    Each window then continues from the state at the end of this beginning.

    Args:
        model: the language model. It may be inside an adapter of peft.
        records: the path of a FASTA file; or a mapping from names to sequences; or a series of
            documents, or of pairs of a name and a sequence.
        tokenizer: the model's tokenizer, which has one token for each nucleotide. By default, it is
            the one in the model's folder, or that of a converted HyenaDNA, Evo or model of bytes.
        variants: the variants to score; or the path of a VCF file or of a table with the columns
            chrom, pos, ref and alt, which `read_variants` reads. By default, the records themselves
            are scored.
        intervals: path of a BED file, or None. If it is given, its intervals are scored instead of
            the records, each on its strand.
        reverse_complement: `"no"` scores each sequence as it is written. `"average"` and `"both"`
            score its reverse complement too. These two differ only in the table that `write_scores`
            writes.
        bos: whether to put the tokenizer's BOS token before every sequence. If the tokenizer has
            none, its EOS token is used, because Evo puts this token between sequences.
        count_unknown: whether a score includes letters other than A, C, G and T, such as N. The
            model reads their tokens in any case.
        window: number of bases in the window around a variant; by default 8,192, or the length of
            the model's filters if that is less.
        batch_size: number of sequences that are read together.
        chunk_size: largest number of tokens of a sequence that are read at once.
        skip: number of scores to leave out at the beginning. The other scores do not change, not
            even by rounding errors.
        progress: function that is called as `progress(done, total)` with numbers of bases or
            variants, or None.

    Returns:
        An iterator over the scores, in the order of the records or variants. It computes each score
        when it is needed.

    Raises:
        TypeError: if the model is not a `GramianForCausalLM`.
        OSError: if a file cannot be read.
        ValueError: if a record contains letters that are not codes of nucleotides; if the tokenizer
            does not fit the model; if a variant is not written as bases, lies outside the genome,
            or has a reference allele that differs from the genome; or if a log-likelihood is not
            finite. All of these except the last are checked before the first score is computed.
        ImportError: if variants or intervals of a FASTA file are requested and `pyfaidx` is not
            installed.
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
    tokenizer = tokenizer_of(model) if tokenizer is None else tokenizer
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


def blocks_of(
    lengths: list[int], batch_size: int, chunk_size: int, skip: int = 0
) -> Iterator[tuple[int, int]]:
    """Yield the first and the last index, exclusive, of records that are read together.

    They are sorted by length together and give their results together, so there are few of them if
    they are long.

    Args:
        lengths: number of bases of each record.
        batch_size: number of records in a batch.
        chunk_size: largest number of tokens of a record that are read at once.
        skip: number of records whose results are not wanted; blocks of such records are left out.
    """
    most = max(batch_size, min(16 * batch_size, 256))
    first = bases = 0
    for last, length in enumerate(lengths, 1):
        bases += length
        if last - first == most or bases >= 16 * batch_size * chunk_size or last == len(lengths):
            if last > skip:
                yield first, last
            first, bases = last, 0


def default_window(model: GramianForCausalLM) -> int:
    """Return the number of bases that the window around a variant has by default in `score`."""
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
    blocks = list(blocks_of(lengths, batch_size, reader.chunk_size, skip))
    start = blocks[0][0] if blocks else len(lengths)
    done, total = sum(lengths[:start]) * strands, sum(lengths) * strands

    def tell(bases: int) -> None:
        nonlocal done
        done += bases
        if progress is not None:
            progress(done, total)

    tell(0)
    reader.tell = tell
    records = source.read(start)
    for first, last in blocks:
        texts: list[Letters] = []
        for one in itertools.islice(records, last - first):
            texts += [one, Reverse(one)] if both else [one]
        found = _read_by_length(reader, texts, batch_size)
        for index, place in enumerate(range(first, last)):
            if place >= skip:
                results = tuple(found[index * strands : (index + 1) * strands])
                yield RecordScore(source.names[place], lengths[place], results)


def _read_by_length(reader: Reader, texts: list[Letters], batch_size: int) -> list[LogLikelihood]:
    """Return the log-likelihood of each sequence, and read sequences in batches of similar length.

    No batch mixes sequences that fit in a chunk with longer ones.
    """
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
    together = max(1, batch_size // (4 if both else 2))  # rows of two sequences on each strand
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
    """Score variants together. The variants of a row have the same reference allele."""
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
