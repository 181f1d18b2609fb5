"""The demo at a small size: what it writes, what it checks, and how it fails."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from matplotlib.image import imread
from rich.console import Console

from gramian.demo import DemoReport, DemoSettings, TrainingSettings, run_demo
from gramian.demo.measuring import (
    Agreement,
    Decoder,
    bits_per_byte,
    compare_greedy,
    cut_to_tap_zero,
    hankel_spectra,
    interleaved_seconds,
    median_ratio,
)
from gramian.demo.training import train
from gramian.models import GramianConfig, GramianForCausalLM, load

SMALL = DemoSettings(
    hidden_size=24,
    layers=2,
    heads=3,
    training=TrainingSettings(steps=12, batch_size=2, length=63),
    written=20,
    greedy_tokens=12,
    contexts=(32, 257),
    timed_tokens=2,
    timed_rounds=2,
)


def console() -> Console:
    return Console(file=io.StringIO(), width=120)


def small_model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = GramianConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_heads=3,
        filter={"type": "implicit", "frequency": 1.0},
        max_position_embeddings=63,
    )
    return GramianForCausalLM(config).eval()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DemoReport, str]:
    output = tmp_path_factory.mktemp("demo") / "output"
    out = console()
    report = run_demo(output, SMALL, out)
    assert isinstance(out.file, io.StringIO)
    return output, report, out.file.getvalue()


def test_models_figures_and_numbers_are_written(finished: tuple[Path, DemoReport, str]) -> None:
    output, report, _ = finished
    names = {"cost.png", "demo.json", "distilled", "hankel_spectra.png", "original", "quality.png"}
    assert {path.name for path in output.iterdir()} == names
    assert list(output.parent.iterdir()) == [output]
    for picture in output.glob("*.png"):
        assert imread(picture).std() > 0
    numbers = json.loads((output / "demo.json").read_text())
    assert numbers["bits_per_byte"] == report.bits_per_byte
    assert numbers["passed"] == report.passed == all(check.passed for check in report.checks)
    assert len(numbers["checks"]) == 6


def test_saved_models_have_the_quality_reported(finished: tuple[Path, DemoReport, str]) -> None:
    from gramian.demo.text import python_documentation

    output, report, _ = finished
    held_out = python_documentation().held_out
    windows = held_out[: len(held_out) // 63 * 63].view(-1, 63)
    for name in ("original", "distilled"):
        value = bits_per_byte(load(output / name), windows)
        assert value == pytest.approx(report.bits_per_byte[name], rel=1e-5)


def test_recurrence_agrees_with_recomputation(finished: tuple[Path, DemoReport, str]) -> None:
    _, report, _ = finished
    assert report.agreement.tokens == 12
    assert report.agreement.holds()
    assert report.agreement.max_logit_difference < 1e-3


def test_distilled_state_does_not_grow(finished: tuple[Path, DemoReport, str]) -> None:
    _, report, _ = finished
    assert len(set(report.state_bytes["distilled"].values())) == 1
    grown = report.state_bytes["filters as long as the context"]
    assert grown[257] > 4 * grown[32]


def test_everything_is_told(finished: tuple[Path, DemoReport, str]) -> None:
    _, report, told = finished
    for check in report.checks:
        assert check.claim.split(",")[0][:30] in " ".join(told.split())
    assert "written by the distilled model" in told
    assert f"{report.bits_per_byte['bigram model']:.4f}" in told


def test_an_earlier_output_is_replaced_and_another_folder_is_not(
    finished: tuple[Path, DemoReport, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = tmp_path / "folder"
    foreign.mkdir()
    (foreign / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match="not written by the demo"):
        run_demo(foreign, SMALL, console())
    assert [path.name for path in foreign.iterdir()] == ["mine"]

    output, _, _ = finished
    before = {path.name for path in output.iterdir()}

    def fail(*arguments: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr("gramian.demo._run.train", fail)
    with pytest.raises(RuntimeError, match="broken"):
        run_demo(output, SMALL, console())
    assert {path.name for path in output.iterdir()} == before
    assert list(output.parent.iterdir()) == [output]


def test_training_learns_what_can_be_learned() -> None:
    model = small_model()
    data = torch.tensor(list(b"abcdefgh" * 200), dtype=torch.uint8)
    settings = TrainingSettings(steps=60, batch_size=4, length=32, learning_rate=1e-2)
    losses = train(model, data, settings)
    assert losses[0] == pytest.approx(8, abs=1)  # nothing known: about log2(259) bits
    assert losses[-1] < 1
    assert not model.training


def test_learning_rate_rises_and_falls() -> None:
    settings = TrainingSettings(steps=100, learning_rate=1.0)
    rates = [settings.rate_at(step) for step in range(100)]
    peak = rates.index(max(rates))
    assert max(rates) == 1.0
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0.05 <= rates[-1] < 0.06


def test_bits_per_byte_is_the_mean_over_all_but_first_bytes() -> None:
    model = small_model()
    windows = torch.randint(0, 256, (11, 40), dtype=torch.uint8)
    with torch.no_grad():
        loss = model(windows.long(), labels=windows.long()).loss.item()
    assert bits_per_byte(model, windows) == pytest.approx(loss / math.log(2), rel=1e-5)


@torch.no_grad()
def test_cutting_leaves_tap_zero_alone() -> None:
    model = small_model()
    cut = cut_to_tap_zero(model)
    for before, after in zip(model.model.layers, cut.model.layers, strict=True):
        kernel = before.mixer.filter().impulse_response(63)
        shortened = after.mixer.filter().impulse_response(63)
        assert torch.equal(shortened[:, 0], kernel[:, 0])
        assert not shortened[:, 1:].any() and kernel[:, 1:].any()


@torch.no_grad()
def test_spectra_are_those_of_the_dense_blocks() -> None:
    model = small_model()
    for index, (name, values) in enumerate(hankel_spectra(model, 20).items()):
        assert name == f"layer {index}"
        kernel = model.model.layers[index].mixer.filter(20).impulse_response(20).double()
        matrix = torch.zeros(3, 20, 20, dtype=torch.float64)
        for i in range(20):
            for j in range(i + 1):
                matrix[:, i, j] = kernel[:, i - j]
        expected = torch.linalg.svdvals(matrix[:, 10:, :10])
        torch.testing.assert_close(values.double(), expected, rtol=1e-8, atol=1e-10)


def test_a_wrong_token_is_found_with_its_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = small_model(), torch.tensor([[65, 66, 67]])
    right = compare_greedy(model, prompt, 10)
    assert right.first_difference is None and right.holds(0)

    generate = model.generate

    def slip(*args: Any, **kwargs: Any) -> Any:
        result = generate(*args, **kwargs)
        result.sequences[0, prompt.shape[1] + 4] += 1
        return result

    monkeypatch.setattr(model, "generate", slip)
    wrong = compare_greedy(model, prompt, 10)
    assert wrong.first_difference == 4
    assert wrong.gap is not None and wrong.gap > 0
    assert not wrong.holds(wrong.gap / 2)
    assert wrong.holds(wrong.gap)


def test_agreement_up_to_ties() -> None:
    assert Agreement(9, 3, 0.5e-4, 0.0).holds(1e-4)
    assert not Agreement(9, 3, 2e-4, 0.0).holds(1e-4)


def test_ratios_are_taken_within_a_round() -> None:
    assert median_ratio([2.0, 30.0, 4.0], [1.0, 10.0, 4.0]) == 2.0


def test_decoders_take_turns() -> None:
    model = small_model()
    ids = torch.randint(0, 256, (1, 30))
    decoders = {n: Decoder(model, ids[:, :n]) for n in (5, 30)}
    rounds: list[int] = []
    times = interleaved_seconds(decoders, tokens=2, rounds=3, on_round=rounds.append)
    assert times.keys() == {5, 30}
    assert all(len(runs) == 3 and min(runs) > 0 for runs in times.values())
    assert rounds == [1, 2, 3]
    assert decoders[30].cache.get_seq_length() == 30 + 2 + 3 * 2
    assert decoders[30].state_bytes == model.state_bytes(1, 30)
