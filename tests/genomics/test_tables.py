"""A table of scores is complete or absent, and a call that was cut short goes on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gramian import genomics
from gramian.models import GramianForCausalLM
from tests.genomics.conftest import drawn

MakeModel = Callable[..., GramianForCausalLM]

VCF = "#CHROM\tPOS\tID\tREF\tALT\n"


@pytest.fixture
def genome(tmp_path: Path) -> Path:
    file = tmp_path / "x.fa"
    texts = [drawn(5 + 7 * (index % 9), index) for index in range(40)]
    file.write_text("".join(f">r{index}\n{text}\n" for index, text in enumerate(texts)))
    return file


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    file = tmp_path / "x.vcf"
    rows = []
    for index in range(40):
        text = drawn(5 + 7 * (index % 9), index)
        others = [letter for letter in "ACGT" if letter != text[3]]
        rows.append(f"r{index}\t4\tv{index}\t{text[3]}\t{','.join(others[: 1 + index % 3])}\n")
    file.write_text(VCF + "".join(rows))
    return file


class Stop(Exception):
    pass


def stopping(after: int) -> Callable[[int, int], None]:
    """A progress that ends the call, as a signal would, once it was called so often."""
    seen = 0

    def tell(done: int, total: int) -> None:
        nonlocal seen
        seen += 1
        if seen > after:
            raise Stop

    return tell


@pytest.mark.parametrize(
    ("strands", "of_variants"), [("no", False), ("average", True), ("both", False), ("both", True)]
)
def test_rows_are_the_scores(
    make_model: MakeModel,
    tokenizer: Any,
    genome: Path,
    calls: Path,
    tmp_path: Path,
    strands: str,
    of_variants: bool,
) -> None:
    options: dict[str, Any] = {"tokenizer": tokenizer, "reverse_complement": strands}
    if of_variants:
        options |= {"variants": calls, "window": 20}
    genomics.write_scores(tmp_path / "out.tsv", make_model(), genome, **options)
    lines = [line.split("\t") for line in (tmp_path / "out.tsv").read_text().splitlines()]
    rows = [dict(zip(lines[0], cells, strict=True)) for cells in lines[1:]]
    expected: list[Any] = list(genomics.score(make_model(), genome, **options))
    assert len(rows) == len(expected)
    for row, one in zip(rows, expected, strict=True):
        if of_variants:
            assert (row["chrom"], row["id"], row["ref"], row["alt"]) == (
                one.variant.chrom,
                one.variant.id,
                one.variant.ref,
                one.variant.alt,
            )
            assert (int(row["start"]), int(row["end"])) == (one.start, one.end)
            assert float(row["difference"]) == pytest.approx(one.difference, abs=1e-5)
            gap = float(row["alternative_total"]) - float(row["reference_total"])
            assert float(row["difference"]) == pytest.approx(gap, abs=1e-5)
            mean = sum(strand.mean for strand in one.reference) / len(one.reference)
            assert float(row["reference_mean"]) == pytest.approx(mean, abs=1e-5)
            if strands == "both":
                parts = [float(row[f"{name}_difference"]) for name in ("forward", "reverse")]
                assert parts == pytest.approx(one.differences, abs=1e-5)
        else:
            assert (row["name"], int(row["length"])) == (one.name, one.length)
            assert float(row["total"]) == pytest.approx(one.total, abs=1e-5)
            assert float(row["mean"]) == pytest.approx(one.mean, abs=1e-5)
            if strands == "both":
                parts = [float(row[f"{name}_total"]) for name in ("forward", "reverse")]
                assert parts == pytest.approx([strand.total for strand in one.strands], abs=1e-5)
        assert ("forward_total" in row or "forward_difference" in row) == (strands == "both")


@pytest.mark.parametrize("of_variants", [False, True])
def test_a_call_that_was_cut_short_goes_on(
    make_model: MakeModel,
    tokenizer: Any,
    genome: Path,
    calls: Path,
    tmp_path: Path,
    of_variants: bool,
) -> None:
    options: dict[str, Any] = {"tokenizer": tokenizer, "batch_size": 2}
    if of_variants:
        options |= {"variants": calls, "window": 20}
    genomics.write_scores(tmp_path / "whole.tsv", make_model(), genome, **options)
    target, partial = tmp_path / "out.tsv", tmp_path / "out.tsv.partial"
    kept = []
    for after in (1, 18, 25 if of_variants else 3):
        with pytest.raises(Stop):
            genomics.write_scores(target, make_model(), genome, progress=stopping(after), **options)
        assert not target.exists()
        kept.append(len(partial.read_text().splitlines()) if partial.exists() else 0)
        if after == 18:  # a row that was torn when the power failed
            with partial.open("a") as file:
                file.write("r99\t12")
    assert kept[0] <= kept[1] <= kept[2]
    assert kept[2] > 2
    before = genomics.write_scores(target, make_model(), genome, **options)
    assert before == kept[2] - 2
    assert target.read_bytes() == (tmp_path / "whole.tsv").read_bytes()
    assert not partial.exists()
    with pytest.raises(FileExistsError, match=r"out\.tsv exists already"):
        genomics.write_scores(target, make_model(), genome, **options)


def test_the_rows_of_another_call_are_not_gone_on_with(
    make_model: MakeModel, tokenizer: Any, genome: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"tokenizer": tokenizer, "batch_size": 2}
    target = tmp_path / "out.tsv"
    with pytest.raises(Stop):
        genomics.write_scores(target, make_model(), genome, progress=stopping(18), **options)
    changed = copy.deepcopy(make_model())
    changed.lm_head.weight.data[7] += 0.1
    other = tmp_path / "y.fa"
    other.write_text(genome.read_text() + ">more\nACGT\n")
    for model, file, more in (
        (make_model(), genome, {"bos": True}),
        (make_model(), genome, {"batch_size": 3}),
        (make_model(), other, {}),
        (make_model("s6"), genome, {}),
        (changed, genome, {}),
    ):
        with pytest.raises(ValueError, match=r"out\.tsv\.partial belongs to another call"):
            genomics.write_scores(target, model, file, **options | more)
    assert genomics.write_scores(target, make_model(), genome, **options) > 0
