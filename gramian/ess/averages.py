r"""The mean entropy-ESS over positions and channels, from cheap estimates and a sample.

An estimate from few products is biased, but the bias is much alike in all blocks. So every block
gets a rough estimate, and some that are chosen at random get an accurate one. The regression of
accurate on rough estimates corrects all blocks (two-phase sampling; Cochran, *Sampling Techniques*,
1977, chapters 7 and 12). The mean of the corrected estimates is free of the bias whatever the rough
estimates are worth, and the scatter of the sample around the regression gives its standard error.

A rough estimate comes from one block Krylov space of random signs. Its converged triples count
themselves. The others are the nodes of two quadratures for the remaining values, of Gauss and of
Gauss and Radau (Golub and Meurant 2010), whose weights are corrected to the known number and energy
of these values. The estimate is the mean of both rules. The variables of the regression are their
ratio, its square, and the ratio of an estimate to what its neighbours suggest.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gramian.ess._student import student_quantile
from gramian.ess.krylov import NOISE, KrylovSpace, krylov_space, random_signs
from gramian.ess.measures import size_from_sums
from gramian.ess.quadrature import BREADTH, Estimate, measure_small
from gramian.ess.rows import Blocks
from gramian.ops.threads import work

__all__ = ["Average", "Channel", "average"]

_EXACT = 128
"""A block whose smaller side is at most this is decomposed."""

_BREADTH = 2
"""The number of vectors in a block of the Krylov space of a rough estimate."""

_DEPTH = 24
"""The number of blocks of this space."""

_CONVERGED = 0.1
"""A triple counts itself if its residual is at most this, relative to its value."""

_VECTORS = 3
"""The number of random vectors of an accurate estimate."""

_SAMPLE = 64
"""The size of the first sample, over all channels."""

_LEAST = 2
"""The least number of blocks of a channel in the first sample."""

_FEW = 12
"""With at most this many blocks in a sample, all rough estimates are corrected by one factor."""

_NEAR = 2
"""The number of positions on either side that a rough estimate is compared with."""

_ROUNDS = 3
"""The largest number of samples."""

_UNSURE = 0.1
"""The share of the extrapolation of the quadratures that counts as their error, beside all of its
last step. For 35 blocks of attention maps this covered the mean error of the quadratures."""


@dataclasses.dataclass
class Average:
    """Sizes of the blocks of all channels at all positions, and the error of their mean.

    Attributes:
        sizes: (C, P), float64.
        errors: (C, P), float64: the errors of the single sizes, 0 where they are exact.
        error: The error of the mean of all sizes.
        accurate: The number of accurate estimates.
    """

    sizes: Tensor
    errors: Tensor
    error: float
    accurate: int


class Channel:
    """The sizes of the blocks of one channel.

    Args:
        rows: The rows of the channel, as in `RowOperator`.
        horizon: The position at which the blocks end.
        positions: Positions in 1 … horizon - 1, ascending, without repetitions.
        tolerance: The relative error of the mean to reach.
        seed: The seed of the random vectors and of the sample.
        memory: The largest number of bytes of rows to keep.
        device: The device of the rows.
        sample: The number of accurate estimates, or None for one at every position. Then there
            are no rough ones.

    Attributes:
        sizes: (P), float64: exact sizes, and rough ones at the positions `large`.
        large: The numbers of the positions of rough estimates.
        ratios: (len(large)), float64: the logarithms of the ratios of Gauss's rule to the other.
        found: For the number of a position in `large`, the accurate size, the square of its
            standard error, its two corrections, and its systematic error, (5), float64.
    """

    def __init__(
        self,
        rows: Callable[[slice], Tensor],
        horizon: int,
        positions: list[int],
        tolerance: float,
        seed: int,
        memory: int,
        device: torch.device,
        sample: int | None,
    ) -> None:
        self._blocks = blocks = Blocks(rows, horizon, positions, device, memory)
        self._positions, self._tolerance = positions, tolerance
        self._generator = torch.Generator().manual_seed(seed)
        self.found: dict[int, Tensor] = {}
        self.sizes, self.large, self._energies = measure_small(blocks, _EXACT)
        self.ratios = self.sizes.new_zeros(len(self.large))
        rough = range(len(self.large)) if sample is not None else range(0)
        for group in blocks.groups(rough, _BREADTH):
            numbers = self._take(group)
            signs = random_signs(blocks, _BREADTH, self._generator)
            space = krylov_space(blocks, signs, _DEPTH)
            both = _rough(space, blocks, self._energies[numbers])
            self.sizes[numbers], self.ratios[group] = both
        self.extend(len(self.large) if sample is None else sample)

    def extend(self, count: int) -> None:
        """Add accurate estimates, at most `count`, and let go of the rows."""
        for group in self._blocks.groups(self._choose(count), BREADTH):
            numbers = self._take(group)
            energies = self._energies[numbers]
            estimate = Estimate(self._blocks, energies, self._tolerance, self._generator)
            for k, tail in zip(group, estimate.tails(_VECTORS), strict=True):
                variance = torch.maximum(tail.expected, tail.observed) / tail.count
                parts = [tail.size, variance, *tail.corrections, tail.systematic]
                self.found[k] = torch.stack([torch.as_tensor(part) for part in parts])
        self._blocks.forget()

    def _take(self, group: list[int]) -> list[int]:
        """Choose positions, given as places in `large`, and return their numbers."""
        numbers = [self.large[k] for k in group]
        self._blocks.choose([self._positions[p] for p in numbers])
        return numbers

    def _choose(self, count: int) -> list[int]:
        """Choose blocks at random, one from each of `count` stretches of those that are left."""
        left = [k for k in range(len(self.large)) if k not in self.found]
        if count >= len(left):
            return left
        bounds = [len(left) * k // count for k in range(count + 1)]
        draws = torch.rand(count, generator=self._generator).tolist()
        pairs = zip(bounds[:-1], bounds[1:], draws, strict=True)
        return [left[a + int((b - a) * draw)] for a, b, draw in pairs]


def _rough(space: KrylovSpace, blocks: Blocks, energies: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate sizes from a Krylov space of random signs.

    Returns:
        The estimates and the logarithms of the ratios of both rules, (P) each.
    """
    values, W, residual = space.triples()
    b = space.start.shape[-1]
    largest = values.amax(-1, keepdim=True)
    kept = (values > 10 * NOISE * largest) & (residual <= _CONVERGED * values)
    leading = torch.where(kept, values, 0)
    number = (blocks.small_sizes() - kept.sum(-1)).clamp_min(0)
    rest = (energies - leading.square().sum(-1)).clamp_min(0)
    squares, X = torch.linalg.eigh(space.upper.mT @ space.upper)
    # The rule of Gauss and Radau has the same leading values, and b nodes at 0.
    fixed = torch.nn.functional.pad(kept, (b, 0))
    found = [
        _sums(values, _weights(space.start, W, b), kept, number, rest),
        _sums(squares.clamp_min(0).sqrt(), _weights(space.start, X, b), fixed, number, rest),
    ]
    known = leading.sum(-1), torch.xlogy(leading, leading).sum(-1)
    sums = [(known[0] + S, known[1] + Q) for S, Q in found]
    gauss, radau = (size_from_sums(S, Q) for S, Q in sums)
    mean = size_from_sums(*((one + other) / 2 for one, other in zip(*sums, strict=True)))
    return mean, (gauss / radau).log().nan_to_num(0.0, 0.0, 0.0)


