"""Packed copies of weights follow the weights, whoever changes them and however."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.testing import assert_close

from gramian.ops import packed
from gramian.ops.packed import Linear, Packing, can_pack

pytestmark = pytest.mark.skipif(not can_pack(), reason="needs oneDNN")

ROWS, COLUMNS = 17, 33


class Owner:
    """What a generation may belong to."""


def optimizer(kind: Any, **options: Any) -> Callable[[Linear], None]:
    def step(layer: Linear) -> None:
        layer.weight.grad = torch.randn_like(layer.weight)
        kind([layer.weight], lr=0.1, **options).step(lambda: layer.weight.detach().sum())

    return step


def numpy_all(layer: Linear) -> None:
    layer.weight.detach().numpy()[...] *= 0.9


def twice(layer: Linear) -> None:
    """So that the allocator may give the first address out again."""
    layer.weight.data = layer.weight.data + 1
    layer.weight.data = layer.weight.data + 1


def replaced(layer: Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.detach() + 1)


def loaded(assign: bool) -> Callable[[Linear], None]:
    def load(layer: Linear) -> None:
        state = {name: value + 1 for name, value in layer.state_dict().items()}
        layer.load_state_dict(state, assign=assign)

    return load


def averaged(layer: Linear) -> None:
    """An exponential moving average written back, as scripts do."""
    for parameter in layer.parameters():
        shadow = parameter.detach().numpy() * 0.99
        parameter.data.copy_(torch.from_numpy(shadow))


def swapped(layer: Linear) -> None:
    torch.utils.swap_tensors(layer.weight, nn.Parameter(layer.weight.detach() * 2))


def flattened(layer: Linear) -> None:
    vector = nn.utils.parameters_to_vector(layer.parameters()).detach()
    nn.utils.vector_to_parameters(vector + 1, layer.parameters())


def merged(layer: Linear) -> None:
    """A low-rank adapter merged into the weight, as peft does it."""
    layer.weight.data += 0.5 * torch.randn(ROWS, 4) @ torch.randn(4, COLUMNS)


WHOLE: dict[str, Callable[[Linear], Any]] = {
    "data +=": lambda layer: layer.weight.data.__iadd__(1),
    "data.copy_": lambda layer: layer.weight.data.copy_(layer.weight.data + 1),
    "data =": lambda layer: setattr(layer.weight, "data", layer.weight.data + 1),
    "data = twice": twice,
    "data.view": lambda layer: layer.weight.data.view(-1)[:].add_(1),
    "detach().add_": lambda layer: layer.weight.detach().add_(1),
    "mul_": lambda layer: layer.weight.mul_(2),
    "foreach": lambda layer: torch._foreach_add_([layer.weight], 0.5),
    "numpy": numpy_all,
    "parameter replaced": replaced,
    "load_state_dict": loaded(False),
    "load_state_dict, assigned": loaded(True),
    "average written back": averaged,
    "swap_tensors": swapped,
    "vector_to_parameters": flattened,
    "adapter merged": merged,
    "double and back": lambda layer: layer.double().float().weight.data.add_(1),
    "bfloat16 and back": lambda layer: layer.bfloat16().float(),
    "SGD": optimizer(torch.optim.SGD),
    "SGD, foreach": optimizer(torch.optim.SGD, foreach=True),
    "SGD, fused": optimizer(torch.optim.SGD, fused=True),
    "Adam, fused": optimizer(torch.optim.Adam, fused=True),
    "AdamW": optimizer(torch.optim.AdamW),
    "AdamW, fused": optimizer(torch.optim.AdamW, fused=True),
    "Adagrad, fused": optimizer(torch.optim.Adagrad, fused=True),
    "Adafactor": optimizer(torch.optim.Adafactor),
    "RMSprop": optimizer(torch.optim.RMSprop),
}


def one_value(layer: Linear) -> None:
    layer.weight.data[ROWS // 2, 7] += 0.1


def one_value_by_numpy(layer: Linear) -> None:
    layer.weight.detach().numpy()[3, 5] += 0.1


def rows_exchanged(layer: Linear) -> None:
    weight = layer.weight.detach().numpy()
    weight[[2, 9]] = weight[[9, 2]]


def columns_exchanged(layer: Linear) -> None:
    weight = layer.weight.detach().numpy()
    weight[:, [2, 9]] = weight[:, [9, 2]]


def transposed_halves(layer: Linear) -> None:
    layer.weight.data[:16, :16] = layer.weight.data[:16, :16].T.clone()


SINGLE: dict[str, Callable[[Linear], Any]] = {
    "one value": one_value,
    "one value, numpy": one_value_by_numpy,
    "rows exchanged": rows_exchanged,
    "columns exchanged": columns_exchanged,
    "block transposed": transposed_halves,
    "one row to zero": lambda layer: layer.weight.data[11].zero_(),
    "one column to zero": lambda layer: layer.weight.data[:, 11].zero_(),
    "sign of one row": lambda layer: layer.weight.data[4].neg_(),
}


def reference(layer: Linear, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(x, layer.weight, layer.bias)


@torch.no_grad()
def run(packing: Packing, layer: Linear, x: torch.Tensor, owner: Any, begins: bool) -> torch.Tensor:
    with packing.generation(owner, begins):
        return layer(x)


@pytest.fixture
def layer() -> Linear:
    torch.manual_seed(0)
    return Linear(COLUMNS, ROWS)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, COLUMNS, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("name", [*WHOLE, *SINGLE])
def test_every_generation_sees_every_change(layer: Linear, x: torch.Tensor, name: str) -> None:
    packing, first, second = Packing(), Owner(), Owner()
    assert_close(run(packing, layer, x, first, True), reference(layer, x))
    assert len(packing) == 1
    before = reference(layer, x)
    {**WHOLE, **SINGLE}[name](layer)
    assert (reference(layer, x) - before).abs().max() > 1e-3
    assert_close(run(packing, layer, x, second, True), reference(layer, x))
    {**WHOLE, **SINGLE}[name](layer)
    assert_close(run(packing, layer, x, first, True), reference(layer, x))  # emptied, used again


@torch.no_grad()
@pytest.mark.parametrize("name", WHOLE)
def test_a_generation_sees_changes_of_the_whole(layer: Linear, x: torch.Tensor, name: str) -> None:
    packing, owner = Packing(), Owner()
    run(packing, layer, x, owner, True)
    WHOLE[name](layer)
    assert_close(run(packing, layer, x, owner, False), reference(layer, x))


@torch.no_grad()
def test_a_copy_is_used_and_kept_while_nothing_changes(layer: Linear, x: torch.Tensor) -> None:
    packing, owner = Packing(), Owner()
    run(packing, layer, x, owner, True)
    (made, _) = packing._copies[layer]
    for begins in (False, True, False):
        run(packing, layer, x, owner, begins)
        run(packing, layer, x, Owner(), begins)
    assert packing._copies[layer][0] is made
    with pytest.MonkeyPatch.context() as patch:  # what is multiplied by is the copy
        patch.setattr(made, "packed", torch.ops.mkldnn._reorder_linear_weight(2 * layer.weight))
        doubled = run(packing, layer, x, owner, False)
    assert_close(doubled - layer.bias, 2 * (reference(layer, x) - layer.bias))
    packing.clear()
    assert len(packing) == 0


@torch.no_grad()
def test_outside_of_a_generation_nothing_is_packed(layer: Linear, x: torch.Tensor) -> None:
    packing, owner = Packing(), Owner()
    run(packing, layer, x, owner, True)
    packing._copies[layer][0].packed = None  # would fail if it were used
    assert torch.equal(layer(x), reference(layer, x))
    with packing.generation(owner, False):
        with torch.enable_grad():
            layer(x).sum().backward()
        assert torch.equal(
            layer(x.expand(11, 2, 3, COLUMNS)), reference(layer, x).expand(11, 2, 3, ROWS)
        )
        assert layer.double()(x.double()).dtype == torch.float64
    assert layer.weight.grad is not None


@torch.no_grad()
def test_parametrized_and_replaced_weights(layer: Linear, x: torch.Tensor) -> None:
    packing = Packing()
    run(packing, layer, x, Owner(), True)
    other = {"weight": torch.randn(ROWS, COLUMNS), "bias": torch.zeros(ROWS)}
    with packing.generation(Owner(), True):
        assert_close(torch.func.functional_call(layer, other, x), x @ other["weight"].T)
        assert_close(layer(x), reference(layer, x))
    parametrizations.weight_norm(layer)
    for _ in range(2):
        layer.parametrizations.weight.original0.data.mul_(2)
        assert_close(run(packing, layer, x, Owner(), True), reference(layer, x))
    parametrize.remove_parametrizations(layer, "weight")
    assert_close(run(packing, layer, x, Owner(), True), reference(layer, x))
    layer.weight = nn.Parameter(torch.randn(COLUMNS, ROWS).T)  # not contiguous
    assert_close(run(packing, layer, x, Owner(), True), reference(layer, x))


@torch.no_grad()
def test_tied_and_shared_weights(layer: Linear, x: torch.Tensor) -> None:
    embedding = nn.Embedding(ROWS, COLUMNS)
    layer.weight = embedding.weight
    layer.share_memory()
    packing = Packing()
    run(packing, layer, x, Owner(), True)
    embedding.weight.data[5] = 3
    assert_close(run(packing, layer, x, Owner(), True), reference(layer, x))
    buffer = torch.randn(ROWS, COLUMNS).numpy()
    layer.weight = nn.Parameter(torch.from_numpy(buffer))
    run(packing, layer, x, Owner(), True)
    buffer[2, 2] = 9
    assert_close(run(packing, layer, x, Owner(), True), reference(layer, x))


@torch.no_grad()
def test_a_weight_made_on_meta_and_loaded(x: torch.Tensor) -> None:
    with torch.device("meta"):
        layer = Linear(COLUMNS, ROWS)
    packing, owner = Packing(), Owner()
    with packing.generation(owner, True):
        assert layer(x.to("meta")).shape == (2, 3, ROWS)
    layer.load_state_dict(Linear(COLUMNS, ROWS).state_dict(), assign=True)
    assert_close(run(packing, layer, x, owner, False), reference(layer, x))
    layer.to_empty(device="cpu")
    layer.weight.zero_()
    layer.bias.fill_(1)
    assert torch.equal(run(packing, layer, x, owner, False), torch.ones(2, 3, ROWS))


@torch.no_grad()
def test_weights_that_are_no_numbers_are_copied_as_they_are(layer: Linear, x: torch.Tensor) -> None:
    packing = Packing()
    layer.weight[3, 4] = float("nan")
    layer.weight[5, 6] = float("inf")
    run(packing, layer, x, Owner(), True)
    for value in (float("nan"), 0.5):
        layer.weight.detach().numpy()[3, 4] = value
        expected = reference(layer, x)
        assert_close(run(packing, layer, x, Owner(), True), expected, equal_nan=True)


@torch.no_grad()
def test_copies_are_neither_copied_nor_pickled(layer: Linear, x: torch.Tensor) -> None:
    holder = nn.Module()
    holder.layer, holder.packing = layer, Packing()
    run(holder.packing, layer, x, Owner(), True)
    for other in (copy.deepcopy(holder), pickle.loads(pickle.dumps(holder))):
        assert len(other.packing) == 0
        other.layer.weight.zero_()
        zeros = run(other.packing, other.layer, x, Owner(), True)
        assert_close(zeros, layer.bias.expand(2, 3, ROWS))
    assert list(layer.state_dict()) == ["weight", "bias"]


@torch.no_grad()
def test_owners_are_not_kept(layer: Linear, x: torch.Tensor) -> None:
    packing = Packing()
    run(packing, layer, x, Owner(), True)
    gc.collect()
    assert len(packing._owners) == 0


def test_generations_of_threads_do_not_mix(layer: Linear, x: torch.Tensor) -> None:
    packing = Packing()
    with torch.no_grad(), packing.generation(Owner(), True):
        done: list[bool] = []

        def other() -> None:
            with torch.no_grad():
                done.append(torch.equal(layer(x), reference(layer, x)) and not len(packing))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert done == [True]


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Prefer oneDNN for products of any size, and note the rows of those that it computes."""
    rows: list[int] = []
    product = Linear._product

    def noted(layer: Linear, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows.append(x.numel() // layer.in_features)
        return product(layer, x, weight)

    monkeypatch.setattr(packed, "_prefers_onednn", lambda: True)
    monkeypatch.setattr(packed, "_LEAST_WORK", 0)
    monkeypatch.setattr(Linear, "_product", noted)
    return rows


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (1, 2), (4, 1), (5,), (2, 70), (0,)])
@torch.no_grad()
def test_products_are_the_same_where_onednn_is_preferred(
    onednn: list[int], bias: bool, shape: tuple[int, ...]
) -> None:
    layer = Linear(COLUMNS, ROWS, bias=bias)
    x = torch.randn(*shape, COLUMNS)
    y = layer(x)
    assert y.shape == (*shape, ROWS) and y.is_contiguous()
    assert_close(y, nn.functional.linear(x, layer.weight, layer.bias))
    rows = torch.Size(shape).numel()
    assert onednn == ([] if rows in packed._TURNED else [rows])


def test_onednn_is_left_where_something_follows_the_product(onednn: list[int]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    layer, x = Linear(COLUMNS, ROWS), torch.randn(6, COLUMNS)
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        assert_close(torch.vmap(layer)(x.unsqueeze(1)).squeeze(1), expected)
        _, tangent = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
        assert_close(tangent, layer.weight.sum(1).expand(6, -1))
        with FlopCounterMode(display=False) as counter:
            layer(x)
        assert counter.get_total_flops() == 2 * 6 * ROWS * COLUMNS
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        layer.double()(x.double())
    assert not onednn
