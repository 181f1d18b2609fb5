"""Labels of every model with a head: what is -100 counts nowhere, what does not fit is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gramian.models import (
    GramianConfig,
    GramianForCausalLM,
    GramianForPairClassification,
    GramianForReconstruction,
    GramianForSequenceClassification,
    GramianForSignalRegression,
)
from gramian.models.labels import LabelError

MakeConfig = Callable[..., GramianConfig]

BATCH, LENGTH, VOCABULARY = 3, 5, 50
IDS = torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH)
MULTI = "multi_label_classification"
MODELS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "tokens": (GramianForCausalLM, {}),
    "reconstruction": (GramianForReconstruction, {}),
    "classes": (GramianForSequenceClassification, {"num_labels": 4}),
    "pairs": (GramianForPairClassification, {"num_labels": 4}),
    "several": (GramianForSequenceClassification, {"num_labels": 4, "problem_type": MULTI}),
    "several of pairs": (GramianForPairClassification, {"num_labels": 4, "problem_type": MULTI}),
    "one number": (GramianForSequenceClassification, {"num_labels": 1}),
    "one number of pairs": (GramianForPairClassification, {"num_labels": 1}),
    "numbers": (GramianForSequenceClassification, {"num_labels": 4, "problem_type": "regression"}),
    "signal": (GramianForSignalRegression, {"num_labels": 2}),
}
OF_CLASSES = ("tokens", "reconstruction", "classes", "pairs")
OF_NUMBERS = tuple(name for name in MODELS if name not in OF_CLASSES)
WITHOUT_ANY = "labels must leave something to score; all of them are -100"

Score = Callable[..., Any]


@pytest.fixture
def score(make_config: MakeConfig) -> Score:
    """Scores a float64 model of a name in `MODELS` on labels."""

    def run(name: str, labels: Tensor, **kwargs: Any) -> Any:
        torch.manual_seed(0)
        kind, options = MODELS[name]
        model = kind(make_config(**options)).double().eval()
        inputs: dict[str, Any] = {"input_ids": IDS}
        if kind is GramianForPairClassification:
            inputs["input_ids_2"] = IDS + 1
        if name == "tokens":
            inputs["use_cache"] = False
            kwargs.setdefault("shift_labels", labels)
        return model(**inputs, labels=labels, **kwargs)

    return run


def fitting(name: str) -> Tensor:
    """Labels of every value that they may have, at random."""
    torch.manual_seed(1)
    shapes = {"classes": (BATCH,), "pairs": (BATCH,), "signal": (BATCH, LENGTH, 2)}
    if name in ("tokens", "reconstruction"):
        return torch.randint(VOCABULARY, (BATCH, LENGTH))
    if name in OF_CLASSES:
        return torch.tensor([0, 3, 1])
    one = name.startswith("one number")
    shape = shapes.get(name, (BATCH,) if one else (BATCH, 4))
    return torch.rand(shape, dtype=torch.float64)


def by_hand(name: str, logits: Tensor, labels: Tensor, real: Tensor | None = None) -> float:
    """The mean over what is due, number by number."""
    losses = []
    if name in OF_CLASSES:
        for row, label in zip(
            logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), strict=True
        ):
            if label != -100:
                total = math.log(sum(math.exp(value) for value in row.tolist()))
                losses.append(total - row[int(label)].item())
    else:
        real = torch.ones_like(labels) if real is None else real
        numbers = (logits.reshape(-1), labels.reshape(-1), real.reshape(-1))
        for logit, label, due in zip(*map(Tensor.tolist, numbers), strict=True):
            if label == -100 or not due:
                continue
            if name.startswith("several"):
                losses.append(math.log1p(math.exp(logit)) - label * logit)
            else:
                losses.append((logit - label) ** 2)
    return math.fsum(losses) / len(losses)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_ignored_counts_nowhere(name: str, score: Score) -> None:
    labels = fitting(name)
    flat = labels.view(-1)
    for ignored in ([], [0], [len(flat) - 1], list(range(1, len(flat)))):
        chosen = labels.clone()
        chosen.view(-1)[ignored] = -100
        outputs = score(name, chosen)
        assert outputs.loss.item() == pytest.approx(by_hand(name, outputs.logits, chosen), rel=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_ignored_has_no_gradient(name: str, score: Score) -> None:
    labels = fitting(name)
    labels[0] = -100
    outputs = score(name, labels)
    (gradient,) = torch.autograd.grad(outputs.loss, outputs.logits)
    assert gradient.isfinite().all() and not gradient[0].any()
    assert gradient[1:].any()


@pytest.mark.parametrize("name", MODELS)
def test_parts_of_a_batch_add_up(name: str, score: Score) -> None:
    """With the count of the whole batch, parts of it give losses whose sum is the whole's."""
    labels = fitting(name)
    labels[0] = -100
    labels.view(-1)[-1] = -100
    due = int((labels != -100).sum())
    whole = score(name, labels).loss.item()
    parts = 0.0
    for row in range(BATCH):
        alone = torch.full_like(labels, -100)
        alone[row] = labels[row]
        parts += score(name, alone, num_items_in_batch=due).loss.item()
    assert parts == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_to_score_is_refused(name: str, score: Score) -> None:
    with pytest.raises(LabelError, match=WITHOUT_ANY):
        score(name, torch.full_like(fitting(name), -100))


