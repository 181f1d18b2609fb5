"""Products of powers of dense matrices against a loop."""

import pytest
import torch

from gramian.ops.krylov import krylov_product, krylov_sum, matrix_power


@pytest.mark.parametrize("length", [1, 2, 3, 7, 63, 64, 257, 1000])
@pytest.mark.parametrize("order", [1, 2, 5])
def test_against_a_loop(order: int, length: int) -> None:
    torch.manual_seed(length)
    A = torch.randn(3, order, order, dtype=torch.float64)
    A = A / torch.linalg.matrix_norm(A, 2)[:, None, None]
    c, x = torch.randn(2, 3, order, dtype=torch.float64)
    signal = torch.randn(2, 3, length, dtype=torch.float64)
    taps, state, vector = [], torch.zeros(2, 3, order, dtype=torch.float64), x
    for t in range(length):
        taps.append((c * vector).sum(-1))
        vector = (A @ vector.unsqueeze(-1)).squeeze(-1)
        state = (A @ state.unsqueeze(-1)).squeeze(-1) + x * signal[..., t : t + 1]
    expected = torch.stack(taps, -1)
    torch.testing.assert_close(krylov_product(c, A, x, length), expected)
    torch.testing.assert_close(krylov_sum(A, x, signal), state)
    torch.testing.assert_close((matrix_power(A, length) @ x.unsqueeze(-1)).squeeze(-1), vector)


def test_gradients() -> None:
    torch.manual_seed(0)
    A = (torch.randn(2, 3, 3, dtype=torch.float64) / 2).requires_grad_()
    c, x = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    u = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *v: krylov_product(*v, 11), (c, A, x))
    assert torch.autograd.gradcheck(krylov_sum, (A, x, u))


def test_single_precision_keeps_its_digits_over_long_horizons() -> None:
    """Powers in float64: a slow rotation after 16,000 steps."""
    angle = torch.tensor(0.1)
    cos, sin = 0.9999 * angle.cos(), 0.9999 * angle.sin()
    A = torch.stack([torch.stack([cos, -sin]), torch.stack([sin, cos])])
    c = x = torch.tensor([1.0, 0.0])
    exact = krylov_product(c.double(), A.double(), x.double(), 16384)
    single = krylov_product(c, A, x, 16384)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=1e-6)


def test_autocast_leaves_the_precision_alone() -> None:
    torch.manual_seed(0)
    A, (c, x) = torch.randn(4, 4) / 4, torch.randn(2, 4)
    expected = krylov_product(c, A, x, 100)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(krylov_product(c, A, x, 100), expected)
