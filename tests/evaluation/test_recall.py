"""Bigram-recall perplexity is that of tokens which complete a pair seen before."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from gramian.evaluation import EvaluationReport, perplexity
from gramian.evaluation._perplexity import _earlier_pairs
from gramian.tasks import Document

VOCABULARY = 7


class Pairs(nn.Module):
    """A language model whose logits depend on the last two tokens and on the number of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, VOCABULARY))
        self.config = SimpleNamespace(max_position_embeddings=16)

    def forward(self, ids: Tensor, use_cache: bool = False) -> Any:
        before = torch.cat([torch.zeros_like(ids[:, :1]), ids[:, :-1]], 1)
        time = torch.arange(ids.shape[1])[None, :, None] / 10
        return SimpleNamespace(logits=self.table[before, ids] * (1 + time))


def tokenizer(text: str, **options: Any) -> dict[str, list[int]]:
    return {"input_ids": [int(c) for c in text]}


tokenizer.decode = lambda ids, **options: "".join(map(str, ids))  # type: ignore[attr-defined]


def by_hand(model: Pairs, texts: list[str], window: int, stride: int) -> tuple[list[float], ...]:
    """The losses of tokens that complete an earlier pair of their window, and of the others."""
    hits: list[float] = []
    others: list[float] = []
    for text in texts:
        ids = [int(c) for c in text]
        begin, start = 1, 0
        while begin < len(ids):
            end = min(start + window + 1, len(ids))
            logits = model(torch.tensor([ids[start : end - 1]])).logits[0].detach().double()
            for t in range(begin, end):
                loss = -float(logits[t - 1 - start].log_softmax(-1)[ids[t]])
                context = ids[start:t]
                pairs = {tuple(context[s : s + 2]) for s in range(len(context) - 1)}
                (hits if (ids[t - 1], ids[t]) in pairs else others).append(loss)
            begin, start = end, start + stride
    return hits, others


def words(*lengths: int, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    return ["".join(map(str, random.integers(0, VOCABULARY, size=n))) for n in lengths]


@pytest.mark.parametrize(("window", "stride"), [(16, 8), (5, 5), (9, 1), (100, 50)])
@pytest.mark.parametrize("lengths", [(63,), (1, 2, 40), (17, 16, 15)])
def test_tokens_are_counted_as_by_hand(window: int, stride: int, lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, texts = Pairs(), words(*lengths)
    hits, others = by_hand(model, texts, window, stride)
    score = perplexity(
        model, tokenizer, [Document(t) for t in texts], window=window, stride=stride, batch_size=3
    )
    assert score.recall_tokens == len(hits) > 0
    assert score.tokens == len(hits) + len(others)
    assert score.recall_perplexity == pytest.approx(math.exp(np.mean(hits)), rel=1e-5)
    assert score.other_perplexity == pytest.approx(math.exp(np.mean(others)), rel=1e-5)
    found = {one.metric: one for one in score.measures("text")}
    recall = found["bigram_recall_perplexity"]
    assert recall.value == pytest.approx(score.recall_perplexity)
    assert recall.tokens == len(hits) and found["perplexity"].tokens == score.tokens
    assert found["other_perplexity"].tokens == len(others)
    assert recall.to_dict()["tokens"] == len(hits)
    table = EvaluationReport("m", tuple(score.measures("text"))).to_markdown()
    assert "bigram_recall_perplexity" in table and "| tokens |" in table


def test_the_error_is_that_of_a_ratio_of_sums_over_windows() -> None:
    torch.manual_seed(0)
    model, (text,) = Pairs(), words(400)
    score = perplexity(model, tokenizer, text, window=20, stride=20)
    found = {one.metric: one for one in score.measures("text")}["bigram_recall_perplexity"]
    losses, counts = np.array(score.recall_losses), np.array(score.recall_counts)
    random = np.random.default_rng(1)
    draws = random.integers(0, len(counts), size=(4000, len(counts)))
    values = np.exp(losses[draws].sum(1) / counts[draws].sum(1))
    assert found.error == pytest.approx(values.std(), rel=0.15)


def test_a_text_without_repetition_has_no_recall() -> None:
    score = perplexity(Pairs(), tokenizer, "0123456", window=8)
    assert score.recall_perplexity is None and score.recall_tokens == 0
    assert score.other_perplexity == pytest.approx(score.perplexity)
    assert "bigram_recall_perplexity" not in {one.metric for one in score.measures("text")}
    same = perplexity(Pairs(), tokenizer, "0000", window=8)
    assert same.recall_tokens == 2  # the first pair is new


@pytest.mark.parametrize("length", [1, 2, 3, 63, 257, 1000])
def test_earlier_pairs_are_the_last_ones(length: int) -> None:
    ids = np.random.default_rng(length).integers(0, 6, size=length)
    expected = []
    for t in range(length):
        found = [s for s in range(1, t) if (ids[s - 1], ids[s]) == (ids[t - 1], ids[t])]
        expected.append(max(found, default=-1) if t else -1)
    assert _earlier_pairs(ids).tolist() == expected


def test_token_ids_stand_for_their_document() -> None:
    torch.manual_seed(0)
    model, (text, other) = Pairs(), words(63, 40)
    ids = [torch.tensor([int(c) for c in one]) for one in (text, other)]
    found = perplexity(model, tokenizer, ids, window=16)
    expected = perplexity(model, tokenizer, [Document(text), Document(other)], window=16)
    assert found == expected
    with pytest.raises(ValueError, match="at least 2 tokens; it has 1"):
        perplexity(model, tokenizer, ids[0][None, :1].flatten().split(1), window=16)
