"""A real genome: phiX174 (NCBI, NC_001422.1, 5,386 bases), with HyenaDNA's layout in float32."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gramian import checkpoints, genomics
from gramian.tasks import IndexedGenome, build
from tests.genomics.reference import Reference, other_strand

DATA = Path(__file__).parents[1] / "data"
FILE = DATA / "phix174.fna"
LINES = FILE.read_text().splitlines()
NAME, GENOME = LINES[0][1:].split()[0], "".join(LINES[1:])


@pytest.fixture(scope="module")
def loaded() -> Any:
    found = checkpoints.load(DATA / "hyenadna_tiny.ckpt")
    return found.model, found.tokenizer


def test_the_record_on_both_strands(loaded: Any) -> None:
    model, tokenizer = loaded
    assert len(GENOME) == 5386
    reference = Reference(model, tokenizer)
    for chunk_size in (1000, 100_000):
        (one,) = genomics.score(
            model, FILE, tokenizer=tokenizer, reverse_complement="both", chunk_size=chunk_size
        )
        assert isinstance(one, genomics.RecordScore)
        assert (one.name, one.length) == (NAME, 5386)
        for strand, text in zip(one.strands, (GENOME, other_strand(GENOME)), strict=True):
            assert strand.tokens == 5385
            assert strand.mean == pytest.approx(reference.score(text)[0] / 5385, abs=1e-5)


def test_every_substitution_of_a_stretch(loaded: Any, tmp_path: Path) -> None:
    model, tokenizer = loaded
    rows = []
    for pos in (1, 2, 2693, 2694, 5385, 5386):
        base = GENOME[pos - 1]
        others = ",".join(other for other in "ACGT" if other != base)
        rows.append(f"{NAME}\t{pos}\t.\t{base}\t{others}\n")
    (tmp_path / "x.vcf").write_text("#CHROM\tPOS\tID\tREF\tALT\n" + "".join(rows))
    reference = Reference(model, tokenizer)
    found: Any = list(
        genomics.score(model, FILE, tokenizer=tokenizer, variants=tmp_path / "x.vcf", window=200)
    )
    assert len(found) == 18
    for one in found:
        before = GENOME[one.start : one.end]
        place = one.variant.pos - 1 - one.start
        after = before[:place] + one.variant.alt + before[place + 1 :]
        expected = reference.score(after)[0] - reference.score(before)[0]
        assert one.difference == pytest.approx(expected, abs=2e-3)


def test_places_chunks_and_rows_of_the_file(loaded: Any) -> None:
    model, tokenizer = loaded
    with IndexedGenome(FILE) as genome:
        for start, stop in itertools.pairwise((0, 1, 69, 70, 71, 4000, 5386)):
            assert genome.fetch(NAME, start, stop) == GENOME[start:stop]
    chunks = list(
        genomics.hidden_states(model, GENOME, layers=1, tokenizer=tokenizer, chunk_size=777)
    )
    with torch.no_grad():
        ids = torch.tensor([tokenizer(GENOME).input_ids])
        whole = model(ids, output_hidden_states=True).hidden_states[1][0]
    torch.testing.assert_close(torch.cat(chunks), whole, rtol=1e-4, atol=1e-4)
    (one,) = genomics.embed(model, FILE, tokenizer=tokenizer, layer=1, chunk_size=777)
    assert np.allclose(one.values, whole.numpy().mean(0), atol=1e-4)
    task = build(
        "fasta", train=str(FILE), validation_share=0.1, validation_by="positions", length=512
    )
    kept = sum(len(row["labels"]) for row in task.rows("train", 0))
    held_out = sum(len(row["labels"]) for row in task.rows("validation", 0))
    assert (kept, held_out) == (5386 - 539 - 1, 538)
