"""The cache: what beam search, finished sequences and offloading ask of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from gramian.models import GramianCache, GramianConfig, GramianForCausalLM

MakeModel = Callable[..., GramianForCausalLM]
MakeTokens = Callable[[int, int], torch.Tensor]


@torch.no_grad()
def continued(model: GramianForCausalLM, cache: GramianCache, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, past_key_values=cache).logits


@torch.no_grad()
def filled(model: GramianForCausalLM, tokens: torch.Tensor) -> GramianCache:
    return model(tokens, use_cache=True).past_key_values


def test_it_counts_tokens_and_sequences(model: GramianForCausalLM, make_tokens: MakeTokens) -> None:
    cache = GramianCache(model.config)
    assert cache.get_seq_length() == 0
    assert cache.batch_size == -1
    assert cache.nbytes == 0
    assert not cache.has_previous_state()
    continued(model, cache, make_tokens(3, 5))
    continued(model, cache, make_tokens(3, 1))
    assert [cache.get_seq_length(layer) for layer in range(2)] == [6, 6]
    assert cache.get_mask_sizes(4, 1) == (10, 0)
    assert cache.batch_size == 3
    assert len(cache) == 2
    assert cache.has_previous_state()
    assert not cache.is_compileable


@pytest.mark.each
@pytest.mark.parametrize(
    ("indices", "picked"),
    [
        (torch.tensor([2, 0, 0, 1]), [2, 0, 0, 1]),
        (torch.tensor([True, False, True]), [0, 2]),
    ],
)
def test_selecting_sequences(
    make_model: MakeModel,
    make_tokens: MakeTokens,
    mixer: str,
    filter_config: dict[str, Any],
    indices: torch.Tensor,
    picked: list[int],
) -> None:
    model = make_model(mixers=mixer, filter=filter_config)
    tokens = make_tokens(3, 9)
    more = make_tokens(len(picked), 1)
    cache = filled(model, tokens)
    cache.batch_select_indices(indices)
    assert cache.batch_size == len(picked)
    expected = model(torch.cat([tokens[picked], more], 1)).logits[:, -1:]
    assert_close(continued(model, cache, more), expected)


def test_reordering_follows_the_beams(model: GramianForCausalLM, make_tokens: MakeTokens) -> None:
    tokens, more = make_tokens(4, 7), make_tokens(4, 2)
    order = torch.tensor([3, 3, 0, 1])
    cache = filled(model, tokens)
    cache.reorder_cache(order)
    expected = model(torch.cat([tokens[order], more], 1)).logits[:, -2:]
    assert_close(continued(model, cache, more), expected)


@pytest.mark.each
def test_repeating_puts_copies_side_by_side(
    make_model: MakeModel, make_tokens: MakeTokens, mixer: str, filter_config: dict[str, Any]
) -> None:
    model = make_model(mixers=mixer, filter=filter_config)
    tokens, more = make_tokens(2, 8), make_tokens(6, 1)
    cache = filled(model, tokens)
    cache.batch_repeat_interleave(3)
    assert cache.batch_size == 6
    repeated = tokens.repeat_interleave(3, 0)
    expected = model(torch.cat([repeated, more], 1)).logits[:, -1:]
    assert_close(continued(model, cache, more), expected)


def test_an_empty_cache_can_be_rearranged(model: GramianForCausalLM) -> None:
    cache = GramianCache(model.config)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    assert cache.batch_size == -1


def test_resetting_forgets_the_tokens_and_keeps_the_recurrences(
    model: GramianForCausalLM, make_tokens: MakeTokens
) -> None:
    tokens, others = make_tokens(2, 9), make_tokens(3, 5)
    cache = filled(model, tokens)
    recurrences = [layer.recurrence for layer in cache.layers]
    cache.reset()
    assert cache.get_seq_length() == 0
    assert not cache.has_previous_state()
    assert_close(continued(model, cache, others), model(others).logits)
    assert [layer.recurrence for layer in cache.layers] == recurrences


def test_offloading_and_back_changes_nothing(
    model: GramianForCausalLM, make_tokens: MakeTokens
) -> None:
    tokens, more = make_tokens(2, 9), make_tokens(2, 1)
    cache = filled(model, tokens)
    expected = continued(model, copy.deepcopy(cache), more)
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    assert torch.equal(continued(model, cache, more), expected)


@pytest.mark.each
def test_a_copy_has_a_state_of_its_own_and_shares_the_weights(
    make_model: MakeModel, make_tokens: MakeTokens, mixer: str, filter_config: dict[str, Any]
) -> None:
    model = make_model(mixers=mixer, filter=filter_config)
    tokens, one, other = make_tokens(2, 9), make_tokens(2, 6), make_tokens(2, 6)
    prompt = filled(model, tokens)
    branch = copy.deepcopy(prompt)
    for t in range(6):  # steps may write into the state they consume
        continued(model, branch, one[:, t : t + 1])
    for t in range(5):
        continued(model, prompt, other[:, t : t + 1])
    expected = model(torch.cat([tokens, other], 1)).logits[:, -1:]
    assert_close(continued(model, prompt, other[:, 5:]), expected)
    assert branch.get_seq_length() == 15
    for copied, original in zip(branch.layers, prompt.layers, strict=True):
        assert copied.recurrence is original.recurrence


def test_what_a_recurrence_cannot_do_is_refused(
    model: GramianForCausalLM, make_tokens: MakeTokens
) -> None:
    cache = filled(model, make_tokens(1, 4))
    assert not cache.layers[0].is_croppable
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="cannot record its past"):
        cache.activate_past_recording()
    with pytest.raises(TypeError, match="no convolution state"):
        cache.update_conv_state(torch.zeros(1, 2, 3), 0)


@pytest.mark.each
def test_the_cache_is_as_large_as_announced_and_does_not_grow(
    make_model: MakeModel, make_tokens: MakeTokens, mixer: str, filter_config: dict[str, Any]
) -> None:
    model = make_model(mixers=mixer, filter=filter_config)
    announced = model.state_bytes(3, 5)
    cache = filled(model, make_tokens(3, 5))
    assert cache.nbytes == announced > 0
    for _ in range(3):
        continued(model, cache, make_tokens(3, 1))
    continued(model, cache, make_tokens(3, 2 * model.config.max_position_embeddings))
    assert cache.nbytes == announced == model.state_bytes(3, cache.get_seq_length())
    assert model.state_bytes(6) == 2 * announced == model.model.state_bytes(6)


def test_modal_states_are_smaller_than_buffers_and_half_precision_smaller_still(
    make_config: Callable[..., GramianConfig],
) -> None:
    modal = GramianForCausalLM(make_config(filter={"type": "modal", "orders": 3}))
    implicit = GramianForCausalLM(make_config())
    assert modal.state_bytes() < implicit.state_bytes()
    single = modal.state_bytes()
    assert modal.to(torch.bfloat16).state_bytes() < single


@pytest.mark.parametrize(("batch", "context"), [(0, 1), (1, 0), (-2, 5)])
def test_state_bytes_of_nothing_is_refused(
    model: GramianForCausalLM, batch: int, context: int
) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        model.state_bytes(batch, context)


def fused_step(model: GramianForCausalLM) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW(model.parameters(), lr=0.05, fused=True).step()


def load_others(model: GramianForCausalLM) -> None:
    model.load_state_dict({n: 1.1 * t for n, t in model.state_dict().items()})


@torch.no_grad()
def set_data(model: GramianForCausalLM) -> None:
    for parameter in model.parameters():
        parameter.data = 1.1 * parameter.data


@pytest.mark.parametrize("change", [fused_step, load_others, set_data])
def test_a_cache_does_not_outlive_a_change_of_the_filters(
    make_model: MakeModel,
    make_tokens: MakeTokens,
    filter_config: dict[str, Any],
    change: Callable[[GramianForCausalLM], None],
) -> None:
    model = make_model(mixers=["hyena", "softmax_attention"], filter=filter_config)
    tokens = make_tokens(2, 9)
    cache = filled(model, tokens[:, :6])
    copied = copy.deepcopy(cache)
    change(model)
    for stale in (cache, copied):
        with pytest.raises(ValueError, match="filters have changed since this cache was filled"):
            continued(model, stale, tokens[:, 6:7])
    cache.reset()  # what is remembered is gone, and recurrences are made anew
    expected = continued(model, filled(model, tokens[:, :6]), tokens[:, 6:])
    continued(model, cache, tokens[:, :6])
    assert torch.equal(continued(model, cache, tokens[:, 6:]), expected)


def test_a_cache_outlives_what_changes_no_filter(
    make_model: MakeModel, make_tokens: MakeTokens, filter_config: dict[str, Any]
) -> None:
    """The same values loaded again, a change of other weights, and training across chunks."""
    model, tokens = make_model(mixers="hyena", filter=filter_config), make_tokens(2, 12)
    cache = filled(model, tokens[:, :6])
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    expected = continued(model, copy.deepcopy(cache), tokens[:, 6:7])
    assert torch.equal(continued(model, filled(model, tokens[:, :6]), tokens[:, 6:7]), expected)
    model.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)
    assert not torch.equal(continued(model, copy.deepcopy(cache), tokens[:, 6:7]), expected)
    model.train()
    model(tokens[:, 6:9], past_key_values=cache, labels=tokens[:, 6:9]).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    model(tokens[:, 9:], past_key_values=cache)  # with gradients, filters are evaluated anew


def test_a_cache_is_of_one_model(make_model: MakeModel, make_tokens: MakeTokens) -> None:
    model, tokens = make_model(), make_tokens(1, 7)
    cache, other = filled(model, tokens[:, :6]), copy.deepcopy(model)
    with pytest.raises(ValueError, match="filled by another model"):
        continued(other, cache, tokens[:, 6:])
    cache.reset()
    assert torch.equal(
        continued(other, cache, tokens), continued(model, GramianCache(model.config), tokens)
    )
