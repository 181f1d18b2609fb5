r"""Modal interpolation by gradient descent, as in the Laughing Hyena Distillery.

The procedure is that of S. Massaroli et al., "Laughing Hyena Distillery: extracting compact
recurrences from convolutions", NeurIPS 2023 (arXiv 2310.18780), section 3.2. An adaptive method
optimizes poles in polar form, `λ = A e^{iθ}`, and residues r together. There are two objectives:

- `"l2"` is `Σ_{t<L} (h_t - ĥ_t)²`, the error over the taps.
- `"h2"` is `1/N Σ_k |H(z_k) - Ĥ(z_k)|²` on N ≥ 2 L roots of unity, the error of the transfer
  function, where h is followed by zeros. This objective includes the tail of ĥ.

One entry of a conjugate pair is learned, and an odd order ends with a real pole. ĥ_0 = h_0. Kernels
are first scaled to unit norm. The descent is that of `gramian.reduction.descent`, with gradients in
closed form. The result is the best set of parameters of the whole descent. There are two
initializations:

- `"ring"` draws radii and angles at random in a ring close to the unit circle, as for linear
  recurrent units (A. Orvieto et al., 2023, arXiv 2303.06349, section 3.2).
- `"even"` spaces angles evenly at one radius, as S4D-Lin does (A. Gu et al., 2022,
  arXiv 2206.11893).

The radii correspond to memories of a tenth of the taps and more. The method serves as a baseline:
balanced truncation is closer and faster by orders of magnitude.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gramian.ops.lengths import fft_length
from gramian.reduction.basis import Vandermonde
from gramian.reduction.descent import descended
from gramian.reduction.problem import Problem
from gramian.reduction.residues import ModalFit, measured

if TYPE_CHECKING:
    from gramian.reduction.methods import Gradient

__all__ = ["modal_interpolation"]

_LEAST_RADIUS = 1e-3


def modal_interpolation(
    problem: Problem, order: Tensor, rows: Tensor, options: Gradient
) -> ModalFit:
    """Fit the channels `rows` of a problem by gradient descent.

    Args:
        problem: The kernels and the settings.
        order: (len(rows)), integers: the order of every fit.
        rows: The indices of the channels.
        options: The options of the descent.
    """
    settings = problem.settings
    taps = problem.taps[rows]
    best = problem.silence(rows)
    size = taps.norm(dim=-1, keepdim=True)
    loud = torch.nonzero(size.flatten() > 0).flatten()
    if not len(loud):
        return best
    taps, size, order = taps[loud], size[loud], order[loud]
    unit = taps / size
    present, paired = _slots(order)
    parameters = _initial(order, present, paired, taps.shape[-1], options)
    objective = options.objective or ("h2" if settings.fades else "l2")
    loss = _FrequencyLoss(unit) if objective == "h2" else _TimeLoss(unit)
    ceiling = math.inf if settings.least_decay is None else math.exp(-settings.least_decay)
    parameters = descended(
        parameters,
        loss,
        options,
        moving=torch.stack([present, paired, present, paired]).double(),
        confine=lambda all_: all_[0].clamp_(_LEAST_RADIUS, ceiling),
        tick=lambda part: settings.tick(part * len(rows)),
    )
    radius, angle, a, b = parameters
    poles = torch.where(present, torch.polar(radius, angle), 0)
    poles = torch.where(paired, poles, poles.real.to(poles.dtype))
    # A pole below the real axis is replaced by its conjugate, with the conjugate residue.
    residues = torch.where(present, torch.complex(a, b) * size, 0)
    below = poles.imag < 0
    poles, residues = (torch.where(below, x.conj(), x) for x in (poles, residues))
    problem.keep(best, measured(taps, poles, residues, settings.dtype), loud)
    return best


def _slots(order: Tensor) -> tuple[Tensor, Tensor]:
    """Return masks (B, m) of the entries in use, and of the entries that stand for a pair."""
    slot = torch.arange(int(order.max() + 1) // 2, device=order.device)
    order = order.unsqueeze(-1)
    return 2 * slot < order, 2 * slot + 1 < order


def _initial(
    order: Tensor, present: Tensor, paired: Tensor, length: int, options: Gradient
) -> Tensor:
    """Return initial radii, angles, real and imaginary parts of residues, (4, B, m)."""
    generator = torch.Generator().manual_seed(options.seed)
    modes = present.shape[-1]
    # Every channel starts from the same numbers, so that its result does not depend on the others.
    draws = torch.rand(3, modes, generator=generator, dtype=torch.float64).to(order.device)
    noise = torch.randn(2, modes, generator=generator, dtype=torch.float64).to(order.device)
    inner = math.exp(-10 / length)
    if options.initialization == "ring":
        radius = (inner**2 + draws[0] * (1 - inner**2)).sqrt()
        angle = math.pi * draws[1]
        radius, angle = radius.expand(present.shape), angle.expand(present.shape)
    else:
        slot = torch.arange(modes, device=order.device)
        pairs = paired.sum(-1, keepdim=True).clamp(min=1)
        radius = torch.full(present.shape, math.exp(-3 / length), dtype=torch.float64).to(draws)
        angle = math.pi * (slot + 0.5) / pairs
    angle = torch.where(paired, angle, 0)
    residues = noise.unsqueeze(1).expand(2, *present.shape) / (length * order.unsqueeze(-1)).sqrt()
    residues = residues * torch.stack([present, paired])
    return torch.cat([torch.stack([radius, angle]), residues])


class _TimeLoss:
    """The loss `Σ_t (h_t - Re Σ_k r_k λ_k^t)²` and its gradient."""

    def __init__(self, taps: Tensor) -> None:
        self.taps = taps

    def __call__(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        radius, angle, a, b = parameters
        residues = torch.complex(a, b)
        kernels = Vandermonde(torch.polar(radius, angle), self.taps.shape[-1])
        error = self.taps - kernels.combine(residues)
        zeroth, first = kernels.moments(error)
        turned = residues * first
        slope = [-turned.real / radius, turned.imag, -zeroth.real, zeroth.imag]
        return error.square().sum(-1), 2 * torch.stack(slope)


class _FrequencyLoss:
    """The mean of |G - Ĝ|² over N roots of unity, and its gradient.

    Ĝ is the transform of the taps `Re Σ_k r_k λ_k^t`: a sum of terms `r_k / (z - λ_k)` and their
    conjugates.
    """

    def __init__(self, taps: Tensor) -> None:
        points = fft_length(2 * taps.shape[-1], 1)
        # The spectrum of h_1 z^-1 + h_2 z^-2 + … on the upper half of the circle: (B, 1, N/2 + 1)
        self.spectrum = torch.fft.rfft(torch.nn.functional.pad(taps, (1, 0)), n=points).unsqueeze(1)
        place = torch.arange(points // 2 + 1, dtype=taps.dtype, device=taps.device)
        self.z = torch.polar(torch.ones_like(place), 2 * math.pi / points * place)
        weight = torch.full_like(place, 2.0)  # each point counts for both halves of the circle
        weight[0] = weight[-1] = 1
        self.weight = weight / points

    def __call__(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        radius, angle, a, b = parameters
        residues = torch.complex(a, b).unsqueeze(-1)
        poles = torch.polar(radius, angle).unsqueeze(-1)  # (B, m, 1)
        upper, lower = 1 / (self.z - poles), 1 / (self.z - poles.conj())  # (B, m, F)
        found = (residues * upper + residues.conj() * lower).sum(1, keepdim=True) / 2
        error = self.spectrum - found  # (B, 1, F)
        # This sums conj(E) / (z - λ) over the whole circle. The lower half is the conjugate of the
        # upper half.
        weighted = error * (self.weight / 2)
        back, ahead = weighted.conj(), weighted
        lower = lower.conj()  # 1 / (z̄ - λ)
        zeroth = (back * upper + ahead * lower).sum(-1)
        first = residues.squeeze(-1) * (back * upper * upper + ahead * lower * lower).sum(-1)
        first = first * poles.squeeze(-1)
        slope = [-first.real / radius, first.imag, -zeroth.real, zeroth.imag]
        value = (self.weight * error.abs().square()).sum((-2, -1))
        return value, 2 * torch.stack(slope)
