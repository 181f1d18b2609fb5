"""`shrink` with labels: what counts in errors, losses and recoveries."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Mamba2Config, Mamba2ForCausalLM

import gramian
from gramian.models import GramianConfig, GramianForCausalLM
from gramian.shrinking import Recovery
from gramian.shrinking._choosing import Choices
from gramian.shrinking._family import find_layers
from gramian.shrinking._magnitudes import magnitudes
from gramian.shrinking._passes import Scores, measure_importance, window_scores
from gramian.shrinking._texts import Windows, windows_of
from gramian.shrinking._trying import Run

VOCABULARY = 31


def model_of(kind: str = "mamba2") -> Any:
    torch.manual_seed(0)
    if kind == "mamba2":
        shape = {"num_heads": 4, "head_dim": 8, "state_size": 6, "n_groups": 2, "chunk_size": 16}
        config = Mamba2Config(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, **shape)
        model: Any = Mamba2ForCausalLM(config)
    else:
        model = GramianForCausalLM(
            GramianConfig(
                vocab_size=VOCABULARY,
                hidden_size=16,
                num_hidden_layers=2,
                num_heads=2,
                mixers=kind,
                linear_recurrence={"state_size": 6},
            )
        )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    return model.eval()


def tokens(count: int = 12, length: int = 21) -> tuple[Tensor, Tensor]:
    """Token ids, and labels of a fifth of them."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (count, length), generator=generator)
    due = torch.rand(count, length, generator=generator) < 0.2
    due[:, 5] = True
    return ids, torch.where(due, ids, -100)


def test_losses_and_accuracies_are_those_of_the_labels() -> None:
    model, (ids, labels) = model_of(), tokens()
    scores = window_scores(model, windows_of({"input_ids": ids, "labels": labels}, None, 8, 10**6))
    with torch.no_grad():
        logits = model(ids).logits.double()
    for row in range(len(ids)):
        losses, right = [], []
        for t in range(1, ids.shape[1]):
            if labels[row, t] != -100:
                predicted = logits[row, t - 1]
                losses.append(-predicted.log_softmax(-1)[labels[row, t]])
                right.append(predicted.argmax() == labels[row, t])
        assert scores.losses[row] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
        assert scores.accuracies[row] == float(torch.stack(right).double().mean())