def _weights(start: Tensor, vectors: Tensor, breadth: int) -> Tensor:
    """Return the weights of the nodes of a rule, the means over the random vectors, (P, K)."""
    return (start.mT @ vectors[:, :breadth]).square().mean(1)


def _sums(
    nodes: Tensor, weights: Tensor, kept: Tensor, number: Tensor, rest: Tensor
) -> tuple[Tensor, Tensor]:
    """Estimate `Σ σ` and `Σ σ log σ` of the values that do not count themselves, (P) each.

    The sums are linear combinations of the number and the energy of these values, which are known.
    The factors fit best at the nodes.

    Args:
        nodes: (P, K).
        weights: (P, K).
        kept: (P, K): the nodes that count themselves.
        number: (P): the number of all other values.
        rest: (P): their energy.
    """
    weights = torch.where(kept, 0, weights)
    tiny = torch.finfo(nodes.dtype).tiny
    level = torch.where(kept, 0, nodes).amax(-1, keepdim=True).clamp_min(tiny**0.25)
    basis = torch.stack([torch.ones_like(nodes), (nodes / level).square()], 1)
    weighted = basis * weights.unsqueeze(1)
    inverse = torch.linalg.pinv(weighted @ basis.mT, hermitian=True)
    known = torch.stack([number, rest / level.squeeze(-1).square()], -1)
    functions = torch.stack([nodes, torch.xlogy(nodes, nodes)], -1)
    S, Q = (known.unsqueeze(1) @ inverse @ (weighted @ functions)).squeeze(1).unbind(-1)
    return S.clamp_min(0), Q


