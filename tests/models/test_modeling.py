"""The forward: parallel, recurrent, chunked and padded modes are one map; losses and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache

from gramian.models import GramianConfig, GramianForCausalLM, GramianModel

MakeModel = Callable[..., GramianForCausalLM]
MakeTokens = Callable[[int, int], torch.Tensor]


def gradients(model: GramianForCausalLM) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
    model.zero_grad()
    return found


@pytest.mark.pairs
@pytest.mark.parametrize("chunks", [[1], [2], [1, 5, 2, 17, 1, 37]])
@torch.no_grad()
def test_parallel_equals_recurrent_equals_chunked(
    make_model: MakeModel,
    make_tokens: MakeTokens,
    mixer: str,
    filter_config: dict[str, Any],
    chunks: list[int],
) -> None:
    model = make_model(mixers=mixer, filter=filter_config)
    length = sum(chunks)  # up to 63, past the filters' max_length
    tokens = make_tokens(2, length)
    whole = model(tokens, use_cache=False)
    assert whole.past_key_values is None

    for sizes in (chunks, [1] * length):
        cache, logits = None, []
        for part in tokens.split(sizes, 1):
            outputs = model(part, past_key_values=cache)
            cache = outputs.past_key_values
            logits.append(outputs.logits)
        assert_close(torch.cat(logits, 1), whole.logits)


@pytest.mark.each
@torch.no_grad()
def test_single_precision_agrees_to_the_promised_error(
    make_model: MakeModel, make_tokens: MakeTokens, mixer: str, filter_config: dict[str, Any]
) -> None:
    model = make_model(mixers=mixer, filter=filter_config).float()
    tokens = make_tokens(2, 63)
    whole = model(tokens, use_cache=False).logits
    first = model(tokens[:, :30])
    steps = [first.logits]
    for t in range(30, 63):
        steps.append(model(tokens[:, t : t + 1], past_key_values=first.past_key_values).logits)
    assert (torch.cat(steps, 1) - whole).norm() <= 1e-5 * whole.norm()


@pytest.mark.each
@pytest.mark.parametrize("padding", [1, 3, 50])
@torch.no_grad()
def test_left_padding_leaves_no_trace(
    make_model: MakeModel,
    make_tokens: MakeTokens,
    mixer: str,
    filter_config: dict[str, Any],
    padding: int,
) -> None:
    model = make_model(mixers=mixer, filter=filter_config)
    tokens, junk = make_tokens(2, 12), make_tokens(1, padding)
    batch = torch.cat([torch.cat([junk, tokens[:1]], 1), make_tokens(1, padding + 12)])
    mask = torch.ones_like(batch)
    mask[0, :padding] = 0
    expected = model(tokens[:1]).logits
    parallel = model(batch, attention_mask=mask, use_cache=False).logits
    assert_close(parallel[:1, padding:], expected)
    assert_close(parallel[1:], model(batch[1:]).logits)

    cached = model(batch[:, :-3], attention_mask=mask[:, :-3])
    assert_close(cached.logits, parallel[:, :-3])
    for t in (-3, -2, -1):  # the mask grows with the sequence, as in `generate`
        until = batch.shape[1] + t + 1
        step = model(
            batch[:, until - 1 : until],
            attention_mask=mask[:, :until],
            past_key_values=cached.past_key_values,
        )
        assert_close(step.logits, parallel[:, until - 1 : until])


@torch.no_grad()
def test_padding_fed_token_by_token_leaves_no_trace(
    model: GramianForCausalLM, make_tokens: MakeTokens
) -> None:
    tokens, cache = make_tokens(1, 10), None
    for t in range(10):
        outputs = model(
            tokens[:, t : t + 1],
            attention_mask=torch.tensor([[int(t >= 4)]]),
            past_key_values=cache,
        )
        cache = outputs.past_key_values
    assert_close(outputs.logits, model(tokens[:, 4:]).logits[:, -1:])


@pytest.mark.each
@torch.no_grad()
def test_the_future_does_not_matter_and_the_past_does(
    make_model: MakeModel, make_tokens: MakeTokens, mixer: str, filter_config: dict[str, Any]
) -> None:
    model = make_model(mixers=mixer, filter=filter_config)
    tokens = make_tokens(1, 24)
    logits = model(tokens).logits
    later, earlier = tokens.clone(), tokens.clone()
    later[0, 15] = (later[0, 15] + 1) % model.config.vocab_size
    earlier[0, 5] = (earlier[0, 5] + 1) % model.config.vocab_size
    assert_close(model(later).logits[:, :15], logits[:, :15])
    assert (model(earlier).logits[:, 23] - logits[:, 23]).abs().max() > 1e-6


@torch.no_grad()
def test_a_mask_of_ones_changes_nothing(model: GramianForCausalLM, make_tokens: MakeTokens) -> None:
    tokens = make_tokens(2, 9)
    expected = model(tokens).logits
    for mask in (torch.ones(2, 9), torch.ones(2, 9).bool(), torch.ones(2, 9).long()):
        assert torch.equal(model(tokens, attention_mask=mask).logits, expected)


@torch.no_grad()
def test_layers_may_differ(make_model: MakeModel, make_tokens: MakeTokens) -> None:
    model = make_model(
        num_hidden_layers=3,
        mixers=["hyena", "long_convolution", "multi_hyena"],
        filter=[
            {"type": "rtf", "state_size": 3, "initialization": "montel"},
            {"type": "implicit"},
            {"type": "modal", "orders": [1, 4, 2]},
        ],
    )
    kinds = [type(block.mixer).__name__ for block in model.model.layers]
    assert kinds == ["Hyena", "LongConvolution", "MultiHyena"]
    tokens = make_tokens(2, 20)
    first = model(tokens[:, :11])
    rest = model(tokens[:, 11:], past_key_values=first.past_key_values).logits
    assert_close(torch.cat([first.logits, rest], 1), model(tokens).logits)


@pytest.mark.parametrize("order", [3, 4])
@torch.no_grad()
def test_hyena_of_higher_order(make_model: MakeModel, make_tokens: MakeTokens, order: int) -> None:
    model = make_model(mixers="hyena", hyena_order=order, gated_mlp=False)
    tokens = make_tokens(2, 13)
    first = model(tokens[:, :7])
    rest = model(tokens[:, 7:], past_key_values=first.past_key_values).logits
    assert_close(torch.cat([first.logits, rest], 1), model(tokens).logits)


@torch.no_grad()
def test_embeddings_may_be_given_instead_of_tokens(
    model: GramianForCausalLM, make_tokens: MakeTokens
) -> None:
    tokens = make_tokens(2, 9)
    embedded = model.get_input_embeddings()(tokens)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(tokens).logits)


@torch.no_grad()
def test_logits_to_keep(model: GramianForCausalLM, make_tokens: MakeTokens) -> None:
    tokens = make_tokens(2, 9)
    logits = model(tokens).logits
    assert logits.shape == (2, 9, model.config.vocab_size)
    assert_close(model(tokens, logits_to_keep=1).logits, logits[:, -1:])
    picked = torch.tensor([0, 4, 5])
    assert_close(model(tokens, logits_to_keep=picked).logits, logits[:, picked])

    due = torch.zeros(tokens.shape, dtype=torch.bool)
    due[0, 2] = due[1, [0, 4]] = True
    answers = torch.where(due, tokens, -100)
    kept = model(tokens, labels=answers, shift_labels=answers[due], logits_to_keep=due)
    assert_close(kept.logits, logits[due])
    assert_close(kept.loss, model(tokens, labels=answers, shift_labels=answers).loss)
    with pytest.raises(ValueError, match="needs shift_labels"):
        model(tokens, labels=answers, logits_to_keep=due)


@torch.no_grad()
def test_hidden_states(model: GramianForCausalLM, make_tokens: MakeTokens) -> None:
    tokens = make_tokens(2, 9)
    outputs = model(tokens, output_hidden_states=True)
    base = model.model(tokens, output_hidden_states=True)
    assert len(outputs.hidden_states) == model.config.num_hidden_layers + 1
    assert torch.equal(outputs.hidden_states[0], model.model.embed_tokens(tokens))
    assert torch.equal(outputs.hidden_states[-1], base.last_hidden_state)
    assert_close(model.lm_head(outputs.hidden_states[-1]), outputs.logits)
    assert model(tokens).hidden_states is None
    one_block = model.model.layers[0](outputs.hidden_states[0])
    assert_close(one_block, outputs.hidden_states[1])


def test_a_tuple_on_request(model: GramianForCausalLM, make_tokens: MakeTokens) -> None:
    tokens = make_tokens(2, 5)
    loss, logits = model(tokens, labels=tokens, return_dict=False)
    assert loss.ndim == 0
    assert_close(logits, model(tokens).logits)


def test_the_loss_is_that_of_the_next_token(
    model: GramianForCausalLM, make_tokens: MakeTokens
) -> None:
    tokens = make_tokens(2, 9)
    labels = tokens.clone()
    labels[0, :4] = -100
    outputs = model(tokens, labels=labels)
    log_probabilities = outputs.logits.double().log_softmax(-1)
    terms = [
        -log_probabilities[b, t, labels[b, t + 1]]
        for b in range(2)
        for t in range(8)
        if labels[b, t + 1] >= 0
    ]
    assert_close(outputs.loss.double(), torch.stack(terms).mean(), rtol=1e-5, atol=0)


def test_no_cache_is_made_where_gradients_are(
    model: GramianForCausalLM, make_tokens: MakeTokens
) -> None:
    tokens = make_tokens(1, 4)
    assert model(tokens).past_key_values is None
    with torch.no_grad():
        assert model(tokens).past_key_values is not None
        assert model(tokens, use_cache=False).past_key_values is None
        assert model.train()(tokens).past_key_values is None


@pytest.mark.each
def test_gradients_cross_chunks(
    make_model: MakeModel, make_tokens: MakeTokens, mixer: str, filter_config: dict[str, Any]
) -> None:
    model = make_model(mixers=mixer, filter=filter_config)
    tokens = make_tokens(2, 15)
    weights = torch.randn(2, 15, model.config.vocab_size, dtype=torch.float64)
    (model(tokens).logits * weights).sum().backward()
    expected = gradients(model)

    first = model(tokens[:, :8], use_cache=True)
    one = model(tokens[:, 8:9], past_key_values=first.past_key_values)
    last = model(tokens[:, 9:], past_key_values=one.past_key_values)
    logits = torch.cat([first.logits, one.logits, last.logits], 1)
    (logits * weights).sum().backward()
    for name, gradient in gradients(model).items():
        assert_close(gradient, expected[name], rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.each
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(
    make_model: MakeModel, make_tokens: MakeTokens, mixer: str, reentrant: bool
) -> None:
    model = make_model(mixers=mixer).train()
    tokens = make_tokens(2, 12)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    model(tokens, attention_mask=mask, labels=tokens).loss.backward()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    outputs = model(tokens, attention_mask=mask, labels=tokens, use_cache=True)
    assert outputs.past_key_values is None
    outputs.loss.backward()
    for name, gradient in gradients(model).items():
        assert_close(gradient, expected[name], msg=name)


@pytest.mark.each
def test_every_parameter_learns(
    make_model: MakeModel, make_tokens: MakeTokens, mixer: str, filter_config: dict[str, Any]
) -> None:
    model = make_model(mixers=mixer, filter=filter_config).train()
    tokens = make_tokens(2, 30)
    model(tokens, labels=tokens).loss.backward()
    for name, gradient in gradients(model).items():
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 0, name


@pytest.mark.each
@torch.no_grad()
def test_half_precision_spares_the_filters(
    make_model: MakeModel, make_tokens: MakeTokens, mixer: str, filter_config: dict[str, Any]
) -> None:
    model = make_model(mixers=mixer, filter=filter_config).float()
    tokens = make_tokens(2, 30)
    expected = model(tokens, use_cache=False).logits
    model.to(torch.bfloat16)
    for filter in (getattr(block.mixer, "filter", None) for block in model.model.layers):
        if filter is not None:
            for tensor in (*filter.parameters(), *filter.buffers()):
                assert tensor.dtype != torch.bfloat16
    assert model.dtype == model.lm_head.weight.dtype == torch.bfloat16
    first = model(tokens[:, :29])
    last = model(tokens[:, 29:], past_key_values=first.past_key_values)
    logits = torch.cat([first.logits, last.logits], 1)
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).norm() < 0.1 * expected.norm()
    assert last.past_key_values.nbytes == model.state_bytes(2)


def test_tied_and_untied_embeddings(make_config: Callable[..., GramianConfig]) -> None:
    tied = GramianForCausalLM(make_config())
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    untied = GramianForCausalLM(make_config(tie_word_embeddings=False))
    assert not torch.equal(untied.lm_head.weight, untied.model.embed_tokens.weight)
    assert untied.num_parameters() - tied.num_parameters() == tied.lm_head.weight.numel()


def test_resizing_the_vocabulary(model: GramianForCausalLM, make_tokens: MakeTokens) -> None:
    tokens = make_tokens(1, 6)
    before = model(tokens).logits
    model.resize_token_embeddings(64)
    after = model(tokens).logits
    assert after.shape[-1] == model.config.vocab_size == 64
    assert_close(after[..., : before.shape[-1]], before)


def test_initialization_follows_the_configuration(
    make_config: Callable[..., GramianConfig],
) -> None:
    torch.manual_seed(0)
    config = make_config(hidden_size=96, num_hidden_layers=8, initializer_range=0.05)
    block = GramianForCausalLM(config).model.layers[3]
    assert block.mixer.in_proj.weight.std().item() == pytest.approx(0.05, rel=0.1)
    for small in (block.mixer.out_proj, block.mlp.down_proj):
        assert small.weight.std().item() == pytest.approx(0.05 / 4, rel=0.1)
    taps = block.mixer.short.weight  # uniform in ±1/√3
    assert taps.std().item() == pytest.approx(1 / 3, rel=0.1)
    frequency = config.filter_of(3).get("frequency", 10.0)
    assert torch.all(block.mixer.filter.frequency == frequency)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({}, ValueError, "exactly one of input_ids and inputs_embeds"),
        (
            {"input_ids": torch.ones(1, 2).long(), "inputs_embeds": torch.ones(1, 2, 12)},
            ValueError,
            "exactly one of input_ids and inputs_embeds",
        ),
        ({"input_ids": torch.ones(2, 0).long()}, ValueError, "at least one token.* length 0"),
        (
            {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 2)},
            ValueError,
            r"attention_mask must be .*\(2, 3\).*; got \(2, 2\)",
        ),
        (
            {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 1, 3, 3)},
            ValueError,
            "attention_mask must be",
        ),
        (
            {"input_ids": torch.ones(2, 3).long(), "past_key_values": DynamicCache()},
            TypeError,
            "must be a GramianCache.*; got DynamicCache",
        ),
    ],
)
def test_wrong_inputs_are_refused_in_one_sentence(
    model: GramianForCausalLM, arguments: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    for callee in (model, model.model):
        with pytest.raises(error, match=sentence) as caught:
            callee(**arguments)
        assert "\n" not in str(caught.value)


def test_a_cache_of_another_batch_is_refused(
    model: GramianForCausalLM, make_tokens: MakeTokens
) -> None:
    with torch.no_grad():
        cache = model(make_tokens(2, 4)).past_key_values
    with pytest.raises(ValueError, match="holds 2 sequences, the input 3"):
        model(make_tokens(3, 1), past_key_values=cache)
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="checkpointing"):
        model(make_tokens(2, 1), past_key_values=cache)


@pytest.mark.slow
@torch.no_grad()
def test_the_forward_compiles(make_model: MakeModel, make_tokens: MakeTokens, mixer: str) -> None:
    """As close to double precision as the forward that is not compiled, up to a factor."""
    model, tokens = make_model(mixers=mixer), make_tokens(2, 24)
    exact = model(tokens, use_cache=False).logits
    model.float()
    own, compiled = (
        float((forward(tokens, use_cache=False).logits - exact).abs().max())
        for forward in (model, torch.compile(model))
    )
    assert compiled < 2 * own < 1e-3


def test_the_base_model_stands_alone(
    make_config: Callable[..., GramianConfig], make_tokens: MakeTokens
) -> None:
    model = GramianModel(make_config())
    assert model(make_tokens(2, 5)).last_hidden_state.shape == (2, 5, 12)
    assert not model.can_generate()


@torch.no_grad()
def test_attention_counts_positions_from_the_first_real_token(
    make_model: MakeModel, make_tokens: MakeTokens
) -> None:
    """Generated behind padding, attention sees what it sees without."""
    model = make_model(mixers=["softmax_attention", "hyena"], attention={"rotary_base": 30.0})
    tokens = make_tokens(1, 12)
    padded = torch.cat([make_tokens(1, 70), tokens], 1)
    mask = (torch.arange(82) >= 70).long()[None]
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens, **settings)[:, 12:]
    assert torch.equal(model.generate(padded, attention_mask=mask, **settings)[:, 82:], expected)