@pytest.mark.parametrize("kind", ["mamba2", "gated_linear_attention", "gated_delta_net", "s6"])
def test_the_label_criteria_count_errors_where_labels_are_due(kind: str) -> None:
    model, (ids, labels) = model_of(kind), tokens()
    windows = windows_of({"input_ids": ids, "labels": labels}, None, 8, 10**6)
    layers = list(find_layers(model))
    both = measure_importance(model, layers, windows)
    every = measure_importance(model, layers, Windows.of(ids))
    for layer in layers:
        one = both[layer.path]
        assert one.due is not None and torch.equal(one.gram, every[layer.path].gram)
        assert every[layer.path].due is None
    # All positions are the labelled ones and the others.
    inverse = replace(windows, answers=torch.where(windows.answers == -100, ids, -100))
    rest = measure_importance(model, layers, inverse)
    for path, one in both.items():
        other = rest[path].due
        assert one.due is not None and other is not None and float(one.due.norm()) > 0
        torch.testing.assert_close(one.due + other, one.gram, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(one.due / one.due.norm(), one.gram / one.gram.norm(), rtol=1e-3)
    candidates = Choices.of(layers, both, 1).candidates({layer.path: 3 for layer in layers})
    assert {"label error", "label diagonal"} < set(candidates)
    assert "label error" not in Choices.of(layers, every, 1).candidates(
        {layer.path: 3 for layer in layers}
    )


def test_labels_come_as_mappings_rows_tables_and_shifted() -> None:
    ids, labels = tokens()
    expected = windows_of({"input_ids": ids, "labels": labels}, None, 8, 10**6)
    assert torch.equal(expected.ids, ids) and expected.labelled
    assert bool((expected.answers[:, -1] == -100).all())
    shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    rows = [
        {"input_ids": i, "labels": x} for i, x in zip(ids.tolist(), labels.tolist(), strict=True)
    ]
    forms: list[Any] = [
        {"input_ids": ids, "shift_labels": shifted},
        {
            "input_ids": ids.tolist(),
            "labels": labels.tolist(),
            "attention_mask": (ids >= 0).tolist(),
        },
        rows,
    ]
    datasets = pytest.importorskip("datasets")
    forms.append(datasets.Dataset.from_list(rows))
    for form in forms:
        found = windows_of(form, None, 8, 10**6)
        assert torch.equal(found.ids, ids) and torch.equal(found.answers, expected.answers)


def test_texts_with_labels_are_cut_like_texts() -> None:
    ids, labels = (x.flatten() for x in tokens())
    found = windows_of({"input_ids": ids, "labels": labels}, None, 20, 10**6)
    assert found.ids.shape == (12, 20)
    assert torch.equal(found.answers[3, :-1], labels[61:80])
    unequal = {"input_ids": [ids[:45], ids[45:]], "labels": [labels[:45], labels[45:]]}
    assert windows_of(unequal, None, 20, 10**6).ids.shape == (12, 20)
    none = windows_of({"input_ids": tokens()[0]}, None, 8, 10**6)
    assert not none.labelled and torch.equal(none.answers[:, :-1], none.ids[:, 1:])


def test_windows_without_labels_are_left_out() -> None:
    ids, labels = tokens()
    labels[3] = -100
    labels[5, 1:] = -100
    labels[5, 0] = ids[5, 0]  # nothing comes before the first token
    found = windows_of({"input_ids": ids, "labels": labels}, None, 8, 10**6)
    assert len(found) == 10
    with pytest.raises(ValueError, match=r"at least two windows are needed.*got 1 with labels"):
        windows_of({"input_ids": ids[2:4], "labels": labels[2:4]}, None, 8, 10**6)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"labels": [[1, 2], [3, 4]]}, "need the column input_ids"),
        ({"input_ids": [[1, 2], [3, 4]], "labels": [[1, 2], [3]]}, "labels must have the shape"),
        ({"input_ids": [[1.5, 2], [3, 4]]}, "input_ids must be integers"),
        (
            {"input_ids": [[1, 2], [3, 4]], "attention_mask": [[1, 1], [1, 0]]},
            "must not be padded",
        ),
        (
            {"input_ids": [[1, 2], [3, 4]], "labels": [[1, 2], [3, 4]], "shift_labels": [[1, 2]]},
            "give one of labels and shift_labels",
        ),
        (
            {"input_ids": [[1, 2], [3, 4]], "labels": [[1, 2], [3, 99]]},
            r"labels must lie in 0 … 30.*got 2 … 99",
        ),
    ],
)
def test_bad_labels_are_refused_in_one_sentence(texts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gramian.shrink(model_of(), texts, keep=0.5)


def test_criteria_are_chosen_by_what_is_asked_for() -> None:
    model, (ids, labels) = model_of("gated_linear_attention"), tokens(24)
    texts = {"input_ids": ids, "labels": labels}
    found = {}
    for measure in ("loss", "accuracy"):
        _, report = gramian.shrink(model, texts, keep=2, choose_by=measure)
        assert report.choose_by == measure and report.labelled
        assert report.criterion == next(iter(report.criteria))
        assert "label error" in report.criteria and "Right labels" in report.summary
        found[measure] = report
    wrong = found["accuracy"].criteria
    assert all(0 <= value <= 1 for value in wrong.values()) and wrong != found["loss"].criteria
    assert 0 <= found["loss"].accuracy_after <= 1
    with pytest.raises(ValueError, match="choose_by must be loss or accuracy; got 'speed'"):
        gramian.shrink(model, texts, keep=2, choose_by="speed")


def scores_of(right: list[int], of: int = 4, loss: float = 0.5) -> Scores:
    """Scores of a model in windows of so many answers."""
    accuracies = torch.tensor(right, dtype=torch.float64) / of
    return Scores(torch.full_like(accuracies, loss), accuracies)


def test_accuracies_are_close_within_two_standard_errors() -> None:
    best = scores_of([4, 4, 4, 4, 3, 3, 3, 3])
    # k windows of 8 lose an answer: k / 8 and its standard error, √(k / 8 (1 - k / 8) / 7).
    assert scores_of([3, 3, 4, 4, 3, 3, 3, 3]).is_close_to(best)  # 0.25, 0.164
    assert not scores_of([3, 3, 3, 4, 3, 3, 3, 3]).is_close_to(best)  # 0.375, 0.183
    assert not scores_of([3, 3, 3, 3, 2, 2, 2, 2]).is_close_to(best)  # 1, 0
    assert best.is_close_to(scores_of([3] * 8)) and best.is_close_to(best)
    assert scores_of([0]).is_close_to(scores_of([4]))  # one window has no standard error


@pytest.mark.parametrize(
    ("measure", "count", "expected"),
    [
        ("accuracy", 1, ["label error"]),
        ("accuracy", 4, ["label error", "error", "weights", "label diagonal"]),
        ("loss", 3, ["label diagonal", "error", "weights"]),
    ],
)
def test_close_accuracies_are_compared_again_on_all_windows(
    monkeypatch: pytest.MonkeyPatch, measure: str, count: int, expected: list[str]
) -> None:
    model, (ids, labels) = model_of("gated_linear_attention"), tokens(24)
    windows = windows_of({"input_ids": ids, "labels": labels}, None, 8, 10**6)
    layers = list(find_layers(model))
    choices = Choices.of(layers, measure_importance(model, layers, windows), 1)
    plan = {layer.path: 2 for layer in layers}
    candidates = choices.candidates(plan)

    def name_of(kept: dict[str, Tensor]) -> str:
        return next(n for n, own in candidates.items() if all(own[p].equal(kept[p]) for p in own))

    assert [name_of(kept) for kept in candidates.values()] == list(candidates)
    told = {
        4: {  # "label diagonal" is far from the best accuracy, and so are the last two
            "error": scores_of([4, 4, 4, 3], loss=0.3),
            "weights": scores_of([4, 4, 4, 3], loss=0.4),
            "label error": scores_of([4, 4, 2, 4], loss=0.5),
            "label diagonal": scores_of([2, 2, 2, 1], loss=0.1),
            "diagonal": scores_of([1, 1, 1, 0], loss=0.6),
            "energy": scores_of([1, 1, 1, 0], loss=0.7),
        },
        24: {
            "error": scores_of([4] * 23 + [2]),
            "weights": scores_of([4] * 23 + [1]),
            "label error": scores_of([4] * 23 + [3]),
        },
    }
    monkeypatch.setattr(Run, "_fold", lambda _, kept: (name_of(kept), {}))
    monkeypatch.setattr(
        "gramian.shrinking._trying.window_scores", lambda name, some: told[len(some)][name]
    )
    run = Run(model, layers, choices, windows[:4], windows, windows, measure)
    found = run.several(plan, count)
    assert [one.model for one in found] == [one.criterion for one in found] == expected
    for one in found:
        assert next(iter(one.criteria)) == expected[0]
        assert one.criteria["label error"] == (0.5 if measure == "loss" else 0.125)
    alone = Run(model, layers, choices, windows[:4], windows[:4], windows, "accuracy")
    assert alone.shrink(plan).criterion == "error"  # there are no other windows


def test_a_recovery_trains_on_the_labels_alone() -> None:
    model, (ids, labels) = model_of("gated_linear_attention"), tokens(64)
    texts = {"input_ids": ids, "labels": labels}
    small, report = gramian.shrink(model, texts, keep=2, recover=Recovery(20, learning_rate=3e-3))
    plain, _ = gramian.shrink(model, texts, keep=2)
    every, _ = gramian.shrink(model, ids, keep=2, recover=Recovery(20, learning_rate=3e-3))
    done = report.recovery
    assert done is not None and done.divergence_after < done.divergence_before
    windows = windows_of(texts, None, 8, 10**6)
    due = windows.answers != -100

    def divergence(other: Any, where: Tensor) -> float:
        with torch.no_grad():
            p, q = (net(ids).logits.double().log_softmax(-1)[where] for net in (model, other))
        return float((p.exp() * (p - q)).sum(-1).mean())

    assert divergence(small, due) < divergence(plain, due)
    assert divergence(small, due) / divergence(small, ~due) < divergence(every, due) / divergence(
        every, ~due
    )


def test_several_criteria_are_recovered_and_the_best_is_kept() -> None:
    model, (ids, _) = model_of("gated_linear_attention"), tokens(64)
    seen: list[tuple[int, int]] = []
    recovery = Recovery(6, learning_rate=3e-3, candidates=3)
    small, report = gramian.shrink(
        model, ids, keep=2, recover=recovery, progress=lambda *done: seen.append(done)
    )
    alone, first = gramian.shrink(model, ids, keep=2, recover=Recovery(6, learning_rate=3e-3))
    assert seen[-1][0] == seen[-1][1] and seen[-1][1] % 6 == 0 and seen[-1][1] >= 12
    assert report.recovery is not None and report.recovery.candidates == 3
    assert first.criterion == min(first.criteria, key=first.criteria.__getitem__)
    assert report.criteria == first.criteria
    if report.criterion == first.criterion:
        same = zip(small.parameters(), alone.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in same)


@pytest.mark.parametrize(
    "kind", ["mamba2", "gated_linear_attention", "gated_delta_net", "s6", "linear_attention"]
)
def test_magnitudes_are_the_squares_that_a_cut_removes(kind: str) -> None:
    model = model_of(kind)
    layers = list(find_layers(model))
    importance = measure_importance(model, layers, Windows.of(tokens()[0]))
    for layer in layers:
        groups, n, energies = layer.shape.groups, 6, importance[layer.path].energies

        def left(kept: Tensor, layer: Any = layer, energies: Any = energies) -> float:
            cut = layer.family.cut(layer.module, kept, energies)
            return sum(float(x.detach().double().square().sum()) for x in cut.values())

        found = magnitudes(layer, energies)
        assert found.shape == (groups, n)
        whole = torch.arange(n - 1).repeat(groups, 1)  # the last coordinate is dropped
        for group in range(groups):
            for j in range(n - 1):
                kept = whole.clone()
                kept[group] = torch.tensor([i for i in range(n) if i != j])
                removed = left(whole) - left(kept)  # what j has more than the last coordinate
                expected = float(found[group, j] - found[group, n - 1])
                assert removed == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_loss_of_zero_can_be_reported() -> None:
    """A model may predict all labels with certainty."""
    model, (ids, _) = model_of("gated_linear_attention"), tokens()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e9)
        answers = model(ids).logits.argmax(-1)
    texts = {"input_ids": ids, "shift_labels": answers}
    _, report = gramian.shrink(model, texts, keep=5, choose_by="accuracy", recover=1)
    assert report.loss_before == 0 and report.recovery is not None
    assert report.increase == (0 if report.loss_after == 0 else float("inf"))
    assert "nats before" in str(report) and report.to_json()


