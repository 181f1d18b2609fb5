"""Bigram-recall perplexity is that of tokens which complete a pair seen before."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from gramian.evaluation import (
    RARE,
    EvaluationReport,
    count_bigrams,
    perplexity,
    repeated_bigrams,
)
from gramian.evaluation._bigrams import earlier_bigrams
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


def by_hand(
    model: Pairs,
    texts: list[str],
    window: int,
    stride: int,
    frequent: set[tuple[int, int]] | None = None,
) -> tuple[list[float], ...]:
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
                pairs -= frequent or set()
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
def test_earlier_bigrams_are_the_last_ones(length: int) -> None:
    ids = np.random.default_rng(length).integers(0, 6, size=length)
    expected = []
    for t in range(length):
        found = [s for s in range(1, t) if (ids[s - 1], ids[s]) == (ids[t - 1], ids[t])]
        expected.append(max(found, default=-1) if t else -1)
    assert earlier_bigrams(ids).tolist() == expected


def test_token_ids_stand_for_their_document() -> None:
    torch.manual_seed(0)
    model, (text, other) = Pairs(), words(63, 40)
    ids = [torch.tensor([int(c) for c in one]) for one in (text, other)]
    found = perplexity(model, tokenizer, ids, window=16)
    expected = perplexity(model, tokenizer, [Document(text), Document(other)], window=16)
    assert found == expected
    with pytest.raises(ValueError, match="at least 2 tokens; it has 1"):
        perplexity(model, tokenizer, ids[0][None, :1].flatten().split(1), window=16)


def counted(texts: list[str]) -> dict[tuple[int, int], int]:
    """How often each pair occurs, counted by hand."""
    found: dict[tuple[int, int], int] = {}
    for text in texts:
        for pair in itertools.pairwise(text):
            key = (int(pair[0]), int(pair[1]))
            found[key] = found.get(key, 0) + 1
    return found


@pytest.mark.parametrize("rare", [0, 1, 3, 5, 1000])
@pytest.mark.parametrize(("window", "stride"), [(16, 8), (9, 1)])
def test_pairs_that_are_frequent_in_training_do_not_count(
    rare: int, window: int, stride: int
) -> None:
    torch.manual_seed(0)
    model, texts, training = Pairs(), words(63, 17), words(80, 1, 60, seed=1)
    frequent = {pair for pair, count in counted(training).items() if count > rare}
    hits, others = by_hand(model, texts, window, stride, frequent)
    bigrams = count_bigrams([Document(one) for one in training], tokenizer)
    score = perplexity(
        model,
        tokenizer,
        [Document(t) for t in texts],
        window=window,
        stride=stride,
        training_bigrams=bigrams,
        rare=rare,
    )
    assert (score.recall_tokens, score.rare, bigrams.tokens) == (len(hits), rare, 141)
    if hits:
        assert score.recall_perplexity == pytest.approx(math.exp(np.mean(hits)), rel=1e-5)
    assert score.other_perplexity == pytest.approx(math.exp(np.mean(others)), rel=1e-5)


def test_a_bigram_is_rare_up_to_the_number_of_the_paper() -> None:
    ids = torch.tensor([1, 2, 1, 2, 1, 3, 1, 3])
    training = torch.tensor([1, 2] * RARE + [1, 3] * (RARE + 1))
    bigrams = count_bigrams([training])
    assert bigrams.of(ids.numpy()).tolist() == [0, RARE, RARE, RARE, RARE, RARE + 1, RARE, RARE + 1]
    hits = repeated_bigrams(ids, training_bigrams=bigrams)
    assert RARE == 1250 and hits.tolist() == [False, False, False, True, True, False, False, False]


def test_counts_are_merged_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    training = [torch.from_numpy(np.random.default_rng(n).integers(0, 9, n)) for n in range(40)]
    whole = count_bigrams(training)
    monkeypatch.setattr("gramian.evaluation._bigrams._HELD", 50)
    parts = count_bigrams(training)
    assert whole.counts.tolist() == parts.counts.tolist() and parts.tokens == 780
    assert whole.codes.tolist() == parts.codes.tolist()
    expected = counted(["".join(map(str, one.tolist())) for one in training])
    assert dict(zip(whole.codes.tolist(), whole.counts.tolist(), strict=True)) == {
        (first << 32) + second: count for (first, second), count in expected.items()
    }


@pytest.mark.parametrize("length", [1, 2, 3, 17, 64])
@pytest.mark.parametrize("padding", ["none", "left", "right", "anywhere"])
@pytest.mark.parametrize("rare", [None, 2])
def test_a_batch_with_padding_is_marked_as_by_hand(
    length: int, padding: str, rare: int | None
) -> None:
    random = np.random.default_rng(length)
    ids = random.integers(0, 4, (5, length))
    mask = np.ones(ids.shape, dtype=int)
    for row, count in zip(mask, random.integers(0, length + 1, 5), strict=True):
        if padding == "left":
            row[:count] = 0
        elif padding == "right":
            row[length - count :] = 0
        elif padding == "anywhere":
            row[:] = random.integers(0, 2, length)
    training = words(30, seed=2)
    bigrams = count_bigrams([Document(training[0])], tokenizer)
    frequent = {pair for pair, count in counted(training).items() if rare and count > rare}
    expected = np.zeros(ids.shape, dtype=bool)
    for row, real, found in zip(ids, mask, expected, strict=True):
        seen: set[tuple[int, int]] = set()
        last = None
        for t in np.flatnonzero(real):
            pair = None if last is None else (int(last), int(row[t]))
            if pair is not None:
                found[t] = pair in seen and pair not in frequent
                seen.add(pair)
            last = row[t]
    options = {} if rare is None else {"training_bigrams": bigrams, "rare": rare}
    given = None if padding == "none" else torch.from_numpy(mask)
    marked = repeated_bigrams(torch.from_numpy(ids), given, **options)  # type: ignore[arg-type]
    assert marked.dtype == torch.bool and marked.tolist() == expected.tolist()
    alone = None if given is None else given[0]
    assert torch.equal(repeated_bigrams(torch.from_numpy(ids[0]), alone, **options), marked[0])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: repeated_bigrams(torch.zeros(2, 3)), "must be integers of .* got float32"),
        (lambda: repeated_bigrams(torch.zeros(1, 2, 3, dtype=torch.int64)), r"\(1, 2, 3\)"),
        (lambda: repeated_bigrams(torch.arange(3), torch.ones(2)), r"shape of ids, \(3,\); got"),
        (lambda: repeated_bigrams(torch.arange(3), rare=3), "got 3 without them"),
        (lambda: perplexity(Pairs(), tokenizer, "0123", rare=3), "got 3 without them"),
        (
            lambda: repeated_bigrams(
                torch.arange(3), training_bigrams=count_bigrams([torch.arange(3)]), rare=-1
            ),
            "at least 0; got -1",
        ),
        (lambda: count_bigrams("0123"), "needs a tokenizer"),
        (lambda: count_bigrams([torch.zeros(2, 2)]), r"float32 of shape \(2, 2\)"),
        (lambda: count_bigrams([torch.tensor([-1, 2])]), "non-negative"),
        (lambda: count_bigrams("0", tokenizer), "no document has two tokens"),
    ],
)
def test_what_is_not_defined_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
