"""A batch without a stream is a batch: every system in every way."""

import pytest
import torch

from gramian import FIR, DenseOperator, Modal, StateSpace, TimeVarying, TransferFunction


def complex_normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.complex64)


SYSTEMS = {
    "fir": lambda: FIR(torch.randn(3, 40)),
    "fir of one tap": lambda: FIR(torch.randn(3, 1)),
    "modal": lambda: Modal(0.3 * complex_normal(3, 2), complex_normal(3, 2), torch.randn(3)),
    "transfer function": lambda: TransferFunction(
        0.1 * torch.randn(3, 2), torch.randn(3, 2), torch.randn(3)
    ),
    "state space": lambda: StateSpace(
        0.2 * torch.randn(3, 2, 2), torch.randn(3, 2), torch.randn(3, 2), torch.randn(3)
    ),
    "time-varying": lambda: TimeVarying(*torch.rand(3, 3, 60, 2), torch.randn(3, 60)),
    "dense": lambda: DenseOperator(torch.randn(3, 60, 60)),
}


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3)])
@pytest.mark.parametrize("name", SYSTEMS)
def test_no_stream(name, shape):
    torch.manual_seed(0)
    system = SYSTEMS[name]()
    u = torch.randn(*shape, 50)
    assert system(u).shape == u.shape
    recurrence = system.recurrence()
    y, state = recurrence.prefill(u[..., :9])
    assert y.shape == (*shape, 9)
    for t in range(9, 45):  # past the end of an online convolution's smallest block
        y, state = recurrence.step(u[..., t], state)
        assert y.shape == shape
    y, state = system(u[..., 45:], state)
    assert y.shape == (*shape, 5)
