"""Block Krylov spaces of the blocks of an operator at all positions.

The vectors of all positions are stored together, as `gramian.ess.rows` does.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from gramian.ess.rows import Blocks

__all__ = ["NOISE", "KrylovSpace", "krylov_space", "random_signs"]

NOISE = 1e-6
"""A length up to which a product is taken for rounding errors, relative to the largest value."""


@dataclasses.dataclass
class KrylovSpace:
    """A block Krylov space at every position (Golub, Luk and Overton 1981).

    With the basis V as columns and `B = upper`, `H V = U B[:, :r]` and `Hᵀ U = [V, V_next] Bᵀ`,
    where U is orthonormal.

    Attributes:
        basis: The orthonormal vectors on the small sides, (r, n) for each position.
        upper: (P, r, r + b), float64: block bidiagonal matrices.
        start: (P, b, b), float64: the vectors that the space started from are `startᵀ` times the
            first b vectors of the basis.
    """

    basis: list[Tensor]
    upper: Tensor
    start: Tensor

    def triples(self) -> tuple[Tensor, Tensor, Tensor]:
        """Compute approximate singular triples.

        Returns:
            The values, (P, r), ascending; the coefficients of their vectors in the basis,
            (P, r, r); and the residuals of the triples, (P, r), in float64.
        """
        r = self.upper.shape[1]
        inner = self.upper[..., :r]
        squares, W = torch.linalg.eigh(inner.mT @ inner)
        values = squares.clamp_min(0).sqrt()
        left = inner @ W / values.clamp_min(torch.finfo(values.dtype).tiny).unsqueeze(1)
        residual = torch.linalg.vector_norm(self.upper[..., r:].mT @ left, dim=1)
        return values, W, residual


def random_signs(
    blocks: Blocks, count: int, generator: torch.Generator, large: bool = False
) -> Tensor:
    """Draw random signs on the small or on the large sides, (P, count, horizon), float32."""
    shape = (len(blocks.positions), count, blocks.horizon)
    signs = 2 * torch.randint(2, shape, generator=generator, dtype=torch.int8) - 1
    result = torch.zeros(shape, device=blocks.device)
    for p in range(len(blocks.positions)):
        side = blocks.large(p) if large else blocks.small(p)
        result[p, :, side] = signs[p, :, side].to(result)
    return result


def krylov_space(blocks: Blocks, start: Tensor, depth: int) -> KrylovSpace:
    """Compute the Krylov spaces of `Hᵀ H` at all positions of the blocks.

    Args:
        blocks: The blocks.
        start: (P, b, horizon), float32: vectors on the small sides, which are 0 elsewhere.
        depth: The number of blocks of b vectors.
    """
    count, b = start.shape[:2]
    sizes = blocks.small_sizes().long().tolist()
    basis = [start.new_zeros(b * depth, n) for n in sizes]
    upper = torch.zeros(count, b * depth, b * (depth + 1), dtype=torch.float64, device=start.device)
    Z, first = _orthonormal(start)
    U, coupling, floor = None, upper.new_zeros(0), None
    for step in range(depth):
        here = slice(step * b, (step + 1) * b)
        for p, V in enumerate(basis):
            V[here] = Z[p, :, blocks.small(p)]
        Y = blocks.to_large(Z)
        if U is not None:
            Y -= coupling.mT.to(U.dtype) @ U
        U, upper[:, here, here] = _orthonormal(Y, floor)
        if floor is None:
            floor = NOISE * torch.linalg.matrix_norm(upper[:, here, here], 2)
        W = blocks.to_small(U)
        known = [V[: here.stop] for V in basis]
        blocks.project(W, known)
        blocks.project(W, known)
        Z, further = _orthonormal(W, floor)
        blocks.project(Z, known)
        Z, again = _orthonormal(Z, torch.full_like(floor, 0.5))  # others were rounding errors
        coupling = (again @ further).mT
        upper[:, here, here.stop : here.stop + b] = coupling
    return KrylovSpace(basis, upper, first)


def _orthonormal(Z: Tensor, floor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return vectors O (P, N, L) and F (P, N, N), float64, with Z = Fᵀ O.

    The vectors O are orthonormal or zero (Stathopoulos and Wu 2002). Directions along which Z is
    not longer than `floor`, (P), are left out.
    """
    factor = torch.eye(Z.shape[1], dtype=torch.float64, device=Z.device).expand(len(Z), -1, -1)
    for repeat in range(4):
        squares, vectors = torch.linalg.eigh((Z @ Z.mT).double())
        largest = squares.amax(-1, keepdim=True)
        done = repeat and bool(((squares - 1).abs() < 1e-4).logical_or(squares == 0).all())
        if repeat:
            there = squares > 1e-4
        else:
            there = (largest > 0).expand_as(squares)
            if floor is not None:
                there = squares > floor.square().unsqueeze(-1)
            squares = squares.clamp_min(1e-7 * largest)
        scale = squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()
        change = torch.where(there.unsqueeze(1), vectors / scale.unsqueeze(1), 0)
        Z = change.mT.to(Z.dtype) @ Z
        factor = torch.where(there.unsqueeze(-1), vectors.mT * scale.unsqueeze(-1), 0) @ factor
        if done:
            break
    return Z, factor