def average(
    rows: Callable[[int, slice], Tensor],
    channels: int,
    horizon: int,
    positions: list[int],
    tolerance: float,
    seed: int,
    memory: int,
    device: torch.device,
) -> Average:
    """Estimate the sizes of all channels at all positions until the error of the mean is small.

    Args:
        rows: The rows of all channels, as in `RowOperator`.
        channels: The number C of channels.
        horizon: The position at which the blocks end.
        positions: Positions in 1 … horizon - 1, ascending, without repetitions.
        tolerance: The relative error of the mean to reach.
        seed: The seed of the random vectors and of the samples.
        memory: The largest number of bytes of rows of a channel to keep.
        device: The device of the rows.

    Raises:
        ValueError: if a value is NaN or infinite. The message names the channel.
    """
    total = channels * len(positions)
    wanted = min(_SAMPLE, math.ceil(total / 2))
    first = None if total <= 2 * _FEW else max(_LEAST, math.ceil(wanted / channels))

    def one(channel: int) -> Channel:
        own = partial(rows, channel)
        number = seed + (channel << 32)
        try:
            return Channel(own, horizon, positions, tolerance, number, memory, device, first)
        except ValueError as error:
            raise ValueError(f"channel {channel}: {error}") from error

    like = torch.empty(0, device=device)
    found = work(one, range(channels), like)
    regression = _Regression(found)
    for _ in range(_ROUNDS - 1):
        more = regression.missing(tolerance)
        if not more:
            break
        work(partial(Channel.extend, count=math.ceil(more / channels)), found, like)
        regression = _Regression(found)
    return regression.result()


