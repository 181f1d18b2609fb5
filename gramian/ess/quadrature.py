r"""Entropy-ESS with a stated error from products with the blocks only.

The entropy-ESS of a block H is `S exp(-Q / S)` with `S = Σ σ` and `Q = Σ σ log σ`. Both sums are
traces of functions of `M = Hᵀ H`.

1. A block Krylov space of H (Golub, Luk and Overton 1981) gives leading singular triples. Those
   that have converged are deflated.
2. The sums over all other values are `E zᵀ f(M) z` for random signs z that are projected onto the
   complement of the leading vectors. Bidiagonalization (Golub and Kahan 1965) gives
   the nodes and weights of two quadratures, of Gauss and of Gauss and Radau, between which the
   exact value lies (Golub and Meurant 2010). The estimate is their mean.
3. Two traces on the complement are known exactly: its dimension, and the energy `Σ σ²`, which is
   that of the block minus that of the leading values. So only the part of f that differs from
   `α + β λ` is estimated. The spectrum, which the quadrature shows as well, gives the best α and β
   and the variance of that part.
4. More random vectors are drawn at those positions where the error is above the tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gramian.ess.measures import Measure
from gramian.ess.rows import Blocks
from gramian.ess.tails import Leading, Sample, Tail, quadratures

__all__ = ["estimate_sizes"]

_EXACT = 320
"""A block whose smaller side is at most this is decomposed."""

_BREADTH = 16
"""The number of vectors in a block of the Krylov space, and of random vectors in a round."""

_DEPTH = 6
"""The number of blocks of the Krylov space."""

_NOISE = 1e-6
"""A length up to which a product is taken for rounding errors, relative to the largest value."""

_CONVERGED = 0.2
"""A leading triple is deflated if its residual is at most this, relative to its value."""

_STEPS = (8, 12, 16, 24, 32, 48)
"""Numbers of steps of the bidiagonalization, of which the first is taken that suffices."""

_SHARE = 0.25
"""The share of the tolerance that the error of the quadratures may take."""

_PRIOR = 16
"""How much the common ratio of observed to expected scatter counts, in random vectors."""

_ROUNDS = 16
"""The largest number of rounds of random vectors."""

_LEAST = 1e-20
"""The least energy of an operator that is not scaled before its products in single precision."""

_TOGETHER = 2**28
"""The largest number of bytes of the vectors of all positions that are measured together."""


def estimate_sizes(
    rows: Callable[[slice], Tensor],
    horizon: int,
    positions: list[int],
    tolerance: float,
    seed: int,
    memory: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Estimate the entropy-ESS of one channel and the errors, (P) each, float64.

    Args:
        rows: The rows of the channel, as in `RowOperator`.
        horizon: The position at which the blocks end.
        positions: Positions in 1 … horizon - 1, ascending, without repetitions.
        tolerance: The relative error to reach.
        seed: The seed of the random vectors.
        memory: The largest number of bytes of rows to keep.
        device: The device of the rows.
    """
    sizes = torch.zeros(2, len(positions), dtype=torch.float64, device=device)
    blocks = Blocks(rows, horizon, positions, device, memory)
    if not positions:
        return sizes[0], sizes[1]
    energies, total = blocks.energies()
    if not _LEAST < float(total) < 1 / _LEAST:
        blocks.normalize()
        energies, total = blocks.energies()
    there = energies.sqrt() > torch.finfo(torch.float32).eps * total.sqrt()
    floor = torch.zeros((), dtype=torch.float64, device=device)
    large = []
    for p, i in enumerate(positions):
        if not there[p]:
            continue
        if min(i, horizon - i) <= _EXACT:
            sizes[0, p] = _measured(blocks.matrix(p), floor)
        else:
            large.append(p)
    generator = torch.Generator().manual_seed(seed)
    group = max(1, _TOGETHER // (4 * horizon * _BREADTH))
    for start in range(0, len(large), group):
        some = large[start : start + group]
        blocks.choose([positions[p] for p in some])
        sizes[:, some] = _Estimate(blocks, energies[some], tolerance, generator).result()
    return sizes[0], sizes[1]


def _measured(block: Tensor, floor: Tensor) -> Tensor:
    """Measure a block (m, k), m ≥ k, from its Gram matrix, or by SVD where necessary."""
    eigenvalues = torch.linalg.eigvalsh(block.mT @ block)
    count = torch.tensor(len(eigenvalues), device=block.device)
    if bool(Measure().unsafe_from_gram(eigenvalues, count, 9e-7)):
        return Measure()(torch.linalg.svdvals(block), floor)
    return Measure()(eigenvalues.clamp_min(0).sqrt(), floor)


class _Estimate:
    """An estimate for some positions of a channel.

    Args:
        blocks: The blocks at these positions.
        energies: (P): the energies of the blocks.
        tolerance: The relative error to reach.
        generator: The source of random vectors.
    """

    def __init__(
        self, blocks: Blocks, energies: Tensor, tolerance: float, generator: torch.Generator
    ) -> None:
        self.blocks, self.tolerance, self.generator = blocks, tolerance, generator
        self.energies = energies
        self.positions = list(blocks.positions)
        self.leading = self._deflated(*self._krylov())

    def _signs(self, count: int) -> Tensor:
        """Draw random signs (horizon, P, count), float32."""
        shape = (self.blocks.horizon, len(self.blocks.positions), count)
        signs = torch.randint(2, shape, generator=self.generator, dtype=torch.int8)
        return (2 * signs - 1).float().to(self.blocks.device)

    # Leading singular triples

    def _krylov(self) -> tuple[list[Tensor], Tensor]:
        """Compute orthonormal vectors V (n, r) for each position and `B` (P, r, r + b), float64.

        Here `H V = U B[:, :r]`, and `Hᵀ U = [V, V_next] Bᵀ`, with U orthonormal.
        """
        blocks, b = self.blocks, _BREADTH
        basis: list[list[Tensor]] = [[] for _ in self.positions]
        upper = torch.zeros(
            len(basis), b * _DEPTH, b * (_DEPTH + 1), dtype=torch.float64, device=blocks.device
        )
        start = self._signs(b) * (1 - blocks.small_mask())
        Z, _ = _orthonormal(blocks.to_small(start))
        U, coupling, floor = None, upper.new_zeros(0), None
        for step in range(_DEPTH):
            here = slice(step * b, (step + 1) * b)
            self._append(basis, Z)
            Y = blocks.to_large(Z)
            if U is not None:
                Y -= _times(U, coupling)
            U, upper[:, here, here] = _orthonormal(Y, floor)
            if floor is None:
                floor = _NOISE * torch.linalg.matrix_norm(upper[:, here, here], 2)
            W = blocks.to_small(U)
            self._project(W, basis)
            self._project(W, basis)
            Z, first = _orthonormal(W, floor)
            self._project(Z, basis)
            Z, second = _orthonormal(Z, torch.full_like(floor, 0.5))  # others were rounding errors
            coupling = (second @ first).mT
            upper[:, here, here.stop : here.stop + b] = coupling
        return [torch.cat(parts, 1) for parts in basis], upper

    def _append(self, basis: list[list[Tensor]], Z: Tensor) -> None:
        for p, parts in enumerate(basis):
            parts.append(Z[self.blocks.small(p), p].contiguous())

    def _project(self, Z: Tensor, basis: list[list[Tensor]]) -> None:
        """Subtract from Z, in place, its part in the span of the basis on the small sides."""
        for p, parts in enumerate(basis):
            z = Z[self.blocks.small(p), p]
            for V in parts:
                z -= V @ (V.mT @ z)

    def _deflated(self, basis: list[Tensor], upper: Tensor) -> Leading:
        """Choose the converged triples of a bidiagonalization."""
        r = upper.shape[1]
        inner = upper[..., :r]
        squares, W = torch.linalg.eigh(inner.mT @ inner)
        values = squares.clamp_min(0).sqrt()
        left = inner @ W / values.clamp_min(torch.finfo(values.dtype).tiny).unsqueeze(1)
        residual = torch.linalg.vector_norm(upper[..., r:].mT @ left, dim=1)  # (P, r)
        largest = values.amax(-1, keepdim=True)
        kept = (values > 10 * _NOISE * largest) & (residual <= _CONVERGED * values)
        vectors = [V @ W[p][:, kept[p]].to(V.dtype) for p, V in enumerate(basis)]
        values = torch.where(kept, values, 0)
        rest, unsure = self._rest(values, vectors, kept)
        level = torch.where(kept, values, math.inf).amin(-1, keepdim=True) / 2
        each = values * residual.square() / (2 * level * (values + level))
        return Leading(
            values=values,
            vectors=vectors,
            rest=rest,
            unsure=unsure,
            number=self.blocks.small_sizes() - kept.sum(-1),
            excess=torch.where(kept, each, 0).sum(-1),
        )

    def _rest(self, values: Tensor, vectors: list[Tensor], kept: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the energy outside of the span of the vectors, and its error, (P) each."""
        blocks, count = self.blocks, 8
        Z = torch.zeros(
            blocks.horizon, len(vectors), count, dtype=torch.float64, device=blocks.device
        )
        leading = values.new_zeros(len(vectors))
        others = values.square().sum(-1)
        for p, V in enumerate(vectors):
            order = values[p][kept[p]].argsort(descending=True)[:count]
            exact = torch.linalg.qr(V[:, order].double())[0]
            Z[blocks.small(p), p, : exact.shape[1]] = exact
            others[p] -= values[p][kept[p]][order].square().sum()
        leading = blocks.to_large(Z).square().sum((0, 2))
        others = others.clamp_min(0)
        rest = (self.energies - leading - others).clamp_min(0)
        return rest, 1e-6 * others + 1e-12 * self.energies

    # Random vectors

    def result(self) -> Tensor:
        """Return the estimates and the errors, (2, P), float64."""
        count = len(self.positions)
        samples: list[list[Sample]] = [[] for _ in range(count)]
        active, width, steps = list(range(count)), _BREADTH // 2, None
        for _ in range(_ROUNDS):
            self.blocks.choose([self.positions[p] for p in active])
            for p, sample in zip(active, self._sample(active, width, steps), strict=True):
                samples[p].append(sample)
            steps = samples[0][0].rules[0].nodes.shape[-1] // 2
            sizes, errors, scatter = self._combined(samples)
            limit = self.tolerance * sizes
            active = [p for p in range(count) if errors[p] > limit[p]]
            # More vectors reduce only the scatter.
            room = (limit - (errors - scatter)).clamp_min(limit / 4)
            drawn = torch.tensor([float(sum(len(x.mass) for x in s)) for s in samples])
            more = (drawn * ((scatter.cpu() / room.cpu()).square() - 1)).ceil()
            active = [p for p in active if more[p] > 0]
            if not active:
                break
            width = int(more[active].max().clamp(4, _BREADTH))
        return torch.stack([sizes, errors])

    def _sample(self, some: list[int], width: int, steps: int | None = None) -> list[Sample]:
        """Draw random vectors at some positions, and compute quadratures from each of them.

        By default there are as many steps as the quadratures need.
        """
        blocks, vectors = self.blocks, [[self.leading.vectors[p]] for p in some]
        Z = self._signs(width) * blocks.small_mask()
        self._project(Z, vectors)
        self._project(Z, vectors)
        mass = Z.square().sum(0, dtype=torch.float64)  # (P, N)
        Z, _ = _normalized(Z)
        diagonal, beside = [], []
        Y = None
        for step in range(steps or _STEPS[-1]):
            further = blocks.to_large(Z)
            Y = further if Y is None else further - Y * beside[-1].to(Y.dtype)
            Y, length = _normalized(Y)
            diagonal.append(length)
            W = blocks.to_small(Y) - Z * length.to(Z.dtype)
            self._project(W, vectors)
            Z, length = _normalized(W)
            # Products amplify what rounding leaves along leading vectors, so it is removed again.
            self._project(Z, vectors)
            beside.append(length)
            if step + 1 == steps:
                rule = quadratures(mass, torch.stack(diagonal, -1), torch.stack(beside, -1))
                return [Sample(m, (one,)) for m, one in zip(mass, rule, strict=True)]
            if step + 1 in _STEPS:
                D, E = torch.stack(diagonal, -1), torch.stack(beside, -1)
                counts = [(step + 1) // 4, (step + 1) // 2, step + 1]
                found = [quadratures(mass, D[..., :k], E[..., :k]) for k in counts]
                parts = [
                    Sample(m, each) for m, each in zip(mass, zip(*found, strict=True), strict=True)
                ]
                if self._resolved(some, parts):
                    break
        return parts

    def _resolved(self, some: list[int], samples: list[Sample]) -> bool:
        """Return whether the quadratures contribute little to the error at all positions."""
        for p, sample in zip(some, samples, strict=True):
            tail = Tail(self.leading, p, [sample])
            if tail.quadrature > _SHARE * self.tolerance:
                return False
        return True

    def _combined(self, samples: list[list[Sample]]) -> tuple[Tensor, Tensor, Tensor]:
        """Return estimates, errors, and the part of the errors that is scatter, (P) each."""
        tails = [Tail(self.leading, p, each) for p, each in enumerate(samples)]
        freedom = torch.tensor([tail.count - 1 for tail in tails], dtype=torch.float64)
        expected = torch.stack([tail.expected for tail in tails]).cpu()
        observed = torch.stack([tail.observed for tail in tails]).cpu()
        ratio = torch.where(expected > 0, observed / expected.clamp_min(1e-300), 0)
        common = (freedom * ratio).sum() / freedom.sum()
        ratio = (_PRIOR * common + freedom * ratio) / (_PRIOR + freedom)
        scatter = 2 * (expected * ratio / (freedom + 1)).sqrt()
        sizes = torch.stack([tail.size for tail in tails]).cpu()
        others = torch.stack([tail.quadrature + tail.systematic for tail in tails]).cpu()
        device = self.blocks.device
        return (
            sizes.to(device),
            ((scatter + others) * sizes).to(device),
            (scatter * sizes).to(device),
        )


def _normalized(Z: Tensor) -> tuple[Tensor, Tensor]:
    """Divide vectors (L, P, N) by their lengths, and return these, (P, N), float64."""
    length = torch.linalg.vector_norm(Z, dim=0)
    scale = torch.where(length > 0, 1 / length.clamp_min(torch.finfo(Z.dtype).tiny), 0)
    return Z * scale, length.double()


def _times(Z: Tensor, matrix: Tensor) -> Tensor:
    """Multiply the vectors Z (L, P, N) of each position by a matrix (P, N, M)."""
    return (Z.transpose(0, 1) @ matrix.to(Z.dtype)).transpose(0, 1)


def _orthonormal(Z: Tensor, floor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return vectors O (L, P, N) and F (P, N, N), float64, with Z = O F.

    The vectors O are orthonormal or zero (Stathopoulos and Wu 2002). Directions along which Z is
    not longer than `floor`, (P), are left out.
    """
    factor = torch.eye(Z.shape[-1], dtype=torch.float64, device=Z.device).expand(Z.shape[1], -1, -1)
    for repeat in range(4):
        by_position = Z.permute(1, 2, 0)
        gram = (by_position @ by_position.mT).double()
        squares, vectors = torch.linalg.eigh(gram)
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
        Z = _times(Z, change)
        factor = torch.where(there.unsqueeze(-1), vectors.mT * scale.unsqueeze(-1), 0) @ factor
        if done:
            break
    return Z.contiguous(), factor
