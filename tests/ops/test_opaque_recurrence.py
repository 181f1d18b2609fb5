"""The linear recurrence that is one operation of a graph, and its derivatives."""

import pytest
import torch
from torch.testing import assert_close

from gramian import TimeVarying
from gramian.ops import opaque_recurrence
from gramian.ops.opaque_recurrence import run_opaquely

Arguments = list[torch.Tensor | None]


def arguments(length: int, low_rank: bool, dtype: torch.dtype = torch.float64) -> Arguments:
    """Return A, B, C, D, p, q, values and memory of 2 × 2 heads with 3 states and 2 values."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    steps = (2, 2, length, 3)
    gates = (0.9 * torch.rand(steps, dtype=dtype)).requires_grad_()
    p, q = (0.3 * torch.randn(2, *steps, dtype=dtype)).requires_grad_() if low_rank else (None,) * 2
    return [gates, normal(*steps), normal(*steps), normal(*steps[:3]), p, q,
            normal(2, 2, length, 2), normal(2, 2, 3, 2)]  # fmt: skip


def step_by_step(A, B, C, D, p, q, values, memory):  # type: ignore[no-untyped-def]
    """Return the outputs and the state after the last step, by a loop over the steps."""
    outputs = []
    for i in range(values.shape[2]):
        u, x = values[:, :, i], memory
        outputs.append(torch.einsum("bhn,bhnw->bhw", C[:, :, i], x) + D[:, :, i, None] * u)
        memory = A[:, :, i, :, None] * x + B[:, :, i, :, None] * u[:, :, None]
        if p is not None:
            memory = memory + p[:, :, i, :, None] * torch.einsum(
                "bhn,bhnw->bhw", q[:, :, i], x
            ).unsqueeze(2)
    return torch.stack(outputs, dim=2) if outputs else values, memory


@pytest.fixture(params=[2**24, 8], ids=["one stretch", "stretches"])
def stretches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opaque_recurrence, "_ELEMENTS", request.param)


@pytest.mark.usefixtures("stretches")
@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 17, 63])
def test_outputs_and_gradients(length: int, low_rank: bool) -> None:
    torch.manual_seed(length)
    inputs = arguments(length, low_rank)
    leaves = [x for x in inputs if x is not None]
    outputs = [function(*inputs) for function in (run_opaquely, step_by_step)]
    weights = [torch.randn_like(y) for y in outputs[0]]
    assert_close(outputs[0], outputs[1])
    gradients = [
        torch.autograd.grad(one, leaves, weights, allow_unused=True, materialize_grads=True)
        for one in outputs
    ]
    assert_close(gradients[0], gradients[1])


@pytest.mark.usefixtures("stretches")
@pytest.mark.parametrize("low_rank", [False, True])
def test_derivatives_of_every_order_and_mode(low_rank: bool) -> None:
    torch.manual_seed(1)
    inputs = arguments(5, low_rank)
    assert torch.autograd.gradcheck(run_opaquely, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(run_opaquely, inputs, fast_mode=True)


@pytest.mark.parametrize("low_rank", [pytest.param(False, marks=pytest.mark.slow), True])
def test_opcheck(low_rank: bool) -> None:
    inputs = arguments(7, low_rank)
    torch.library.opcheck(run_opaquely, inputs)
    frozen = [None if x is None else x.detach() for x in inputs]
    cotangents = torch.randn_like(frozen[6]), torch.randn_like(frozen[7])  # type: ignore[arg-type]
    torch.library.opcheck(opaque_recurrence._backward, (*frozen, *cotangents))


def test_single_precision() -> None:
    inputs = [None if x is None else x.detach() for x in arguments(9, True, torch.float32)]
    y, end = run_opaquely(*inputs)
    expected = step_by_step(*(None if x is None else x.double() for x in inputs))
    assert (y.dtype, end.dtype) == (torch.float32, torch.float32)
    assert_close((y.double(), end.double()), expected, atol=1e-5, rtol=1e-5)


def test_it_is_the_time_varying_system() -> None:
    A, B, C, D, _, _, values, memory = (
        None if x is None else x.detach() for x in arguments(11, False)
    )
    y, _ = run_opaquely(A, B, C, D, None, None, values, torch.zeros_like(memory))
    system = TimeVarying(A, B, C, D)
    assert_close(y, system(values.permute(3, 0, 1, 2)).permute(1, 2, 3, 0))
