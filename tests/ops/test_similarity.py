"""State coordinates in which powers by squaring are right, against steps in 60 digits."""

from fractions import Fraction

import numpy as np
import pytest
import scipy.signal
import torch

from gramian.ops.krylov import krylov_product
from gramian.ops.similarity import bounded_powers, coordinates, exact_product
from tests.systems.reference import relative_error, stepped_exactly


def companion(order: int, cutoff: float, observable: bool) -> tuple[torch.Tensor, ...]:
    """A badly scaled companion matrix of a low pass, or its transpose."""
    b, a = scipy.signal.butter(order, cutoff)
    A = np.vstack([-a[1:], np.eye(order, k=0)[:-1]])
    B, C = np.eye(order)[0], b[1:] - b[0] * a[1:]
    if observable:
        A, B, C = A.T.copy(), C, B
    return tuple(torch.from_numpy(m.copy()) for m in (A, B, C))


@pytest.mark.parametrize("inner", [1, 2, 7, 40])
def test_exact_product(inner: int) -> None:
    rng = np.random.default_rng(inner)
    left = rng.standard_normal((3, inner)) * 10 ** rng.uniform(-6, 6, (3, inner))
    right = rng.standard_normal((inner, 2)) * 10 ** rng.uniform(-6, 6, (inner, 2))
    high, low = exact_product(torch.from_numpy(left), torch.from_numpy(right))
    scale = np.abs(left).max(1)[:, None] * np.abs(right).max(0)
    for i in range(3):
        for j in range(2):
            expected = sum(Fraction(left[i, k]) * Fraction(right[k, j]) for k in range(inner))
            found = Fraction(float(high[i, j])) + Fraction(float(low[i, j]))
            assert abs(float(found - expected)) < 1e-29 * scale[i, j]


@pytest.mark.parametrize("observable", [False, True])
@pytest.mark.parametrize(
    ("order", "cutoff"), [(1, 0.02), (4, 0.002), (5, 0.02), (6, 0.02), (8, 0.02), (12, 0.05)]
)
def test_companion_matrices(order: int, cutoff: float, observable: bool) -> None:
    """To the last digits, where plain steps in double precision lose up to ten more."""
    A, B, C = companion(order, cutoff, observable)
    found = coordinates(A, B, C)
    assert not found.stepwise
    matrix, column, row = found.system(A, B, C)
    assert float(torch.linalg.matrix_norm(matrix, 2)) < 4 or not found.factors
    taps = krylov_product(row, matrix, column, 700)
    expected = stepped_exactly(A, B, C, 0.0, 701)[1:]
    assert relative_error(taps, expected) < 2e-12
    powers = torch.linalg.matrix_power(matrix, 4096)
    assert bool(powers.isfinite().all()) and bool(bounded_powers(matrix))


@pytest.mark.parametrize("order", [1, 2, 5, 16])
def test_what_is_well_behaved_is_left_alone(order: int) -> None:
    torch.manual_seed(order)
    A = torch.randn(4, order, order, dtype=torch.float64)
    A = 0.99 * A / torch.linalg.matrix_norm(A, 2)[:, None, None]
    B, C = torch.randn(2, 4, order, dtype=torch.float64)
    assert coordinates(A, B, C) == ((), False)
    assert coordinates(1.3 * A / 0.99, B, C) == ((), False)  # growth alone is no harm


def test_channels_do_not_disturb_each_other() -> None:
    hard = companion(6, 0.02, False)
    easy = tuple(torch.randn(*m.shape, dtype=torch.float64) / 5 for m in hard)
    both = tuple(torch.stack(pair) for pair in zip(hard, easy, strict=True))
    found = coordinates(*both)
    (A, B, C), (F, G, H) = found.system(*both), coordinates(*hard).system(*hard)
    together, alone = krylov_product(C[0], A[0], B[0], 500), krylov_product(H, F, G, 500)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-14)
    for kept, given in zip((A, B, C), easy, strict=True):
        assert torch.equal(kept[1], given)


def test_states_go_there_and_back() -> None:
    A, B, C = companion(8, 0.02, False)
    found = coordinates(A, B, C)
    x = torch.randn(3, 2, 8, dtype=torch.float64)
    torch.testing.assert_close(found.out_of(found.into(x)), x, rtol=1e-9, atol=1e-9)


def test_modes_that_the_input_does_not_reach() -> None:
    A, B, C = companion(6, 0.02, False)
    A = torch.block_diag(A, torch.tensor([[0.9]], dtype=torch.float64))
    B, C = torch.nn.functional.pad(B, (0, 1)), torch.nn.functional.pad(C, (0, 1), value=1.0)
    found = coordinates(A, B, C)
    assert not found.stepwise and len(found.factors) < 5
    matrix, _, row = found.system(A, B, C)
    x = torch.randn(7, dtype=torch.float64)
    taps = krylov_product(row, matrix, found.into(x), 400)
    assert relative_error(taps, stepped_exactly(A, x, C, 0.0, 401)[1:]) < 1e-9


def test_no_input_no_output_and_no_state() -> None:
    A, B, C = companion(6, 0.02, False)
    for b, c in ((0 * B, C), (B, 0 * C), (0 * B, 0 * C)):
        found = coordinates(A, b, c)
        matrix, column, row = found.system(A, b, c)
        assert float(krylov_product(row, matrix, column, 300).abs().max()) == 0
    nothing = torch.zeros(2, 0, dtype=torch.float64)
    assert coordinates(torch.zeros(2, 0, 0, dtype=torch.float64), nothing, nothing) == ((), False)


def test_what_is_not_finite_is_stepped() -> None:
    A, B, C = companion(4, 0.3, False)
    assert coordinates(A * torch.nan, B, C).stepwise


def test_gradients() -> None:
    """Any coordinates give the same response, so they count as constants."""
    torch.manual_seed(0)
    A, B, C = companion(3, 0.05, False)
    found = coordinates(A, B, C)
    assert found.factors

    def taps(*system: torch.Tensor) -> torch.Tensor:
        matrix, column, row = found.system(*system)
        return krylov_product(row, matrix, column, 9)

    assert torch.autograd.gradcheck(taps, [m.clone().requires_grad_() for m in (A, B, C)])
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: found.out_of(found.into(x)), (x,))
