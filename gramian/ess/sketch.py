r"""Randomized estimates of entropy-ESS for blocks that are too large to decompose.

A subspace iteration from a random start (Halko, Martinsson and Tropp 2011) gives the leading r
singular values. Of all other values, only the sums `Σ σ` and `Σ σ log σ` are needed. These are
traces of functions of the part of the block outside the subspace. Stochastic Lanczos quadrature
(Ubaru, Chen and Saad 2017) estimates both from a few random vectors, and the scatter of these
estimates gives the error. The energy of the other values is known exactly. It bounds the entropy.
The entropy is smallest if the energy is in as few values as the last known value allows, and
largest if the energy is spread evenly.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gramian.ess.measures import Measure, size_from_sums, size_with, spectral_sums
from gramian.ops.threads import work

__all__ = ["sketched_sizes"]

_STEPS = 40
"""The number of Lanczos steps, which is the number of nodes of a quadrature."""


def sketched_sizes(
    T: Tensor,
    positions: list[int],
    rank: int,
    probes: int,
    iterations: int,
    seed: int,
    floor: Tensor,
) -> tuple[Tensor, Tensor]:
    """Estimate the entropy-ESS and twice its standard error, (G, P) each, float64.

    Args:
        T: Lower-triangular matrices (G, L, L).
        positions: Positions in 1 … L - 1.
        rank: The number of leading singular values to compute.
        probes: The number of random vectors for the other values, at least 2.
        iterations: The number of subspace iterations.
        seed: The seed of the random vectors.
        floor: (G), float64: the norms up to which a block counts as zero.
    """
    sizes = torch.zeros(2, len(T), len(positions), dtype=torch.float64, device=T.device)

    def run(task: tuple[int, int]) -> None:
        g, k = task
        i = positions[k]
        block = T[g, i:, :i].double()
        if min(block.shape) <= 2 * rank:
            sizes[0, g, k] = Measure()(torch.linalg.svdvals(block), floor[g])
            return
        block = block if block.shape[0] >= block.shape[1] else block.mT
        generator = torch.Generator().manual_seed(seed)
        shape = (block.shape[1], rank + probes)
        start = torch.randn(shape, dtype=torch.float64, generator=generator).to(T.device)
        if bool(torch.linalg.matrix_norm(block) > floor[g]):
            sizes[:, g, k] = _sketched(block, start[:, :rank], start[:, rank:].sign(), iterations)

    work(run, [(g, k) for g in range(len(T)) for k in range(len(positions))], T)
    return sizes[0], sizes[1]


def _sketched(block: Tensor, start: Tensor, probes: Tensor, iterations: int) -> Tensor:
    """Estimate the entropy-ESS of a block (m, k), m ≥ k, and twice its standard error: (2)."""
    basis = torch.linalg.qr(block @ start)[0]
    for _ in range(iterations):
        basis = torch.linalg.qr(block @ torch.linalg.qr(block.mT @ basis)[0])[0]
    values = torch.linalg.svdvals(basis.mT @ block)
    energy = (block.square().sum() - values.square().sum()).clamp_min(0)
    others = block.shape[1] - len(values)
    if float(energy) <= len(block) * torch.finfo(values.dtype).eps * float(values.square().sum()):
        return torch.stack([size_from_sums(*spectral_sums(values)), torch.zeros_like(energy)])

    def rest(x: Tensor) -> Tensor:
        y = block @ x
        return block.mT @ (y - basis @ (basis.mT @ y))

    nodes, weights = _quadrature(rest, probes)
    sigma = nodes.clamp_min(0).sqrt()
    total = (weights * sigma).sum(-1)  # (probes): estimates of Σ σ and Σ σ log σ of the others
    logs = (weights * torch.xlogy(sigma, sigma)).sum(-1)
    S, Q = spectral_sums(values)
    low = size_with(S, Q, *_concentrated(values[-1], energy))
    high = size_with(S, Q, (energy / others).sqrt(), values.new_tensor(float(others)))
    S, Q = S + total.mean(), Q + logs.mean()
    size = size_from_sums(S, Q)
    # This is the standard error to first order in the two sums.
    scatter = size * ((1 / S + Q / S.square()) * total - logs / S)
    error = 2 * scatter.std() / math.sqrt(probes.shape[1])
    return torch.stack([torch.minimum(torch.maximum(size, low), high), error])


def _quadrature(apply: Callable[[Tensor], Tensor], start: Tensor) -> tuple[Tensor, Tensor]:
    """Compute nodes and weights (s, steps) of `Σ_j w_j f(θ_j) ≈ zᵀ f(M) z` by Lanczos.

    The vectors z are the columns of `start` (k, s). The function `apply` multiplies by the
    symmetric matrix M. The Lanczos vectors are orthogonalized.
    """
    norm = torch.linalg.vector_norm(start, dim=0)
    steps = min(_STEPS, len(start))
    vectors = [start / norm]
    diagonal, beside = [], []
    for step in range(steps):
        w = apply(vectors[-1])
        diagonal.append((vectors[-1] * w).sum(0))
        known = torch.stack(vectors)  # (steps so far, k, s)
        for _ in range(2):
            w = w - (known * (known * w).sum(1, keepdim=True)).sum(0)
        length = torch.linalg.vector_norm(w, dim=0)
        if step + 1 == steps:
            break
        beside.append(length)
        vectors.append(w / length.clamp_min(torch.finfo(w.dtype).tiny))
    matrix = torch.diag_embed(torch.stack(diagonal, -1))
    if beside:
        off = torch.diag_embed(torch.stack(beside, -1), offset=1)
        matrix = matrix + off + off.mT
    nodes, rotations = torch.linalg.eigh(matrix)
    return nodes, rotations[:, 0].square() * norm.square().unsqueeze(-1)


def _concentrated(largest: Tensor, energy: Tensor) -> tuple[Tensor, Tensor]:
    """Put the energy into the fewest equal values, at most `largest`. Return value and number."""
    count = energy / largest.square().clamp_min(torch.finfo(energy.dtype).tiny)
    return torch.where(count >= 1, largest, energy.sqrt()), count.clamp_min(1)
