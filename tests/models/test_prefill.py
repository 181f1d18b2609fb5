"""Prompts read in chunks are prompts read whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from gramian.models import GramianForCausalLM

MakeModel = Callable[..., GramianForCausalLM]
MakeTokens = Callable[[int, int], torch.Tensor]


@pytest.mark.each
@pytest.mark.parametrize("chunk_size", [1, 7, 31, 32, 1000])
def test_chunks_are_the_whole(
    make_model: MakeModel,
    make_tokens: MakeTokens,
    mixer: Any,
    filter_config: dict[str, Any],
    chunk_size: int,
) -> None:
    model, tokens = make_model(mixers=mixer, filter=filter_config), make_tokens(2, 31)
    mask = torch.ones_like(tokens)
    mask[0, :12] = 0
    with torch.no_grad():
        whole = model(tokens, attention_mask=mask, use_cache=True)
    seen: list[tuple[int, int]] = []
    outputs = model.prefill(
        tokens, mask, chunk_size=chunk_size, progress=lambda *counts: seen.append(counts)
    )
    assert_close(outputs.logits, whole.logits[:, -1:])
    assert seen[0] == (0, 31) and seen[-1] == (31, 31)
    assert len(seen) == 1 + -(-31 // chunk_size)
    assert outputs.past_key_values.get_seq_length() == 31
    more = make_tokens(2, 1)
    with torch.no_grad():
        expected = model(more, past_key_values=whole.past_key_values).logits
        assert_close(model(more, past_key_values=outputs.past_key_values).logits, expected)


def test_a_second_text_goes_on(model: GramianForCausalLM, make_tokens: MakeTokens) -> None:
    tokens = make_tokens(2, 30)
    first = model.prefill(tokens[:, :11], chunk_size=4)
    rest = model.prefill(tokens[:, 11:], past_key_values=first.past_key_values, chunk_size=8)
    with torch.no_grad():
        assert_close(rest.logits, model(tokens).logits[:, -1:])


@pytest.mark.parametrize("size", [0, -3, 2.5])
def test_a_chunk_of_nothing_is_refused(
    model: GramianForCausalLM, make_tokens: MakeTokens, size: Any
) -> None:
    with pytest.raises(ValueError, match="chunk_size must be an integer of at least 1"):
        model.prefill(make_tokens(1, 4), chunk_size=size)
