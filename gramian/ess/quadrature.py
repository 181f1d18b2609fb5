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

from gramian.ess.krylov import NOISE, krylov_space, random_signs
from gramian.ess.measures import Measure
from gramian.ess.rows import Blocks
from gramian.ess.tails import Leading, Sample, Tail, quadratures

__all__ = ["BREADTH", "Estimate", "estimate_sizes", "measure_small"]

_EXACT = 320
"""A block whose smaller side is at most this is decomposed."""

BREADTH = 16
"""The number of vectors in a block of the Krylov space, and of random vectors in a round."""

_DEPTH = 6
"""The number of blocks of the Krylov space."""

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
    blocks = Blocks(rows, horizon, positions, device, memory)
    sizes, large, energies = measure_small(blocks, _EXACT)
    result = torch.stack([sizes, torch.zeros_like(sizes)])
    generator = torch.Generator().manual_seed(seed)
    for some in blocks.groups(large, BREADTH):
        blocks.choose([positions[p] for p in some])
        result[:, some] = Estimate(blocks, energies[some], tolerance, generator).result()
    return result[0], result[1]


def measure_small(blocks: Blocks, side: int) -> tuple[Tensor, list[int], Tensor]:
    """Measure the blocks of which one side is small, and those that are zero up to rounding.

    The operator is scaled if single precision cannot hold the squares of its entries.

    Args:
        blocks: The blocks.
        side: The largest size of the smaller side.

    Returns:
        The sizes, (P), float64, which are 0 for all other blocks; the numbers of these; and the
        energies of all blocks, (P), float64.
    """
    sizes = torch.zeros(len(blocks.positions), dtype=torch.float64, device=blocks.device)
    if not blocks.positions:
        return sizes, [], sizes
    energies, total = blocks.energies()
    if not _LEAST < float(total) < 1 / _LEAST:
        blocks.normalize()
        energies, total = blocks.energies()
    there = energies.sqrt() > torch.finfo(torch.float32).eps * total.sqrt()
    floor = sizes.new_zeros(())
    large = []
    for p, i in enumerate(blocks.positions):
        if not there[p]:
            continue
        if min(i, blocks.horizon - i) <= side:
            sizes[p] = _measured(blocks.matrix(p), floor)
        else:
            large.append(p)
    return sizes, large, energies


def _measured(block: Tensor, floor: Tensor) -> Tensor:
    """Measure a block (m, k), m ≥ k, from its Gram matrix, or by SVD where necessary."""
    eigenvalues = torch.linalg.eigvalsh(block.mT @ block)
    count = torch.tensor(len(eigenvalues), device=block.device)
    if bool(Measure().unsafe_from_gram(eigenvalues, count, 9e-7)):
        return Measure()(torch.linalg.svdvals(block), floor)
    return Measure()(eigenvalues.clamp_min(0).sqrt(), floor)


class Estimate:
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
        self.leading = self._deflated()

    # Leading singular triples

    def _deflated(self) -> Leading:
        """Choose the converged triples of a block Krylov space."""
        blocks = self.blocks
        signs = random_signs(blocks, BREADTH, self.generator, large=True)
        space = krylov_space(blocks, blocks.to_small(signs), _DEPTH)
        values, W, residual = space.triples()
        largest = values.amax(-1, keepdim=True)
        kept = (values > 10 * NOISE * largest) & (residual <= _CONVERGED * values)
        vectors = [W[p][:, kept[p]].mT.to(V.dtype) @ V for p, V in enumerate(space.basis)]
        values = torch.where(kept, values, 0)
        rest, unsure = self._rest(values, vectors, kept)
        level = torch.where(kept, values, math.inf).amin(-1, keepdim=True) / 2
        each = values * residual.square() / (2 * level * (values + level))
        return Leading(
            values=values,
            vectors=vectors,
            rest=rest,
            unsure=unsure,
            number=blocks.small_sizes() - kept.sum(-1),
            excess=torch.where(kept, each, 0).sum(-1),
        )

    def _rest(self, values: Tensor, vectors: list[Tensor], kept: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the energy outside of the span of the vectors, and its error, (P) each."""
        blocks, count = self.blocks, 8
        shape = (len(vectors), count, blocks.horizon)
        Z = torch.zeros(shape, dtype=torch.float64, device=blocks.device)
        leading = values.new_zeros(len(vectors))
        others = values.square().sum(-1)
        for p, V in enumerate(vectors):
            order = values[p][kept[p]].argsort(descending=True)[:count]
            exact = torch.linalg.qr(V[order].mT.double())[0].mT
            Z[p, : len(exact), blocks.small(p)] = exact
            others[p] -= values[p][kept[p]][order].square().sum()
        leading = blocks.to_large(Z).square().sum((1, 2))
        others = others.clamp_min(0)
        rest = (self.energies - leading - others).clamp_min(0)
        return rest, 1e-6 * others + 1e-9 * self.energies

    # Random vectors

    def result(self) -> Tensor:
        """Return the estimates and the errors, (2, P), float64."""
        count = len(self.positions)
        samples: list[list[Sample]] = [[] for _ in range(count)]
        active, width, steps = list(range(count)), BREADTH // 2, None
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
            width = int(more[active].max().clamp(4, BREADTH))
        return torch.stack([sizes, errors])

    def tails(self, width: int) -> list[Tail]:
        """Estimate the sizes of all positions from a number of random vectors each."""
        samples = self._sample(list(range(len(self.positions))), width)
        return [Tail(self.leading, p, [sample]) for p, sample in enumerate(samples)]

    def _sample(self, some: list[int], width: int, steps: int | None = None) -> list[Sample]:
        """Draw random vectors at some positions, and compute quadratures from each of them.

        By default there are as many steps as the quadratures need.
        """
        blocks, vectors = self.blocks, [self.leading.vectors[p] for p in some]
        Z = random_signs(blocks, width, self.generator)
        blocks.project(Z, vectors)
        blocks.project(Z, vectors)
        mass = Z.square().sum(-1, dtype=torch.float64)  # (P, N)
        Z, _ = _normalized(Z)
        diagonal, beside = [], []
        Y = None
        for step in range(steps or _STEPS[-1]):
            further = blocks.to_large(Z)
            Y = further if Y is None else further - Y * beside[-1].to(Y.dtype).unsqueeze(-1)
            Y, length = _normalized(Y)
            diagonal.append(length)
            W = blocks.to_small(Y) - Z * length.to(Z.dtype).unsqueeze(-1)
            blocks.project(W, vectors)
            Z, length = _normalized(W)
            # Products amplify what rounding leaves along leading vectors, so it is removed again.
            blocks.project(Z, vectors)
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
    """Divide vectors (P, N, L) by their lengths, and return these, (P, N), float64."""
    length = torch.linalg.vector_norm(Z, dim=-1)
    scale = torch.where(length > 0, 1 / length.clamp_min(torch.finfo(Z.dtype).tiny), 0)
    return Z * scale.unsqueeze(-1), length.double()
