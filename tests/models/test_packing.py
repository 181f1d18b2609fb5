"""Packed rows: every sequence is what it is alone, outputs, losses and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening

from gramian.models import (
    GramianConfig,
    GramianForCausalLM,
    GramianForPairClassification,
    GramianForReconstruction,
    GramianForSequenceClassification,
    GramianForSignalRegression,
)

MakeModel = Callable[..., GramianForCausalLM]
VOCABULARY = 50
LENGTHS = (17, 30, 9, 1, 4)
WAYS: dict[str, dict[str, bool]] = {
    "position_ids": {"return_position_ids": True},
    "seq_idx": {"return_position_ids": False, "return_seq_idx": True},
    "cu_seq_lens": {"return_position_ids": False, "return_flash_attn_kwargs": True},
    "all": {"return_seq_idx": True, "return_flash_attn_kwargs": True},
}


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-7) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def sequences(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (n,), generator=generator) for n in lengths]


def flattened(rows: list[Tensor], way: str = "position_ids") -> dict[str, Any]:
    collate = DataCollatorWithFlattening(return_tensors="pt", **WAYS[way])
    return collate([{"input_ids": row.tolist(), "labels": row.tolist()} for row in rows])


def positions(*lengths: int) -> Tensor:
    return torch.cat([torch.arange(n) for n in lengths])


def test_outputs_loss_and_gradients(make_model: MakeModel, every_kind: dict[str, Any]) -> None:
    model = make_model(**every_kind)
    rows = sequences()
    output = model(**flattened(rows))
    alone = [model(row[None], labels=row[None]) for row in rows if len(row) > 1]
    for made, expected in zip(output.logits[0].split(LENGTHS), rows, strict=True):
        close(made, model(expected[None]).logits[0])
    counts = [n - 1 for n in LENGTHS if n > 1]
    loss = sum(one.loss * n for one, n in zip(alone, counts, strict=True)) / sum(counts)
    close(output.loss, loss, 1e-6)  # transformers takes losses in float32
    parameters = list(model.parameters())
    found = torch.autograd.grad(output.loss, parameters, allow_unused=True)
    expected = torch.autograd.grad(loss, parameters, allow_unused=True)
    for one, other in zip(found, expected, strict=True):
        if one is not None and other is not None:
            close(one, other, 1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_telling(model: GramianForCausalLM, way: str) -> None:
    rows = sequences()
    expected = model(**flattened(rows))
    output = model(**flattened(rows, way))
    assert torch.equal(output.logits, expected.logits) and torch.equal(output.loss, expected.loss)


def test_labels_at_the_borders_are_not_due(model: GramianForCausalLM) -> None:
    batch = flattened(sequences())
    masked = model(**batch).loss
    batch["labels"] = batch["input_ids"]  # a collator that masks no border
    close(model(**batch).loss, masked)


def test_several_rows_with_padding(model: GramianForCausalLM) -> None:
    a, b, c, d, e = sequences((5, 7, 3, 6, 2))
    padding = torch.tensor([9, 9])
    ids = torch.stack([torch.cat([a, b, c]), torch.cat([d, padding, e, b[:5]])])
    mask = torch.ones_like(ids)
    mask[1, 6:8] = 0
    place = torch.stack([positions(5, 7, 3), torch.cat([positions(6), padding, positions(2, 5)])])
    output = model(ids, attention_mask=mask, position_ids=place, labels=ids)
    made = [*output.logits[0].split([5, 7, 3]), *output.logits[1][mask[1].bool()].split([6, 2, 5])]
    losses, total = [], 0
    for one, row in zip(made, (a, b, c, d, e, b[:5]), strict=True):
        close(one, model(row[None]).logits[0])
        losses.append(model(row[None], labels=row[None]).loss * (len(row) - 1))
        total += len(row) - 1
    close(output.loss, torch.stack(losses).sum() / total, 1e-6)


def test_positions_that_start_elsewhere(model: GramianForCausalLM) -> None:
    rows = sequences((4, 6))
    ids = torch.cat(rows)[None]
    expected = model(ids, position_ids=positions(4, 6)[None]).logits
    for start in (1, 2, 100):
        assert torch.equal(model(ids, position_ids=positions(4, 6)[None] + start).logits, expected)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_classifiers_have_a_row_a_sequence(
    make_config: Callable[..., GramianConfig], pooling: str
) -> None:
    torch.manual_seed(0)
    config = make_config(mixers="hyena", pooling=pooling, num_labels=3)
    rows = sequences((5, 7, 3, 6))
    ids = torch.stack([torch.cat([*rows[:2], rows[0][:4]]), torch.cat([rows[2], rows[3], rows[1]])])
    place = torch.stack([positions(5, 7, 4), positions(3, 6, 7)])
    each = [rows[0], rows[1], rows[0][:4], rows[2], rows[3], rows[1]]
    labels = torch.tensor([0, 2, 1, 1, 0, 2])

    model = GramianForSequenceClassification(config).double().eval()
    output = model(ids, position_ids=place, labels=labels)
    alone = torch.cat([model(row[None]).logits for row in each])
    close(output.logits, alone)
    close(output.loss, torch.nn.functional.cross_entropy(alone, labels))

    pairs = GramianForPairClassification(config).double().eval()
    others = sequences((2, 9, 4, 8, 3, 6), seed=4)
    output = pairs(
        ids,
        input_ids_2=torch.cat(others)[None],
        position_ids=place,
        position_ids_2=positions(*map(len, others))[None],
        labels=labels,
    )
    alone = torch.cat(
        [pairs(a[None], input_ids_2=b[None]).logits for a, b in zip(each, others, strict=True)]
    )
    close(output.logits, alone)
    unpacked = torch.nn.utils.rnn.pad_sequence(others, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(o) for o in others], True)
    mixed = pairs(ids, input_ids_2=unpacked, attention_mask_2=mask, position_ids=place)
    close(mixed.logits, alone)
    with pytest.raises(ValueError, match="as many sequences; got 6 and 1"):
        pairs(ids, input_ids_2=ids[:1], position_ids=place)

    again = GramianForReconstruction(config).double().eval()
    made = again(ids, position_ids=place).logits.flatten(0, 1)
    for one, row in zip(made.split([len(row) for row in each]), each, strict=True):
        close(one, again(row[None]).logits[0])


@pytest.mark.parametrize("bidirectional", [False, True])
def test_signals(make_config: Callable[..., GramianConfig], bidirectional: bool) -> None:
    torch.manual_seed(0)
    config = make_config(
        mixers="long_convolution",
        block="glu",
        norm="batch",
        input_size=2,
        num_labels=2,
        bidirectional=bidirectional,
    )
    model = GramianForSignalRegression(config).double()
    signal = torch.randn(1, 20, 2, dtype=torch.float64)
    place = positions(5, 12, 3)[None]
    model(input_values=signal, position_ids=place, labels=signal).loss.backward()
    model.eval()
    output = model(input_values=signal, position_ids=place, labels=signal)
    alone = torch.cat(
        [model(input_values=part).logits for part in signal.split([5, 12, 3], dim=1)], 1
    )
    close(output.logits, alone)
    close(output.loss, (alone - signal).square().mean())


def test_refusals(model: GramianForCausalLM) -> None:
    ids = torch.randint(VOCABULARY, (1, 6))
    restarting = positions(2, 4)[None]
    with pytest.raises(ValueError, match="packed rows have no cache"):
        model(ids, position_ids=restarting, use_cache=True)
    with pytest.raises(ValueError, match="packed rows have no cache"):
        model.generate(ids, position_ids=restarting, max_new_tokens=2)
    with pytest.raises(ValueError, match="describe different sequences"):
        model(ids, position_ids=restarting, seq_idx=torch.tensor([[0, 0, 0, 1, 1, 1]]))
    for lengths, message in (
        ([0, 2, 5], "rise from 0 to 6"),
        ([0, 4, 3, 6], "rise from 0 to 6"),
        ([1, 6], "rise from 0 to 6"),
    ):
        both = {f"cu_seq_lens_{name}": torch.tensor(lengths) for name in "qk"}
        with pytest.raises(ValueError, match=message):
            model(ids, **both)
    with pytest.raises(ValueError, match="given together"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="seq_idx must be"):
        model(ids, seq_idx=torch.zeros(1, 5))
    assert model(ids, position_ids=restarting).past_key_values is None
