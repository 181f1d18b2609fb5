r"""`reduce`: the public entrance to model reduction, and the choice of the order."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from gramian.ops._blocks import work
from gramian.reduction import errors
from gramian.reduction.balanced import balanced_poles
from gramian.reduction.residues import ModalFit, fit_residues, stabilised
from gramian.reduction.spectrum import Spectrum, hankel_matrices, leading_spectrum
from gramian.systems import FIR, Modal, System

__all__ = ["Reduction", "reduce"]

_METHODS: dict[str, Callable[[Spectrum, Tensor], Tensor]] = {"balanced": balanced_poles}
"""Poles of given orders from the leading singular vectors of a Hankel matrix."""

_TAILS = {"auto": ("zero", "free"), "zero": ("zero",), "free": ("free",)}

_FIRST_LEVEL = 16
"""The first order that a search for a tolerance tries."""

_MAX_ORDER = 256
"""Where the search for the order that a tolerance needs ends by default."""


@dataclasses.dataclass(frozen=True, eq=False)
class Reduction:
    """A smaller system and how far it is from what it was made of.

    Figures are measured in float64 on the taps of ``system`` itself, after the cast to its dtype.
    Where they are compared with a bound, it is with the one named.

    Attributes:
        system: `Modal`, channels (*C).
        order: (*C), integers: state dimension over the reals of every channel. Below the order that
            was asked for where the kernel's Hankel matrix has no more rank.
        relative_error: (*C): ‖h - ĥ‖₂ / ‖h‖₂ over the L taps; 0 for a silent channel.
        lower_bound: (*C): no system of that order, stable or not, has a smaller ``relative_error``.
        l1_error: (*C): ‖h - ĥ‖₁ over the L taps, which bounds ‖y - ŷ‖_∞ / ‖u‖_∞ for inputs up to L.
        hankel_singular_values: (*C, k): the leading ones of the kernel followed by zeros,
            descending; NaN past those that were computed. Value n + 1 bounds ``hankel_error`` from
            below for every system of order n.
        tail_energy: (*C): Σ_{t≥L} ĥ_t² / ‖h‖₂².
        converged: (*C), bool: whether the tolerance was met; true if an order was given.
    """

    system: Modal
    order: Tensor
    relative_error: Tensor
    lower_bound: Tensor
    l1_error: Tensor
    hankel_singular_values: Tensor
    tail_energy: Tensor
    converged: Tensor
    _kernel: Tensor = dataclasses.field(repr=False)

    @functools.cached_property
    def hankel_error(self) -> Tensor:
        """(*C): Hankel norm of h - ĥ on the infinite horizon, h followed by zeros and ĥ by its
        tail. Computed when first asked for."""
        shape, taps = self.order.shape, self._kernel.shape[-1]
        device = _work_device(self._kernel.device)
        system = self.system.to(device, torch.float64)
        flat = self._kernel.to(device, torch.float64).reshape(math.prod(shape), taps)
        if taps == 1:
            flat = torch.nn.functional.pad(flat, (0, 1))
        size = _block_size(flat, 1)
        modes = (math.prod(shape), system.poles.shape[-1])
        blocks = list(
            zip(
                flat[:, 1:].split(size),
                system.poles.reshape(modes).split(size),
                system.residues.reshape(modes).split(size),
                strict=True,
            )
        )
        error = torch.cat(work(lambda block: errors.hankel_error(*block), blocks, flat))
        return _returned(error, self._kernel.device).reshape(shape)


@torch.no_grad()
def reduce(
    kernel_or_system: Tensor | System,
    order: int | Tensor | None = None,
    tol: float | None = None,
    method: str = "balanced",
    tail: str = "auto",
    stable: bool = True,
    *,
    length: int | None = None,
    max_order: int | None = None,
) -> Reduction:
    """Find a small modal system with nearly the same impulse response, for every channel.

    Poles are those of a balanced truncation (Kung's method; `gramian.reduction.balanced`), residues
    their least-squares fit to all taps, and the direct term is h_0 exactly. Everything is computed
    in float64 and without gradients.

    Args:
        kernel_or_system: A kernel (*C, L), real floating point, or a time-invariant system, of
            which the impulse response up to ``length`` is taken.
        order: State dimension over the reals, 1 … L - 1, where a conjugate pair of poles counts 2
            and a real pole 1: one number, or integers that broadcast to (*C).
        tol: The relative l2 error over the taps to reach, above 0, instead of an order. Every
            channel gets the smallest order that reaches it (as far as the error falls with the
            order), or the largest one and ``converged`` false.
        method: "balanced".
        tail: What to assume past the last tap. "zero": silence, for a recurrence that fades after L
            as the kernel does. "free": nothing; usually closer over the taps, but see
            ``tail_energy``. "auto": whichever of the two is closer over the taps, per channel.
        stable: Keep poles inside the unit circle: those outside are moved there before the residues
            are fitted. False: leave them.
        length: Number of taps to take of a system; by default an FIR's own. Not for kernels.
        max_order: Where the search for ``tol`` ends; by default 256, or L - 1 if that is less.

    Returns:
        A `Reduction`. The system is float32 for a half-precision kernel, otherwise of its dtype.

    Raises:
        TypeError: if the first argument is neither a real floating-point tensor nor a system.
        ValueError: if an argument is out of range, or a kernel is not finite.
    """
    kernel = _kernel_of(kernel_or_system, length)
    if (order is None) == (tol is None):
        raise ValueError(f"give either order or tol, not both or none; got {order=} and {tol=}.")
    _check_choice("method", method, tuple(_METHODS))
    _check_choice("tail", tail, tuple(_TAILS))
    shape, taps = kernel.shape[:-1], kernel.shape[-1]
    if tol is not None and not (isinstance(tol, int | float) and 0 < tol < math.inf):
        raise ValueError(f"tol must be a finite number above 0, got {tol!r}.")
    if max_order is not None and (order is not None or max_order < 1):
        raise ValueError(f"max_order must be at least 1 and goes with tol, got {max_order}.")
    orders = None if order is None else _orders(order, shape, taps)
    _check_finite(kernel)

    dtype = kernel.dtype if kernel.dtype == torch.float64 else torch.float32
    work_device = _work_device(kernel.device)
    flat = kernel.detach().to(work_device, torch.float64).reshape(math.prod(shape), taps)
    if taps == 1:
        flat = torch.nn.functional.pad(flat, (0, 1))  # silence behind the direct term
    settings = _Settings(method, _TAILS[tail], stable, dtype)
    if orders is not None:
        orders = orders.reshape(-1).to(work_device)
        size = _block_size(flat, int(orders.max()))
        blocks = list(zip(flat.split(size), orders.split(size), strict=True))
        parts = work(lambda block: _reduce_to_order(*block, settings), blocks, flat)
    else:
        assert tol is not None
        largest = min(max(1, taps - 1), _MAX_ORDER if max_order is None else max_order)
        parts = work(
            lambda block: _reduce_to_tolerance(block, tol, largest, settings),
            flat.split(_block_size(flat, _FIRST_LEVEL)),
            flat,
        )
    return _assembled(parts, kernel.detach(), dtype)


def _kernel_of(source: Tensor | System, length: int | None) -> Tensor:
    if isinstance(source, Tensor):
        if length is not None:
            raise ValueError(
                f"length goes with a system; a kernel ends where it ends, got {length=}."
            )
        if not source.dtype.is_floating_point or source.ndim == 0 or source.numel() == 0:
            raise TypeError(
                "a kernel is a real floating-point tensor (*channels, taps) that is not empty, got "
                f"{source.dtype} of shape {tuple(source.shape)}."
            )
        return source
    if not isinstance(source, System):
        raise TypeError(
            "reduce takes a kernel (a torch tensor) or a time-invariant system, got "
            f"{type(source).__name__}."
        )
    if length is None:
        if not isinstance(source, FIR):
            raise ValueError(
                f"the impulse response of a {type(source).__name__} has no end: give the length "
                "over which to reduce it."
            )
        length = source.kernel.shape[-1]
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}.")
    return source.impulse_response(length)


def _check_choice(name: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}.")


def _orders(order: int | Tensor, shape: torch.Size, taps: int) -> Tensor:
    orders = torch.as_tensor(order)
    if orders.dtype.is_floating_point or orders.dtype.is_complex or orders.dtype == torch.bool:
        raise ValueError(f"order must be an integer or integers, got {order!r}.")
    try:
        orders = orders.broadcast_to(shape)
    except RuntimeError:
        raise ValueError(
            f"orders {tuple(orders.shape)} do not broadcast to the channels {tuple(shape)}."
        ) from None
    highest = max(1, taps - 1)  # a kernel of one tap is all direct term, whatever the order
    wrong = orders[(orders < 1) | (orders > highest)]
    if wrong.numel():
        raise ValueError(
            f"order must lie in 1 … {highest} for kernels of {taps} taps, got {int(wrong[0])}."
        )
    return orders


def _check_finite(kernel: Tensor) -> None:
    bad = (~kernel.isfinite()).any(-1)
    if bool(bad.any()):
        first = tuple(torch.nonzero(bad)[0].tolist()) if bad.ndim else ()
        where = "the kernel" if not first else f"channel {first[0] if len(first) == 1 else first}"
        raise ValueError(f"{where} holds NaN or infinite taps; a reduction needs finite ones.")


def _work_device(device: torch.device) -> torch.device:
    """Where float64 is computed: Apple's GPUs lack it."""
    return torch.device("cpu") if device.type == "mps" else device


def _returned(figure: Tensor, device: torch.device) -> Tensor:
    return figure.float().to(device) if device.type == "mps" else figure.to(device)


def _block_size(taps: Tensor, order: int) -> int:
    """How many channels to reduce at once, so that a CPU's cache or a GPU's memory holds their
    bases: vectors that are used, and vectors that are allocated."""
    if taps.device.type == "cpu":
        return max(1, 2**23 // (taps.shape[-1] * (4 * order + 36)))
    return max(1, 2**29 // (taps.shape[-1] * (8 * order + 136)))


@dataclasses.dataclass(frozen=True)
class _Settings:
    method: str
    tails: tuple[str, ...]
    stable: bool
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class _Part:
    """What was found for one block of channels; ``bound`` is of the squared l2 error."""

    fit: ModalFit
    bound: Tensor
    values: Tensor
    converged: Tensor


class _Candidates:
    """The leading Hankel spectra of B kernels, and the fits that come from them."""

    def __init__(self, taps: Tensor, count: int, settings: _Settings) -> None:
        self.taps = taps  # (B, T)
        self.settings = settings
        self.spectra: dict[str, Spectrum] = {}
        guess = None
        if "free" in settings.tails:
            self.spectra["free"] = leading_spectrum(hankel_matrices(taps, "free"), count)
            guess = self.spectra["free"].vectors.sum(1)
        self.spectra["zero"] = leading_spectrum(hankel_matrices(taps, "zero"), count, guess)

    def fit(self, order: Tensor, rows: Tensor | slice) -> ModalFit:
        """The best fits of the given orders to the channels ``rows`` (indices)."""
        taps, settings = self.taps[rows], self.settings
        best = fit_residues(
            taps, taps.new_zeros(len(taps), 0, dtype=torch.complex128), torch.float64
        )

        def offer(poles: Tensor, where: Tensor) -> None:
            fit = fit_residues(taps[where], poles[where], settings.dtype)
            better = fit.l2_error < best.l2_error[where]
            best.put(where[better], fit[better])

        everywhere = torch.arange(len(taps), device=taps.device)
        for tail in settings.tails:
            poles = _METHODS[settings.method](self.spectra[tail][rows], order)
            if settings.stable:
                poles = stabilised(poles, settings.dtype)
            offer(poles, everywhere)
        complete = torch.nonzero(order >= taps.shape[-1]).flatten()
        if len(complete):
            offer(_ring(taps), complete)
        return best

    def bound(self, fit: ModalFit, rows: Tensor | slice) -> Tensor:
        """The squared lower bound that belongs to the orders of ``fit``."""
        windowed = self.spectra.get("free")
        return errors.squared_lower_bound(
            self.taps[rows], fit.orders(), None if windowed is None else windowed[rows]
        )


def _ring(taps: Tensor) -> Tensor:
    """As many poles as taps, evenly spaced on a circle: they reproduce any taps, (B, T).

    Balanced truncation leaves nothing out at this order, and ends in a defective pole at zero.
    """
    count = taps.shape[-1]
    angle = 2 * math.pi / count * torch.arange(count, dtype=taps.dtype, device=taps.device)
    poles = torch.polar(torch.full_like(angle, 0.25 ** (1 / count)), angle)
    poles.imag[(angle == 0) | (2 * torch.arange(count, device=taps.device) == count)] = 0
    return poles.expand(len(taps), -1)


def _reduce_to_order(kernel: Tensor, order: Tensor, settings: _Settings) -> _Part:
    everything = slice(None)
    largest = int(order.max())
    candidates = _Candidates(kernel[:, 1:], largest + 1, settings)
    fit = candidates.fit(order, everything)
    return _Part(
        fit,
        candidates.bound(fit, everything),
        candidates.spectra["zero"].values,
        torch.ones_like(order, dtype=torch.bool),
    )


def _reduce_to_tolerance(kernel: Tensor, tol: float, largest: int, settings: _Settings) -> _Part:
    """Double the order until the error is small enough, then bisect, every channel for itself."""
    taps, allowed = kernel[:, 1:], tol * kernel.norm(dim=-1)
    everywhere = torch.arange(len(kernel), device=kernel.device)
    best = fit_residues(taps, taps.new_zeros(len(taps), 0, dtype=torch.complex128), torch.float64)
    bound = taps.new_zeros(len(taps))
    values = taps.new_full((len(taps), 0), torch.nan)
    pending = everywhere[best.l2_error > allowed]
    converged = best.l2_error <= allowed
    failed, level = 0, min(_FIRST_LEVEL, largest)
    while len(pending):
        candidates = _Candidates(taps[pending], level + 1, settings)
        rows = torch.arange(len(pending), device=kernel.device)
        low, high = torch.full_like(rows, failed), torch.full_like(rows, level)
        fit = candidates.fit(high, rows)
        done = fit.l2_error <= allowed[pending]
        if level == largest:
            low = torch.where(done, low, high)
        open_ = rows[done]
        while len(open_ := open_[high[open_] - low[open_] > 1]):
            middle = (low[open_] + high[open_]) // 2
            trial = candidates.fit(middle, open_)
            good = trial.l2_error <= allowed[pending[open_]]
            fit.put(open_[good], trial[good])
            high[open_[good]], low[open_[~good]] = middle[good], middle[~good]
        settled = rows if level == largest else rows[done]
        best.put(pending[settled], fit[settled])
        bound[pending[settled]] = candidates.bound(fit[settled], settled)
        converged[pending] = done
        found = candidates.spectra["zero"].values
        values = torch.nn.functional.pad(
            values, (0, found.shape[-1] - values.shape[-1]), value=torch.nan
        )
        values[pending] = found
        pending = pending[~done] if level < largest else pending[:0]
        failed, level = level, min(2 * level, largest)
    return _Part(best, bound, values, converged)


def _assembled(parts: list[_Part], kernel: Tensor, dtype: torch.dtype) -> Reduction:
    shape, device = kernel.shape[:-1], kernel.device

    def joined(pieces: list[Tensor], padding: float = 0.0) -> Tensor:
        width = max(piece.shape[-1] for piece in pieces)
        pad = torch.nn.functional.pad
        return torch.cat([pad(p, (0, width - p.shape[-1]), value=padding) for p in pieces])

    def figure(pieces: list[Tensor]) -> Tensor:
        return _returned(torch.cat(pieces), device).reshape(shape)

    kind = dtype.to_complex()
    poles = joined([part.fit.poles for part in parts])
    residues = joined([part.fit.residues for part in parts])
    system = Modal(
        poles.to(device, kind).reshape(*shape, -1),
        residues.to(device, kind).reshape(*shape, -1),
        kernel[..., 0].to(dtype),
    )
    norm = kernel.to(poles.device, torch.float64).norm(dim=-1).flatten()
    safe = torch.where(norm > 0, norm, 1)
    values = _returned(joined([part.values for part in parts], torch.nan), device)
    return Reduction(
        system=system,
        order=system.orders,
        relative_error=figure([torch.cat([part.fit.l2_error for part in parts]) / safe]),
        lower_bound=figure([torch.cat([part.bound for part in parts]).sqrt() / safe]),
        l1_error=figure([part.fit.l1_error for part in parts]),
        hankel_singular_values=values.reshape(*shape, -1),
        tail_energy=figure([errors.tail_energy(poles, residues, kernel.shape[-1]) / safe.square()]),
        converged=torch.cat([part.converged for part in parts]).to(device).reshape(shape),
        _kernel=kernel,
    )