@pytest.mark.each
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("change", ["more rows", "fewer rows", "another dimension", "flat"])
def test_another_shape_is_refused(name: str, score: Score, change: str) -> None:
    labels = fitting(name)
    wrong = {
        "more rows": torch.cat([labels, labels[:1]]),
        "fewer rows": labels[:-1],
        "another dimension": labels[None],
        "flat": labels.reshape(-1) if labels.ndim > 1 else labels.reshape(1, 1, -1),
    }[change]
    with pytest.raises(LabelError, match=r"labels must be .*; got") as caught:
        score(name, wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.each
@pytest.mark.parametrize("name", OF_CLASSES)
@pytest.mark.parametrize("value", [-1, -99, -101, "classes", 10**9])
def test_a_class_that_there_is_not_is_refused(name: str, score: Score, value: Any) -> None:
    labels = fitting(name)
    classes = VOCABULARY if labels.ndim == 2 else 4
    labels.view(-1)[1] = classes if value == "classes" else value
    given = labels.view(-1)[1]
    place = r"\[0, 1\]" if labels.ndim == 2 else r"\[1\]"
    sentence = f"from 0 to {classes - 1}, or be -100 where nothing is due; got {given} at {place}"
    with pytest.raises(LabelError, match=sentence):
        score(name, labels)


@pytest.mark.parametrize("name", ["tokens", "reconstruction"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_tokens_of_another_dtype_are_refused(name: str, score: Score, dtype: torch.dtype) -> None:
    with pytest.raises(LabelError, match=f"must be integers; got {str(dtype)[6:]}"):
        score(name, fitting(name).to(dtype))


@pytest.mark.each
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize("name", OF_CLASSES)
def test_integers_of_any_width_are_the_same_labels(
    name: str, score: Score, dtype: torch.dtype
) -> None:
    labels = fitting(name)
    assert torch.equal(score(name, labels.to(dtype)).loss, score(name, labels).loss)


@pytest.mark.each
@pytest.mark.parametrize("name", OF_NUMBERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(name: str, score: Score, value: float) -> None:
    labels = fitting(name)
    labels.view(-1)[-1] = value
    accepted = "lie from 0 to 1" if name.startswith("several") else "be finite numbers"
    with pytest.raises(LabelError, match=f"must {accepted}, or be -100 .*; got {value:g} at"):
        score(name, labels)


@pytest.mark.parametrize("name", ["several", "several of pairs"])
@pytest.mark.parametrize("value", [-1.0, 1.5, 2.0, -99.0])
def test_several_labels_are_shares(name: str, score: Score, value: float) -> None:
    labels = fitting(name)
    labels[1, 2] = value
    with pytest.raises(LabelError, match=rf"from 0 to 1, .* got {value:g} at \[1, 2\]"):
        score(name, labels)


@pytest.mark.parametrize("name", OF_NUMBERS)
def test_complex_numbers_are_refused(name: str, score: Score) -> None:
    with pytest.raises(LabelError, match=r"must be real numbers.*; got complex128"):
        score(name, fitting(name).to(torch.complex128))


@pytest.mark.each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("name", OF_NUMBERS)
def test_numbers_of_any_dtype_may_be_ignored(name: str, score: Score, dtype: torch.dtype) -> None:
    labels = fitting(name).round().to(dtype)
    labels.view(-1)[0] = -100
    outputs = score(name, labels)
    assert outputs.loss.item() == pytest.approx(by_hand(name, outputs.logits, labels), rel=1e-5)


def test_a_mask_and_ignored_numbers_of_a_signal_add_up(score: Score) -> None:
    labels = fitting("signal")
    labels[0, 0, 1] = labels[1, 4, 0] = -100
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[0, 3:] = 0
    labels[0, 3:] = math.nan  # padding may be anything
    outputs = score("signal", labels, attention_mask=mask)
    real = mask[..., None].expand(labels.shape)
    assert outputs.loss.item() == pytest.approx(by_hand("signal", outputs.logits, labels, real))
    labels[0, :3] = -100
    with pytest.raises(LabelError, match=WITHOUT_ANY):
        score("signal", labels[:1].expand(3, -1, -1), attention_mask=mask[:1].expand(3, -1))


def test_labels_that_a_language_model_shifts(make_config: MakeConfig) -> None:
    torch.manual_seed(0)
    model = GramianForCausalLM(make_config()).double().eval()
    labels = fitting("tokens")
    labels[0, 2:] = -100
    outputs = model(IDS, labels=labels, use_cache=False)
    expected = by_hand("tokens", outputs.logits[:, :-1], labels[:, 1:])
    assert outputs.loss.item() == pytest.approx(expected, rel=1e-6)
    labels[:, 1:] = -100  # the first is never predicted
    with pytest.raises(LabelError, match=WITHOUT_ANY):
        model(IDS, labels=labels)
    with pytest.raises(LabelError, match=WITHOUT_ANY):
        model(IDS[:, :1], labels=IDS[:, :1])
    with pytest.raises(LabelError, match=r"labels must be \(3, 2\); got \(3, 5\)"):
        model(IDS, labels=IDS, logits_to_keep=2)


def test_the_problem_is_kept_and_not_taken_from_labels_that_do_not_fit(
    make_config: MakeConfig,
) -> None:
    model = GramianForSequenceClassification(make_config(num_labels=2)).double()
    with pytest.raises(LabelError, match="for multi_label_classification"):
        model(IDS, labels=torch.ones(3))
    assert model.config.problem_type is None
    model(IDS, labels=torch.tensor([True, False, True]))
    assert model.config.problem_type == "single_label_classification"
    with pytest.raises(LabelError, match=r"must be integers for single_label.*; got float32"):
        model(IDS, labels=torch.ones(3))
    several = GramianForSequenceClassification(make_config(num_labels=2)).double()
    several(IDS, labels=torch.ones(3, 2, dtype=torch.bool))
    assert several.config.problem_type == "multi_label_classification"


def test_half_precision_is_scored_in_single(score: Score, make_config: MakeConfig) -> None:
    for name, (kind, options) in MODELS.items():
        model = kind(make_config(**options)).to(torch.bfloat16).eval()
        inputs = {"input_ids": IDS}
        if kind is GramianForPairClassification:
            inputs["input_ids_2"] = IDS
        outputs = model(**inputs, labels=fitting(name))
        assert outputs.logits.dtype == torch.bfloat16, name
        assert outputs.loss.dtype == torch.float32, name
