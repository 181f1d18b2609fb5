r"""Changes of state coordinates that make powers of a state matrix accurate.

Powers that are computed by squaring are as accurate as plain steps only if no power is much larger
than the next, since the error of `A^2k` is `eps ‖A^k‖²`. The companion matrix of a filter whose
poles crowd at z = 1 has powers of norm 1e10 and more before they decay to zero. In the coordinates
`x = L x̃` with

    L Lᵀ = Σ_t A^t (b bᵀ + Q) (A^t)ᵀ,  Ã = L⁻¹ A L,  b̃ = L⁻¹ b,  c̃ = c L

the state matrix is a contraction, `‖Ã‖ ≤ 1`, and `‖c̃‖` is about the norm of the impulse response,
so nothing cancels. This is the input-normal form of B. C. Moore, IEEE Trans. Automatic Control 26,
1981. The matrix Q, small and diagonal, keeps L regular even if b does not reach every state.

The sum extends over all t for which `A^t` is accurate. It is then computed again in the coordinates
that result, and so on. Each L may have a condition number of 1e8, and the product of all L a
condition number far above 1/eps. So `Ã` is not computed as a product of three matrices. Instead,
`L Ã = A L` is solved by iterative refinement in twice the working precision, and only the last
result is rounded.

Coordinates are found without gradients and applied with gradients, since the impulse response is
the same in all coordinates.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Coordinates", "bounded_powers", "coordinates", "exact_product", "reached"]

_BOUND = 32.0
"""The largest norm of powers, relative to the norm of the identity, with which squaring is
accurate. The error of squaring is the square of this number times the rounding unit, so three
digits are lost."""

_TRUSTED = 1e6
"""The largest norm of powers that are accurate enough for coordinates, though not for taps."""

_FORCING = 1e-8
"""The square root of Q, relative to how far b moves each coordinate. With Q, the coordinates keep
states that b does not reach, but with eight digits fewer."""

_LEAST_TRUSTED = 30.0
_MOST_FORCING = 0.5
"""The search gives up when failures have moved one of its two parameters beyond this."""

_CANCELLED = 1e3
"""The largest acceptable ‖b̃‖ ‖c̃‖, relative to the norm of the impulse response."""

_DOUBLINGS = 50
_PASSES = 16
_REFINEMENTS = 16


class Pair(NamedTuple):
    """The unevaluated sum of two float64 tensors: about 32 digits."""

    high: Tensor
    low: Tensor

    @classmethod
    def of(cls, value: Tensor) -> Pair:
        value = value.detach()
        return cls(value, torch.zeros_like(value))

    def plus(self, other: Tensor) -> Pair:
        high = self.high + other
        rounded = high - self.high
        lost = (self.high - (high - rounded)) + (other - rounded) + self.low
        total = high + lost
        return Pair(total, lost - (total - high))

    def where(self, condition: Tensor, other: Pair) -> Pair:
        """Select this pair where `condition` holds, and `other` elsewhere."""
        return Pair(*(torch.where(condition, a, b) for a, b in zip(self, other, strict=True)))


def exact_product(left: Tensor, right: Tensor) -> Pair:
    """Compute `left @ right` in twice the working precision.

    Both factors are split into slices with so few bits that products of slices are exact (Ozaki et
    al., "Error-free transformations of matrix multiplication", Numerical Algorithms 59, 2012).

    Args:
        left: (*C, m, k), float64: the left factor.
        right: (*C, k, n), float64: the right factor.

    Returns:
        (*C, m, n), with an error of about eps² relative to the largest entries of the row and the
        column.
    """
    bits = (51 - max(1, left.shape[-1] - 1).bit_length()) // 2
    count = -(-108 // bits)
    rows, columns = _slices(left, -1, bits, count), _slices(right, -2, bits, count)
    total = Pair.of(rows[0] @ columns[0])
    for level in range(1, count):
        for i in range(level + 1):
            total = total.plus(rows[i] @ columns[level - i])
    return total


def _slices(x: Tensor, dim: int, bits: int, count: int) -> list[Tensor]:
    """Split `x` into parts that add up to it.

    Each part holds the next `bits` bits, counted from the largest remaining entry along `dim`.
    """
    parts = []
    for _ in range(count):
        top = x.abs().amax(dim, keepdim=True)
        # Adding and then subtracting 3/4 of a power of two rounds to a multiple of its last bit.
        carrier = torch.ldexp(torch.full_like(top, 0.75), torch.frexp(top)[1] + 53 - bits)
        part = (x + carrier) - carrier
        parts.append(part)
        x = x - part
    return parts


class Coordinates(NamedTuple):
    """Coordinates `x = L_1 L_2 … x̃` with zero or more lower-triangular factors (*C, n, n)."""

    factors: tuple[Tensor, ...] = ()
    stepwise: bool = False
    """Whether plain steps are necessary because powers are inaccurate in all coordinates found."""

    def system(self, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Transform a system into these coordinates, differentiably.

        Args:
            A: (*C, n, n), float64: the state matrix.
            B: (*C, n): the input vector.
            C: (*C, n): the output vector.
        """
        if not self.factors:
            return A, B, C
        order = A.shape[-1]
        exact = Pair.of(torch.cat([A, B.unsqueeze(-1)], dim=-1))
        row = Pair.of(C.unsqueeze(-2))
        for L in self.factors:
            exact = _similar(L, exact)[0]
            row = _times(row, L)
        if not (A.requires_grad or B.requires_grad or C.requires_grad):
            return exact.high[..., :order], exact.high[..., order], row.high.squeeze(-2)
        b, c = B.unsqueeze(-1), C.unsqueeze(-2)
        for L in self.factors:
            A, b, c = _solve(L, A @ L), _solve(L, b), c @ L
        return (
            _with_gradient(exact.high[..., :order], A),
            _with_gradient(exact.high[..., order:], b).squeeze(-1),
            _with_gradient(row.high, c).squeeze(-2),
        )

    def into(self, x: Tensor) -> Tensor:
        """Transform states (*B, n) into these coordinates, differentiably; *C broadcasts to *B."""
        if not self.factors:
            return x
        exact, plain = Pair.of(x.unsqueeze(-1)), x.unsqueeze(-1)
        one = x.new_ones(1, 1)
        for L in self.factors:
            exact, _ = _refined(L, exact, one)
            plain = _solve(L, plain)
        return _with_gradient(exact.high, plain).squeeze(-1)

    def out_of(self, x: Tensor) -> Tensor:
        """Transform states (*B, n) back from these coordinates, differentiably."""
        for L in reversed(self.factors):
            x = (L @ x.unsqueeze(-1)).squeeze(-1)
        return x


