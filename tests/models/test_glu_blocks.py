"""Language models of GLU blocks: one map in every mode, saved, distilled and generated from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from gramian import distill
from gramian.models import GramianForCausalLM, GramianGLUBlock, load

MakeModel = Callable[..., GramianForCausalLM]
MakeTokens = Callable[[int, int], torch.Tensor]

GLU: dict[str, Any] = {"block": "glu", "norm": "layer"}


@pytest.mark.each
@pytest.mark.parametrize("prenorm", [True, False])
@torch.no_grad()
def test_every_mode_is_one_map(
    make_model: MakeModel,
    make_tokens: MakeTokens,
    mixer: str,
    filter_config: dict[str, Any],
    prenorm: bool,
) -> None:
    model = make_model(mixers=mixer, filter=filter_config, prenorm=prenorm, **GLU)
    assert all(isinstance(layer, GramianGLUBlock) for layer in model.model.layers)
    tokens, junk = make_tokens(2, 30), make_tokens(2, 5)
    whole = model(tokens, use_cache=False).logits
    cache, logits = None, []
    for part in tokens.split([11, 1, 1, 17], 1):
        outputs = model(part, past_key_values=cache)
        cache = outputs.past_key_values
        logits.append(outputs.logits)
    assert_close(torch.cat(logits, 1), whole)
    assert cache.nbytes == model.state_bytes(2)

    mask = torch.ones(2, 35)
    mask[:, :5] = 0
    padded = model(torch.cat([junk, tokens], 1), attention_mask=mask).logits
    assert_close(padded[:, 5:], whole)


@torch.no_grad()
@pytest.mark.parametrize(
    "mixer",
    [
        "long_convolution",
        ["hyena", "softmax_attention"],
        pytest.param("hyena", marks=pytest.mark.slow),
        pytest.param("multi_hyena", marks=pytest.mark.slow),
        pytest.param(["long_convolution", "gated_linear_attention"], marks=pytest.mark.slow),
        pytest.param(["multi_hyena", "gated_delta_net"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_written_read_and_distilled(
    make_model: MakeModel, make_tokens: MakeTokens, mixer: Any, tmp_path: Path
) -> None:
    model = make_model(mixers=mixer, max_position_embeddings=20, **GLU).float()
    tokens = make_tokens(2, 12)
    model.save_pretrained(tmp_path / "whole")
    read = load(tmp_path / "whole")
    assert torch.equal(read(tokens).logits, model(tokens).logits)
    written = model.generate(tokens, max_new_tokens=5, do_sample=False, use_cache=True)
    plain = model.generate(tokens, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(written, plain)
    distilled, report = distill(model, order=12)
    assert len(report.layers) == sum(hasattr(layer.mixer, "filter") for layer in model.model.layers)
    distilled.save_pretrained(tmp_path / "small")
    small = load(tmp_path / "small")
    assert torch.equal(small(tokens).logits, distilled(tokens).logits)
    whole = model(tokens).logits
    assert (small(tokens).logits - whole).norm() < 0.05 * whole.norm()


def test_gradients_cross_chunks(make_model: MakeModel, make_tokens: MakeTokens) -> None:
    model, tokens = make_model(**GLU), make_tokens(2, 15)
    model(tokens).logits.square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    first = model(tokens[:, :8], use_cache=True)
    rest = model(tokens[:, 8:], past_key_values=first.past_key_values)
    torch.cat([first.logits, rest.logits], 1).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name], rtol=1e-6, atol=1e-9, msg=name)


@torch.no_grad()
def test_half_precision_spares_the_filters(make_model: MakeModel, make_tokens: MakeTokens) -> None:
    model, tokens = make_model(**GLU).float(), make_tokens(2, 20)
    expected = model(tokens, use_cache=False).logits
    model.to(torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in model.model.layers[0].mixer.filter.parameters())
    logits = model(tokens).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).norm() < 0.1 * expected.norm()
