"""The demo's text is split honestly, and its bigram model is the one it says it is."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("rich")

from gramian.demo.text import BigramModel, python_documentation


def test_no_held_out_passage_stands_in_the_training_text() -> None:
    corpus = python_documentation()
    train, held_out = bytes(corpus.train.tolist()), bytes(corpus.held_out.tolist())
    assert len(train) > 200_000 and 0.08 < len(held_out) / len(train + held_out) < 0.12
    width = 100
    seen = {train[i : i + width] for i in range(len(train) - width)}
    repeated = sum(held_out[i : i + width] in seen for i in range(len(held_out) - width))
    assert repeated < 0.01 * len(held_out)


@pytest.mark.parametrize("fraction", [0.1, 0.37])
def test_fraction_held_out(fraction: float) -> None:
    corpus = python_documentation(fraction)
    total = len(corpus.train) + len(corpus.held_out)
    assert len(corpus.held_out) == pytest.approx(fraction * total, abs=1)


def test_bigram_model_against_counting_by_hand() -> None:
    torch.manual_seed(0)
    data = torch.randint(97, 104, (257,), dtype=torch.uint8)
    windows = torch.randint(95, 106, (3, 63), dtype=torch.uint8)  # with bytes never seen
    text = data.tolist()
    singles, pairs = Counter(text), Counter(pairwise(text))
    successors = {a: {b for x, b in pairs if x == a} for a in set(text)}

    def probability(before: int, after: int) -> float:
        alone = (singles[after] + 1) / (len(text) + 256)
        seen = sum(n for (a, _), n in pairs.items() if a == before)
        if seen == 0:
            return alone
        kinds = len(successors[before])
        return (pairs[before, after] + kinds * alone) / (seen + kinds)

    bits = [
        -math.log2(probability(before, after))
        for window in windows.tolist()
        for before, after in pairwise(window)
    ]
    model = BigramModel(data)
    assert model.bits_per_byte(windows) == pytest.approx(sum(bits) / len(bits), rel=1e-9)
    torch.testing.assert_close(model.probabilities.sum(-1), torch.ones(256, dtype=torch.float64))
