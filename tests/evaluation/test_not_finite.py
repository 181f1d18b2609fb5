"""Models whose outputs are NaN: null in valid JSON, and a status other than 0."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")

from gramian import cli, tasks
from gramian.evaluation import EvaluationReport, evaluate_task, perplexity
from gramian.evaluation._measure import ratio
from gramian.models import (
    ByteTokenizer,
    GramianConfig,
    GramianForCausalLM,
    GramianForReconstruction,
    GramianForSequenceClassification,
    GramianForSignalRegression,
)

SMALL = {"train_examples": 4, "eval_examples": 5}
OF: dict[str, tuple[type[Any], str, dict[str, Any]]] = {
    "tokens": (GramianForCausalLM, "mqar", {"vocab_size": 32, "length": 16, "pairs": 2}),
    "classes": (
        GramianForSequenceClassification,
        "lra/listops",
        {"min_length": 4, "max_length": 24},
    ),
    "signal": (GramianForSignalRegression, "delay", {"length": 30, "lags": 2, "lag": 5}),
    "reconstruction": (GramianForReconstruction, "mad/compression", {}),
}

Call = Callable[..., tuple[int, str, str]]


def strictly(text: str) -> Any:
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def build(name: str) -> tuple[Any, tasks.Task]:
    kind, task_name, settings = OF[name]
    task = tasks.build(task_name, **settings, **SMALL)
    description = task.description()
    torch.manual_seed(0)
    config = GramianConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_heads=2,
        max_position_embeddings=description.length,
        vocab_size=description.vocab_size or 32,
        input_size=description.input_size,
        num_labels=description.num_labels or 2,
    )
    return kind(config).eval(), task


def spoil(model: Any) -> None:
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Call:
    def main(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["gramian", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return (int(exit.value.code or 0), *capfd.readouterr())

    return main


@pytest.mark.parametrize("name", OF)
def test_scores_are_nan_too(name: str) -> None:
    """An accuracy among them: the largest of NaN is no answer."""
    model, task = build(name)
    fine = evaluate_task(model, task)
    assert all(math.isfinite(one.value) for one in fine)
    spoil(model)
    measures = evaluate_task(model, task)
    assert [one.metric for one in measures] == [one.metric for one in fine]
    for one in measures:
        assert math.isnan(one.value) and one.error is None and one.influence is None, one.metric
    report = EvaluationReport("m", tuple(measures), "n", tuple(fine))
    assert report.unusable == tuple(measures)
    values = strictly(report.to_json())
    assert all(one["value"] is None for one in values["measures"])
    assert all(one["difference"] is None for one in values["comparisons"])
    assert "nan" in report.to_markdown()


def test_one_row_is_enough() -> None:
    model, task = build("tokens")
    row = next(iter(task.rows("test", 0)))
    with torch.no_grad():
        model.model.embed_tokens.weight[int(row["input_ids"][0])] = math.nan
    assert all(math.isnan(one.value) for one in evaluate_task(model, task))


@pytest.mark.parametrize("output", [[], ["--output", "numbers"]])
@pytest.mark.parametrize("name", OF)
def test_evaluate_ends_with_status_1(
    name: str, output: list[str], call: Call, tmp_path: Path
) -> None:
    model, _ = build(name)
    spoil(model)
    model.save_pretrained(tmp_path / "model")
    _, task, settings = OF[name]
    changes = [f"--set={key}={value}" for key, value in (settings | SMALL).items()]
    status, out, err = call("evaluate", "model", "--task", task, *changes, "--json", *output)
    assert status == 1
    assert all(one["value"] is None for one in strictly(out)["measures"])
    assert err.count("\n") == 1 and "is nan: the model's weights or outputs hold NaN" in err
    if output:
        written = (tmp_path / "numbers" / "evaluation.json").read_text()
        assert strictly(written) == strictly(out)
    status, out, err = call("evaluate", "model", "--task", task, *changes)
    assert status == 1 and "nan" in out and err.count("\n") == 1


def test_a_text_and_its_continuation(call: Call, tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    model = GramianForCausalLM(
        GramianConfig(hidden_size=8, num_hidden_layers=1, num_heads=2, vocab_size=len(tokenizer))
    ).eval()
    model.save_pretrained(tmp_path / "fine")
    spoil(model)
    model.save_pretrained(tmp_path / "model")
    for name in ("fine", "model"):
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "text.txt").write_text("All models are wrong. " * 4)
    score = perplexity(model, tokenizer, "All models are wrong.", window=8)
    assert math.isnan(score.loss) and math.isnan(score.perplexity)
    assert math.isnan(score.bits_per_byte)
    assert all(math.isnan(one.value) for one in score.measures("text"))
    for models in (["model"], ["fine", "--against", "model"], ["model", "--against", "fine"]):
        status, out, err = call("evaluate", *models, "--text", "text.txt", "--json")
        assert status == 1 and err.count("\n") == 1
        values = strictly(out)
        null = "measures" if models[0] == "model" else "before"
        assert all(one["value"] is None for one in values[null])
    for way in ([], ["--greedy"], ["--stream"], ["--json"], ["--greedy", "--json"]):
        status, out, err = call("generate", "model", "--prompt", "All", *way)
        assert status == 1 and err.count("\n") == 1
        assert out == ("All" if "--stream" in way else "")  # no more than what was given
        assert err.startswith("gramian: model: the model's logits are not finite")


def test_a_power_that_is_larger_than_every_number_is_no_number() -> None:
    """A loss of 800 nats is finite, its perplexity is not, and 700 is not put in its place."""
    for losses, value in (([800.0, 900.0], math.inf), ([700.0, 708.0], math.exp(704.0))):
        one = ratio("t", "m", losses, [1.0, 1.0], higher_is_better=False, of="exponential")
        assert one.value == pytest.approx(value)
        assert (one.error is None) == math.isinf(value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("of", ["mean", "exponential", "root"])
def test_a_total_that_is_not_finite(value: float, of: str) -> None:
    one = ratio("t", "m", [1.0, value], [1.0, 2.0], higher_is_better=False, of=of)
    assert not math.isfinite(one.value) and one.error is None and one.units == 2
