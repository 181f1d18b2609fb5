"""Token classification: a head at every position, its loss, padding, packed rows and streams."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForTokenClassification, BertConfig, BertForTokenClassification

import gramian
from gramian import distill
from gramian.models import (
    GramianConfig,
    GramianForCausalLM,
    GramianForTokenClassification,
    load,
    load_any,
)
from gramian.models.cache import CACHE

MakeConfig = Callable[..., GramianConfig]
MakeTokens = Callable[[int, int], Tensor]
Make = Callable[..., GramianForTokenClassification]
LABELS = 4
BIDIRECTIONAL: dict[str, Any] = {"mixers": "long_convolution", "bidirectional": True}


@pytest.fixture
def make(make_config: MakeConfig) -> Make:
    """Makes a float64 classifier in evaluation mode."""

    def build(**kwargs: Any) -> GramianForTokenClassification:
        torch.manual_seed(3)
        config = make_config(**({"num_labels": LABELS} | kwargs))
        return GramianForTokenClassification(config).double().eval()

    return build


def some_labels(batch: int, length: int) -> Tensor:
    """Classes, a third of which is not due."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(LABELS, (batch, length), generator=generator)
    return labels.masked_fill(torch.rand(labels.shape, generator=generator) < 1 / 3, -100)


def naive_loss(logits: Tensor, labels: Tensor) -> Tensor:
    losses = [
        -logits[row, t].log_softmax(-1)[labels[row, t]]
        for row, t in (labels != -100).nonzero().tolist()
    ]
    return torch.stack(losses).mean()


def test_logits_are_of_the_hidden_states(
    make: Make, make_tokens: MakeTokens, kind: dict[str, Any]
) -> None:
    model, tokens, labels = make(**kind), make_tokens(2, 9), some_labels(2, 9)
    outputs = model(tokens, labels=labels, output_hidden_states=True)
    hidden = model.model(tokens).last_hidden_state
    assert_close(outputs.hidden_states[-1], hidden)
    assert_close(outputs.logits, hidden @ model.score.weight.T + model.score.bias)
    assert outputs.logits.shape == (2, 9, LABELS)
    assert_close(outputs.loss, naive_loss(outputs.logits, labels))
    outputs.loss.backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert not unused


def test_the_loss_is_that_of_transformers(make: Make, make_tokens: MakeTokens) -> None:
    model, tokens, labels = make(), make_tokens(2, 9), some_labels(2, 9)
    bert = BertForTokenClassification(
        BertConfig(
            vocab_size=50,
            hidden_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            num_labels=LABELS,
        )
    ).eval()
    expected = bert.loss_function(model(tokens).logits, labels, bert.config)
    assert_close(model(tokens, labels=labels).loss, expected, check_dtype=False)
    summed = model(tokens, labels=labels, num_items_in_batch=7).loss
    assert_close(summed, expected * (labels != -100).sum() / 7, check_dtype=False)


@pytest.mark.parametrize("encoder", [{"mixers": "multi_hyena"}, {"mixers": "s6"}, BIDIRECTIONAL])
def test_padding_and_packing_change_nothing(
    make: Make, make_tokens: MakeTokens, encoder: dict[str, Any]
) -> None:
    model, tokens, labels = make(**encoder), make_tokens(3, 12), some_labels(3, 12)
    with torch.no_grad():
        expected = model(tokens, labels=labels)
        at = torch.tensor([[0, 1, 5, *range(7, 16)], [*range(4, 16)], [*range(12)]])
        padded, mask = make_tokens(3, 16), torch.zeros(3, 16).long()
        wide = torch.full((3, 16), 99)  # labels at padding are not looked at
        for row in range(3):
            padded[row, at[row]], mask[row, at[row]] = tokens[row], 1
            wide[row, at[row]] = labels[row]
        for items in (None, 20):
            found = model(padded, attention_mask=mask, labels=wide, num_items_in_batch=items)
            again = model(tokens, labels=labels, num_items_in_batch=items)
            rows = torch.arange(3)[:, None]
            assert_close(found.logits[rows, at], expected.logits)
            due, counted = (labels != -100).sum(), (wide != -100).sum()
            scale = 1 if items is None else due / counted  # a trainer counts those at padding
            assert_close(found.loss * scale, again.loss)
        positions = torch.arange(12).repeat(3)[None]
        packed = model(tokens.reshape(1, -1), position_ids=positions, labels=labels.reshape(1, -1))
        assert_close(packed.logits.reshape(3, 12, LABELS), expected.logits)
        assert_close(packed.loss, expected.loss)


def test_only_a_bidirectional_model_looks_ahead(make: Make, make_tokens: MakeTokens) -> None:
    tokens = make_tokens(1, 15)
    later = tokens.clone()
    later[0, 10] = (later[0, 10] + 1) % 50
    for encoder in (BIDIRECTIONAL, {"mixers": "hyena"}):
        model = make(**encoder)
        with torch.no_grad():
            change = (model(later).logits - model(tokens).logits)[:, :10].abs().max()
        assert change > 1e-6 if encoder is BIDIRECTIONAL else change < 1e-12


