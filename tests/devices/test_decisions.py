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
from gramian.systems import System, to_modal, to_state_space, to_time_varying, to_transfer_function
from gramian.testing import recorded_waits
from tests.devices.conftest import PAGE, documented, refuse_undocumented
from tests.devices.test_models import make as make_models
from tests.devices.test_models import tokens
from tests.ess.conftest import SYSTEMS, TIME_INVARIANT, make

LENGTH = 24


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
