"""State-sizes, reductions, conversions and losses on memory on a device that is not the CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree

import gramian
from gramian import ess, memory
from gramian.models import GramianForCausalLM
from gramian.reduction import Balanced, Gradient, ModalTruncation, hankel_singular_values, reduce
from gramian.systems import (
    System,
    TimeVarying,
    to_modal,
    to_state_space,
    to_time_varying,
    to_transfer_function,
)
from gramian.testing import recorded_waits, without_float64
from tests.devices.conftest import PAGE, documented, refuse_undocumented
from tests.devices.test_models import make as make_models
from tests.devices.test_models import tokens
from tests.ess.conftest import SYSTEMS, TIME_INVARIANT, make

LENGTH = 12


def compare(
    run: Callable[[Any], Any], given: Any, device: torch.device, tolerance: float = 1e-6
) -> None:
    """Run a function on the CPU and on the device, whose results must be the same, and there."""
    expected = pytree.tree_leaves(run(given))
    there = given.to(device=device)
    with recorded_waits() as waits:
        actual = pytree.tree_leaves(run(there))
    refuse_undocumented("decisions", waits)
    for one, other in zip(actual, expected, strict=True):
        if isinstance(other, torch.Tensor):
            assert one.device == device
            torch.testing.assert_close(one.cpu(), other, rtol=tolerance, atol=tolerance)


def operands(name: str) -> tuple[System, dict[str, int]]:
    torch.manual_seed(0)
    return make(name, LENGTH), {"length": LENGTH} if name in TIME_INVARIANT else {}


@pytest.mark.parametrize("name", SYSTEMS)
def test_state_sizes(name: str, device: torch.device) -> None:
    system, options = operands(name)
    compare(lambda s: ess.effective_state_size(s, **options), system, device)
    count = {"measure": "tolerance", "tol": 1e-3, **options}
    compare(lambda s: ess.effective_state_size(s, **count), system, device)
    compare(lambda s: ess.hankel_singular_values(s, **options), system, device)
    compare(lambda s: ess.theoretical_state_size(s, **options), system, device)


def test_estimates_and_realizations(device: torch.device) -> None:
    system, _ = operands("low_rank_operator")
    for run in (ess.sketched_state_size, ess.estimated_state_size):
        compare(run, system, device)
    compare(lambda s: ess.realize(s, 1e-6).matrix(), system, device)


@pytest.mark.parametrize("name", SYSTEMS)
def test_gradients_of_losses_on_memory(name: str, device: torch.device) -> None:
    system, _ = operands(name)

    def slopes(system: System) -> Any:
        leaves, spec = pytree.tree_flatten(system)
        moving = [x.detach().requires_grad_() if isinstance(x, torch.Tensor) else x for x in leaves]
        made = pytree.tree_unflatten(moving, spec)
        if name in TIME_INVARIANT:
            loss = memory.hankel_penalty(made, LENGTH)
        else:
            loss = memory.ess_penalty(made, target=2.0)
        fields = [x for x in moving if isinstance(x, torch.Tensor)]
        return torch.autograd.grad(loss, fields, allow_unused=True, materialize_grads=True)

    compare(slopes, system, device)


CONVERSIONS = [to_modal, to_state_space, to_transfer_function]


@pytest.mark.each
@pytest.mark.parametrize("convert", [*CONVERSIONS, lambda s: to_time_varying(s, 10)])
@pytest.mark.parametrize("name", ["modal", "state_space", "transfer_function", "dplr"])
def test_conversions(name: str, convert: Any, device: torch.device) -> None:
    system, _ = operands(name)
    compare(lambda s: convert(s).matrix(10), system, device)


@pytest.mark.parametrize("method", [Balanced(), ModalTruncation(), Gradient(steps=3)])
def test_reductions(method: Any, device: torch.device) -> None:
    torch.manual_seed(0)
    source: Any = make("modal", LENGTH, order=12)
    if not isinstance(method, ModalTruncation):
        source = source.impulse_response(40)

    def found(source: Any) -> Any:
        options = {"length": 40} if isinstance(source, System) else {}
        result = reduce(source, 4, method=method, **options)
        return result.relative_error, result.lower_bound, result.system.impulse_response(40)

    compare(found, source, device, 1e-5)
    taps = source if isinstance(source, torch.Tensor) else source.impulse_response(40)
    compare(lambda taps: hankel_singular_values(taps, 4), taps, device)


def test_a_distilled_model_stays_on_its_device(device: torch.device) -> None:
    here, there = (model.eval() for model in make_models("long_convolution/implicit", device))
    ids = tokens(9)
    with torch.no_grad():
        expected = gramian.distill(here, order=2)[0](ids).logits
        with recorded_waits() as waits:
            made = gramian.distill(there, order=2)[0]
        refuse_undocumented("decisions", waits)
        actual = made(ids.to(device)).logits.cpu()
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)  # stored in float32


@pytest.mark.parametrize("kind", ["hyena/implicit", "s6", "attention"])
def test_an_analysis_gives_what_it_gives_on_the_cpu(kind: str, device: torch.device) -> None:
    here, there = (model.eval() for model in make_models(kind, device))
    ids = tokens(12)[:1]
    reports = [gramian.analyze(model, ids, every=4) for model in (here, there)]
    assert isinstance(there, GramianForCausalLM) and next(there.parameters()).device == device
    for one, other in zip(*(report.layers for report in reports), strict=True):
        for field in dataclasses.fields(one):
            value, due = getattr(one, field.name), getattr(other, field.name)
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value.cpu(), due.cpu(), rtol=1e-6, atol=1e-6)


def test_every_documented_place_exists() -> None:
    """A place that was renamed leaves the page."""
    root = PAGE.parents[2] / "gramian"
    for place in set().union(*documented().values()):
        file, _, name = place.partition(":")
        assert (root / file).exists(), place
        if name:
            last = name.rpartition(".")[2]
            assert f"def {last}(" in (root / file).read_text(encoding="utf-8"), place


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_device_without_double_precision_decides_on_the_cpu(
    name: str, device: torch.device
) -> None:
    system, options = operands(name)
    system = system.to(dtype=torch.float32)
    there = system.to(device=device)
    runs: list[Callable[[System], Any]] = [
        lambda s: ess.effective_state_size(s, **options),
        lambda s: ess.effective_state_size(s, measure="tolerance", tol=1e-3, **options),
        lambda s: ess.hankel_singular_values(s, **options),
        lambda s: ess.theoretical_state_size(s, **options),
    ]
    if name == "low_rank_operator":
        runs += [
            ess.sketched_state_size,
            ess.estimated_state_size,
            ess.estimated_mean_state_size,
            lambda s: ess.realize(s, 1e-6),
            lambda s: ess.realization_errors(s, [0, 1, 2]),
        ]
    for run in runs:
        expected = tensors(run(system))
        with without_float64():
            actual = tensors(run(there))
        assert actual
        for one, other in zip(actual, expected, strict=True):
            assert one.device == device and one.dtype == torch.float32
            torch.testing.assert_close(one.cpu(), other.float(), rtol=1e-5, atol=1e-6)


def tensors(result: Any) -> list[torch.Tensor]:
    parts = vars(result) if dataclasses.is_dataclass(result) else result
    return [x for x in pytree.tree_leaves(parts) if isinstance(x, torch.Tensor)]


def test_rows_on_a_device_without_double_precision(device: torch.device) -> None:
    matrix = torch.randn(2, 40, 40, generator=torch.Generator().manual_seed(0)).tril()
    there = matrix.to(device)
    expected = ess.estimated_state_size(ess.RowOperator(lambda c, w: matrix[c, w], 40, 2), [5, 20])
    rows = ess.RowOperator(lambda c, w: there[c, w], 40, 2, device)
    with without_float64():
        found = ess.estimated_state_size(rows, [5, 20])
        kept = ess.theoretical_state_size(rows, [5, 20])
    torch.testing.assert_close([x.cpu() for x in found], list(expected))
    assert kept.device == device and kept.tolist() == [[5, 20]] * 2


def test_losses_on_a_device_without_double_precision_have_gradients(device: torch.device) -> None:
    for name in ("modal", "gated"):
        system, _ = operands(name)
        system = system.to(dtype=torch.float32)
        slopes = []
        for place in (torch.device("cpu"), device):
            leaves, spec = pytree.tree_flatten(system.to(device=place))
            fields = [x.detach().requires_grad_() for x in leaves if isinstance(x, torch.Tensor)]
            moving = iter(fields)
            made = pytree.tree_unflatten(
                [next(moving) if isinstance(x, torch.Tensor) else x for x in leaves], spec
            )
            with without_float64():
                if name == "modal":
                    loss = memory.hankel_penalty(made, LENGTH)
                else:
                    loss = memory.ess_penalty(made, target=2.0)
                found = torch.autograd.grad(loss, fields, allow_unused=True, materialize_grads=True)
            assert loss.device == place and all(x.device == place for x in found)
            slopes.append([x.cpu() for x in found])
        torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-6)


def test_results_return_to_the_device_of_what_is_measured(device: torch.device) -> None:
    matrix = torch.randn(2, 20, 20, dtype=torch.float64).tril()
    expected = ess.effective_state_size(matrix, [3, 5])
    with without_float64():
        positions = torch.tensor([3, 5]).to(device)
        found = ess.effective_state_size(matrix, positions)
        there = ess.effective_state_size(matrix.float().to(device), torch.tensor([3, 5]))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert there.device == device and there.dtype == torch.float32


def test_filters_and_states_on_a_device_without_double_precision(device: torch.device) -> None:
    kernel = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    system, _ = operands("gated")
    assert isinstance(system, TimeVarying)
    system = system.to(dtype=torch.float32)
    u = torch.randn(*system.channel_shape, 2, LENGTH)
    expected = memory.filter_state_sizes(kernel), *ess.state_ranks(system, u, [3, 7])
    with without_float64():
        there = system.to(device=device)
        found = (
            memory.filter_state_sizes(kernel.to(device)),
            *ess.state_ranks(there, u.to(device), [3, 7]),
        )
    for one, other in zip(found, expected, strict=True):
        assert one.device == device and one.dtype == torch.float32
        torch.testing.assert_close(one.cpu(), other.float(), rtol=1e-5, atol=1e-6)


def test_an_analysis_on_a_device_without_double_precision_is_refused(device: torch.device) -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9)).to(device)
    with without_float64(), pytest.raises(ValueError, match="which the device 'simulated:0' does"):
        gramian.analyze(model, tokens(8)[:1].to(device))
