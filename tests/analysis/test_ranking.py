"""Layers are ranked by the share in use, and each has a suggestion with the right bytes."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

pytest.importorskip("transformers")

import transformers

import gramian
from gramian.analysis import LayerState, StateReport, Storage
from gramian.mixers import GatedLinearAttention, Hyena, SoftmaxAttention

HORIZON = 101


def make(kind: str, ess: list[float], tss: float | None, **fields: object) -> LayerState:
    """A layer whose heads have a constant ESS, except where the position allows less."""
    positions = torch.arange(HORIZON).float()
    cap = torch.minimum(positions, HORIZON - positions)
    sizes = torch.tensor(ess)[:, None].minimum(cap)
    states = positions.expand_as(sizes) if tss is None else torch.full_like(sizes, tss)
    channels = tuple(range(len(ess)))
    return LayerState("x.0.m", "Mix", kind, channels, len(ess), sizes, states, **fields)  # type: ignore[arg-type]


def report(*layers: LayerState) -> StateReport:
    tokens = ("a",) * HORIZON
    return StateReport("m", layers, tuple(range(HORIZON)), tokens, "entropy", None, None, (), 0.1)


def test_the_least_used_layer_comes_first_and_one_without_a_state_last() -> None:
    layers = [make("recurrence", [size], 8.0) for size in (4.0, 1.0, 6.0)]
    nothing = make("recurrence", [0.0], 0.0)
    found = report(nothing, *layers).ranking()
    assert [one.in_use for one in found] == [
        layers[1].in_use and pytest.approx(layer.in_use)
        for layer in report(layers[1], layers[0], layers[2]).layers
    ] + [None]
    assert found.layers[-1].suggestion == "No measured position has a usable state."
    assert len(found) == 4 and "suggestion" in str(found)


def test_heads_of_small_ess_are_named_with_their_bytes() -> None:
    storage = Storage(width=16, key_width=24, group=2, itemsize=2)
    layer = make("attention", [2.3, 1.0, 40.0, 3.0, 2.9, 4.0], None, storage=storage)
    (one,) = report(layer).ranking()
    assert one.channels == (0, 1, 3, 4, 5)
    # Heads 3 and 2 share keys and values, and head 2 needs them all.
    assert one.held_bytes == 2 * 100 * (16 + 24) * 2
    assert one.needed_bytes == 2 * 4 * (16 + 24) * 2
    assert "5 of 6 heads (0, 1, 3, 4, 5) never reach an ESS above 4.0, of 100 tokens." in (
        one.suggestion
    )
    assert one.suggestion.endswith(
        "A window of 4 tokens may do: 640 bytes of keys and values instead of 15.6 KiB, for 2 KV "
        "heads that no other head reads."
    )


def test_the_stated_bound_is_never_below_the_size() -> None:
    (one,) = report(make("attention", [1.512], None)).ranking()
    assert "above 1.6, of 100 tokens. A window of 2 tokens may do." in one.suggestion


def test_a_head_that_shares_its_keys_saves_nothing_alone() -> None:
    layer = make("attention", [2.0, 40.0], None, storage=Storage(8, 8, 2, 4))
    (one,) = report(layer).ranking()
    assert one.channels == (0,) and one.held_bytes is None and one.needed_bytes is None
    assert one.suggestion.endswith("Other heads read the same keys and values.")


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (make("attention", [30.0, 20.0], None), "Every head reaches an ESS of 20.0 or more"),
        (make("attention", [10.0], 10.0), "Its window is full. A longer window"),
        (make("attention", [1.0], None), "Its head never reaches an ESS above 1.0, of 100 tokens."),
        (make("recurrence", [8.0], 8.0), "Its state of 8 is full."),
        (make("recurrence", [7.2, 3.0], 8.0), "Its ESS reaches 7.2 of 8 states. Keep"),
        (make("recurrence", [1.0, 0.5], 16.0), "Gates that forget too fast are the usual reason."),
        (make("recurrence", [5.0], 60.0), "too short to fill its state of 60: read at least 120"),
        (make("convolution", [5.0], None, reader="mixer"), "`gramian distill` makes recurrences"),
        (make("convolution", [5.0], None, reader="general"), "A recurrence may do"),
        (make("convolution", [2.0], 8.0, reader="mixer"), "`gramian distill` makes fewer states"),
        (make("convolution", [2.0], 3.0, reader="general"), "Fewer taps may do"),
        (make("convolution", [2.6], 3.0, reader="general"), "Keep its size."),
        (make("other", [2.6], 3.0), "Its ESS reaches 2.6 of 3 numbers for each value channel."),
    ],
)
def test_every_kind_has_a_suggestion_of_its_own(layer: LayerState, words: str) -> None:
    (one,) = report(layer).ranking()
    assert words in one.suggestion
    assert json.dumps(report(layer).to_dict()["ranking"][0]["suggestion"])


def test_a_short_text_says_nothing_about_attention() -> None:
    layer = make("attention", [1.0], None)
    short = dataclasses.replace(report(layer).at(range(8)), tokens=("a",) * 16)
    (one,) = short.ranking()
    assert one.suggestion == "The text is too short to tell: at most 7 states are usable."


def test_states_of_recurrences_are_counted_for_each_value_channel() -> None:
    layer = make("recurrence", [2.5, 3.0], 16.0, storage=Storage(width=10, itemsize=4))
    (one,) = report(layer).ranking()
    assert one.held_bytes == 2 * 16 * 10 * 4 and one.needed_bytes == 2 * 3 * 10 * 4
    assert (
        "(about 3 numbers each: 240 bytes instead of 1.2 KiB for 2 measured heads" in one.suggestion
    )


def test_what_a_model_stores_is_what_its_cache_holds() -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=32,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
    )
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(0, 20, (1, 17))
    (layer,) = gramian.analyze(model, ids).layers
    assert layer.storage == Storage(6, 6, 2, 4)
    (cached,) = model(ids, use_cache=True).past_key_values.layers
    nbytes = cached.keys.nbytes + cached.values.nbytes
    assert 2 * layer.storage.nbytes(17) == nbytes


def test_scans_store_a_state_for_every_value_channel() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 5}
    mamba2 = {"num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 8}
    for model, width, heads in (
        (transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)), 1, 32),
        (transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**sizes, **mamba2)), 8, 4),
    ):
        report = gramian.analyze(model, torch.arange(20))
        (layer,) = [one for one in report.layers if one.reader == "scan"]
        assert layer.storage == Storage(width) and layer.count == heads
        assert layer.storage.nbytes(float(layer.tss[:, -1].sum())) == 4 * 32 * 5


def count(state: object) -> int:
    """Numbers in a nest of tuples of tensors."""
    if isinstance(state, torch.Tensor):
        return state.numel()
    return sum(map(count, state))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mixer", "states"),
    [
        (SoftmaxAttention(16, heads=4, kv_heads=2), 0),
        (GatedLinearAttention(12, heads=3, state_size=5), 3),
        (Hyena(6, {"type": "modal", "orders": 2}, max_length=40), 6),
    ],
    ids=["attention", "recurrence", "convolution"],
)
def test_storage_of_our_mixers(mixer: torch.nn.Module, states: int) -> None:
    (layer,) = gramian.analyze(torch.nn.Sequential(mixer), torch.randn(40, mixer.width)).main.layers
    assert layer.storage is not None
    if isinstance(mixer, SoftmaxAttention):
        assert layer.storage == Storage(4, 4, 2, 4)
    else:
        numbers = int(layer.tss[:, -1].sum()) * layer.storage.width
        state = mixer.recurrence().initial_state(1)
        held = state.memory if hasattr(state, "memory") else state.long
        assert numbers == count(held)
        assert len(layer.channels) == states


def test_shrink_is_named_for_the_layers_that_it_takes() -> None:
    from gramian.analysis._ranking import _SHRINKS
    from gramian.shrinking._families.one_size import OneSize
    from gramian.shrinking._family import _FAMILIES, _load

    _load()
    assert {name for name, one in _FAMILIES.items() if not isinstance(one, OneSize)} == _SHRINKS
    layer = make("recurrence", [5.0], 16.0)
    for mixer, named in (("S6", True), ("Mamba2Mixer", True), ("Mix", False)):
        (one,) = report(dataclasses.replace(layer, mixer=mixer)).ranking()
        assert "Fewer states may do" in one.suggestion
        assert (", and `gramian shrink` chooses them" in one.suggestion) == named