@torch.no_grad()
def test_a_sequence_may_come_in_pieces(
    make: Make, make_tokens: MakeTokens, some_kind: dict[str, Any]
) -> None:
    model, tokens = make(**some_kind), make_tokens(2, 30)
    whole, parts, cache = model(tokens).logits, [], None
    for part in tokens.split([1, 7, 13, 1, 8], 1):
        outputs = model(part, past_key_values=cache, use_cache=True)
        cache = getattr(outputs, CACHE)
        parts.append(outputs.logits)
    assert_close(torch.cat(parts, 1), whole)
    with pytest.raises(ValueError, match="a bidirectional model has no cache"):
        make(**BIDIRECTIONAL)(tokens, use_cache=True)


def test_a_signal_is_classified_too(make: Make) -> None:
    model, values = make(input_size=3), torch.randn(2, 9, 3)
    outputs = model(input_values=values, labels=some_labels(2, 9))
    assert outputs.logits.shape == (2, 9, LABELS)
    assert_close(outputs.loss, naive_loss(outputs.logits, some_labels(2, 9)))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(2, 8).long(), r"labels must be \(2, 9\); got \(2, 8\)"),
        (torch.zeros(2, 9), "labels must be integers; got float32"),
        (torch.full((2, 9), LABELS), r"lie from 0 to 3, .* got 4 at \[0, 0\]"),
        (torch.full((2, 9), -100), "must leave something to score"),
    ],
)
def test_labels_that_do_not_fit_are_refused(
    make: Make, make_tokens: MakeTokens, labels: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make()(make_tokens(2, 9), labels=labels)
    if labels.ndim == 2 and labels.shape[1] == 9:
        mask = torch.ones(2, 9).long()
        mask[0, 1] = 0
        with pytest.raises(ValueError, match=message):
            make()(make_tokens(2, 9), attention_mask=mask, labels=labels)


def test_problems_that_transformers_does_not_know_for_tokens_are_refused(make: Make) -> None:
    for problem in ("regression", "multi_label_classification"):
        with pytest.raises(ValueError, match=f"must be 'single_label_.*; got '{problem}'"):
            make(problem_type=problem)


@torch.no_grad()
def test_saved_and_loaded(make: Make, make_tokens: MakeTokens, tmp_path: Path) -> None:
    names = {0: "exon", 1: "intron", 2: "promoter", 3: "other"}
    model, tokens = make(id2label=names, mixers="hyena").float(), make_tokens(2, 9)
    expected = model(tokens).logits
    model.save_pretrained(tmp_path / "model")
    for again in (
        load_any(tmp_path / "model"),
        AutoModelForTokenClassification.from_pretrained(tmp_path / "model").eval(),
        AutoModelForTokenClassification.from_pretrained(
            tmp_path / "model", trust_remote_code=True
        ).eval(),
    ):
        assert type(again) is GramianForTokenClassification
        assert again.config.id2label == names
        assert torch.equal(again(tokens).logits, expected)
    with pytest.raises(ValueError, match="holds a GramianForTokenClassification; a GramianForCaus"):
        load(tmp_path / "model")


@torch.no_grad()
def test_distilled_and_checked(make: Make, make_tokens: MakeTokens, tmp_path: Path) -> None:
    model, tokens = make(mixers="multi_hyena").float(), make_tokens(2, 30)
    small, report = distill(model, order=18)
    assert report.order == 18 and type(small) is GramianForTokenClassification
    error = small(tokens).logits - model(tokens).logits
    assert 0 < float(error.norm() / model(tokens).logits.norm()) < 2e-2
    checked = gramian.check(model, length=20, distill_order=4, dtypes=[torch.float32])
    assert checked.passed, str(checked)
    assert "generated" not in checked.rows[-1].differences
    assert {"recurrent", "chunked", "turn", "packed"} <= checked.rows[-1].differences.keys()
    with pytest.raises(ValueError, match="a causal model of tokens; got a bidirectional model"):
        gramian.check(make(**BIDIRECTIONAL))
    with pytest.raises(ValueError, match="a causal model of tokens; got a model of numbers"):
        gramian.check(make(input_size=2))


def test_the_body_of_a_language_model_is_taken_over(
    make_config: MakeConfig, make_tokens: MakeTokens, tmp_path: Path
) -> None:
    model = GramianForCausalLM(make_config(mixers="s6"))
    model.save_pretrained(tmp_path / "model")
    tagger = GramianForTokenClassification.from_pretrained(tmp_path / "model", num_labels=LABELS)
    assert isinstance(tagger.score, nn.Linear) and tagger.score.out_features == LABELS
    tokens = make_tokens(2, 9)
    with torch.no_grad():
        expected = model.eval().model(tokens).last_hidden_state
        assert torch.equal(tagger.eval().model(tokens).last_hidden_state, expected)
