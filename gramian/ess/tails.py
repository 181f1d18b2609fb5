r"""Sums over the singular values that are not deflated, from quadratures.

Where many values are near 0, the rules of Gauss and of Gauss and Radau converge slowly, from both
sides. So the mean of both is extrapolated.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from gramian.ess.measures import size_from_sums, size_with, spectral_sums

__all__ = ["Leading", "Rule", "Sample", "Tail", "quadratures"]

_UNSURE = 0.01
"""The energy of the other values serves if its relative error is at most this."""


@dataclasses.dataclass
class Leading:
    """The leading singular values of every block, and what is left.

    Attributes:
        values: (P, r), float64, in any order. Zeros stand where a position has fewer.
        vectors: The singular vectors on the small sides, (r, n) for each position.
        rest: (P), float64: the energy of all other values.
        unsure: (P), float64: the error of `rest`.
        number: (P), float64: the number of all other values.
        excess: (P), float64: about how much the sum of all values is too large, because the space
            of the vectors is not exactly invariant.
    """

    values: Tensor
    vectors: list[Tensor]
    rest: Tensor
    unsure: Tensor
    number: Tensor
    excess: Tensor


@dataclasses.dataclass
class Rule:
    """Quadratures for N random vectors at a position, in float64.

    Attributes:
        nodes: (N, 2k + 1): the nodes as singular values, first k of Gauss's rule, then k + 1 of the
            rule of Gauss and Radau with a node at 0.
        weights: (N, 2k + 1): half the weights of both rules.
    """

    nodes: Tensor
    weights: Tensor

    def integrals(self, function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Integrate a function: the means of both rules, and half their differences, (N) each."""
        each = self.weights * function(self.nodes)
        k = each.shape[-1] // 2
        gauss, fixed = each[:, :k].sum(-1), each[:, k:].sum(-1)
        return gauss + fixed, gauss - fixed


@dataclasses.dataclass
class Sample:
    """What N random vectors show at a position.

    Attributes:
        mass: (N), float64: the squared lengths of the vectors.
        rules: the quadratures after a quarter, a half and all of the steps; or those after a
            quarter of the steps only.
    """

    mass: Tensor
    rules: tuple[Rule, ...]


