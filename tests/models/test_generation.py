"""`generate`: what is written with the cache is what full recomputation writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from gramian.models import GramianCache, GramianForCausalLM

MakeModel = Callable[..., GramianForCausalLM]
MakeTokens = Callable[[int, int], torch.Tensor]


def written(model: GramianForCausalLM, tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """The new tokens."""
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    return model.generate(tokens, **(settings | kwargs))[:, tokens.shape[1] :]


@pytest.mark.each
def test_greedy(
    make_model: MakeModel, make_tokens: MakeTokens, mixer: str, filter_config: dict[str, Any]
) -> None:
    model = make_model(mixers=mixer, filter=filter_config, tie_word_embeddings=False)
    tokens = make_tokens(2, 9)
    cached = written(model, tokens)
    assert torch.equal(cached, written(model, tokens, use_cache=False))
    by_hand = tokens
    for _ in range(12):
        with torch.no_grad():
            best = model(by_hand, use_cache=False).logits[:, -1].argmax(-1)
        by_hand = torch.cat([by_hand, best[:, None]], 1)
    assert torch.equal(cached, by_hand[:, 9:])
    assert len(cached.unique()) > 3  # not one token for ever, which would agree too easily


@pytest.mark.each
def test_a_left_padded_batch_writes_what_each_prompt_does_alone(
    make_model: MakeModel, make_tokens: MakeTokens, mixer: str, filter_config: dict[str, Any]
) -> None:
    model = make_model(mixers=mixer, filter=filter_config)
    prompts = [make_tokens(1, length) for length in (3, 9, 1)]
    batch = torch.cat([torch.cat([torch.zeros(1, 9 - p.shape[1]).long(), p], 1) for p in prompts])
    mask = torch.stack([torch.arange(9) >= 9 - p.shape[1] for p in prompts]).long()
    expected = torch.cat([written(model, prompt) for prompt in prompts])
    assert torch.equal(written(model, batch, attention_mask=mask), expected)
    uncached = written(model, batch, attention_mask=mask, use_cache=False)
    assert torch.equal(uncached, expected)


def test_only_the_prompt_carries_a_mask(
    model: GramianForCausalLM, make_tokens: MakeTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking at a mask for zeros would wait for the device at every token."""
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    masks = []
    forward = model.model.forward

    def spy(**kwargs: Any) -> Any:
        masks.append(kwargs["attention_mask"])
        return forward(**kwargs)

    monkeypatch.setattr(model.model, "forward", spy)
    written(model, make_tokens(2, 4), attention_mask=mask, max_new_tokens=4)
    assert torch.equal(masks[0].real, mask != 0)
    assert masks[1:] == [None] * 3


@pytest.mark.each
@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 0.7, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True},
    ],
)
def test_sampling_and_beams(
    make_model: MakeModel, make_tokens: MakeTokens, mixer: str, settings: dict[str, Any]
) -> None:
    model = make_model(mixers=mixer)
    tokens = make_tokens(2, 6)
    results = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        results.append(written(model, tokens, use_cache=use_cache, **settings))
    assert torch.equal(*results)
    assert results[0].shape[0] == 2 * settings.get("num_return_sequences", 1)


def test_a_long_prompt_may_be_prefilled_in_chunks(
    model: GramianForCausalLM, make_tokens: MakeTokens
) -> None:
    tokens = make_tokens(2, 23)
    mask = torch.ones_like(tokens)
    mask[1, :10] = 0
    expected = written(model, tokens, attention_mask=mask)
    chunked = written(model, tokens, attention_mask=mask, prefill_chunk_size=7)
    assert torch.equal(chunked, expected)


def test_generation_goes_on_from_a_cache(
    model: GramianForCausalLM, make_tokens: MakeTokens
) -> None:
    tokens = make_tokens(2, 7)
    expected = written(model, tokens)
    cache = GramianCache(model.config)
    first = written(model, tokens, past_key_values=cache, max_new_tokens=5)
    assert cache.get_seq_length() == 7 + 5 - 1  # the last one has not been read yet
    so_far = torch.cat([tokens, first], 1)
    rest = written(model, so_far, past_key_values=cache, max_new_tokens=7)
    assert torch.equal(torch.cat([first, rest], 1), expected)


def test_the_cache_is_returned_on_request(
    model: GramianForCausalLM, make_tokens: MakeTokens
) -> None:
    outputs = model.generate(
        make_tokens(2, 5),
        max_new_tokens=4,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        output_hidden_states=True,
    )
    assert type(outputs.past_key_values) is GramianCache
    assert outputs.past_key_values.get_seq_length() == 8
    assert len(outputs.logits) == len(outputs.hidden_states) == 4


def test_prompts_may_be_embeddings(model: GramianForCausalLM, make_tokens: MakeTokens) -> None:
    tokens = make_tokens(2, 6)
    embedded = model.get_input_embeddings()(tokens)
    generated = model.generate(inputs_embeds=embedded, max_new_tokens=12, do_sample=False)
    assert torch.equal(generated, written(model, tokens))


def test_finished_sequences_are_padded(model: GramianForCausalLM, make_tokens: MakeTokens) -> None:
    tokens = make_tokens(2, 8)
    free = written(model, tokens)
    end = free[0, 4].item()
    ended = written(model, tokens, eos_token_id=end)
    for row, reference in zip(ended, free, strict=True):
        stop = next((i for i, token in enumerate(reference) if token == end), len(reference))
        assert torch.equal(row[: stop + 1], reference[: stop + 1])
        assert (row[stop + 1 :] == 0).all()


@pytest.mark.each
def test_half_precision_generates(
    make_model: MakeModel, make_tokens: MakeTokens, mixer: str, filter_config: dict[str, Any]
) -> None:
    model = make_model(mixers=mixer, filter=filter_config).to(torch.bfloat16)
    new = written(model, make_tokens(2, 5))
    assert new.shape == (2, 12)
    assert ((new >= 0) & (new < model.config.vocab_size)).all()


def test_what_a_recurrence_cannot_do_is_refused(
    make_model: MakeModel, make_tokens: MakeTokens
) -> None:
    model, tokens = make_model(), make_tokens(1, 4)
    assistant = AutoModelForCausalLM.from_config(model.config).double()
    with pytest.raises(ValueError, match="stateful"):
        model.generate(tokens, assistant_model=assistant, max_new_tokens=3)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(tokens, prompt_lookup_num_tokens=2, max_new_tokens=3)
    with pytest.raises(ValueError, match="leave cache_implementation out; got 'static'"):
        model.generate(tokens, cache_implementation="static", max_new_tokens=3)
