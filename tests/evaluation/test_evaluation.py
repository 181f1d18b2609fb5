"""Perplexity against a loop over its definition; scores of tasks; errors of differences."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")

from transformers import GPT2Config, GPT2LMHeadModel

from gramian.distillation import distill
from gramian.evaluation import (
    EvaluationReport,
    Measure,
    evaluate_task,
    perplexity,
)
from gramian.evaluation._measure import difference_error, ratio
from gramian.models import (
    ByteTokenizer,
    GramianConfig,
    GramianForCausalLM,
    GramianForPairClassification,
    GramianForReconstruction,
    GramianForSequenceClassification,
    GramianForSignalRegression,
    GramianPreTrainedModel,
)
from gramian.tasks import build

TEXT = "The states of a recurrence: naïve, “small” and many. " * 3


def ours(seed: int = 0, **changes: Any) -> GramianForCausalLM:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_heads": 3,
        "filter": {"type": "implicit", "frequency": 1.0},
        "max_position_embeddings": 64,
        "initializer_range": 0.4,
    }
    return GramianForCausalLM(GramianConfig(**(settings | changes))).eval()


def gpt2() -> Any:
    torch.manual_seed(1)
    sizes = {"n_embd": 24, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 259}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.4)).eval()


@torch.no_grad()
def naive(model: Any, ids: list[int], window: int, stride: int) -> list[float]:
    """-log p of every token but the first, from what precedes it in the first window with it."""
    starts = []
    for place in range(1, len(ids)):
        start = 0
        while place > start + window:  # inputs start … start + window - 1 predict up to there
            start += stride
        starts.append(start)
    losses = torch.zeros(len(ids), dtype=torch.float64)
    lengths = torch.arange(1, len(ids)) - torch.tensor(starts)
    for length in lengths.unique().tolist():  # contexts as long as each other are one batch
        places = 1 + torch.nonzero(lengths == length)[:, 0]
        contexts = torch.tensor([ids[place - length : place] for place in places.tolist()])
        logits = model(contexts).logits[:, -1].double().log_softmax(-1)
        losses[places] = -logits.gather(1, torch.tensor(ids)[places, None])[:, 0]
    return losses[1:].tolist()


@pytest.mark.parametrize("model", [ours(), gpt2()], ids=["ours", "gpt2"])
@pytest.mark.parametrize(
    ("window", "stride", "batch"),
    [(64, 32, 1), (64, 64, 2), (13, 5, 3), (13, 13, 1), (7, 1, 8), (1, 1, 4), (64, 63, 1)],
)
def test_perplexity_is_that_of_its_definition(
    model: Any, window: int, stride: int, batch: int
) -> None:
    score = perplexity(model, ByteTokenizer(), TEXT, window=window, stride=stride, batch_size=batch)
    ids = list(TEXT.encode())
    losses = naive(model, ids, window, stride)
    assert score.tokens == sum(score.counts) == len(ids) - 1 == score.bytes
    assert score.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert score.bits_per_byte == pytest.approx(np.sum(losses) / math.log(2) / len(ids[1:]))
    if window < len(ids):
        assert sum(score.counts[1:-1]) == stride * (len(score.counts) - 2)
    loss, power, bits = score.measures("text")[:3]
    assert (loss.value, power.value) == pytest.approx((score.loss, score.perplexity))
    assert bits.value == pytest.approx(score.bits_per_byte)
    if loss.error is not None and power.error is not None:
        assert power.error == pytest.approx(power.value * loss.error)


def test_a_text_shorter_than_the_window_and_defaults() -> None:
    model = ours()
    score = perplexity(model, ByteTokenizer(), "abc")
    assert (score.window, score.stride, score.counts) == (64, 32, (2,))
    assert score.loss == pytest.approx(np.mean(naive(model, list(b"abc"), 64, 32)), rel=1e-5)
    assert score.measures("text")[0].error is None
    seen: list[tuple[int, int]] = []
    perplexity(model, ByteTokenizer(), "x" * 200, progress=lambda *now: seen.append(now))
    assert seen[-1][0] == seen[-1][1] == 6


@pytest.mark.parametrize(
    ("text", "options", "sentence"),
    [
        ("", {}, "at least 2 tokens; it has 0"),
        ("a", {}, "at least 2 tokens; it has 1"),
        ("abc", {"window": 0}, "window must be at least 1 token; got 0"),
        ("abc", {"window": 4, "stride": 5}, "stride must lie from 1 to the window, 4; got 5"),
        ("abc", {"stride": 0}, "stride must lie from 1 to"),
        ("abc", {"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_mistakes_about_windows(text: str, options: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        perplexity(ours(), ByteTokenizer(), text, **options)


@pytest.mark.parametrize("of", ["mean", "exponential", "root"])
def test_standard_errors_are_those_of_repeated_draws(of: str) -> None:
    """Of ratios and functions of them, and of paired differences: against 4,000 fresh draws."""
    random = np.random.default_rng(0)

    def draw() -> tuple[Measure, Measure]:
        weights = random.integers(1, 20, size=60)
        hard = random.gamma(2.0, size=60)
        one = weights * hard + random.normal(size=60)
        other = weights * (hard + 0.1) + random.normal(size=60)
        options: dict[str, Any] = {"higher_is_better": False, "scale": 0.5, "of": of}
        return (
            ratio("t", "m", list(one), list(weights), **options),
            ratio("t", "m", list(other), list(weights), **options),
        )

    draws = [draw() for _ in range(4000)]
    spread = np.std([one.value for one, _ in draws])
    told = np.sqrt(np.mean([one.error**2 for one, _ in draws if one.error is not None]))
    assert told == pytest.approx(spread, rel=0.08)
    differences = [one.value - other.value for one, other in draws]
    errors = [difference_error(one, other) for one, other in draws]
    told = np.sqrt(np.mean([error**2 for error in errors if error is not None]))
    assert told == pytest.approx(np.std(differences), rel=0.1)
    assert told < 0.3 * spread  # what is hard for both cancels


def test_means_have_the_usual_standard_error() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    measure = ratio("t", "accuracy", values, [1.0] * 5, higher_is_better=True)
    assert measure.value == 0.6
    assert measure.error == pytest.approx(np.std(values, ddof=1) / math.sqrt(5))
    alone = Measure("t", "m", 0.5, 0.3, 5)
    assert difference_error(measure, alone) == pytest.approx(math.hypot(measure.error or 0, 0.3))
    assert difference_error(measure, Measure("t", "m", 0.5, None, 5)) is None
    assert difference_error(measure, measure) == 0


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_a_task_is_scored_by_its_definition(batch: int) -> None:
    model = ours(vocab_size=32)
    task = build("mqar", vocab_size=32, length=16, pairs=3, eval_examples=20)
    measures = {
        one.metric: one for one in evaluate_task(model, task, name="mqar", seed=5, batch_size=batch)
    }
    losses, right, whole = [], [], []
    for row in task.rows("test", 5):
        with torch.no_grad():
            logits = model(torch.as_tensor(row["input_ids"])[None].long()).logits[0].double()
        labels = torch.as_tensor(row["labels"]).long()
        due = labels >= 0
        losses += (-logits.log_softmax(-1)[due, labels[due]]).tolist()
        hits = (logits.argmax(-1) == labels)[due].double().tolist()
        right += hits
        whole.append(float(all(hits)))
    assert measures["loss"].value == pytest.approx(np.mean(losses), rel=1e-5)
    assert measures["accuracy"].value == pytest.approx(np.mean(right))
    assert measures["sequence_accuracy"].value == pytest.approx(np.mean(whole))
    assert measures["loss"].units == 20 and measures["accuracy"].higher_is_better
    few = evaluate_task(model, task, seed=5, examples=3)
    assert few[0].units == 3 and few[0].value == pytest.approx(np.mean(losses[:9]), rel=1e-5)


def test_foreign_models_and_classifiers_are_scored_too() -> None:
    task = build("mqar", vocab_size=32, length=16, pairs=3, eval_examples=8)
    assert 0 <= evaluate_task(gpt2(), task)[1].value <= 1
    torch.manual_seed(0)
    config = GramianConfig(
        hidden_size=8,
        num_hidden_layers=1,
        mixers="long_convolution",
        filter={"type": "rtf", "state_size": 4},
        vocab_size=18,
        num_labels=10,
        max_position_embeddings=32,
    )
    listops = build("lra/listops", min_length=4, max_length=24, eval_examples=9)
    measures = evaluate_task(GramianForSequenceClassification(config), listops, batch_size=4)
    assert [one.metric for one in measures] == ["loss", "accuracy"]
    assert measures[0].units == 9
    with pytest.raises(ValueError, match=r"GramianForSequenceClassification is needed; .*CausalLM"):
        evaluate_task(ours(), listops)
    with pytest.raises(ValueError, match="is needed; the model is a GPT2LMHeadModel"):
        evaluate_task(gpt2(), build("lra/listops", min_length=4, max_length=24, eval_examples=2))
    with pytest.raises(ValueError, match="has 1000 tokens and the model only 259"):
        evaluate_task(ours(), build("mqar", vocab_size=1000))
    with pytest.raises(ValueError, match="of the kind 'signal', for which a GramianForSignal"):
        evaluate_task(ours(), build("delay"))
    with pytest.raises(ValueError, match=r"'signal', for which .* is a GPT2LMHeadModel"):
        evaluate_task(gpt2(), build("delay"))
    with pytest.raises(ValueError, match="unknown split"):
        evaluate_task(ours(), task, split="tests")


def little(kind: type[GramianPreTrainedModel], **changes: Any) -> GramianPreTrainedModel:
    torch.manual_seed(1)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "mixers": "long_convolution"}
    filter = {"type": "rtf", "state_size": 4}
    return kind(GramianConfig(**sizes, filter=filter, max_position_embeddings=64, **changes)).eval()


@pytest.mark.parametrize("batch", [2, 16])
def test_signals_are_scored_by_their_squared_errors(batch: int) -> None:
    model = little(GramianForSignalRegression, input_size=1, num_labels=3)
    delay = build("delay", length=40, lags=3, lag=5, eval_examples=7)
    mse, relative = evaluate_task(model, delay, seed=2, batch_size=batch)
    errors, energies = [], []
    for row in delay.rows("test", 2):
        due = torch.as_tensor(row["labels"]).double()
        with torch.no_grad():
            given = model(input_values=torch.as_tensor(row["input_values"])[None]).logits[0]
        errors.append(float((given.double() - due).square().sum()))
        energies.append(float(due.square().sum()))
    assert (mse.metric, relative.metric) == ("mse", "relative_error")
    assert mse.value == pytest.approx(sum(errors) / (7 * 40 * 3), rel=1e-5)
    assert relative.value == pytest.approx(math.sqrt(sum(errors) / sum(energies)), rel=1e-5)
    assert mse.units == 7 and relative.higher_is_better is False
    with pytest.raises(ValueError, match="has 4 numbers at a position and the model has 3"):
        evaluate_task(model, build("delay", length=40, lags=4, lag=5, eval_examples=7))
    with pytest.raises(ValueError, match="has inputs of 1 numbers and the model takes token ids"):
        evaluate_task(little(GramianForSignalRegression, num_labels=3), delay)


def test_reconstructions_and_pairs_are_scored(tmp_path: Path) -> None:
    compression = build("mad/compression", eval_examples=6, vocab_size=8, length=12)
    size = compression.description().vocab_size
    model = little(GramianForReconstruction, vocab_size=size)
    measures = {one.metric: one for one in evaluate_task(model, compression, batch_size=4)}
    right, losses = [], []
    for row in compression.rows("test", 0):
        ids, labels = (torch.as_tensor(row[key]).long() for key in ("input_ids", "labels"))
        with torch.no_grad():
            logits = model(ids[None]).logits[0].double()
        due = labels >= 0
        right += (logits.argmax(-1) == labels)[due].double().tolist()
        losses += (-logits.log_softmax(-1)[due, labels[due]]).tolist()
    assert measures["accuracy"].value == pytest.approx(np.mean(right))
    assert measures["loss"].value == pytest.approx(np.mean(losses), rel=1e-5)
    assert set(measures) == {"loss", "accuracy", "sequence_accuracy"}

    (tmp_path / "new_aan_pairs.eval.tsv").write_text(
        "".join(f"{i % 2}\t{i}\t{i + 1}\tone paper {i}\tanother {'x' * i}\n" for i in range(5))
    )
    for split in ("train", "test"):
        (tmp_path / f"new_aan_pairs.{split}.tsv").write_text("1\t1\t2\ta\tb\n")
    pairs = build("lra/retrieval", path=str(tmp_path), length=32)
    model = little(GramianForPairClassification, vocab_size=259, num_labels=2)
    measures = {one.metric: one for one in evaluate_task(model, pairs, split="validation")}
    losses = []
    for row in pairs.rows("validation", 0):
        first, second = (torch.as_tensor(row[f"input_ids{end}"])[None] for end in ("", "_2"))
        with torch.no_grad():
            logits = model(input_ids=first.long(), input_ids_2=second.long()).logits[0].double()
        losses.append(float(-logits.log_softmax(-1)[int(row["labels"])]))
    assert measures["loss"].value == pytest.approx(np.mean(losses), rel=1e-5)
    assert measures["loss"].units == 5
    with pytest.raises(ValueError, match="has 2 classes and the model has 1"):
        evaluate_task(little(GramianForPairClassification, vocab_size=259, num_labels=1), pairs)


def test_the_report_of_a_distillation() -> None:
    original = ours()
    small, _ = distill(original, order=2)
    scores = [
        perplexity(one, ByteTokenizer(), TEXT, window=16).measures("text")
        for one in (original, small)
    ]
    report = EvaluationReport("small", tuple(scores[1]), "original", tuple(scores[0]))
    pair = report.comparisons[0]
    assert pair.difference == scores[1][0].value - scores[0][0].value
    assert pair.error is not None and pair.error > 0
    values = json.loads(report.to_json())
    assert values["comparisons"][0]["difference"] == pair.difference
    assert values["comparisons"][0]["error"] == pair.error
    line = report.to_markdown().splitlines()[2]
    assert line == (
        f"| text | loss | ↓ | {scores[0][0].value:.4f} ± {scores[0][0].error:.4f} | "
        f"{scores[1][0].value:.4f} ± {scores[1][0].error:.4f} | "
        f"{pair.difference:+.4f} ± {pair.error:.4f} |"
    )
    alone = EvaluationReport("small", tuple(scores[1]))
    assert "before" not in alone.to_dict() and "| units |" in alone.to_markdown()


def test_a_tokenizer_with_a_beginning_predicts_every_byte(tmp_path: Path) -> None:
    class Beginning:
        """Puts a token before the text, as Llama's does."""

        is_fast = True

        def __call__(self, text: str, **options: Any) -> dict[str, Any]:
            ids = list(text.encode())
            return {
                "input_ids": [256, *ids],
                "offset_mapping": [(0, 0), *((i, i + 1) for i in range(len(ids)))],
            }

    model = ours()
    score = perplexity(model, Beginning(), "abcdef")
    assert score.tokens == score.bytes == 6
    expected = naive(model, [256, *b"abcdef"], 64, 32)
    assert score.nats == pytest.approx(sum(expected), rel=1e-5)
