"""Reconstruction from one vector: nothing but that vector passes, padding, saving."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from gramian.models import GramianConfig, GramianForReconstruction
from gramian.models.reconstruction import position_codes

MakeConfig = Callable[..., GramianConfig]
MakeTokens = Callable[[int, int], torch.Tensor]
Make = Callable[..., GramianForReconstruction]


@pytest.fixture
def make(make_config: MakeConfig) -> Make:
    """Makes a float64 model in evaluation mode."""

    def build(**kwargs: Any) -> GramianForReconstruction:
        torch.manual_seed(3)
        config = make_config(**({"pooling": "last"} | kwargs))
        return GramianForReconstruction(config).double().eval()

    return build


@pytest.mark.parametrize("width", [1, 2, 3, 8, 63])
def test_position_codes_by_their_formula(width: int) -> None:
    codes = position_codes(torch.arange(7), width)
    assert codes.shape == (7, width)
    half = width // 2
    for t in range(7):
        for k in range(half):
            angle = t / 10_000 ** (k / max(half - 1, 1))
            assert codes[t, k].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert codes[t, half + k].item() == pytest.approx(math.cos(angle), abs=1e-5)
        if width % 2:
            assert codes[t, -1] == 0


@pytest.mark.each
@pytest.mark.parametrize("pooling", ["last", "mean"])
@torch.no_grad()
def test_positions_are_decoded_from_the_pooled_vector_alone(
    make: Make, make_tokens: MakeTokens, mixer: Any, pooling: str
) -> None:
    model, tokens = make(mixers=mixer, pooling=pooling), make_tokens(2, 11)
    outputs = model(tokens, labels=tokens)
    hidden = model.model(tokens, use_cache=False).last_hidden_state
    vector = hidden[:, -1] if pooling == "last" else hidden.mean(1)
    for t in range(11):
        place = position_codes(torch.tensor(t), model.config.hidden_size)
        logits = model.head(model.decoder(vector + place.double()))
        assert_close(outputs.logits[:, t], logits)
    expected = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), tokens.flatten())
    assert_close(outputs.loss, expected)


@torch.no_grad()
def test_padding_leaves_no_trace(make: Make, make_tokens: MakeTokens) -> None:
    model, tokens = make(), make_tokens(2, 9)
    expected = model(tokens, labels=tokens)
    for left, right in ((4, 0), (0, 5), (2, 3)):
        padded = torch.cat([make_tokens(2, left), tokens, make_tokens(2, right)], 1)
        mask = torch.zeros(2, left + 9 + right)
        mask[:, left : left + 9] = 1
        labels = padded.where(mask.bool(), torch.tensor(-100))
        outputs = model(padded, attention_mask=mask, labels=labels)
        assert_close(outputs.logits[:, left : left + 9], expected.logits)
        assert_close(outputs.loss, expected.loss)


def test_every_parameter_learns(make: Make, make_tokens: MakeTokens) -> None:
    model, tokens = make().train(), make_tokens(3, 20)
    model(tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_written_and_read(make: Make, make_tokens: MakeTokens, tmp_path: Path) -> None:
    model, tokens = make().float(), make_tokens(2, 9)
    model.save_pretrained(tmp_path)
    read = GramianForReconstruction.from_pretrained(tmp_path)
    assert torch.equal(read(tokens).logits, model(tokens).logits)


def test_what_is_refused(make: Make, make_tokens: MakeTokens) -> None:
    tokens = make_tokens(2, 5)
    with pytest.raises(ValueError, match=r"labels must be \(2, 5\); got \(2, 4\)"):
        make()(tokens, labels=tokens[:, 1:])
    with pytest.raises(ValueError, match="must leave a real token in every sequence"):
        make()(tokens, attention_mask=torch.zeros(2, 5))
    with pytest.raises(ValueError, match="input_size must be None; got 2"):
        make(input_size=2)
