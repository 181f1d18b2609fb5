"""Options that published models need: norms, biases, dropout of embeddings, the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gramian.models import GramianForCausalLM
from gramian.models.norms import PlusEpsRMSNorm, make_norm

MakeModel = Callable[..., GramianForCausalLM]
MakeTokens = Callable[[int, int], torch.Tensor]


@pytest.mark.parametrize("kind", ["rms", "rms_plus_eps", "layer"])
def test_norms_are_their_formulas(kind: str) -> None:
    torch.manual_seed(0)
    norm = make_norm(kind, 7, 0.3).double()
    weight = norm.weight
    assert isinstance(weight, torch.Tensor)
    nn.init.normal_(weight)
    x = 0.1 * torch.randn(2, 3, 7, dtype=torch.float64)
    square = x.square().mean(-1, keepdim=True)
    centred = x - x.mean(-1, keepdim=True)
    expected = {
        "rms": x / (square + 0.3).sqrt(),
        "rms_plus_eps": x / (square.sqrt() + 0.3),
        "layer": centred / (centred.square().mean(-1, keepdim=True) + 0.3).sqrt(),
    }
    torch.testing.assert_close(norm(x), weight * expected[kind])


def test_the_norm_of_a_half_precision_input_is_taken_in_single() -> None:
    norm = PlusEpsRMSNorm(64, 1e-6).bfloat16()
    x = (100 * torch.randn(5, 64)).bfloat16()
    expected = x.float() / (x.float().square().mean(-1, keepdim=True).sqrt() + 1e-6)
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x), expected.bfloat16())


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({}, (nn.RMSNorm, nn.RMSNorm)),
        ({"norm": "layer"}, (nn.LayerNorm, nn.LayerNorm)),
        ({"norm": "rms_plus_eps", "final_norm": "layer"}, (PlusEpsRMSNorm, nn.LayerNorm)),
        ({"block": "glu", "norm": "layer"}, (nn.LayerNorm, nn.RMSNorm)),
    ],
)
def test_which_norms_a_model_has(
    make_model: MakeModel, options: dict[str, Any], kinds: tuple[type, type]
) -> None:
    model = make_model(**options).model
    block = model.layers[0]
    first = block.mixer_norm if hasattr(block, "mixer_norm") else block.block.norm
    assert (type(first), type(model.norm)) == kinds
    assert model.norm.weight.eq(1).all()


@pytest.mark.parametrize("gated", [False, True])
def test_biases_of_the_mlp(make_model: MakeModel, gated: bool) -> None:
    mlp = make_model(mlp_bias=True, gated_mlp=gated).model.layers[0].mlp
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    for linear in (mlp.up_proj, mlp.down_proj, *([mlp.gate_proj] if gated else [])):
        assert linear.bias.eq(0).all()
        nn.init.normal_(linear.bias)
    inner = x @ mlp.up_proj.weight.T + mlp.up_proj.bias
    if gated:
        inner = nn.functional.silu(x @ mlp.gate_proj.weight.T + mlp.gate_proj.bias) * inner
    else:
        inner = nn.functional.silu(inner)
    torch.testing.assert_close(mlp(x), inner @ mlp.down_proj.weight.T + mlp.down_proj.bias)
    plain = make_model().model.layers[0].mlp
    assert plain.up_proj.bias is None and plain.down_proj.bias is None


def test_embeddings_are_dropped_in_training_only(
    make_model: MakeModel, make_tokens: MakeTokens
) -> None:
    model, tokens = make_model(embedding_dropout=0.5), make_tokens(4, 30)
    with torch.no_grad():
        whole = model(tokens, output_hidden_states=True).hidden_states[0]
        dropped = model.train()(tokens, output_hidden_states=True).hidden_states[0]
    zero = dropped == 0
    assert 0.4 < float(zero.double().mean()) < 0.6
    torch.testing.assert_close(dropped[~zero], 2 * whole[~zero])


@pytest.mark.parametrize("wide", [False, True])
def test_the_residual_stream_of_a_half_precision_model(
    make_model: MakeModel, make_tokens: MakeTokens, wide: bool
) -> None:
    model = make_model(num_hidden_layers=3, residual_in_fp32=wide).bfloat16()
    dtype = torch.float32 if wide else torch.bfloat16
    tokens = make_tokens(2, 30)
    with torch.no_grad():
        outputs = model(tokens, output_hidden_states=True, use_cache=False)
        first, second, _, last = outputs.hidden_states
        block = model.model.layers[0]
        mixed = first + block.mixer(block.mixer_norm(first.bfloat16()))
        expected = mixed + block.mlp(block.mlp_norm(mixed.bfloat16()))
    assert first.dtype == second.dtype == expected.dtype == dtype
    assert torch.equal(second, expected)
    assert last.dtype == outputs.logits.dtype == torch.bfloat16
    if wide:  # what a block adds is not rounded to the stream's size
        assert not torch.equal(second, second.bfloat16().float())
