"""Models of different depths are compared over relative depth, or refused."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from fractions import Fraction

import pytest
import torch

pytest.importorskip("transformers")

from gramian.analysis import LayerState, StateReport, compare_reports

HORIZON = 12


def make(
    depth: int,
    model: str = "m",
    positions: tuple[int, ...] = tuple(range(HORIZON)),
    paths: tuple[str, ...] | None = None,
    unread: tuple[tuple[str, str], ...] = (),
    **fields: object,
) -> StateReport:
    generator = torch.Generator().manual_seed(depth)
    layers = []
    for path in paths or tuple(f"model.layers.{k}.mixer" for k in range(depth)):
        tss = torch.full((2, len(positions)), 5.0)
        ess = torch.rand(tss.shape, generator=generator)
        layers.append(LayerState(path, "Mix", "recurrence", (0, 1), 2, ess, tss))
    made = StateReport(
        model, tuple(layers), positions, ("a",) * HORIZON, "entropy", None, None, unread, 0.1
    )
    return dataclasses.replace(made, **fields)  # type: ignore[arg-type]


def naive(values: list[float], count: int) -> list[float]:
    """Mean over each interval of the function that is constant on each layer."""
    n = len(values)
    means = []
    for k in range(count):
        low, high = Fraction(k, count), Fraction(k + 1, count)
        total = 0.0
        for layer, value in enumerate(values):
            overlap = min(high, Fraction(layer + 1, n)) - max(low, Fraction(layer, n))
            total += float(max(overlap, Fraction(0)) * count) * value
        means.append(total)
    return means


@pytest.mark.parametrize("depths", [(2, 3), (3, 2, 7), (5, 5), (1, 30), (12, 30)])
def test_layers_are_averaged_by_relative_depth(depths: tuple[int, ...]) -> None:
    reports = [make(depth, f"model {depth}") for depth in depths]
    found = compare_reports(reports)
    count = min(depths)
    assert len(found.depths) == count
    for row, report in zip(found.by_depth(found.ess), reports, strict=True):
        sizes = [float(layer.ess.double().mean()) for layer in report.layers]
        assert row.tolist() == pytest.approx(naive(sizes, count), rel=1e-6)
        assert float(row.mean()) == pytest.approx(float(report.average()), rel=1e-6)
    for row, report in zip(found.by_depth(found.in_use), reports, strict=True):
        shares = [layer.in_use for layer in report.layers]
        assert row.tolist() == pytest.approx(naive(shares, count), rel=1e-6)  # type: ignore[arg-type]
    values = json.loads(json.dumps(found.to_dict()))
    first = torch.tensor(values["average_ess"][0])
    for ess, difference in zip(
        values["average_ess"], values["average_ess_difference"], strict=True
    ):
        torch.testing.assert_close(torch.tensor(difference), torch.tensor(ess) - first)
    assert values["models_in_use"] == pytest.approx([report.in_use for report in reports])


def test_only_common_positions_count_and_the_table_says_so() -> None:
    one, two = make(2, "one", (0, 2, 4, 6, 8)), make(3, "two", (8, 5, 2))
    found = compare_reports([one, two])
    assert found.positions == (2, 8)
    expected = torch.stack([layer.ess[:, [2, 0]].mean() for layer in two.layers]).mean()
    assert float(found.averages[1]) == pytest.approx(float(expected))
    assert "measured at different positions" in str(found)
    assert "measured at different positions" not in str(compare_reports([one, one]))
    with pytest.raises(ValueError, match="among those measured; got 3"):
        one.at([2, 3])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"measure": "tolerance", "tol": 0.1}, "same measure; got entropy and tolerance tol=0.1"),
        ({"tokens": ("a",) * 9, "positions": (0, 1)}, "number of tokens; got 12 and 9"),
        ({"include": "mixer"}, "same include; got core and mixer"),
        ({"layers": ()}, "no layer of m was read"),
    ],
)
def test_what_cannot_be_aligned_is_refused(other: dict[str, object], message: str) -> None:
    report = make(2, positions=(0, 1))
    with pytest.raises(ValueError, match=message):
        compare_reports([report, dataclasses.replace(report, **other)])  # type: ignore[arg-type]


def test_positions_that_never_meet_are_refused() -> None:
    with pytest.raises(ValueError, match="position in common; got 0, 1… and 2, 3…"):
        compare_reports([make(2, positions=(0, 1)), make(2, positions=(2, 3))])
    with pytest.raises(ValueError, match="at least two reports; got 1"):
        compare_reports([make(2)])
    with pytest.raises(ValueError, match="2 reports need as many names; got 1"):
        compare_reports([make(2), make(3)], ["one"])


def test_unread_blocks_keep_their_place() -> None:
    gap = make(
        2,
        paths=("layers.0.mix", "layers.3.mix"),
        unread=(("layers.1.odd", "no."), ("layers.2.odd", "no.")),
    )
    found = compare_reports([gap, make(4)])
    known = [not math.isnan(value) for value in found.by_depth(found.ess)[0].tolist()]
    assert known == [True, False, False, True]
    assert "–" in str(found) and "not read" in str(found)
    assert found.to_dict()["average_ess"][0][0] == float(gap.layers[0].ess.double().mean())


def test_mixers_of_one_block_are_averaged() -> None:
    twice = make(3, paths=("layers.0.attention", "layers.0.scan", "layers.1.scan"))
    found = compare_reports([twice, make(2)])
    first, second, third = (float(layer.ess.double().mean()) for layer in twice.layers)
    assert found.ess[0].tolist() == pytest.approx([(first + second) / 2, third])
    strange = make(3, paths=("encoder.1.x", "encoder.0.x", "decoder.0.x"))
    assert len(compare_reports([strange, make(2)]).ess[0]) == 3


def test_the_table_names_every_model_and_cuts_nothing() -> None:
    rich = pytest.importorskip("rich.console")
    names = [f"/a/long/path/of/a/folder/with/models/number/{k}/checkpoint-1000" for k in range(4)]
    found = compare_reports([make(k + 2) for k in range(4)], names)
    console = rich.Console(width=80, record=True, file=io.StringIO())
    console.print(found)
    text = console.export_text()
    for name in names:
        assert name in "".join(text.split())
    assert "…" not in text
