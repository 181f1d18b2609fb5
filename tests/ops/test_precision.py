"""Under autocast, what decides decides as without it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gramian import (
    FIR,
    Modal,
    TransferFunction,
    analyze,
    check,
    distill,
    effective_state_size,
    reduce,
)
from gramian.ess import hankel_singular_values, realize, sketched_state_size
from gramian.filters import build
from gramian.memory import ess_penalty
from gramian.models import GramianConfig, GramianForCausalLM
from gramian.ops.precision import full_precision
from gramian.reduction.spectrum import hankel_singular_values as kernel_values
from gramian.systems import gated_convolution, to_modal


def smooth(channels: int, taps: int) -> torch.Tensor:
    time = torch.arange(taps) / taps
    rates = torch.linspace(3, 60, channels).unsqueeze(-1)
    return torch.exp(-rates * time) * torch.cos(rates * time) + 0.01 * torch.randn(channels, taps)


def model(filter: dict[str, Any], mixers: Any = "hyena") -> GramianForCausalLM:
    config = GramianConfig(
        vocab_size=16,
        hidden_size=8,
        num_hidden_layers=2,
        num_heads=2,
        max_position_embeddings=64,
        mixers=mixers,
        filter=filter,
    )
    return GramianForCausalLM(config).eval()


def modal() -> Modal:
    poles = torch.polar(0.3 + 0.6 * torch.rand(3, 4), 3 * torch.rand(3, 4))
    return Modal(poles, torch.randn(3, 4, dtype=torch.complex64), torch.randn(3))


def operator() -> Any:
    gate = torch.rand(3, 40)
    return gated_convolution(modal(), gate, gate).to(torch.float32)


def figures(reduction: Any) -> list[torch.Tensor]:
    return [
        reduction.system.poles,
        reduction.system.residues,
        reduction.order,
        reduction.relative_error,
        reduction.lower_bound,
        reduction.hankel_singular_values.nan_to_num(),
        reduction.hankel_error,
    ]


def distilled(**goal: Any) -> list[Any]:
    result, report = distill(model({"type": "implicit", "hidden": 8}), **goal)
    data = report.to_dict()
    data.pop("seconds")
    return [data, *result.state_dict().values()]


def state_report(mixers: Any) -> Any:
    report = analyze(model({"type": "modal", "orders": 3}, mixers), torch.arange(12) % 16)
    return [(layer.name, layer.ess, layer.tss) for layer in report.layers]


def check_report() -> Any:
    report = check(model({"type": "implicit", "hidden": 8}), length=9, batch=2)
    assert report.passed
    return [str(key) for key in report.to_dict()]


def recurrence() -> Any:
    a = torch.tensor([[-1.2, 0.5, -0.1, 0.02]])
    system = TransferFunction(a, torch.ones(1, 4), torch.zeros(1)).recurrence()
    y, state = system.prefill(torch.ones(1, 30))
    return [y, system.step(torch.ones(1), state)[0]]


RESULTS: dict[str, Callable[[], Any]] = {
    "reduce, dense": lambda: figures(reduce(smooth(4, 60), 4)),
    "reduce, Lanczos": lambda: figures(reduce(smooth(3, 500), 6)),
    "reduce to a tolerance": lambda: figures(reduce(smooth(3, 200), tol=0.2)),
    "reduce by modal truncation": lambda: figures(reduce(modal(), 4, method="modal", length=50)),
    "distill to an order": lambda: distilled(order=4),
    "distill to a tolerance": lambda: distilled(tol=0.3, max_order=8),
    "analyze convolutions": lambda: state_report("hyena"),
    "analyze heads": lambda: state_report(["multi_hyena", "softmax_attention"]),
    "analyze recurrences": lambda: state_report(["gated_delta_net", "s6"]),
    "check": check_report,
    "state-size of a kernel": lambda: effective_state_size(FIR(smooth(3, 60)), [7, 30], horizon=60),
    "state-size of modes": lambda: effective_state_size(modal(), [7, 30], horizon=60),
    "state-size of a recurrence": lambda: effective_state_size(operator(), [7, 30]),
    "count of a matrix": lambda: effective_state_size(
        torch.randn(2, 40, 40).tril(), [7, 30], measure="tolerance", rtol=1e-3
    ),
    "values at positions": lambda: hankel_singular_values(operator(), [7, 30]),
    "values of kernels": lambda: kernel_values(smooth(3, 500), 5),
    "values of a system": lambda: modal().hankel_singular_values(length=40),
    "sketch": lambda: sketched_state_size(torch.randn(60, 60).tril(), [30], 4),
    "realize": lambda: realize(operator().matrix(40), 1e-4).A,
    "penalty": lambda: ess_penalty(operator(), 3.0),
    "filters": lambda: [
        build(config, channels=3, max_length=40)().impulse_response(40)
        for config in (
            {"type": "implicit", "hidden": 8},
            {"type": "rtf", "state_size": 4, "initialization": "montel"},
            {"type": "s4", "state_size": 8},
            {"type": "modal", "orders": 3},
        )
    ],
    "to_modal": lambda: to_modal(
        TransferFunction(*torch.tensor([[[0.3, 0.1]]] * 2), torch.ones(1))
    ),
    "recurrence": recurrence,
}


SLOW = ("check", "distill to a tolerance", "reduce to a tolerance")


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the models' own warnings about half layers
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in RESULTS],
)
def test_autocast_changes_nothing(name):
    torch.manual_seed(0)
    with torch.no_grad():
        expected = RESULTS[name]()
    torch.manual_seed(0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        actual = RESULTS[name]()
        assert torch.is_autocast_enabled("cpu")
    alike(actual, expected)


def alike(actual: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    elif isinstance(expected, Modal):
        alike(expected._fields(), actual._fields())
    elif isinstance(expected, list | tuple):
        for one, other in zip(actual, expected, strict=True):
            alike(one, other)
    else:
        assert actual == expected


def test_gradients_through_a_state_size_under_autocast():
    A = operator().matrix(40).requires_grad_()
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            size = effective_state_size(A, [20]).sum()
        gradients.append(torch.autograd.grad(size, A)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_it_is_left_again():
    with torch.autocast("cpu", torch.bfloat16):
        with full_precision():
            assert (torch.randn(2, 2) @ torch.randn(2, 2)).dtype == torch.float32
        assert (torch.randn(2, 2) @ torch.randn(2, 2)).dtype == torch.bfloat16
        with pytest.raises(ValueError, match="no way"):
            raised()
        assert torch.is_autocast_enabled("cpu")


def test_it_is_traced_into_one_graph() -> None:
    x = torch.randn(2, 2)

    def product(x: torch.Tensor) -> torch.Tensor:
        with full_precision():
            return x @ x

    with torch.autocast("cpu", torch.bfloat16):
        compiled = torch.compile(product, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), product(x), rtol=0, atol=0)
    torch.compiler.reset()


@full_precision()
def raised() -> None:
    assert not torch.is_autocast_enabled("cpu")
    raise ValueError("no way")
