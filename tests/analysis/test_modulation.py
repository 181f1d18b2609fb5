"""Modulation at delimiters is a mean of ratios over texts, with an interval over them."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from gramian.analysis import (
    LayerState,
    StateReport,
    StateReports,
    find_delimiters,
    measure_modulation,
    special_tokens,
)


def pieces(text: str) -> list[str]:
    """Words with the space before them, marks alone."""
    import re

    return re.findall(r"<eot>|\n+| ?[A-Za-z0-9]+| ?[^A-Za-z0-9\s<]+| ", text)


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("One. Two! Three?", {"sentence": [". ", "! ", "?"]}),
        ("pi is 3.14 and so on.", {"sentence": ["."]}),
        ('He said "no." Then', {"sentence": ['." ']}),
        ("a.b.c", {}),
        ("first\nsecond\n\nthird", {"newline": ["\n", "\n\n"]}),
        ("end.<eot>next <eot>", {"sentence": ["."], "special": ["<eot>", "<eot>"]}),
        ("end.\nnext", {"sentence": ["."], "newline": ["\n"]}),
        ("no marks at all", {}),
        ("", {}),
    ],
)
def test_delimiters_are_found_in_the_tokens_that_occur(text: str, kinds: Any) -> None:
    tokens = pieces(text)
    found = find_delimiters(tokens, {"<eot>"})
    assert {kind: len(places) for kind, places in found.items()} == {
        kind: len(marks) for kind, marks in kinds.items()
    }
    for kind, places in found.items():
        assert [tokens[i] for i in places] == [mark.strip(" ") for mark in kinds[kind]]


def test_bytes_and_wide_marks_are_delimiters_too() -> None:
    assert find_delimiters(list("Yes. No.")) == {"sentence": [3, 7]}
    assert find_delimiters(list("3.5")) == {}
    assert find_delimiters(["好", "。", "是"]) == {"sentence": [1]}
    assert find_delimiters([".\n", "x"]) == {"sentence": [0]}


def test_special_tokens_are_those_of_the_tokenizer() -> None:
    class Tokens:
        all_special_ids = (0,)
        added_tokens_decoder = {  # noqa: RUF012 (read only)
            0: type("T", (), {"special": True}),
            7: type("T", (), {"special": True}),
            8: type("T", (), {"special": False}),
        }

        def decode(self, ids: list[int]) -> str:
            return f"<{ids[0]}>"

    assert special_tokens(Tokens()) == {"<0>", "<7>"}
    assert special_tokens(lambda text: []) == set()


def reports(counts: tuple[int, ...], seed: int = 0) -> StateReports:
    """Texts of 40 tokens with some points each, and random sizes with two layers."""
    random = np.random.default_rng(seed)
    found = []
    for text, count in enumerate(counts):
        tokens = [" w"] * 40
        for place in random.choice(np.arange(0, 40, 2), size=count, replace=False):
            tokens[place] = "."
        if count > 2:
            tokens[2] = "."  # position 0, where nothing is stored, is within reach of the next one
        layers = tuple(
            LayerState(
                name,
                "A",
                "attention",
                tuple(range(heads)),
                heads,
                torch.from_numpy(random.uniform(1, 9, (heads, 40))).float(),
                torch.full((heads, 40), 40.0),
            )
            for name, heads in (("0", 2), ("1", 3))
        )
        found.append(
            StateReport(
                "m", layers, tuple(range(40)), tuple(tokens), "entropy", None, None, (), 0.0,
                source=f"t{text}",
            )
        )  # fmt: skip
    return StateReports(tuple(found))


def by_hand(report: StateReport, after: set[int], avoid: set[int], reach: int) -> Any:
    """The ratios of the average ESS and of each head, by plain loops."""
    layers = [layer.ess.double().numpy() for layer in report.layers]
    average = np.mean([sizes.mean(0) for sizes in layers], axis=0)
    curves = [average, *np.concatenate(layers)]
    rows: list[list[float]] = []
    for i in sorted(after):
        near = []
        for d in range(1, reach + 1):
            if i - d >= 1 and i + d < 40 and i - d not in avoid and i + d not in avoid:
                near += [i - d, i + d]
        if near:
            rows.append([curve[i] / np.mean([curve[j] for j in near]) for curve in curves])
    return np.array(rows).reshape(-1, len(curves))


@pytest.mark.parametrize("reach", [1, 2, 4])
@pytest.mark.parametrize("counts", [(3,), (2, 5, 1), (1, 0, 4, 6)])
def test_ratios_are_those_of_plain_loops(counts: tuple[int, ...], reach: int) -> None:
    texts = reports(counts)
    found = measure_modulation(texts, reach=reach)
    (kind,) = found.kinds
    assert kind.kind == "sentence" and set(kind.tokens) == {"."}
    rows, controls = [], []
    for report in texts:
        after = {i + 1 for i, token in enumerate(report.tokens) if token == "."}
        rows.append(by_hand(report, after, after, reach))
        far = {
            i
            for i in range(reach + 1, 40 - reach)
            if not any(j in after for j in range(i - reach, i + reach + 1))
        }
        controls.append(by_hand(report, far, after, reach))
    whole = np.concatenate(rows)
    assert kind.count == len(whole) == sum(kind.tokens.values())
    assert kind.counts == tuple(map(len, rows))
    assert kind.ratio == pytest.approx(whole[:, 0].mean())
    assert kind.heads == 5 and kind.heads_below == int((whole[:, 1:].mean(0) < 1).sum())
    for mean, one in zip(kind.means, rows, strict=True):
        assert math.isnan(mean) if not len(one) else mean == pytest.approx(one[:, 0].mean())
    elsewhere = np.concatenate(controls)
    assert found.control.count == len(elsewhere)
    assert found.control.ratio == pytest.approx(elsewhere[:, 0].mean())
    alone = texts.reports[0].modulation(["."], reach=reach)
    assert kind.means[0] == pytest.approx(alone["average_ratio"])


def test_the_interval_is_that_of_texts_drawn_with_replacement() -> None:
    texts = reports((4, 2, 6, 3, 5, 1, 4, 3))
    found = measure_modulation(texts, resamples=4000, seed=3).kinds[0]
    sums = [
        mean * count if count else 0.0
        for mean, count in zip(found.means, found.counts, strict=True)
    ]
    random = np.random.default_rng(11)  # other draws than those of the function
    values = []
    for _ in range(4000):
        chosen = random.choice(len(sums), len(sums))
        values.append(sum(sums[k] for k in chosen) / sum(found.counts[k] for k in chosen))
    low, high = np.percentile(values, [2.5, 97.5])
    width = high - low
    assert abs(found.low - low) < 0.1 * width and abs(found.high - high) < 0.1 * width
    assert found.low < found.ratio < found.high
    again = measure_modulation(texts, resamples=4000, seed=3).kinds[0]
    assert (again.low, again.high) == (found.low, found.high)


def test_one_text_has_no_interval() -> None:
    found = measure_modulation(reports((4,)))
    assert math.isnan(found.kinds[0].low)
    assert json.loads(found.to_json())["kinds"][0]["low"] is None


def test_named_delimiters_are_kinds_of_their_own() -> None:
    texts = reports((4, 3))
    found = measure_modulation(texts, [".", "absent"])
    assert [one.kind for one in found.kinds] == ["."]
    assert found.kinds[0].ratio == pytest.approx(measure_modulation(texts).kinds[0].ratio)
    with pytest.raises(ValueError, match="on both sides"):
        measure_modulation(texts, [".", "w"])  # all neighbors follow a delimiter


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        ((0, 0), {}, "have no delimiters; looked for special tokens"),
        ((2,), {"delimiters": ["%"]}, "looked for '%'"),
        ((2,), {"reach": 0}, "reach must be at least 1; got 0"),
        ((2,), {"resamples": 0}, "resamples must be at least 1"),
    ],
)
def test_what_cannot_be_measured_says_so(counts: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure_modulation(reports(counts), **options)


def test_positions_that_were_not_measured_are_refused() -> None:
    (report,) = reports((3,)).reports
    column = list(range(0, 40, 20))
    layers = tuple(
        dataclasses.replace(layer, ess=layer.ess[:, column], tss=layer.tss[:, column])
        for layer in report.layers
    )
    thin = dataclasses.replace(report, layers=layers, positions=tuple(column))
    with pytest.raises(ValueError, match="measure every position"):
        measure_modulation(StateReports((thin,)))
    with pytest.raises(ValueError, match="no layer of m was read on t0"):
        measure_modulation(StateReports((dataclasses.replace(report, layers=()),)))


def test_the_figure_has_every_model_and_kind() -> None:
    pytest.importorskip("matplotlib")
    from gramian.reports import plot_modulation

    one = measure_modulation(reports((4, 3, 5)))
    other = dataclasses.replace(one, model="m$1")
    figure = plot_modulation([one, other])
    (axes,) = figure.axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["sentence", "elsewhere"]
    middles = [container.lines[0].get_ydata()[0] for container in axes.containers]
    assert middles == pytest.approx([one.kinds[0].ratio] * 2)
    figure.canvas.draw()
    with pytest.raises(ValueError, match="no reports"):
        plot_modulation([])