def test_rows_that_lose_their_labels_are_refused() -> None:
    ids, labels = tokens(10, 24)
    rows = [
        {"input_ids": ids[k, : 14 + k].tolist(), "labels": labels[k, : 14 + k].tolist()}
        for k in range(10)
    ]
    with pytest.raises(ValueError, match=r"windows of 16 tokens, the context, which lose \d+ of"):
        windows_of(rows, None, 16, 10**6)
    late = torch.full((1000,), -100)
    late[-4:] = 3
    with pytest.raises(ValueError, match="lose 4 of 4 labels"):
        windows_of({"input_ids": torch.zeros(1000).long(), "labels": late}, None, 300, 10**6)
    whole = {"input_ids": ids.flatten(), "labels": ids.flatten()}
    assert len(windows_of(whole, None, 24, 10**6)) == 10  # the first of each window is lost


@pytest.mark.parametrize("first", [True, False])
def test_labels_are_those_of_all_rows(first: bool) -> None:
    ids, labels = tokens(4)
    rows = [{"input_ids": i, "labels": j} for i, j in zip(ids, labels, strict=True)]
    rows[0 if first else 2] = {"input_ids": ids[0]}
    with pytest.raises(ValueError, match="got no labels in row"):
        windows_of(rows, None, 8, 10**6)
