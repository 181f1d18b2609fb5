"""Regression at every position: the loss, streaming, the linear model, saving and distilling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.testing import assert_close

from gramian import distill
from gramian.models import (
    GramianConfig,
    GramianForSignalRegression,
    GramianMixerBlock,
    GramianModel,
)

MakeConfig = Callable[..., GramianConfig]
MakeTokens = Callable[[int, int], torch.Tensor]
Make = Callable[..., GramianForSignalRegression]

BLOCKS: dict[str, dict[str, Any]] = {
    "mixer": {"mixers": "long_convolution", "block": "mixer"},
    "glu": {"mixers": "long_convolution", "block": "glu", "norm": "layer"},
    "mlp": {"mixers": ["hyena", "gated_linear_attention"]},
}


@pytest.fixture(params=BLOCKS)
def block(request: pytest.FixtureRequest) -> dict[str, Any]:
    return BLOCKS[request.param]


@pytest.fixture
def make(make_config: MakeConfig) -> Make:
    """Makes a float64 model in evaluation mode: two inputs, three outputs."""

    def build(**kwargs: Any) -> GramianForSignalRegression:
        torch.manual_seed(3)
        config = make_config(**({"input_size": 2, "num_labels": 3} | kwargs))
        return GramianForSignalRegression(config).double().eval()

    return build


def signal(batch: int, length: int, size: int = 2) -> torch.Tensor:
    return torch.randn(batch, length, size, dtype=torch.float64)


@torch.no_grad()
def test_the_loss_is_the_mean_square_over_real_positions(make: Make, block: dict[str, Any]) -> None:
    model, values, due = make(**block), signal(2, 20), signal(2, 20, 3)
    outputs = model(input_values=values, labels=due, output_hidden_states=True)
    hidden = model.model(input_values=values).last_hidden_state
    assert_close(outputs.hidden_states[-1], hidden)
    assert_close(outputs.logits, model.head(hidden))
    assert_close(outputs.loss, (outputs.logits - due).square().mean())
    mask = torch.ones(2, 20)
    mask[0, :7] = 0
    masked = model(input_values=values, labels=due, attention_mask=mask)
    errors = [*(masked.logits[0, 7:] - due[0, 7:]), *(masked.logits[1] - due[1])]
    assert_close(masked.loss, torch.stack(errors).square().mean())


def test_a_padded_label_may_be_anything(make: Make) -> None:
    model, values, due = make(), signal(2, 9), signal(2, 9, 3)
    mask = torch.ones(2, 9)
    mask[0, 4:] = 0
    due[0, 4:] = torch.nan
    model(input_values=values, labels=due, attention_mask=mask).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@torch.no_grad()
def test_half_precision_is_compared_in_single(make: Make) -> None:
    model, values = make().to(torch.bfloat16), signal(2, 9).float()
    outputs = model(input_values=values, labels=signal(2, 9, 3).float())
    assert outputs.logits.dtype == torch.bfloat16
    assert outputs.loss.dtype == torch.float32


@pytest.mark.each
@torch.no_grad()
def test_a_signal_streams(make: Make, block: dict[str, Any], filter_config: dict[str, Any]) -> None:
    model, values = make(filter=filter_config, **block), signal(2, 30)
    whole = model(input_values=values, use_cache=False).logits
    cache, pieces = None, []
    for part in values.split([11, 1, 1, 17], 1):
        outputs = model(input_values=part, past_key_values=cache)
        cache = outputs.past_key_values
        pieces.append(outputs.logits)
    assert_close(torch.cat(pieces, 1), whole)
    assert cache.nbytes == model.state_bytes(2)
    junk = torch.cat([9 * torch.ones(2, 5, 2), values], 1)
    mask = torch.ones(2, 35)
    mask[:, :5] = 0
    assert_close(model(input_values=junk, attention_mask=mask).logits[:, 5:], whole)


@torch.no_grad()
def test_with_bare_mixers_it_is_the_published_linear_model(make: Make) -> None:
    """A map, one convolution, a map: y = W₂ (h ∗ (W₁ u + b₁)) + b₂, by a loop over taps."""
    model = make(num_hidden_layers=1, filter={"type": "rtf", "state_size": 4}, **BLOCKS["mixer"])
    (layer,) = model.model.layers
    assert isinstance(layer, GramianMixerBlock)
    values = signal(1, 17)
    taps = layer.mixer.filter().impulse_response(17).double()  # (width, 17)
    inner = model.model.input_proj(values)[0]  # (17, width)
    mixed = torch.zeros_like(inner)
    for t in range(17):
        for s in range(t + 1):
            mixed[t] += taps[:, s] * inner[t - s]
    assert_close(model(input_values=values).logits[0], model.head(mixed), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_tokens_may_be_regressed_too(make: Make, make_tokens: MakeTokens) -> None:
    model, tokens = make(input_size=None, num_labels=1), make_tokens(2, 9)
    due = signal(2, 9, 1)
    outputs = model(tokens, labels=due)
    assert_close(outputs.loss, (outputs.logits - due).square().mean())


@pytest.mark.each
def test_every_parameter_learns(
    make: Make, block: dict[str, Any], filter_config: dict[str, Any]
) -> None:
    model = make(filter=filter_config, **block).train()
    model(input_values=signal(3, 30), labels=signal(3, 30, 3)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_gradient_checkpointing_changes_no_gradient(make: Make, block: dict[str, Any]) -> None:
    model = make(**block).train()
    given = {"input_values": signal(2, 12), "labels": signal(2, 12, 3)}
    model(**given).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**given).loss.backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name], msg=name)


def test_dropout_of_a_bare_mixer_is_for_training(make: Make) -> None:
    values = signal(1, 20)
    model, expected = make(dropout=0.5, **BLOCKS["mixer"]), make(**BLOCKS["mixer"])
    assert torch.equal(model(input_values=values).logits, expected(input_values=values).logits)
    model.train()
    assert not torch.equal(model(input_values=values).logits, model(input_values=values).logits)


@torch.no_grad()
def test_written_read_and_distilled(make: Make, block: dict[str, Any], tmp_path: Path) -> None:
    model, values = make(max_position_embeddings=20, **block).float(), signal(2, 20).float()
    model.save_pretrained(tmp_path)
    expected = model(input_values=values).logits
    for cls in (GramianForSignalRegression, transformers.AutoModelForTimeSeriesPrediction):
        read = cls.from_pretrained(tmp_path)
        assert type(read) is GramianForSignalRegression
        assert torch.equal(read(input_values=values).logits, expected)
    trunk = GramianModel.from_pretrained(tmp_path)
    assert_close(read.head(trunk(input_values=values).last_hidden_state), expected)
    distilled, _ = distill(model, order=12)
    assert (distilled(input_values=values).logits - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"labels": torch.ones(2, 5)}, r"labels must be \(2, 5, 3\); got \(2, 5\)"),
        ({"labels": torch.ones(2, 5, 1)}, r"labels must be \(2, 5, 3\); got \(2, 5, 1\)"),
        (
            {"labels": torch.ones(2, 5, 3), "attention_mask": torch.zeros(2, 5)},
            "must leave a real position; it hides all",
        ),
    ],
)
def test_wrong_labels_are_refused_in_one_sentence(
    make: Make, arguments: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        make()(input_values=signal(2, 5), **arguments)
    assert "\n" not in str(caught.value)
