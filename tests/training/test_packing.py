"""Packed rows: every sequence once and as if alone, and runs that learn what unpacked ones do."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("accelerate")
pytest.importorskip("datasets")

from gramian.models import GramianConfig
from gramian.tasks import Description, find_kind
from gramian.training import ConfigError, parse_config, train
from gramian.training.collation import Collator, Packer, fit
from gramian.training.recording import read_lines

Run = Callable[..., dict[str, Any]]
WHOLE = ("classification", "regression")  # of sequences, not of positions
LENGTHS: dict[str, list[int]] = {
    "one": [5],
    "all of them longest": [8, 8, 8],
    "ones": [1] * 9,
    "as many as fit": [4, 4, 3, 5, 8, 2, 6],
    "with room left": [3, 3, 3],
    "one longer than the task's": [11, 2, 8, 1],
}


def description(kind: str) -> Description:
    size = 2 if kind == "signal" else None
    return Description(
        kind, 8, vocab_size=None if size else 6, num_labels=3, input_size=size, pad_token_id=5
    )


def rows(kind: str, lengths: list[int]) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    made: list[dict[str, Any]] = []
    for number, length in enumerate(lengths):
        if kind == "signal":
            made.append({"input_values": torch.randn(length, 2), "labels": torch.randn(length, 3)})
            continue
        labels: Any = torch.randint(6, (length,)) if kind == "tokens" else number % 3
        if kind == "regression":
            labels = torch.randn(3)
        made.append({"input_ids": torch.randint(6, (length,)), "labels": labels})
    return made


def taken_apart(batch: dict[str, Tensor], kind: str) -> list[dict[str, Tensor]]:
    """The sequences of packed rows, by the definition of positions that restart."""
    name = "input_values" if kind == "signal" else "input_ids"
    mask = batch.get("attention_mask", torch.ones(batch[name].shape[:2]))
    found: list[dict[str, Tensor]] = []
    for row in range(len(mask)):
        real = mask[row].bool()
        begins = [int(at) for at in (batch["position_ids"][row] == 0).nonzero() if real[at]]
        assert begins[0] == 0
        for begin, end in zip(begins, [*begins[1:], int(real.sum())], strict=True):
            count = torch.arange(end - begin)
            assert torch.equal(batch["position_ids"][row, begin:end], count)
            part = {name: batch[name][row, begin:end]}
            if kind not in WHOLE:
                part["labels"] = batch["labels"][row, begin:end]
            found.append(part)
        if kind not in WHOLE:
            assert (batch["labels"][row][~real] == -100).all()
    if kind in WHOLE:
        assert len(batch["labels"]) == len(found)
        for part, label in zip(found, batch["labels"], strict=True):
            part["labels"] = label
    return found


@pytest.mark.parametrize("kind", ["tokens", "classification", "signal", "regression"])
@pytest.mark.parametrize("name", LENGTHS)
def test_every_sequence_is_there_once(kind: str, name: str) -> None:
    given = rows(kind, LENGTHS[name])
    batch = Packer(description(kind))(given)
    apart = taken_apart(batch, kind)
    assert len(apart) == len(given)

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        values = (torch.as_tensor(row[key]).double().flatten().tolist() for key in sorted(row))
        return tuple(map(tuple, values))

    assert sorted(map(key, apart)) == sorted(map(key, given))
    longest = max(8, *LENGTHS[name])
    assert batch["position_ids"].shape[1] <= longest
    if kind == "tokens":
        assert torch.equal(batch["shift_labels"], batch["labels"])
    if name == "all of them longest":
        assert "attention_mask" not in batch
    if name == "as many as fit":
        assert batch["position_ids"].shape == (4, 8)


def test_rows_are_nearly_as_few_as_can_be() -> None:
    """At most 11/9 of the fewest and one more, which are found by trying every set of sequences."""
    draw = random.Random(0)
    for _ in range(100):
        room, count = draw.randint(1, 40), draw.randint(1, 8)
        lengths = [draw.randint(1, room) for _ in range(count)]
        packed = fit(lengths, room)
        assert sorted(index for row in packed for index in row) == list(range(count))
        assert all(sum(lengths[index] for index in row) <= room for row in packed)
        best = {0: (0, room)}  # by the set: the fewest rows, and how full the last one is
        for members in range(1, 2**count):
            ways = []
            for index in range(count):
                if members >> index & 1:
                    rows, full = best[members & ~(1 << index)]
                    more = full + lengths[index] > room
                    ways.append((rows + more, lengths[index] + (0 if more else full)))
            best[members] = min(ways)
        assert 9 * len(packed) <= 11 * best[2**count - 1][0] + 9


MODEL: dict[str, dict[str, Any]] = {
    "hybrid": {"mixers": ["hyena", "softmax_attention"], "num_heads": 2},
    "recurrent": {"mixers": "gated_linear_attention", "num_heads": 2},
    "multi_hyena": {"mixers": "multi_hyena", "num_heads": 2},
}


@pytest.mark.parametrize("model", MODEL)
@pytest.mark.parametrize("kind", ["tokens", "classification", "signal", "regression"])
def test_the_loss_is_that_of_sequences_alone(kind: str, model: str) -> None:
    """Packed, and each by itself: the sum over what is due, and its gradients."""
    told = description(kind)
    config = GramianConfig(
        hidden_size=8,
        num_hidden_layers=2,
        vocab_size=6,
        num_labels=3,
        input_size=told.input_size,
        max_position_embeddings=16,
        **MODEL[model],
        **find_kind(kind).model_options(),
    )
    torch.manual_seed(0)
    trained = find_kind(kind).model_class()(config).double().train()
    given = rows(kind, LENGTHS["as many as fit"])
    for row in given:
        row["labels"] = torch.as_tensor(row["labels"])
    given[1]["labels"] = torch.full_like(given[1]["labels"], -100)
    due = sum(int((row["labels"] != -100).sum()) for row in given)
    packed = trained(**Packer(told)(given), num_items_in_batch=due).loss
    packed.backward()
    gradients = [parameter.grad for parameter in trained.parameters()]
    trained.zero_grad()
    alone = sum(trained(**Collator(told)([row]), num_items_in_batch=due).loss for row in given)
    alone.backward()
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-6)
    for mine, parameter in zip(gradients, trained.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["tokens", pytest.param("classification", marks=pytest.mark.slow)])
def test_a_run_learns_what_it_would_of_padded_rows(tmp_path: Path, run: Run, kind: str) -> None:
    losses = []
    for packing in (False, True):
        changes = {"optimization__packing": packing, "task__ragged": True, "task__share": 0.2}
        values = run(tmp_path / str(packing), kind, **changes)
        report = train(parse_config(values))
        lines = read_lines(tmp_path / str(packing) / "metrics.jsonl")
        losses.append([line["loss"] for line in lines if "loss" in line])
        losses[-1].append(report.metrics["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "changes", "sentence"),
    [
        ("pairs", {}, "of the kind 'pairs' cannot share a row; those of 'tokens', 'classif"),
        ("reconstruction", {}, "optimization.packing: sequences of a task of the kind 'recon"),
        ("tokens", {"hardware__compile": True}, "packed rows cannot be compiled"),
        ("tokens", {"regularization__gates": 0.1}, "regularization.ess read rows of one sequence"),
        ("tokens", {"optimization__packing": "yes"}, "optimization.packing must be true or false"),
    ],
)
def test_what_cannot_be_packed_is_told(
    tmp_path: Path, run: Run, kind: str, changes: dict[str, Any], sentence: str
) -> None:
    values = run(tmp_path / "run", kind, **({"optimization__packing": True} | changes))
    with pytest.raises(ConfigError, match=sentence) as caught:
        train(parse_config(values))
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
