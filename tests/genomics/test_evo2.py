"""Evo 2's layout: short, medium and long filters and attention, and bytes as tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from gramian import checkpoints, genomics
from tests.genomics.conftest import drawn
from tests.genomics.reference import Reference, other_strand
from tests.genomics.test_embed import whole

FILE = Path(__file__).parents[1] / "data/evo2_tiny.pt"
RECORDS = {f"r{i}": drawn(n, i, "ACGTN") for i, n in enumerate((1, 2, 7, 300, 130, 64, 5))}


@pytest.fixture(scope="module")
def loaded() -> Any:
    found = checkpoints.load(FILE, dtype=torch.float32)
    return found.model, found.tokenizer


def test_records_and_variants(loaded: Any) -> None:
    model, tokenizer = loaded
    reference = Reference(model, tokenizer)
    for chunk_size, batch_size in ((19, 4), (1000, 2)):
        options = {"tokenizer": tokenizer, "chunk_size": chunk_size, "batch_size": batch_size}
        for one in genomics.score(model, RECORDS, **options):
            assert isinstance(one, genomics.RecordScore)
            expected = reference.score(RECORDS[one.name])[0]
            assert one.total == pytest.approx(expected, rel=1e-5, abs=1e-5)
    text = RECORDS["r3"]
    variants = [
        genomics.Variant("r3", pos, text[pos - 1], "A" if text[pos - 1] != "A" else "CC")
        for pos in (1, 150, 300)
    ]
    for one in genomics.score(
        model,
        RECORDS,
        tokenizer=tokenizer,
        variants=variants,
        window=100,
        reverse_complement="both",
        chunk_size=33,
    ):
        assert isinstance(one, genomics.VariantScore)
        before, place = text[one.start : one.end], one.variant.pos - 1 - one.start
        after = before[:place] + one.variant.alt + before[place + 1 :]
        for difference, turn in zip(one.differences, (str, other_strand), strict=True):
            expected = reference.score(turn(after))[0] - reference.score(turn(before))[0]
            assert difference == pytest.approx(expected, abs=1e-3)


def test_hidden_states_in_chunks(loaded: Any) -> None:
    model, tokenizer = loaded
    ids = torch.tensor([tokenizer(drawn(301)).input_ids])
    layers: list[int | str] = [0, 3, -1]
    layers += [f"model.layers.{i}.mlp" for i in (2, 7)]
    layers += [f"model.layers.{i}.mixer" for i in range(4)]
    for layer in layers:
        chunks = list(genomics.hidden_states(model, ids, layers=layer, chunk_size=37))
        expected = whole(model, ids, layer)
        scale = float(expected.abs().max())
        assert_close(torch.cat(chunks, dim=1), expected, rtol=1e-4, atol=1e-4 * scale)
