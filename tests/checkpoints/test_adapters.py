"""peft's adapters on converted models: stepped as in parallel, merged as unmerged."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model

from gramian import checkpoints
from gramian.models.cache import CACHE


@torch.no_grad()
def steps(model: Any, tokens: Tensor) -> Tensor:
    cache, made = None, []
    for part in tokens.split([1, 7, 1, 1], 1):
        outputs = model(input_ids=part, past_key_values=cache, use_cache=True)
        cache = getattr(outputs, CACHE)
        made.append(outputs.logits)
    return torch.cat(made, 1)


@torch.no_grad()
def test_every_checkpoint(every: Any) -> None:
    model, tokens = checkpoints.load(every.file).model.double(), every.expected()["input_ids"]
    tokens = tokens[:2, :10]
    without = model(tokens, use_cache=False).logits
    torch.manual_seed(0)
    adapted = get_peft_model(
        copy.deepcopy(model),
        LoraConfig(
            r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
        ),
    ).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.mul_(0.2)
    expected = adapted(input_ids=tokens, use_cache=False).logits
    assert (expected - without).abs().max() > 1e-2

    def close(found: Tensor, wanted: Tensor) -> None:
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)

    close(steps(adapted, tokens), expected)
    with adapted.disable_adapter():
        close(steps(adapted, tokens), without)
    merged = adapted.merge_and_unload()
    close(steps(merged, tokens), expected)
    close(merged(tokens, use_cache=False).logits, expected)
