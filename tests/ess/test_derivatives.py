"""State-sizes in both modes of differentiation."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp

from gramian import DenseOperator, effective_state_size
from gramian.ess.recurrent import factored_singular_values
from tests.ess.conftest import make


@pytest.mark.parametrize("sizes", [(5, 2, 6), (2, 2, 2), (3, 3, 5)])
def test_singular_values_of_a_product(sizes: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    m, n, k = sizes
    left = torch.randn(2, m, n, dtype=torch.float64, requires_grad=True)
    right = torch.randn(2, n, k, dtype=torch.float64, requires_grad=True)
    values = factored_singular_values(left, right)
    torch.testing.assert_close(values, torch.linalg.svdvals(left @ right)[..., : values.shape[-1]])
    checks = {"check_batched_grad": True}
    assert gradcheck(
        factored_singular_values,
        (left, right),
        check_forward_ad=True,
        check_batched_forward_grad=True,
        **checks,
    )
    assert gradgradcheck(factored_singular_values, (left, right), check_fwd_over_rev=True, **checks)


@pytest.mark.parametrize("kind", ["diagonal", "delta", "dense", "matrix"])
def test_state_sizes(kind: str) -> None:
    system = make("diagonal" if kind == "matrix" else kind, 12, (2,), 3)
    torch.manual_seed(1)
    A = torch.randn(2, 12, 12, dtype=torch.float64) if kind == "matrix" else system.A
    direction = torch.randn_like(A)

    def sizes(A: torch.Tensor) -> torch.Tensor:
        if kind == "matrix":
            return effective_state_size(DenseOperator(A.tril()), [4, 8]).sum()
        return effective_state_size(type(system)(A, *system._fields()[1:]), [4, 8]).sum()

    for enabled in (True, False):  # forward mode needs no graph
        with torch.set_grad_enabled(enabled):
            value, slope = jvp(sizes, (A,), (direction,))
        step = 1e-6
        difference = (sizes(A + step * direction) - sizes(A - step * direction)) / (2 * step)
        torch.testing.assert_close(value, sizes(A))
        torch.testing.assert_close(slope, difference, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((grad(sizes)(A) * direction).sum(), slope)


def test_a_count_has_no_tangent() -> None:
    matrix = torch.eye(6).cumsum(0)
    with pytest.raises(ValueError, match="a count has no gradient"):
        jvp(
            lambda m: effective_state_size(m, 3, measure="tolerance", tol=0.1), (matrix,), (matrix,)
        )