def _solve(L: Tensor, target: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(L, target, upper=False)


def _with_gradient(value: Tensor, formula: Tensor) -> Tensor:
    """Return `value` with the derivatives of `formula`, whose own value may be inaccurate."""
    return value + (formula - formula.detach())


def _times(left: Pair, right: Tensor) -> Pair:
    columns = torch.cat([right, right], dim=-2)
    return exact_product(torch.cat([left.high, left.low], dim=-1), columns)


def _similar(L: Tensor, rows: Pair) -> tuple[Pair, Tensor]:
    """Compute `[L⁻¹ A L, L⁻¹ B]` from `[A, B]`, and whether the result is accurate, (*C)."""
    columns = torch.nn.functional.pad(L, (0, 1, 0, 1))  # [[L, 0], [0, 1]]
    columns[..., -1, -1] = 1
    # The last column may have any size; a power of two scales it to the size of the others.
    top = torch.frexp(rows.high.abs().amax(-2, keepdim=True))[1]  # (*C, 1, n + 1)
    shift = (top[..., :-1].amax(-1, keepdim=True) - top[..., -1:]).clamp(-1000, 1000)
    exponents = torch.cat([torch.zeros_like(top[..., :-1]), shift], dim=-1)
    solution, right = _refined(L, Pair(*(torch.ldexp(part, exponents) for part in rows)), columns)
    return Pair(*(torch.ldexp(part, -exponents) for part in solution)), right


def _refined(L: Tensor, rows: Pair, columns: Tensor) -> tuple[Pair, Tensor]:
    """Compute `L⁻¹ rows columns` by iterative refinement, and whether the result is accurate."""
    finfo = torch.finfo(L.dtype)
    X = Pair.of(_solve(L, rows.high @ columns))
    lead = X.high.shape[:-2]
    wide = L.expand(*lead, -1, -1)
    left = torch.cat([rows.high, rows.low, wide, wide], dim=-1)
    columns = columns.expand(*lead, -1, -1)
    last = torch.full(lead, torch.inf, dtype=L.dtype, device=L.device)
    for _ in range(_REFINEMENTS):
        residual = exact_product(left, torch.cat([columns, columns, -X.high, -X.low], dim=-2)).high
        scale = L.abs().amax(-1, keepdim=True) * X.high.abs().amax(-2, keepdim=True)
        error = (
            (residual.abs() / scale.clamp_min(finfo.tiny))
            .nan_to_num(torch.inf)
            .flatten(-2)
            .amax(-1)
        )
        better = (error > finfo.eps**2) & (error < 0.5 * last)
        last = torch.minimum(error, last)
        if not bool(better.any()):
            break
        X = X.plus(_solve(L, residual)).where(better[..., None, None], X)
    return X, last <= finfo.eps / 16


def bounded_powers(A: Tensor) -> Tensor:
    """Return, for each channel (*C), whether powers by squaring are as accurate as plain steps.

    This is the case if no power `A^(2^k)` is much larger than the identity. Growth at the rate of
    the spectral radius does not count, because the result grows at the same rate.

    Args:
        A: (*C, n, n), float64: the state matrix.
    """
    bound = _BOUND * math.sqrt(max(1, A.shape[-1]))
    small = _largest_power(A, bound) <= bound
    if not bool(small.all()):
        small = small | (_largest_power(A / _growth(A), bound) <= bound)
    return small


def _growth(A: Tensor) -> Tensor:
    """Return the spectral radius, but at least 1, (*C, 1, 1)."""
    finite = A.nan_to_num(0.0, 0.0, 0.0)
    return torch.linalg.eigvals(finite).abs().amax(-1).clamp_min(1.0)[..., None, None]


def _largest_power(A: Tensor, bound: float) -> Tensor:
    """Compute the largest ‖A^(2^k)‖_F, (*C).

    If it exceeds `bound`, the result may be a smaller norm that exceeds `bound` too.
    """
    largest = norm = torch.linalg.matrix_norm(A).nan_to_num(torch.inf)
    for _ in range(_DOUBLINGS):
        if bool(((norm <= 1) | (largest > bound)).all()):
            break
        A = A @ A
        norm = torch.linalg.matrix_norm(A).nan_to_num(torch.inf)
        largest = torch.maximum(largest, norm)
    return largest


def reached(
    A: Tensor, rows: Tensor, trusted: float | Tensor = _TRUSTED, doublings: int = _DOUBLINGS
) -> Tensor:
    """Compute R with `RᵀR = Σ_t A^t rowsᵀ rows (A^t)ᵀ` by doubling.

    The horizon is infinite, unless the powers of A that are computed by squaring become too large
    to be accurate. It ends where they do.

    Args:
        A: (*C, n, n), float64: the state matrix.
        rows: (*C, r, n): the input vectors.
        trusted: One number, or (*C): the sum ends when a power has a larger norm.
        doublings: The largest number of doublings. The horizon is at most 2 to this power.

    Returns:
        (*C, k, n), upper triangular, k ≤ n.
    """
    factor, power = rows, A
    live = torch.ones(A.shape[:-2], dtype=torch.bool, device=A.device)
    for doubling in range(doublings):
        if doubling:  # the first power is A itself, which is exact
            live = live & (torch.linalg.matrix_norm(power) <= trusted)
        # This adds the next stretch of the horizon, which is as long as all stretches before it.
        further = torch.where(live[..., None, None], factor @ power.mT, 0)
        factor = torch.linalg.qr(torch.cat([factor, further], dim=-2), mode="r")[1]
        live = live & (further.square().sum((-2, -1)) > 1e-34 * factor.square().sum((-2, -1)))
        if not bool(live.any()):
            break
        power = torch.where(live[..., None, None], power @ power, power)
    return factor


@torch.no_grad()
def coordinates(A: Tensor, B: Tensor, C: Tensor) -> Coordinates:
    """Find coordinates in which powers of a state matrix can be computed by squaring.

    Args:
        A: (*C, n, n), float64: the state matrix.
        B: (*C, n): the input vector.
        C: (*C, n): the output vector.

    Returns:
        The coordinates. Channels where the powers of A are already bounded keep the given
        coordinates. The function reads the values of A, so it synchronizes with a GPU.
    """
    if A.numel() == 0:
        return Coordinates()
    ready = bounded_powers(A)
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    rows, output = Pair.of(torch.cat([A, B.unsqueeze(-1)], dim=-1)), Pair.of(C.unsqueeze(-2))
    factors: list[Tensor] = []
    good, trusted = ready, torch.full_like(B[..., 0], _TRUSTED)
    forcing, hopeless = torch.full_like(trusted, _FORCING), torch.zeros_like(ready)
    for _ in range(_PASSES):
        if bool((ready | hopeless).all()):
            break
        A = rows.high[..., :-1]
        L = _reach(A, rows.high[..., -1], trusted, forcing)
        changed, right = _similar(L, rows)
        use = (~(ready | hopeless) & right)[..., None, None]
        rows, output = changed.where(use, rows), _times(output, L).where(use, output)
        if bool(use.any()):
            factors.append(torch.where(use, L, identity))
        # After a failure, a shorter horizon is tried, whose factor is better conditioned. When a
        # shorter horizon changes nothing any more, a larger forcing is tried.
        spread = L.diagonal(dim1=-2, dim2=-1).aminmax(dim=-1)
        trusted = torch.where(right, trusted, trusted.sqrt())
        flat = spread.max <= 4 * spread.min
        forcing = torch.where(right & ~flat, forcing, forcing.sqrt())
        hopeless = hopeless | (trusted < _LEAST_TRUSTED) | (forcing > _MOST_FORCING)
        A = rows.high[..., :-1]
        good = bounded_powers(A)
        column, row = rows.high[..., -1:], output.high
        size = torch.linalg.matrix_norm(column) * torch.linalg.matrix_norm(row)
        response = torch.linalg.matrix_norm(reached(A / _growth(A), column.mT) @ row.mT)
        ready = ready | (good & (flat | (size <= _CANCELLED * response)))
    return Coordinates(tuple(factors), stepwise=not bool(good.all()))


def _reach(A: Tensor, B: Tensor, trusted: Tensor, forcing: Tensor) -> Tensor:
    """Compute the factor L (*C, n, n) for inputs through B and small forces on all states."""
    A = A / _growth(A)
    norm = torch.linalg.vector_norm(B, dim=-1, keepdim=True)
    column = (B / torch.where(norm > 0, norm, 1)).unsqueeze(-1)
    columns = [column]
    for _ in range(A.shape[-1]):  # include all states that b reaches, trusted or not
        columns.append(A @ columns[-1])
    rows = torch.cat(columns, dim=-1).mT
    moved = torch.linalg.vector_norm(reached(A, rows, trusted), dim=-2)  # (*C, n)
    most = moved.amax(-1, keepdim=True)
    moved = torch.where(moved > 0, forcing.unsqueeze(-1) * moved, torch.where(most > 0, most, 1))
    rows = torch.cat([rows, torch.diag_embed(moved)], dim=-2)
    factor = reached(A, rows, trusted).mT
    # The columns of a triangular factor have free signs; a positive diagonal makes it unique.
    sign = torch.where(factor.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    return factor * sign.unsqueeze(-2)
