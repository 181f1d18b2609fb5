r"""Products `c A^t x` with powers of dense matrices, computed in blocks of about √L × √L.

For t = iJ + j, `c A^t x` splits into `(c A^{iJ}) (A^j x)`. About √L row vectors and as many column
vectors are computed by doubling with the squares of `A`, and one matrix product combines them.
Neither L powers nor an n × L matrix is formed. Powers are computed in double precision: in single
precision, the 16384th power of a matrix of spectral radius 0.999 has no correct digit left.
Squaring is as accurate as plain steps if no power is much larger than the identity.
`gramian.ops.similarity` finds coordinates in which this condition holds. `plain_steps` is accurate
in any coordinates.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["krylov_product", "krylov_sum", "krylov_vectors", "matrix_power", "plain_steps"]


def krylov_vectors(A: Tensor, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Compute `x, A x, …, A^(count-1) x` by doubling.

    Args:
        A: (*C, n, n): the matrix.
        x: (*B, n, r): r vectors; `C` broadcasts against `B`.
        count: The number of powers, a power of two.

    Returns:
        The vectors (*B, n, r count), in which the r vectors of each power are neighbors, and
        `A^count`.
    """
    power = A
    while count > 1:
        x = torch.cat([x, power @ x], dim=-1)
        power = power @ power
        count //= 2
    return x, power


def matrix_power(A: Tensor, exponent: int) -> Tensor:
    """Raise `A` to a power ≥ 0, by squaring."""
    result = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand_as(A)
    while exponent:
        if exponent & 1:
            result = result @ A
        exponent >>= 1
        if exponent:
            A = A @ A
    return result


def _columns(length: int) -> int:
    """Return a power of two near √length."""
    return 1 << (max(1, math.isqrt(length)) - 1).bit_length()


def krylov_product(c: Tensor, A: Tensor, x: Tensor, length: int) -> Tensor:
    """Compute `c A^t x` for t = 0 … length - 1.

    Args:
        c: (*C, n): the output vector.
        A: (*C, n, n): the state matrix.
        x: (*B, n): the first state; `C` broadcasts against `B`.
        length: The number of values of t, at least 1.

    Returns:
        (*B, length), in the dtype of `x`. The result is differentiable.
    """
    columns = _columns(length)
    rows = 1 << (-(-length // columns) - 1).bit_length()
    wide = A.double()
    right, stride = krylov_vectors(wide, x.double().unsqueeze(-1), columns)  # (*B, n, J)
    left, _ = krylov_vectors(stride.mT, c.double().unsqueeze(-1), rows)  # (*C, n, I)
    # From here on, terms cancel only if the taps themselves are small sums of large terms. Half
    # precision, to which autocast would switch, would leave few correct digits.
    with torch.autocast(x.device.type, enabled=False):
        samples = left.mT.to(x.dtype) @ right.to(x.dtype)  # (*B, I, J)
    return samples.flatten(-2)[..., :length]


def krylov_sum(A: Tensor, b: Tensor, signal: Tensor) -> Tensor:
    """Compute `Σ_j A^(T-1-j) b signal_j`, the state that a recurrence reaches after T inputs.

    Args:
        A: (*C, n, n): the state matrix.
        b: (*C, n): the input vector.
        signal: (*B, T): the inputs; `C` broadcasts against `B`.

    Returns:
        (*B, n), in the dtype of `signal`. The result is differentiable.
    """
    length = signal.shape[-1]
    columns = _columns(length)
    rows = 1 << (-(-length // columns) - 1).bit_length()
    right, stride = krylov_vectors(A.double(), b.double().unsqueeze(-1), columns)
    # The padding is in front, so that the last sample is multiplied by the power zero.
    padded = torch.nn.functional.pad(signal.double(), (rows * columns - length, 0))
    blocks = padded.unflatten(-1, (rows, columns)).mT  # (*B, J, I)
    partial = right.flip(-1) @ blocks  # (*B, n, I)
    while partial.shape[-1] > 1:  # sum pairs of neighbors, of which the first is J steps older
        partial = stride @ partial[..., ::2] + partial[..., 1::2]
        stride = stride @ stride
    return partial.squeeze(-1).to(signal.dtype)


def plain_steps(
    A: Tensor, b: Tensor, c: Tensor, signal: Tensor, x: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute `y_t = c x_t`, `x_{t+1} = A x_t + b signal_t` by a loop over time.

    In exact arithmetic, `krylov_product` and `krylov_sum` give the same result. The loop is for
    matrices whose powers are inaccurate when they are computed by squaring.

    Args:
        A: (*C, n, n): the state matrix.
        b: (*C, n): the input vector.
        c: (*C, n): the output vector.
        signal: (*B, T): the inputs; `C` broadcasts against `B`.
        x: (*B, n): the state before the first input.

    Returns:
        The outputs (*B, T) and the last state (*B, n), in float64. Both are differentiable.
    """
    A, b, c, x = (value.double() for value in (A, b, c, x))
    outputs = []
    for sample in signal.double().unbind(-1):
        outputs.append((c * x).sum(-1))
        x = (A @ x.unsqueeze(-1)).squeeze(-1) + b * sample.unsqueeze(-1)
    return torch.stack(outputs, dim=-1), x
