"""Scans are found where layers take them from, and what is there is put back."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gramian.analysis._scans import SCANS, Place, places, read


def chunk_gla(*args: Any, **kwargs: Any) -> str:
    return "in the module's file"


class Layer(nn.Module):
    """A layer with one scan in each kind of place."""

    def __init__(self) -> None:
        super().__init__()
        self.chunk_kda = lambda *args: "in an attribute"
        self.chunk_hgrn = nn.Linear(2, 2)  # a module is no function
        self.chunk_rwkv6 = None

    def _rnn_scan(self, *args: Any) -> str:
        return "in a method"


class Derived(Layer):
    pass


@pytest.fixture
def derived() -> Iterator[nn.Module]:
    """A layer whose class is defined in another file than that of its base."""
    file = types.ModuleType("file_of_derived")
    file.chunk_retention = lambda *args: "in the file of the class"  # type: ignore[attr-defined]
    sys.modules[file.__name__] = file
    Derived.__module__ = file.__name__
    yield Derived()
    del sys.modules[file.__name__]


def test_every_kind_of_place_is_found(derived: nn.Module) -> None:
    found = {place.name: place for place in places(derived)}
    assert set(found) == {"chunk_gla", "chunk_retention", "chunk_kda", "_rnn_scan"}
    assert found["chunk_gla"].owner is sys.modules[Layer.__module__]
    assert found["chunk_kda"].owner is found["_rnn_scan"].owner is derived
    said = {name: place.function() for name, place in found.items()}
    assert said["_rnn_scan"] == "in a method" and said["chunk_gla"] == "in the module's file"


def test_places_of_a_file_are_the_same_for_every_layer() -> None:
    layers = Layer(), Layer()
    one, other = ({place.key for place in places(layer)} for layer in layers)
    assert len(one & other) == 1 and not list(places(nn.Linear(2, 2)))


def test_another_function_is_held_and_the_scan_is_put_back() -> None:
    layer = Layer()
    before = {place.name: place.function for place in places(layer)}
    for place in places(layer):
        try:
            with place.holding(lambda *args: "replaced"):
                assert getattr(place.owner, place.name)() == "replaced"
                raise KeyError
        except KeyError:
            assert place.function == before[place.name]
    assert layer._rnn_scan() == "in a method" and "_rnn_scan" not in vars(layer)
    assert set(vars(layer)) == set(vars(Layer()))


def test_every_name_has_one_reader() -> None:
    from gramian.analysis._scans._reading import register

    assert all(callable(scan) for scan in SCANS.values())
    with pytest.raises(ValueError, match="chunk_gla"):
        register("chunk_gla")(lambda *args: None)


def heads(n: int = 4, length: int = 5) -> dict[str, Tensor]:
    return {name: torch.randn(1, length, 2, n) for name in "qkvg"}


def test_what_a_partial_function_holds_is_read() -> None:
    q, k, v, g = heads().values()
    function = functools.partial(chunk_gla, q, scale=3.0)
    function = functools.partial(function, k, scale=2.0)
    assert (
        read("chunk_gla", (v, g), {}, function)
        .system(slice(0, 1))
        .matrix(5)
        .equal(read("chunk_gla", (q, k, v, g, 2.0), {}).system(slice(0, 1)).matrix(5))
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("chunk_gla", {"cu_seqlens": torch.tensor([0, 2, 5])}, "cu_seqlens; got a tensor"),
        ("chunk_gla", {"reverse": True}, "reverse; got True"),
        ("chunk_gla", {"head_first": True}, "head_first"),
        ("fused_recurrent_linear_attn", {"g": None, "reverse": True}, "reverse"),
        ("fused_recurrent_gla", {"gv": torch.ones(1, 5, 2, 4)}, r"value channels; got gv \(1, 5"),
        ("chunk_delta_rule", {"beta": torch.ones(1, 5, 2, 4)}, r"β .* got \(1, 5, 2, 4\)"),
        ("chunk_gla", {"k": torch.randn(1, 4, 2, 4)}, "must be those of the scan"),
        ("chunk_gla", {"g": 1}, "must be those of the scan"),
        ("chunk_rwkv6", {}, "must be those of the scan"),
    ],
)
def test_what_is_not_read_is_refused_by_one_sentence(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read(name, (), heads() | options)
    text = str(caught.value)
    assert text.endswith(".") and text[0].islower()


def test_one_sequence_may_have_boundaries() -> None:
    packed = {"cu_seqlens": torch.tensor([0, 5]), "reverse": False}
    given = heads()
    T = read("chunk_gla", (), given).system(slice(0, 2)).matrix(5)
    assert torch.equal(read("chunk_gla", (), given | packed).system(slice(0, 2)).matrix(5), T)


def test_indices_of_sequences_may_be_of_one() -> None:
    x, dt, A, B = (
        torch.randn(1, 5, 2, 3),
        torch.ones(1, 5, 2),
        -torch.ones(2),
        torch.ones(1, 5, 1, 4),
    )
    index = torch.zeros(1, 5, dtype=torch.int32)
    given = {"chunk_size": 4, "seq_idx": index}
    assert read("mamba2_chunk_scan", (x, dt, A, B, B), given).count == 2
    index[0, 3:] = 1
    with pytest.raises(ValueError, match="seq_idx; got a tensor"):
        read("mamba2_chunk_scan", (x, dt, A, B, B), given)


def test_shapes_and_numbers_that_cannot_agree() -> None:
    given = heads()
    reading = read("chunk_gla", (), given)
    assert reading.disagreement(torch.zeros(1, 4, 2, 4)) == float("inf")
    result = torch.full((1, 5, 2, 4), torch.nan)
    assert reading.disagreement(result) != reading.disagreement(result)  # NaN


def test_zero_outputs_of_zero_values_agree() -> None:
    given = heads()
    zero = torch.zeros_like(given["v"])
    assert read("chunk_gla", (), given | {"v": zero}).disagreement(zero) == 0


def test_a_place_is_of_one_owner() -> None:
    layer = Layer()
    assert Place(layer, "chunk_kda").key == (id(layer), "chunk_kda")


def test_an_error_in_few_of_many_channels_is_seen() -> None:
    x, g = torch.randn(1, 7, 200), torch.randn(1, 7, 200).sigmoid().log()
    reading = read("chunk_hgrn", (), {"x": x, "g": g})
    right = torch.zeros(1, 7, 200)
    state = torch.zeros(200)
    for t in range(7):
        state = g[0, t].exp() * state + x[0, t]
        right[0, t] = state
    assert reading.disagreement(right) < 1e-6
    wrong = right.clone()
    wrong[..., 8] *= 1.01
    assert reading.disagreement(wrong) > 5e-3
