"""A variant's score is that of two windows with the same flanks, each read from its beginning."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gramian import genomics
from gramian.genomics import Variant, VariantScore, _likelihood
from gramian.models import GramianForCausalLM
from tests.genomics.conftest import drawn
from tests.genomics.reference import Reference, other_strand

MakeModel = Callable[..., GramianForCausalLM]

GENOME = {"chr1": drawn(300, 1), "chr2": drawn(80, 2, "ACGTN")}


def changed(letter: str) -> str:
    return {"A": "C", "C": "G", "G": "T", "T": "A", "N": "A"}[letter]


def made() -> list[Variant]:
    """Changes of every kind: in the middle, at both ends, longer and shorter than before."""
    found = []
    for chrom, places in (("chr1", (1, 17, 150, 300)), ("chr2", (2, 79))):
        text = GENOME[chrom]
        for pos in places:
            base = text[pos - 1]
            found.append(Variant(chrom, pos, base, changed(base)))
            found.append(Variant(chrom, pos, base, base + "ACCA"))  # an insertion
            found.append(Variant(chrom, pos, base, "GG" + base))
            longer = text[pos - 1 : pos + 4]
            if len(longer) == 5:
                found.append(Variant(chrom, pos, longer, longer[0]))  # a deletion
                found.append(Variant(chrom, pos, longer, longer.translate({65: 67, 67: 71})))
    return [one for one in found if one.ref != one.alt]


def windows(one: Variant, size: int) -> tuple[int, int, str, str]:
    """By the docstring of `score`, base by base."""
    text = GENOME[one.chrom]
    left = (size - len(one.ref) + 1) // 2
    right = size - len(one.ref) - left
    first, last = one.pos - 1, one.pos - 1 + len(one.ref)
    start, end = first, last
    for _ in range(left):
        start -= start > 0
    for _ in range(right):
        end += end < len(text)
    return (
        start,
        end,
        text[start:first] + one.ref + text[last:end],
        text[start:first] + one.alt + text[last:end],
    )


@pytest.mark.each
@pytest.mark.parametrize(
    ("bos", "size", "chunk_size", "batch_size"), [(False, 40, 1000, 8), (True, 41, 13, 3)]
)
def test_differences_are_those_of_whole_windows(
    make_model: MakeModel,
    tokenizer: Any,
    kind: str,
    bos: bool,
    size: int,
    chunk_size: int,
    batch_size: int,
) -> None:
    model, variants = make_model(kind), made()
    reference = Reference(model, tokenizer)
    found = list(
        genomics.score(
            model,
            GENOME,
            tokenizer=tokenizer,
            variants=variants,
            bos=bos,
            window=size,
            chunk_size=chunk_size,
            batch_size=batch_size,
            reverse_complement="both",
        )
    )
    assert [one.variant for one in found] == variants
    for one in found:
        assert isinstance(one, VariantScore)
        start, end, before, after = windows(one.variant, size)
        assert (one.start, one.end) == (start, end)
        differences = []
        for strand, turn in enumerate((str, other_strand)):
            pair = [reference.score(turn(text), bos) for text in (before, after)]
            for result, (total, tokens) in zip(
                (one.reference[strand], one.alternative[strand]), pair, strict=True
            ):
                assert result.tokens == tokens
                assert result.total == pytest.approx(total, rel=1e-5, abs=1e-5)
            differences.append(pair[1][0] - pair[0][0])
            near = 1e-5 * abs(pair[0][0])
            assert one.differences[strand] == pytest.approx(differences[-1], abs=near)
        assert one.difference == pytest.approx(sum(differences) / 2, abs=near)


@pytest.mark.parametrize("size", [1, 2, 5, 6, 7, 300, 1000])
def test_a_window_has_its_size_unless_the_record_ends(size: int) -> None:
    from gramian.genomics._sequences import open_records
    from gramian.genomics._variants import window_around

    genome = open_records(GENOME).genome()
    for one in made():
        if len(one.ref) <= size:
            start, end, before, after = windows(one, size)
            made_ = window_around(genome, [one], size)
            assert (made_.start, made_.end) == (start, end)
            assert made_.reference.read(0, 9999).decode() == before
            assert made_.alternatives[0].read(0, 9999).decode() == after
            if start > 0 and end < len(GENOME[one.chrom]):
                assert end - start == size


def test_the_shared_beginning_is_read_once(
    make_model: MakeModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    batch = _likelihood.Reader._batch

    def counted(self: Any, rows: Any, begin: int, end: int) -> Any:
        made = batch(self, rows, begin, end)
        read.append(int(made[1].sum()))
        return made

    monkeypatch.setattr(_likelihood.Reader, "_batch", counted)
    text = GENOME["chr1"]
    base = text[149]
    others = [letter for letter in "ACGT" if letter != base]
    variants = [Variant("chr1", 150, base, other) for other in others]
    list(
        genomics.score(
            make_model(), GENOME, tokenizer=tokenizer, variants=variants, window=101, chunk_size=20
        )
    )
    assert sum(read) == 50 + 4 * 51  # the left flank, and the rest with each of four bases


def test_a_row_of_several_alternatives_is_one_of_each(
    make_model: MakeModel, tokenizer: Any, tmp_path: Path
) -> None:
    file = tmp_path / "genome.fa"
    file.write_text("".join(f">{name} x\n{text.lower()}\n" for name, text in GENOME.items()))
    base = GENOME["chr1"][9]
    others = [letter for letter in "ACGT" if letter != base]
    vcf = (
        "##fileformat=VCFv4.2\r\n##x=<y>\r\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\r\n"
        f"chr1\t10\trs1\t{base.lower()}\t{','.join(others)}\t.\tPASS\t.\r\n"
    )
    table = f"Alt\tid\tother\tPOS\tchrom\tref\n{','.join(others)}\trs1\t-\t10\tchr1\t{base}\n"
    expected = [Variant("chr1", 10, base, other, "rs1") for other in others]
    wanted = list(genomics.score(make_model(), GENOME, tokenizer=tokenizer, variants=expected))
    for name, data in (
        ("x.vcf", vcf.encode()),
        ("x.vcf.gz", gzip.compress(vcf.encode())),
        ("x.tsv", table.encode()),
        ("x.txt", table.encode()),
    ):
        (tmp_path / name).write_bytes(data)
        read = genomics.read_variants(tmp_path / name)
        assert [(v.chrom, v.pos, v.ref, v.alt, v.id) for v in read] == [
            (v.chrom, v.pos, v.ref, v.alt, v.id) for v in expected
        ]
        found = genomics.score(make_model(), file, tokenizer=tokenizer, variants=tmp_path / name)
        for one, other in zip(found, wanted, strict=True):
            assert one.difference == pytest.approx(other.difference, abs=1e-4)


HEAD = "#CHROM\tPOS\tID\tREF\tALT\n"


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("chr1\t10\t.\tA\t<DEL>", "'<DEL>' is symbolic"),
        ("chr1\t10\t.\tA\t*", r"'\*' is an overlapping deletion"),
        ("chr1\t10\t.\tA\tG,*", r"'\*' is an overlapping deletion"),
        ("chr1\t10\t.\tA\tA[chr2:5[", "is a breakend"),
        ("chr1\t10\t.\tA\t]chr2:5]A", "is a breakend"),
        ("chr1\t10\t.\tA\tA.", "is a breakend"),
        ("chr1\t10\t.\tA\t.", "'.' is missing"),
        ("chr1\t10\t.\tA\t7", "'7' is no sequence"),
        ("chr1\t10\t.\t-\tA", "the reference allele must be bases; got '-'"),
        ("chr1\t0\t.\tA\tC", "at least 1; got 0"),
        ("chr1\tx\t.\tA\tC", "at least 1; got x"),
        ("chr1\t10\t.\tA\ta", "is the reference"),
        ("chr1\t10\t.\tA", "at least 5 columns, separated by tabs; got 4"),
        ("1\t10\t.\tA\tCG", "unknown record '1'. Did you mean 'chr1'"),
        ("chr1\t300\t.\tAA\tC", "ends at 301, and chr1 has 300 bases"),
        ("chr1\t301\t.\tA\tCG", "ends at 301, and chr1 has 300 bases"),
    ],
)
def test_a_row_that_cannot_be_scored_is_named(
    make_model: MakeModel, tokenizer: Any, tmp_path: Path, row: str, sentence: str
) -> None:
    base = GENOME["chr1"][9]
    row = row.replace("\tA\t", f"\t{base}\t") if "\ta" not in row else row
    (tmp_path / "x.vcf").write_text(f"##fileformat=VCFv4.3\n{HEAD}{row}\n")
    with pytest.raises(ValueError, match=f"x.vcf, line 3: .*{sentence}"):
        genomics.score(
            make_model(), GENOME, tokenizer=tokenizer, variants=tmp_path / "x.vcf", window=50
        )


def test_another_reference_allele_than_the_genome_has_is_refused(
    make_model: MakeModel, tokenizer: Any, tmp_path: Path
) -> None:
    base = GENOME["chr1"][9]
    (tmp_path / "x.vcf").write_text(f"{HEAD}chr1\t10\t.\t{changed(base)}\tTT\n")
    sentence = f"line 2: the reference allele is .*, and the genome has '{base}' at chr1:10"
    with pytest.raises(ValueError, match=sentence):
        genomics.score(make_model(), GENOME, tokenizer=tokenizer, variants=tmp_path / "x.vcf")


@pytest.mark.parametrize("text", ["", "\n\n", HEAD, "chrom\tpos\tref\n", "chr1\t10\tA\tC\n"])
def test_a_file_without_variants_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text(text)
    with pytest.raises(ValueError, match=r"x\.tsv (has no variants|is neither VCF nor a table)"):
        genomics.read_variants(tmp_path / "x.tsv")


def test_an_allele_longer_than_the_window_is_refused(make_model: MakeModel, tokenizer: Any) -> None:
    one = Variant("chr1", 1, GENOME["chr1"][:60], "A", where="row 1")
    with pytest.raises(ValueError, match="row 1: a reference allele of 60 bases needs a window"):
        genomics.score(make_model(), GENOME, tokenizer=tokenizer, variants=[one], window=59)
    genomics.score(make_model(), GENOME, tokenizer=tokenizer, variants=[one], window=60)
