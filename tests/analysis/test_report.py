"""What a report says of a layer in one number, and what its files say."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import gramian
from gramian.analysis import LayerState, StateReport
from gramian.distillation import distill
from gramian.models import GramianConfig, GramianForCausalLM


def layer(ess: list[list[float]], tss: list[list[float]]) -> LayerState:
    return LayerState(
        "layers.0", "GLA", "recurrence", (0,), 1, torch.tensor(ess), torch.tensor(tss)
    )


def report(one: LayerState, positions: tuple[int, ...], horizon: int) -> StateReport:
    return StateReport("m", (one,), positions, ("a",) * horizon, "entropy", None, None, (), 0.1)


def test_the_share_in_use_is_that_of_the_table() -> None:
    one = layer([[0.0, 1.0, 3.0]], [[0.0, 4.0, 4.0]])
    assert one.utilization.tolist() == [[0.0, 0.25, 0.75]]
    assert one.in_use == pytest.approx(0.5)
    assert "50.0 %" in str(report(one, (0, 4, 5), 9))
    assert layer([[0.0]], [[0.0]]).in_use is None


@pytest.mark.parametrize("horizon", [2, 3, 63, 257])
def test_the_usable_state_is_the_smallest_of_three_bounds(horizon: int) -> None:
    generator = torch.Generator().manual_seed(horizon)
    positions = tuple(torch.randperm(horizon, generator=generator)[:17].tolist())
    tss = torch.randint(0, 12, (5, len(positions)), generator=generator).float()
    ess = tss * torch.rand(tss.shape, generator=generator)
    found = report(layer(ess.tolist(), tss.tolist()), positions, horizon).layers[0]
    shares = []
    for c in range(5):
        for p, i in enumerate(positions):
            usable = min(float(tss[c, p]), i, horizon - i)
            assert float(found.usable[c, p]) == usable
            if usable > 0:
                shares.append(float(ess[c, p]) / usable)
                assert float(found.utilization[c, p]) == pytest.approx(shares[-1], rel=1e-6)
            else:
                assert float(found.utilization[c, p]) == 0
    expected = sum(shares) / len(shares) if shares else None
    assert found.in_use == (None if expected is None else pytest.approx(expected, rel=1e-6))


@pytest.mark.parametrize("mixer", ["hyena", "multi_hyena"])
@pytest.mark.parametrize("length", [24, 90])
def test_every_channel_of_a_distilled_model_has_its_own_order(mixer: str, length: int) -> None:
    torch.manual_seed(0)
    config = GramianConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_heads=2,
        mixers=mixer,
        filter={"type": "implicit", "hidden": 8},
        max_position_embeddings=length,
        vocab_size=30,
    )
    small, made = distill(GramianForCausalLM(config), tol=0.3)
    found = gramian.analyze(small, torch.randint(0, 30, (length,)))
    (one,) = found.main.layers
    copies = 4 if mixer == "multi_hyena" else 1
    orders = made.layers[0].orders
    assert len({*orders}) > 1
    for row, order in zip(one.usable, orders, strict=True):
        bounds = [min(order * copies, i, length - i) for i in range(length)]
        assert row.tolist() == bounds
    assert bool((one.ess <= one.usable * (1 + 1e-5)).all())


def test_reports_of_the_first_format_are_read(tmp_path: Path) -> None:
    made = report(layer([[0.0, 1.0, 3.0]], [[0.0, 4.0, 4.0]]), (0, 4, 5), 9)
    values = json.loads(made.to_json())
    old = {key: values[key] for key in values.keys() - {"include", "in_use", "ranking"}}
    kept = ("name", "mixer", "kind", "channels", "count", "average_ess", "ess", "tss")
    old["layers"] = [{key: one[key] for key in kept} for one in values["layers"]]
    old["format"] = "gramian.state_report/1"
    (tmp_path / "old.json").write_text(json.dumps(old))
    loaded = StateReport.load(tmp_path / "old.json")
    assert loaded.in_use == made.in_use and loaded.include == "core"
    assert loaded.layers[0].reader == "" and loaded.layers[0].error is None
    with pytest.raises(ValueError, match=r"state_report/1' or .*; got 'x'"):
        StateReport.from_dict({"format": "x"})


@pytest.mark.parametrize("error", [None, 0.25])
def test_nothing_is_cut_at_eighty_columns(error: float | None) -> None:
    console = pytest.importorskip("rich.console")
    name = "SomeVeryLongNameOfAGatedDeltaRuleMixerWithShortConvolutions"
    one = layer([[0.0, 1.0, 3.0]], [[0.0, 4.0, 4.0]])
    one = dataclasses.replace(one, mixer=name, mean_error=error)
    shown = console.Console(width=80, record=True, file=io.StringIO())
    shown.print(report(one, (0, 4, 5), 9))
    text = shown.export_text()
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    assert name in "".join(word for word in text.split() if word in name)
    for number in ("1.33", "3.00", "2.7", "50.0 %"):
        assert number in text
    assert ("± 0.25" in text) == (error is not None)


def test_reports_whose_numbers_do_not_fit_their_positions_are_refused() -> None:
    values = report(layer([[1.0, 2.0]], [[2.0, 3.0]]), (2, 4), 9).to_dict()
    values["positions"] = [2]
    with pytest.raises(ValueError, match=r"ess must have a number for each channel and position"):
        StateReport.from_dict(values)