class _Regression:
    """The regression of accurate on rough estimates over the blocks of all channels.

    Attributes:
        sizes: (K), float64: the corrected sizes of all blocks that are not exact.
        errors: (K), float64: their errors.
    """

    def __init__(self, channels: list[Channel]) -> None:
        self._channels = channels
        rough = torch.cat([one.sizes[one.large] for one in channels]).cpu()
        ratios = torch.cat([one.ratios for one in channels]).cpu()
        places = [(one, k) for one in channels for k in range(len(one.large))]
        sampled = torch.tensor([k in one.found for one, k in places], dtype=torch.bool)
        found = [one.found[k].cpu().double() for one, k in places if k in one.found]
        self.sizes, self.errors = rough, torch.zeros_like(rough)
        self._count, self._sampled = len(rough), len(found)
        self._variance = self._noise = self._systematic = 0.0
        self._quantile = 2.0
        if found:
            self._fit(rough, ratios, sampled, torch.stack(found))

    def _fit(self, rough: Tensor, ratios: Tensor, sampled: Tensor, found: Tensor) -> None:
        accurate, variances, first, second, left = found.unbind(1)
        self._noise = float((variances * accurate.square()).mean())
        # The quadratures err alike everywhere, so their error does not shrink in the mean.
        share = accurate / accurate.sum()
        both = (share * second).sum().abs() + _UNSURE * (share * (first + second)).sum().abs()
        self._systematic = float(both + (share * left).sum())
        if self._sampled < self._count:
            self._correct(rough, ratios, sampled, accurate)
        left = left + second.abs() + _UNSURE * (first + second).abs()
        self.sizes[sampled] = accurate
        self.errors[sampled] = accurate * (4 * variances + left.square()).sqrt()

    def _correct(self, rough: Tensor, ratios: Tensor, sampled: Tensor, accurate: Tensor) -> None:
        """Correct the rough sizes by the regression of the sample."""
        columns = [torch.ones_like(rough)]
        if self._sampled > _FEW:
            columns += [ratios, ratios.square(), self._beside(rough)]
        X = torch.stack(columns, 1)
        freedom = max(self._sampled - X.shape[1], 1)
        self._quantile = student_quantile(freedom)
        # With these weights the corrected sizes of the sample have the sum of the accurate ones.
        weights = rough[sampled].clamp_min(torch.finfo(rough.dtype).tiny).sqrt()
        left_side, right_side = X[sampled] * weights.unsqueeze(1), accurate / weights
        factors = torch.linalg.lstsq(left_side, right_side.unsqueeze(1), driver="gelsd").solution
        self.sizes = rough * (X @ factors).squeeze(1)
        differences = accurate - self.sizes[sampled]
        self._variance = float(differences.square().sum() / freedom)
        spread = float((differences / self.sizes[sampled]).square().sum() / freedom) ** 0.5
        self.errors = self.sizes * math.hypot(self._quantile * spread, self._systematic)

    def _beside(self, rough: Tensor) -> Tensor:
        """Compare rough sizes with straight lines through their neighbours.

        Returns:
            The logarithms of the ratios, (K). They are 0 where there are too few neighbours.
        """
        parts = []
        for sizes in rough.split([len(one.large) for one in self._channels]):
            logs = sizes.clamp_min(torch.finfo(sizes.dtype).tiny).log()
            lags = [lag for lag in range(-_NEAR, _NEAR + 1) if lag]
            found = torch.zeros_like(logs)
            if len(logs) > 2 * _NEAR:
                inner = slice(_NEAR, len(logs) - _NEAR)
                near = [logs[_NEAR + lag : len(logs) - _NEAR + lag] for lag in lags]
                found[inner] = torch.stack(near).mean(0) - logs[inner]
            parts.append(found)
        return torch.cat(parts)

    def _error(self) -> float:
        """Compute the error of the sum of all sizes."""
        if not self._sampled:
            return 0.0
        N, n = self._count, self._sampled
        variance = N * N * (1 / n - 1 / N) * self._variance + N * self._noise
        return math.hypot(
            self._quantile * variance**0.5, self._systematic * float(self.sizes.sum())
        )

    def missing(self, tolerance: float) -> int:
        """Return the number of further accurate estimates that the tolerance needs."""
        N, n = self._count, self._sampled
        exact = sum(float(one.sizes.sum() - one.sizes[one.large].sum()) for one in self._channels)
        total = float(self.sizes.sum())
        limit = tolerance * (total + exact)
        if n == N or self._error() <= limit:
            return 0
        # More estimates reduce only the variance, and not that of the last term below.
        room = max(limit**2 - (self._systematic * total) ** 2, limit**2 / 4)
        room = room / self._quantile**2 - N * self._noise
        if room <= 0 or self._variance == 0:
            return N - n
        return min(N, math.ceil(1 / (1 / N + room / (N * N * self._variance)))) - n

    def result(self) -> Average:
        """Return the sizes of all blocks, and the error of their mean."""
        sizes = torch.stack([one.sizes for one in self._channels])
        errors = torch.zeros_like(sizes)
        counts = [len(one.large) for one in self._channels]
        for c, (found, stated) in enumerate(
            zip(self.sizes.split(counts), self.errors.split(counts), strict=True)
        ):
            large = self._channels[c].large
            sizes[c, large] = found.to(sizes.device)
            errors[c, large] = stated.to(sizes.device)
        return Average(sizes, errors, self._error() / max(sizes.numel(), 1), self._sampled)
