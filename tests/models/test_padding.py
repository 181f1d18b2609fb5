"""A row of a batch is what its tokens are alone, wherever padding stands and however it is run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gramian.models import (
    GramianConfig,
    GramianForCausalLM,
    GramianForPairClassification,
    GramianForReconstruction,
    GramianForSequenceClassification,
    GramianForSignalRegression,
)
from gramian.models.cache import CACHE, GramianCache
from tests.models.conftest import KINDS, SOME_KINDS

VOCABULARY = 50

MakeModel = Callable[..., GramianForCausalLM]
PADDINGS = ("left", "right", "gap")
LENGTHS = (14, 9, 1)


def batch(padding: str, lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens and the mask of rows with so many real ones; padding holds other tokens."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths) + (padding != "left")
    ids = torch.randint(VOCABULARY, (len(lengths), width), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in zip(mask, lengths, strict=True):
        if padding == "left":
            row[width - length :] = 1
        elif padding == "right":
            row[:length] = 1
        else:
            row[torch.randperm(width, generator=generator)[:length]] = 1
    return ids, mask


def tokens(ids: Tensor, mask: Tensor, row: int) -> Tensor:
    return ids[row, mask[row].bool()][None]


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-7) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# Gaps for every kind, and padding at one side for one kind of each sort of state.
@pytest.mark.each
@pytest.mark.parametrize(
    ("kind", "padding"),
    [
        pytest.param(
            kind,
            padding,
            marks=[] if padding == "gap" or kind in SOME_KINDS else [pytest.mark.slow],
        )
        for kind in KINDS
        for padding in PADDINGS
    ],
    indirect=["kind"],
)
@torch.no_grad()
def test_prompts_turns_and_steps(make_model: MakeModel, kind: dict[str, Any], padding: str) -> None:
    model = make_model(**kind)
    ids, mask = batch(padding)
    more, more_mask = batch(padding, (3, 0, 6), seed=1)
    then = torch.tensor([[5], [7], [11]])
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    prompt = model.prefill(ids, mask)
    in_chunks = model.prefill(ids, mask, chunk_size=4)
    turns = [
        model(
            more,
            attention_mask=torch.cat([mask, more_mask], 1),
            past_key_values=copy.deepcopy(output[CACHE]),
            logits_to_keep=1,
        )
        for output in (prompt, in_chunks)
    ]
    with torch.enable_grad():
        live = model(more, attention_mask=more_mask, past_key_values=copy.deepcopy(prompt[CACHE]))
    steps = [model(then, past_key_values=output[CACHE]).logits for output in (*turns, live)]
    for row in range(3):
        one = tokens(ids, mask, row)
        alone = model.prefill(one)
        close(whole[row, mask[row].bool()], model(one, use_cache=False).logits[0])
        for output in (prompt, in_chunks):
            close(output.logits[row], alone.logits[0])
        expected, two = alone.logits, tokens(more, more_mask, row)
        if two.shape[1]:
            expected = model.prefill(two, past_key_values=alone[CACHE]).logits
        for output in turns:  # of a row without a new token, what followed its last one
            close(output.logits[row], expected[0])
        expected = model(then[row : row + 1], past_key_values=alone[CACHE]).logits
        for made in steps:
            close(made[row], expected[0])


@pytest.mark.each
@pytest.mark.parametrize(
    ("options", "padding"),
    [
        pytest.param(
            options,
            padding,
            id=f"{next(iter(options), 'greedy')}-{padding}",
            marks=[pytest.mark.slow] if options and padding != "gap" else [],
        )
        for options in (
            {},
            {"num_beams": 3},
            {"prefill_chunk_size": 4},
            {"use_cache": False},
            {"compiled": True},
        )
        for padding in PADDINGS
    ],
)
@torch.no_grad()
def test_writing(
    make_model: MakeModel, some_kind: dict[str, Any], padding: str, options: dict[str, Any]
) -> None:
    model = make_model(**some_kind)
    options = dict(options)
    if options.pop("compiled", False):
        model.compile_decoding(backend="eager")
    ids, mask = batch(padding)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    written = model.generate(ids, attention_mask=mask, **settings, **options)
    for row in range(3):
        one = tokens(ids, mask, row)
        alone = model.generate(one, attention_mask=torch.ones_like(one), **settings, **options)
        assert torch.equal(written[row, ids.shape[1] :], alone[0, one.shape[1] :])


@torch.no_grad()
def test_a_padded_second_turn_of_generate(make_model: MakeModel, some_kind: dict[str, Any]) -> None:
    model = make_model(**some_kind)
    ids, mask = batch("right")
    more, more_mask = batch("gap", (3, 2, 6), seed=1)
    cache = model.prefill(ids, mask)[CACHE]
    joined, seen = torch.cat([ids, more], 1), torch.cat([mask, more_mask], 1)
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    written = model.generate(joined, attention_mask=seen, **{CACHE: cache}, **settings)
    for row in range(3):
        one = tokens(joined, seen, row)
        alone = model.generate(one, attention_mask=torch.ones_like(one), **settings)
        assert torch.equal(written[row, joined.shape[1] :], alone[0, one.shape[1] :])


@torch.no_grad()
def test_what_a_cache_has_taken_cannot_be_hidden(
    make_model: MakeModel, some_kind: dict[str, Any]
) -> None:
    model = make_model(**some_kind)
    ids, mask = batch("right")
    settings: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 6}
    free = model.generate(ids, attention_mask=mask, **settings)
    settings |= {"eos_token_id": int(free[1, ids.shape[1] + 1]), "return_dict_in_generate": True}
    output = model.generate(ids, attention_mask=mask, **settings)
    written = output.sequences[:, ids.shape[1] :]
    ended = (written == settings["eos_token_id"]).cumsum(1)
    real = torch.cat([mask, (ended - (written == settings["eos_token_id"]).long() < 1).long()], 1)
    assert not real[1, -1] and real[:, -1].any()  # row 1 ends while another goes on
    joined = torch.cat([output.sequences, ids[:, :2]], 1)
    seen = torch.cat([real, torch.ones_like(ids[:, :2])], 1)
    with pytest.raises(ValueError, match="which a recurrence cannot take back"):
        model.generate(joined, attention_mask=seen, **{CACHE: output[CACHE]}, **settings)
    with pytest.raises(ValueError, match="which a recurrence cannot take back"):
        model.prefill(joined[:, -3:], seen, past_key_values=output[CACHE])
    # A mask by which they are tokens goes on, and so does a new cache.
    as_taken = torch.cat([mask, torch.ones_like(joined[:, ids.shape[1] :])], 1)
    model.generate(joined, attention_mask=as_taken, **{CACHE: output[CACHE]}, **settings)
    model.generate(joined, attention_mask=seen, **settings)


@pytest.mark.parametrize("padding", PADDINGS)
def test_numbers_at_padding_reach_no_gradient(
    make_config: Callable[..., GramianConfig], padding: str
) -> None:
    torch.manual_seed(0)
    config = make_config(mixers="hyena", input_size=2, num_labels=2)
    model = GramianForSignalRegression(config).double()
    _, mask = batch(padding)
    signal = torch.randn(*mask.shape, 2, dtype=torch.float64)
    embedded = torch.randn(*mask.shape, config.hidden_size, dtype=torch.float64)
    for name, given in (("input_values", signal), ("inputs_embeds", embedded)):
        found = []
        for padded in (given, given.masked_fill(mask.unsqueeze(-1) == 0, torch.nan)):
            model.zero_grad()
            model(**{name: padded}, attention_mask=mask, labels=signal).loss.backward()
            found.append([p.grad for p in model.parameters() if p.grad is not None])
        for one, other in zip(*found, strict=True):
            close(one, other)


@pytest.mark.each
@pytest.mark.parametrize("padding", ["right", "gap", pytest.param("left", marks=pytest.mark.slow)])
def test_the_loss_is_that_of_the_rows(
    make_model: MakeModel, kind: dict[str, Any], padding: str
) -> None:
    model = make_model(**kind)
    ids, mask = batch(padding)
    loss = model(ids, attention_mask=mask, labels=ids).loss  # labels of padding are not due
    rows = [tokens(ids, mask, row) for row in range(2)]  # the third predicts nothing
    alone = sum(model(one, labels=one).loss * (one.shape[1] - 1) for one in rows)
    alone = alone / sum(one.shape[1] - 1 for one in rows)
    close(loss, alone, 1e-6)  # transformers takes losses in float32
    parameters = list(model.parameters())
    together = torch.autograd.grad(loss, parameters, allow_unused=True)
    for found, expected in zip(
        together, torch.autograd.grad(alone, parameters, allow_unused=True), strict=True
    ):
        if found is not None and expected is not None:
            close(found, expected, 1e-5)


@pytest.mark.each
@pytest.mark.parametrize("padding", PADDINGS)
def test_a_gradient_of_every_row(
    make_model: MakeModel, some_kind: dict[str, Any], padding: str
) -> None:
    model = make_model(**some_kind)
    ids, mask = batch(padding, (14, 9, 2))
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def loss(weights: dict[str, Tensor], ids: Tensor, mask: Tensor) -> Tensor:
        arguments = {"attention_mask": mask[None], "labels": ids[None], "use_cache": False}
        return torch.func.functional_call(model, weights, ids[None], arguments).loss

    every = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, ids, mask)
    for row in range(3):
        one = tokens(ids, mask, row)[0]
        alone = torch.func.grad(loss)(weights, one, torch.ones_like(one))
        for name, expected in alone.items():
            close(every[name][row], expected, 1e-5)


@pytest.mark.parametrize("padding", PADDINGS)
def test_a_trainer_s_count_does_not_change_the_loss(make_model: MakeModel, padding: str) -> None:
    model = make_model()
    ids, mask = batch(padding)
    for labels in (ids, ids.masked_fill(mask == 0, -100)):
        counted = (labels[:, 1:] != -100).sum()  # as transformers' Trainer does
        loss = model(ids, attention_mask=mask, labels=labels).loss
        for items in (counted, int(counted)):
            given = {"labels": labels, "num_items_in_batch": items}
            close(model(ids, attention_mask=mask, **given).loss, loss, 1e-6)


def test_a_batch_in_which_nothing_is_due_adds_nothing(make_model: MakeModel) -> None:
    model = make_model()
    ids = torch.randint(VOCABULARY, (2, 4))
    mask = torch.tensor([[0, 0, 0, 1]] * 2)  # tokens that nothing precedes, yet a trainer counts
    labels = ids.masked_fill(mask == 0, -100)
    assert model(ids, attention_mask=mask, labels=labels, num_items_in_batch=7).loss == 0


def test_a_turn_that_would_be_taken_for_everything_is_refused(make_model: MakeModel) -> None:
    model = make_model()
    prompt, turn = torch.randint(VOCABULARY, (1, 12)), torch.randint(VOCABULARY, (1, 5))
    cache = model.prefill(prompt)[CACHE]
    settings: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, CACHE: cache}
    with pytest.raises(ValueError, match="the cache has seen 12 tokens, and the input has 5"):
        model.generate(turn, attention_mask=torch.ones_like(turn), **settings)
    written = model.generate(turn, attention_mask=torch.ones(1, 17), **settings)
    whole = torch.cat([prompt, turn], 1)
    expected = model.generate(whole, max_new_tokens=3, do_sample=False)
    assert torch.equal(written[:, 5:], expected[:, 17:])


def test_logits_of_the_last_tokens(make_model: MakeModel) -> None:
    model = make_model()
    ids, mask = batch("right")
    kept = model(ids, attention_mask=mask, logits_to_keep=3).logits
    for row in range(3):
        alone = model(tokens(ids, mask, row)).logits[0, -3:]
        close(kept[row, 3 - len(alone) :], alone)


def test_a_row_without_a_token_is_not_continued(make_model: MakeModel) -> None:
    model = make_model()
    ids = torch.randint(VOCABULARY, (2, 5))
    mask = torch.tensor([[1] * 5, [0] * 5])
    for call in (model.prefill, model.generate):
        with pytest.raises(ValueError, match="leave a real token in every row"):
            call(ids, attention_mask=mask)
    assert model(ids, attention_mask=mask).logits.shape[:2] == (2, 5)


@torch.no_grad()
def test_a_cache_keeps_its_rows_through_selection_and_disk(
    make_model: MakeModel, tmp_path: Any
) -> None:
    model = make_model(mixers=["hyena", "softmax_attention"])
    ids, mask = batch("right")
    cache: GramianCache = model.prefill(ids, mask)[CACHE]
    cache.save(tmp_path / "state", model)
    loaded = GramianCache.load(tmp_path / "state", model)
    for one in (cache, loaded):
        one.batch_repeat_interleave(2)
        one.batch_select_indices(torch.tensor([5, 0]))
        one.reorder_cache(torch.tensor([1, 0, 0]))
        nothing = torch.zeros(3, 2, dtype=torch.int64)
        output = model(nothing, attention_mask=nothing, past_key_values=one, logits_to_keep=1)
        for row, source in enumerate((0, 2, 2)):
            close(output.logits[row], model.prefill(tokens(ids, mask, source)).logits[0])
    cache.reset()
    assert cache.last_hidden_state is None and cache.padding is None


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("padding", PADDINGS)
def test_classifiers(make_config: Callable[..., GramianConfig], pooling: str, padding: str) -> None:
    torch.manual_seed(0)
    config = make_config(mixers="hyena", pooling=pooling, num_labels=3)
    ids, mask = batch(padding)
    model = GramianForSequenceClassification(config).double().eval()
    made = model(ids, attention_mask=mask).logits
    for row in range(3):
        close(made[row], model(tokens(ids, mask, row)).logits[0])

    pairs = GramianForPairClassification(config).double().eval()
    others, other_mask = batch(padding, (4, 8, 11), seed=3)
    made = pairs(ids, mask, others, other_mask).logits
    for row in range(3):
        one, two = tokens(ids, mask, row), tokens(others, other_mask, row)
        close(made[row], pairs(one, input_ids_2=two).logits[0])

    again = GramianForReconstruction(config).double().eval()
    made = again(ids, attention_mask=mask).logits
    for row in range(3):
        close(made[row, mask[row].bool()], again(tokens(ids, mask, row)).logits[0])


@pytest.mark.parametrize("padding", PADDINGS)
def test_signals(make_config: Callable[..., GramianConfig], padding: str) -> None:
    torch.manual_seed(0)
    config = make_config(
        mixers="long_convolution", block="glu", norm="batch", input_size=2, num_labels=2
    )
    model = GramianForSignalRegression(config).double().eval()
    _, mask = batch(padding)
    signal = torch.randn(*mask.shape, 2, dtype=torch.float64)
    made = model(input_values=signal, attention_mask=mask, labels=signal)
    errors = []
    for row in range(3):
        one = tokens(signal, mask, row)
        alone = model(input_values=one).logits[0]
        close(made.logits[row, mask[row].bool()], alone)
        errors.append((alone - one[0]).square().flatten())
    close(made.loss, torch.cat(errors).mean())


def layers(options: dict[str, Any]) -> int:
    """One layer of each mixer: layers that are alike are traced one by one."""
    mixers = options.get("mixers")
    return len(mixers) if isinstance(mixers, list) else 1


slow_sides = pytest.mark.parametrize(
    "padding", ["gap", *(pytest.param(side, marks=pytest.mark.slow) for side in ("left", "right"))]
)


@slow_sides
def test_compiled_passes(make_model: MakeModel, some_kind: dict[str, Any], padding: str) -> None:
    model = make_model(**some_kind, num_hidden_layers=layers(some_kind))
    ids, mask = batch(padding)
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    compiled = torch.compile(model, backend="eager")
    for positions in (None, (mask.cumsum(1) - 1).clamp_min(0)):
        made = compiled(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        close(made[mask.bool()], expected[mask.bool()])


@slow_sides
@pytest.mark.parametrize(
    "options", [{"mixers": "s6"}, {"filter": {"type": "modal", "orders": 3}}], ids=["s6", "modal"]
)
def test_traced_passes(make_model: MakeModel, options: dict[str, Any], padding: str) -> None:
    """Models of other mixers are traced in `test_hugging_face.py`."""
    model = make_model(**options, num_hidden_layers=layers(options))
    ids, mask = batch(padding)
    arguments = {"attention_mask": mask, "use_cache": False}
    program = torch.export.export(model, (ids,), arguments, strict=False)
    other, other_mask = torch.randint(VOCABULARY, ids.shape), torch.rand(ids.shape) > 0.4
    other_mask[:, 3] = True
    made = program.module()(other, attention_mask=other_mask.long(), use_cache=False).logits
    wanted = model(other, attention_mask=other_mask, use_cache=False).logits
    close(made[other_mask], wanted[other_mask])


def test_packed_rows_are_not_traced_in_silence(make_model: MakeModel) -> None:
    model = make_model()
    ids = torch.randint(VOCABULARY, (1, 6))
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(RuntimeError, match="cannot be traced"):
        compiled(ids, position_ids=positions, use_cache=False)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"attention_mask": torch.ones(2, 1, 6, 6)}, ValueError, r"must be \(batch, length\)"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 2, 2, 2]] * 2)}, ValueError, "such as 2"),
        ({"attention_mask": torch.zeros(2, 6).log()}, ValueError, "such as -inf"),
        ({"position_ids": torch.arange(6)[None] * 2}, ValueError, "jump ahead by 2"),
        ({"position_ids": torch.zeros(3, 2, 6)}, ValueError, "position_ids must be"),
        ({"cache_position": torch.arange(1, 7)}, ValueError, "must be 0 … 5"),
        ({"cache_position": torch.arange(6).flip(0)}, ValueError, "got .5, 4, 3"),
        ({"input_ids": torch.ones(6).long()}, ValueError, r"input_ids must be .batch, length"),
        ({"input_ids": torch.ones(2, 6)}, ValueError, "of integers; got .2, 6. of torch.float32"),
        ({"attentionmask": torch.ones(2, 6)}, TypeError, "does not take attentionmask"),
        ({"head_mask": torch.ones(2)}, TypeError, "does not take head_mask"),
        ({"past_key_values": 1, "cache": 2}, ValueError, "give one cache"),
    ],
)
def test_what_would_be_dropped_is_named(
    model: GramianForCausalLM, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"input_ids": torch.randint(VOCABULARY, (2, 6)), **arguments}
    with pytest.raises(error, match=message):
        model(**arguments)
    with pytest.raises(error, match=message):
        model.model(**arguments)


def test_what_changes_nothing_is_taken(model: GramianForCausalLM) -> None:
    ids = torch.randint(VOCABULARY, (2, 6))
    expected = model(ids).logits
    for arguments in (
        {"token_type_ids": torch.zeros_like(ids)},
        {"cache_position": torch.arange(6)},
        {"position_ids": torch.arange(6)[None]},
        {"position_ids": torch.arange(3, 9)[None]},
        {"attention_mask": torch.ones(2, 6, dtype=torch.bool)},
        {"head_mask": None, "output_attentions": False},
    ):
        assert torch.equal(model(ids, **arguments).logits, expected)


def test_truncated_backpropagation(make_model: MakeModel, some_kind: dict[str, Any]) -> None:
    model = make_model(**some_kind).train()
    ids, mask = batch("left", (12, 7))
    parts = [slice(0, 4), slice(4, 9), slice(9, 12)]
    cache = None
    for part in parts:
        output = model(
            ids[:, part], attention_mask=mask[:, part], past_key_values=cache, use_cache=True
        )
        cache = output[CACHE].detach()
        output.logits.square().sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    gradient = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    # The same with the states as constants, by hand.
    cache = None
    for part in parts:
        output = model(
            ids[:, part], attention_mask=mask[:, part], past_key_values=cache, use_cache=True
        )
        cache = copy.deepcopy(output[CACHE])
        for layer in cache.layers:
            layer.recurrent_states[0] = layer.state.map(lambda x: x.detach().clone())
        output.logits.square().sum().backward()
    for found, parameter in zip(gradient, model.parameters(), strict=True):
        if found is not None and parameter.grad is not None:
            close(found, parameter.grad)
