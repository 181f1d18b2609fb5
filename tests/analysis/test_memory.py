"""How much memory an analysis takes beside the model, counted in living storages."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM

from gramian.analysis import _mixing, _recording, analyze
from gramian.models import GramianConfig, GramianForCausalLM

TOKENS = torch.arange(63)


def living() -> int:
    """Bytes of the storages of all tensors of this process."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def ours(layers: int) -> torch.nn.Module:
    shape = {"hidden_size": 24, "num_hidden_layers": layers, "num_heads": 3}
    mixers = ["hyena", "s6", "softmax_attention"] * (layers // 3)
    config = GramianConfig(**shape, mixers=mixers, filter={"type": "modal", "orders": 4})
    return GramianForCausalLM(config).eval()


def hyenas(layers: int) -> torch.nn.Module:
    config = GramianConfig(
        hidden_size=24, num_hidden_layers=layers, num_heads=3, filter={"type": "modal", "orders": 4}
    )
    return GramianForCausalLM(config).eval()


def llama(layers: int) -> torch.nn.Module:
    shape = {"hidden_size": 24, "intermediate_size": 24, "num_attention_heads": 3}
    return LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=layers, vocab_size=99)).eval()


def held(model: torch.nn.Module) -> int:
    """The most that lives beside the model whenever a layer has been measured, in bytes."""
    gc.collect()
    before, found = living(), []
    report = analyze(model, TOKENS, progress=lambda done, known: found.append(living() - before))
    assert len(found) == len(report.layers)
    return max(found)


@pytest.mark.parametrize("make", [ours, llama])
def test_the_operators_of_one_layer_are_held(make: Callable[[int], torch.nn.Module]) -> None:
    """With more layers, only the report grows: two numbers for each channel and position."""
    grown = held(make(9)) - held(make(3))
    channels = (36 + 24) + (48 + 48) + 3  # of Hyena and S6 with short convolutions, and attention
    scan = 48 * 63 * 63 * 4  # the operator of one S6
    assert grown <= 2 * (2 * channels * 63 * 4) + 4096 < scan


def searched(model: torch.nn.Module, tokens: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """The most that lives beside the model while far mixing is searched, in bytes."""
    before, found, changes = living(), [0], _mixing._changes
    search = _recording.far_mixers

    def spied(*args: object) -> object:
        found.append(living() - before)
        return changes(*args)

    def far(*args: object) -> object:
        with monkeypatch.context() as patched:
            patched.setattr(_mixing, "_changes", spied)
            return search(*args)

    with monkeypatch.context() as patched:
        patched.setattr(_recording, "far_mixers", far)
        analyze(model, torch.arange(tokens) % 99, positions=1)
    assert len(found) > 5
    return max(found)


@pytest.mark.parametrize("make", [hyenas, llama])
def test_one_hidden_state_of_each_layer_is_held(
    make: Callable[[int], torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each layer has passed to the next one, to run what is around the layers again."""
    tokens = 301
    few, many = (searched(make(layers), tokens, monkeypatch) for layers in (3, 9))
    assert (many - few) / (9 - 3) < 2 * tokens * 24 * 4
