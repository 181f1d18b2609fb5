"""Recall and copying: every query can be answered from what came before, and rightly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from scipy import stats

from gramian import tasks
from gramian.tasks import IGNORED
from gramian.tasks.mad import Memorization


def rows(name: str, split: str = "test", count: int = 40, **settings: Any) -> Iterator[Any]:
    task = tasks.build(name, train_examples=count, eval_examples=count, **settings)
    for row in task.rows(split, seed=5):
        yield row["input_ids"].tolist(), row["labels"].tolist()


@pytest.mark.parametrize("random_non_queries", [False, True])
@pytest.mark.parametrize(
    ("length", "pairs", "passes"), [(64, 4, 1), (64, 16, 1), (64, 8, 2), (8, 2, 1), (4, 1, 1)]
)
def test_mqar(length: int, pairs: int, passes: int, random_non_queries: bool) -> None:
    settings = {
        "vocab_size": 66,
        "length": length,
        "pairs": pairs,
        "passes": passes,
        "random_non_queries": random_non_queries,
    }
    for tokens, labels in rows("mqar", **settings):
        context = 2 * pairs * passes
        keys, values = tokens[: 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
        assert tokens[:context] == tokens[: 2 * pairs] * passes
        assert len(set(keys)) == len(set(values)) == pairs
        assert all(1 <= key < 33 for key in keys)
        assert all(33 <= value < 66 for value in values)
        asked = [place for place in range(length) if labels[place] != IGNORED]
        assert len(asked) == pairs and asked[0] >= context
        assert all((place - context) % 2 == 0 for place in asked)
        assert sorted(tokens[place] for place in asked) == sorted(keys)
        answers = dict(zip(keys, values, strict=True))
        assert all(labels[place] == answers[tokens[place]] for place in asked)
        if not random_non_queries:
            rest = set(range(context, length)) - set(asked)
            assert all(tokens[place] == 0 for place in rest)


def test_gaps_of_mqar_follow_the_power_law() -> None:
    """The first key's gap is one draw from `a x^(a-1)`; over many rows, by a chi-squared test."""
    gaps, power, space = [], 0.3, 12
    settings = {"vocab_size": 64, "length": 32, "pairs": 4, "power": power}
    for tokens, labels in rows("mqar", count=3000, random_non_queries=False, **settings):
        place = next(p for p in range(8, 32) if tokens[p] == tokens[0] and labels[p] != IGNORED)
        gaps.append((place - 8) // 2)
    density = np.arange(1, space + 1) ** (power - 1.0)
    expected = len(gaps) * density / density.sum()
    assert stats.chisquare(np.bincount(gaps, minlength=space), expected).pvalue > 1e-3


@pytest.mark.parametrize("keys", [1, 2])
def test_associative_recall(keys: int) -> None:
    seen = set()
    for tokens, labels in rows("associative_recall", keys=keys, vocab_size=12, input_length=23):
        assert tuple(tokens) not in seen
        seen.add(tuple(tokens))
        pair = keys + 1
        pairs = 23 // pair
        assert len(tokens) == pairs * pair + 1 + keys
        values: dict[tuple[int, ...], int] = {}
        for start in range(0, pairs * pair, pair):
            key, value = tuple(tokens[start : start + keys]), tokens[start + keys]
            assert all(1 <= token <= 5 for token in key) and 6 <= value <= 10
            assert values.setdefault(key, value) == value
        assert tokens[pairs * pair] == 11
        assert labels[:-1] == [IGNORED] * (len(tokens) - 1)
        assert labels[-1] == values[tuple(tokens[-keys:])]


def test_recall_trains_on_every_next_token() -> None:
    for tokens, labels in rows("associative_recall", "train"):
        assert labels[:-1] == tokens[1:]
    for tokens, labels in rows("induction_heads", "train"):
        assert labels[:-1] == tokens[1:]


@pytest.mark.parametrize(("answers", "triggers"), [(1, 1), (3, 4)])
def test_induction_heads(answers: int, triggers: int) -> None:
    settings = {"answer_length": answers, "triggers": triggers}
    for tokens, labels in rows("induction_heads", **settings):
        mark = 19
        assert tokens[30] == mark
        first = tokens.index(mark)
        assert first + answers < 30
        copied = tokens[first + 1 : first + 1 + answers]
        for place in range(30):
            if tokens[place] == mark:
                assert tokens[place + 1 : place + 1 + answers] == copied
        assert labels == [IGNORED] * 30 + copied
        assert tokens[31:] == copied[:-1]
        assert 0 not in tokens


def test_a_vocabulary_that_is_too_small_for_so_many_rows_is_an_error() -> None:
    settings = {"vocab_size": 4, "input_length": 2, "train_examples": 99}
    with pytest.raises(ValueError, match="hardly more than"):
        list(tasks.build("associative_recall", **settings).rows("train", 0))


@pytest.mark.parametrize("noise", [0.0, 0.3, 0.95])
@pytest.mark.parametrize("multi_query", [True, False])
def test_mad_recall(noise: float, multi_query: bool) -> None:
    settings = {"noise": noise, "noise_vocab_size": 8, "multi_query": multi_query, "length": 40}
    name = "mad/noisy-in-context-recall"
    noisy = 0
    for tokens, labels in rows(name, vocab_size=25, **settings):
        ordinary = 17 if multi_query else 16
        half = ordinary // 2
        assert len(tokens) == len(labels) == (39 if multi_query else 40)
        values: dict[int, int] = {}
        for start in range(0, 38, 2):
            key, value = tokens[start : start + 2]
            assert labels[start + 1] == IGNORED
            if key >= ordinary:
                noisy += 1
                assert value >= ordinary and labels[start] == IGNORED
                continue
            assert key < half <= value < ordinary
            known = key in values
            assert values.setdefault(key, value) == value
            assert labels[start] == (value if known and multi_query else IGNORED)
        if not multi_query:
            assert tokens[38] == 24 and labels[38] == IGNORED
        assert labels[-1] == values[tokens[-1]]
    assert (noisy > 0) == (noise > 0)
    for tokens, labels in rows(name, "train", vocab_size=25, **settings):
        assert labels[:-1] == tokens[1:]


@pytest.mark.parametrize("multi_query", [True, False])
def test_mad_fuzzy_recall(multi_query: bool) -> None:
    """Parsed by size: evaluation's keys have three tokens, and values end where a key begins."""
    settings = {"multi_query": multi_query, "vocab_size": 24}
    ordinary = 23 if multi_query else 22
    half = ordinary // 2
    repeated = 0
    for tokens, labels in rows("mad/fuzzy-in-context-recall", count=150, **settings):
        assert len(tokens) == len(labels) == 128
        full = [*tokens, labels[-1]]
        due = [IGNORED, *labels]
        start = next(place for place, token in enumerate(full) if token != ordinary)
        values: dict[tuple[int, ...], list[int]] = {}
        while start < len(full):
            last = not multi_query and full[start] == 23
            start += last
            key = tuple(full[start : start + 3])
            assert len(set(key)) == 3 and max(key) < half
            end = start + 3
            while end < len(full) and half <= full[end] < ordinary:
                end += 1
            value = full[start + 3 : end]
            assert 1 <= len(value) <= 3 and len(set(value)) == len(value)
            known = key in values
            assert values.setdefault(key, value) == value
            assert due[start : start + 3] == [IGNORED] * 3
            final = end == len(full)
            assert known or not final  # what is asked for at the end was shown
            scored = known and (multi_query or final)
            assert due[start + 3 : end] == (value if scored else [IGNORED] * len(value))
            repeated += known
            start = end
    assert repeated >= 150


def test_mad_memorization() -> None:
    task = tasks.build("mad/memorization")
    assert isinstance(task, Memorization)
    dictionary = task.dictionary()
    assert len(dictionary) == len(set(dictionary.values())) == 127
    for split in ("train", "test"):
        for tokens, labels in rows("mad/memorization", split, noise=0.2, noise_vocab_size=1):
            assert len(tokens) == 32
            half = 254 // 2
            for key, mark, none, value in zip(
                tokens[::2], tokens[1::2], labels[::2], labels[1::2], strict=True
            ):
                assert none == IGNORED
                if mark == 255:
                    assert key < half <= value < 254
                else:
                    assert key == mark == 254 and value == IGNORED
    for tokens, labels in rows("mad/memorization"):
        assert labels[1::2] == [dictionary[key] for key in tokens[::2]]


def test_mad_compression() -> None:
    for tokens, labels in rows("mad/compression", noise=0.3, noise_vocab_size=4):
        assert labels == tokens and len(tokens) == 32
        assert tokens[-1] == 15 and max(tokens[:-1]) < 15
        assert any(token >= 11 for token in tokens[:-1])


def test_mad_selective_copying() -> None:
    for tokens, labels in rows("mad/selective-copying", length=50, tokens=6):
        assert len(tokens) == len(labels) == 50
        assert tokens[43] == 15 and tokens[44:] == [14] * 6
        copied = [token for token in tokens[:43] if token != 14]
        assert len(copied) == 6 and max(copied) < 14
        assert tokens[42] != 14  # no blank between the last token and the mark, as published
        assert labels == [IGNORED] * 44 + copied


@pytest.mark.parametrize("variable", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_copying(variable: bool, reverse: bool) -> None:
    settings = {"vocab_size": 10, "noise": 9, "memorize": 5}
    for tokens, labels in rows("copying", variable=variable, reverse=reverse, **settings):
        assert len(tokens) == 19 and tokens[14:] == [9] * 5
        shown = [token for token in tokens[:14] if token]
        assert len(shown) == 5 and max(shown) < 9
        assert variable or tokens[:5] == shown
        assert labels == [IGNORED] * 14 + (shown[::-1] if reverse else shown)


@pytest.mark.parametrize(("length", "lags"), [(1000, 1), (257, 3)])
def test_delay(length: int, lags: int) -> None:
    settings = {"length": length, "lag": 63, "lags": lags, "step": 0.001, "frequency": 125.0}
    task = tasks.build("delay", train_examples=200, **settings)
    inputs = []
    for row in task.rows("train", 0):
        signal, targets = row["input_values"][:, 0], row["labels"]
        assert signal[0] == 0
        for index in range(lags):
            lag = 63 * (index + 1)
            assert np.array_equal(targets[lag:, index], signal[: length - lag])
            assert not targets[:lag, index].any()
        inputs.append(signal)
    signals = np.stack(inputs).astype(np.float64)
    if length % 2 == 0:  # periodic: nothing above the frequency but the constant that was moved
        spectrum = np.abs(np.fft.rfft(signals, axis=-1)) ** 2
        frequencies = np.fft.rfftfreq(length, 0.001)
        assert spectrum[:, frequencies > 125.0].max() < 1e-6 * spectrum.max()
        power = spectrum[:, (frequencies > 0) & (frequencies <= 125.0)].mean(0)
        assert power.max() / power.min() < 3  # white below it
    centred = signals - signals.mean(-1, keepdims=True)
    assert np.sqrt((centred**2).mean()) == pytest.approx(0.5, rel=0.1)