class Tail:
    """The contribution of all values that are not deflated, and the size of the block.

    Args:
        leading: The leading values.
        p: The number of the position.
        samples: The samples at this position.

    Attributes:
        size: The estimate.
        count: The number of random vectors.
        expected: The square of the relative scatter of one vector that the spectrum implies.
        observed: The same, from the scatter of the vectors.
        corrections: By how much the two extrapolations of the quadratures change the estimate, (2),
            relative.
        quadrature: The relative error of the quadratures.
        systematic: The relative error that the deflated space and the energy leave.
    """

    def __init__(self, leading: Leading, p: int, samples: list[Sample]) -> None:
        self.samples = samples
        self.mass = torch.cat([sample.mass for sample in samples])
        self.count = len(self.mass)
        number, rest = leading.number[p], leading.rest[p]
        first = samples[0]  # has the nodes of all steps
        sigma, weight = first.rules[-1].nodes.flatten(), first.rules[-1].weights.flatten()
        weight = weight * number / first.mass.sum()  # a density of the spectrum
        level = sigma.amax().clamp_min(torch.finfo(sigma.dtype).tiny)
        energy = self._integrals(torch.square)[0]
        if leading.unsure[p] > _UNSURE * energy.mean():
            energy = torch.zeros_like(energy)  # the energy that is known is no better than this one
        basis = torch.stack([torch.ones_like(sigma), (sigma / level).square()])
        basis[1] *= bool(energy.any())
        controls = torch.stack([self.mass, energy / level.square()])
        known = torch.stack([number, rest / level.square()]).unsqueeze(-1)
        gram = (basis * weight) @ basis.mT

        def controlled(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
            """Return the estimate of a sum by every vector, (count), the last two corrections of
            the quadratures, (2), the deviations of the change, and the coefficients of the two sums
            that are known, (2).
            """
            moments = ((basis * weight) @ function(sigma)).unsqueeze(-1)
            factors = torch.linalg.lstsq(gram, moments, driver="gelsd").solution.squeeze(-1)
            each, corrections, changes = self._integrals(function)
            return each - factors @ (controls - known), corrections, changes, factors

        totals, total_corrections, total_changes, total_factors = controlled(lambda x: x)
        logs, log_corrections, log_changes, log_factors = controlled(lambda x: torch.xlogy(x, x))
        values = leading.values[p]
        S, Q = spectral_sums(values)
        spread = ((rest + leading.unsure[p]) / number.clamp_min(1)).sqrt()
        high = size_with(S, Q, spread, number) if bool((values > 0).any()) else number
        S, Q = S + totals.mean().clamp_min(0), Q + logs.mean()
        size = size_from_sums(S, Q)
        slope, log_slope = 1 / S + Q / S.square(), -1 / S  # of the logarithm of the size
        influence = slope * sigma + log_slope * torch.xlogy(sigma, sigma)
        factors = slope * total_factors + log_slope * log_factors
        self.expected = 2 * (weight * (influence - factors @ basis).square()).sum()
        self.observed = (slope * totals + log_slope * logs).var()
        self.corrections = slope * total_corrections + log_slope * log_corrections
        one, other = self.corrections.tolist()
        changes = slope * total_changes + log_slope * log_changes
        self.quadrature = 0.25 * abs(one + other) + 2 * abs(other)
        self.quadrature += 2 * float(changes.std()) / math.sqrt(len(changes))
        self.systematic = factors[1].abs() * leading.unsure[p] / level.square()
        if bool((values > 0).any()):
            last = values[values > 0].amin()
            excess = (slope + log_slope * last.log()).clamp_min(0) * leading.excess[p]
            size, self.systematic = size * (-excess).exp(), self.systematic + excess
        self.size = torch.minimum(size, high)

    def _integrals(self, function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Integrate a function for every vector, (count), and extrapolate.

        Only the vectors of the first sample have all quadratures. What further steps change differs
        little from vector to vector, so the mean change of these vectors is added to all. The mean
        of both rules, as a function of their difference, is extrapolated to the difference 0, first
        linearly from the last two quadratures, and then quadratically from all three.

        Returns:
            The integrals, (count), the two corrections that they contain, (2), and the deviations
            of the change from its mean, for the vectors of the first sample.
        """
        found = [rule.integrals(function) for rule in self.samples[0].rules]
        means, gaps = [mean for mean, _ in found], [gap.mean() for _, gap in found]

        def towards_zero(values: tuple[Tensor, Tensor], at: tuple[Tensor, Tensor]) -> Tensor:
            """Return by how much the line through two points is above the second at 0."""
            step = at[0] - at[1]
            share = torch.where(step / at[0] > 0.1, at[1] / step, 0)
            return share.nan_to_num(0.0, 0.0, 0.0) * (values[1] - values[0])

        a, b, c = (mean.mean() for mean in means)
        half = b + towards_zero((a, b), (gaps[0], gaps[1]))
        first = towards_zero((b, c), (gaps[1], gaps[2]))
        second = towards_zero((half, c + first), (gaps[0], gaps[2]))
        each = torch.cat([sample.rules[0].integrals(function)[0] for sample in self.samples])
        further = means[2] - means[0]
        return (
            each + further.mean() + first + second,
            torch.stack([first, second]),
            further - further.mean(),
        )


def quadratures(mass: Tensor, diagonal: Tensor, beside: Tensor) -> list[Rule]:
    """Return the quadratures at every position for bidiagonal matrices.

    Args:
        mass: (P, N): the sums of the weights.
        diagonal: (P, N, k).
        beside: (P, N, k): above the diagonal. The last entry is that of a further column.
    """
    k = diagonal.shape[-1]
    upper = torch.diag_embed(diagonal) + torch.diag_embed(beside[..., :-1], offset=1)
    last = torch.nn.functional.pad(beside[..., -1:], (k - 1, 0)).unsqueeze(-1)
    nodes, weights = [], []
    for matrix in (upper, torch.cat([upper, last], -1)):
        squares, vectors = torch.linalg.eigh(matrix.mT @ matrix)
        nodes.append(squares.clamp_min(0).sqrt())
        weights.append(mass.unsqueeze(-1) * vectors[..., 0, :].square() / 2)
    rules = zip(torch.cat(nodes, -1), torch.cat(weights, -1), strict=True)
    return [Rule(*rule) for rule in rules]
