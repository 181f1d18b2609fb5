"""The input of every method of reduction: kernels, their Hankel spectra, and the settings."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from gramian.reduction import errors
from gramian.reduction.residues import ModalFit, fit_residues, largest_radius, stabilized
from gramian.reduction.spectrum import Spectrum, hankel_matrices, leading_spectrum

__all__ = [
    "INITIALIZATIONS",
    "OBJECTIVES",
    "Problem",
    "Settings",
    "SourceModes",
    "SpectralPiece",
    "lanczos_block",
]

OBJECTIVES = ("l2", "h2")
INITIALIZATIONS = ("ring", "even")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a reduction, for all channels.

    Args:
        tails: The treatments of the tail to try: "zero", "free" or both.
        stable: Whether poles must lie inside the unit circle.
        dtype: The real dtype of the result, float32 or float64.
        refine: Whether balanced truncation refines its poles.
        lower: Whether to look for a closer fit of a lower order. It is false only while an order is
            searched for a tolerance.
        tick: A function that is called with the amount of work, in channels, that has been finished
            since the last call.
    """

    tails: tuple[str, ...]
    stable: bool
    dtype: torch.dtype
    refine: bool = True
    lower: bool = True
    tick: Callable[[float], None] = lambda channels: None

    @property
    def fades(self) -> bool:
        """Return whether silence after the last tap is the only treatment of the tail."""
        return self.tails == ("zero",)

    @property
    def least_decay(self) -> float | None:
        """Return the smallest allowed `-log |λ|` of a pole, or None if every value is allowed."""
        if not self.stable and not self.fades:
            return None
        return -math.log(largest_radius(self.dtype))


@dataclasses.dataclass(frozen=True)
class SourceModes:
    """The modes of the systems to reduce, if they are known.

    Args:
        poles: (B, m), complex128: the poles, one or both of each pair. An unused entry is NaN.
        residues: (B, m), complex128: the residues r_k in `Re Σ_k r_k λ_k^t`. None means that they
            have yet to be fitted.
    """

    poles: Tensor
    residues: Tensor | None

    def __getitem__(self, index: Tensor | slice) -> SourceModes:
        return SourceModes(
            self.poles[index], None if self.residues is None else self.residues[index]
        )

    def split(self, size: int) -> list[SourceModes]:
        return [self[i : i + size] for i in range(0, len(self.poles), size)]


@dataclasses.dataclass(frozen=True)
class SpectralPiece:
    """The Hankel spectra of the channels from `first` on, for each treatment of the tail."""

    first: int
    spectra: dict[str, Spectrum]


def lanczos_block(taps: Tensor, order: int) -> int:
    """Return how many Lanczos bases to grow at one time.

    The vectors in use have to fit into the cache of a CPU, and the allocated vectors into memory.
    """
    if taps.device.type == "cpu":
        return max(1, 2**23 // (taps.shape[-1] * (4 * order + 36)))
    return max(1, 2**29 // (taps.shape[-1] * (8 * order + 136)))


def _spectra(taps: Tensor, count: int, settings: Settings) -> dict[str, Spectrum]:
    spectra, guess = {}, None
    if "free" in settings.tails:
        spectra["free"] = leading_spectrum(hankel_matrices(taps, "free"), count)
        guess = spectra["free"].vectors
    spectra["zero"] = leading_spectrum(hankel_matrices(taps, "zero"), count, guess)
    return spectra


class Problem:
    """A batch of B kernels, their leading Hankel spectra, and the settings.

    Args:
        taps: (B, T), float64: h_1 … h_T.
        count: The number of singular vectors to compute, above the largest order.
        settings: The settings of the reduction.
        source: The modes of the B systems, if they are known.
    """

    def __init__(
        self, taps: Tensor, count: int, settings: Settings, source: SourceModes | None = None
    ) -> None:
        self.taps = taps
        self.settings = settings
        self.source = source
        size = lanczos_block(taps, count)
        self.pieces = [
            SpectralPiece(first, _spectra(taps[first : first + size], count, settings))
            for first in range(0, len(taps), size)
        ]

    @property
    def singular_values(self) -> Tensor:
        """Return the leading Hankel singular values (B, k) of the kernels, continued by zeros."""
        return self.leading_values("zero")

    def leading_values(self, tail: str) -> Tensor:
        """Return the leading Hankel singular values for this treatment of the tail, (B, k)."""
        return torch.cat([piece.spectra[tail].values for piece in self.pieces])

    def ritz(self, tail: str) -> Tensor:
        """Return lower bounds (B, K) of Hankel singular values for this treatment of the tail."""
        parts = [piece.spectra[tail].ritz for piece in self.pieces]
        width = max(part.shape[-1] for part in parts)
        pad = torch.nn.functional.pad
        return torch.cat([pad(part, (0, width - part.shape[-1])) for part in parts])

    def with_settings(self, settings: Settings) -> Problem:
        """Return the same problem, including its spectra, with other settings."""
        other = copy.copy(self)
        other.settings = settings
        return other

    def silence(self, rows: Tensor) -> ModalFit:
        """Return the fits of order 0 to the channels `rows` (indices)."""
        taps = self.taps[rows]
        none = taps.new_zeros(len(taps), 0, dtype=torch.complex128)
        return fit_residues(taps, none, torch.float64)

    def offer(self, best: ModalFit, poles: Tensor, rows: Tensor, where: Tensor) -> ModalFit:
        """Fit residues to poles of the channels `rows[where]`, and keep closer fits in `best`.

        Args:
            best: Fits of the channels `rows`.
            poles: (len(where), n), complex128: the poles. An unused entry is NaN. If the settings
                require stable poles, the poles are made stable first.
            rows: The indices of the channels.
            where: Indices into `rows`.

        Returns:
            The fits with these poles.
        """
        if self.settings.stable:
            poles = stabilized(poles, self.settings.dtype)
        fit = fit_residues(self.taps[rows[where]], poles, self.settings.dtype)
        self.keep(best, fit, where)
        return fit

    def keep(self, best: ModalFit, fit: ModalFit, where: Tensor) -> None:
        """Put a fit into `best` in the channels where its measured error over taps is smaller."""
        better = fit.l2_error < best.l2_error[where]
        best.put(where[better], fit[better])

    def bound(self, fit: ModalFit, rows: Tensor | slice) -> Tensor:
        """Return the lower bound of the squared error for the orders of `fit`."""
        windowed = self.ritz("free")[rows] if "free" in self.settings.tails else None
        return errors.squared_lower_bound(self.taps[rows], fit.orders(), windowed)
