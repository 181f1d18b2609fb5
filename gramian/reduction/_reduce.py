r"""The public function `reduce` for model reduction, and the choice of the order."""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from gramian._checks import check_choice
from gramian.ops.devices import returned, work_device
from gramian.ops.precision import complex_dtype, full_precision
from gramian.ops.threads import work
from gramian.reduction import errors
from gramian.reduction._kernels import check_finite, kernel_of
from gramian.reduction.balanced import balanced, refined_further
from gramian.reduction.methods import Balanced, Method, ModalTruncation, method_of
from gramian.reduction.problem import Problem, Settings, SourceModes, lanczos_block
from gramian.reduction.residues import ModalFit, fit_residues
from gramian.systems import Modal, System, TransferFunction

__all__ = ["Reduction", "reduce"]

_TAILS = {"auto": ("zero", "free"), "zero": ("zero",), "free": ("free",)}

_FIRST_LEVEL = 16
"""The first order that is tried when a tolerance is given."""

_REACH = 2.0
"""The largest ratio of error to tolerance with which a fit is refined. If the ratio is larger, the
order is doubled instead."""

_LARGEST_BLOCK = 96
"""The largest number of channels that one thread refines at a time."""

_MAX_ORDER = 256
"""The default of the largest order that is tried when a tolerance is given."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Reduction:
    """A smaller system and its distance from the original.

    All errors are measured in float64 on the taps of `system`, whose numbers are rounded to its
    dtype.

    Attributes:
        system: The `Modal` that was found, channels (*C).
        order: (*C), integers: the state dimension of every channel, in real numbers. It is below
            the requested order if the Hankel matrix of the kernel has a lower rank, or if a fit of
            a lower order was closer than any fit of the requested order.
        relative_error: (*C): ‖h - ĥ‖₂ / ‖h‖₂ over the L taps; 0 for a silent channel.
        lower_bound: (*C): a lower bound of `relative_error` for every system of that order, stable
            or not.
        l1_error: (*C): ‖h - ĥ‖₁ over the L taps. It bounds ‖y - ŷ‖_∞ / ‖u‖_∞ for inputs of at most
            L samples.
        hankel_singular_values: (*C, k), descending: the leading Hankel singular values of the
            kernel, continued by zeros. A value that was not computed is NaN. The values are Lanczos
            estimates. The first values are accurate to 1e-4 or better, and the last value of a flat
            spectrum is accurate to two percent. To that accuracy, value n + 1 is a lower bound of
            `hankel_error` for every system of order n.
        tail_energy: (*C): Σ_{t≥L} ĥ_t² / ‖h‖₂².
        converged: (*C), bool: whether the error is within the tolerance; true if an order was
            given.
    """

    system: Modal
    order: Tensor
    relative_error: Tensor
    lower_bound: Tensor
    l1_error: Tensor
    hankel_singular_values: Tensor
    tail_energy: Tensor
    converged: Tensor
    _kernel: Tensor

    def __repr__(self) -> str:
        orders = f"{int(self.order.min())} … {int(self.order.max())}"
        if int(self.order.min()) == int(self.order.max()):
            orders = str(int(self.order.max()))
        missed = int((~self.converged).sum())
        return (
            f"Reduction(channels={tuple(self.order.shape)}, taps={self._kernel.shape[-1]}, "
            f"order={orders}, relative_error={float(self.relative_error.median()):.2e} median, "
            f"{float(self.relative_error.max()):.2e} max, "
            f"tail_energy={float(self.tail_energy.max()):.2e} max"
            + (f", {missed} above the tolerance)" if missed else ")")
        )

    @functools.cached_property
    def hankel_error(self) -> Tensor:
        """Return the Hankel norm of h - ĥ on the infinite horizon, (*C).

        After the taps, h continues with zeros, and ĥ with its own tail. The norm is computed when
        it is first accessed.
        """
        shape, taps = self.order.shape, self._kernel.shape[-1]
        device = work_device(self._kernel.device)
        system = self.system.to(device, torch.float64)
        flat = self._kernel.to(device, torch.float64).reshape(math.prod(shape), taps)
        if taps == 1:
            flat = torch.nn.functional.pad(flat, (0, 1))
        size = lanczos_block(flat, 1)
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
        return returned(error, self._kernel.device).reshape(shape)


@full_precision()
@torch.no_grad()
def reduce(
    kernel_or_system: Tensor | System,
    order: int | Tensor | None = None,
    tol: float | None = None,
    method: str | Method = "balanced",
    tail: str = "auto",
    stable: bool = True,
    *,
    length: int | None = None,
    max_order: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Reduction:
    """Find a small modal system with nearly the same impulse response, for every channel.

    The direct term of the result is exactly h_0. Everything is computed in float64 and without
    gradients. There are three methods.

    - "balanced" takes the poles of a balanced truncation (S. Kung, 1978), which it computes from
      the Hankel matrices of the taps. It refines them by variable projection (G. H. Golub,
      V. Pereyra, 1973; L. Kaufman, 1975) and fits the residues to all taps by least squares.
      Refined poles are kept only if the measured error is smaller, so refinement makes no channel
      worse.
    - "modal" keeps the modes with the most energy. If the given system is a `gramian.Modal` or
      `gramian.TransferFunction`, these are modes of the system. Otherwise they are modes of a
      balanced truncation of more than twice the order. The residues of the kept modes are fitted
      again. A repeated pole is kept once.
    - "gradient" finds poles and residues by gradient descent, as the Laughing Hyena Distillery does
      (arXiv 2310.18780, section 3.2). It is slow and serves as the baseline.
      `rational_interpolation` is the baseline in rational form.

    With `tol`, the order is doubled until the error is small enough, and is then bisected.
    Afterwards, starting from the order that the closed form needs, lower and lower orders are tried
    as long as their refined error is within the tolerance.

    Args:
        kernel_or_system: A kernel (*C, L), real floating point, or a time-invariant system, whose
            first `length` taps are then reduced.
        order: The state dimension in real numbers, 1 … L - 1, where a conjugate pair of poles
            counts 2 and a real pole 1. It is one number, or integers that broadcast to (*C).
        tol: The largest accepted relative l2 error over the taps, above 0, instead of an order.
            Every channel gets the smallest order whose error is accepted, as far as the error falls
            with the order. A channel for which no order is accepted gets the closest fit that was
            found, and its `converged` is false.
        method: "balanced", "modal" or "gradient". To set the options of a method, pass a
            `gramian.reduction.Balanced`, `ModalTruncation` or `Gradient`.
        tail: What to assume beyond the last tap. "zero" assumes silence, so that the recurrence
            fades after L taps as the kernel does. Poles are then refined for the error on the
            infinite horizon. "free" assumes nothing, and poles are refined for the error over the
            taps. The fit is then usually closer over the taps, but see `tail_energy`. "auto" tries
            both and decides for every channel. Without a tolerance, it chooses the fit that is
            closer over the taps. With a tolerance, it chooses the fit that is within the tolerance
            and has less energy beyond the taps.
        stable: Whether to keep poles inside the unit circle. If true, poles outside are moved
            inside before the residues are fitted.
        length: The number of taps of a system to use. For an FIR, the default is its number of
            taps. For other systems, a length is necessary. It must not be given for a kernel.
        max_order: The largest order to try for `tol`; by default 256, or L - 1 if that is less.
        progress: A function that is called as `progress(done, total)` as the work proceeds, where
            `done` and `total` are numbers of channels. Different threads may call it, but never two
            at the same time.

    Returns:
        A `Reduction`. Its system is in float32 for a half-precision kernel, and otherwise in the
        dtype of the kernel or system.

    Raises:
        TypeError: if the first argument is neither a real floating-point tensor nor a system.
        ValueError: if an argument is out of range, if no method has the given name, or if a kernel
            is not finite.
    """
    kernel = kernel_of(kernel_or_system, length)
    if (order is None) == (tol is None):
        raise ValueError(f"give either order or tol, not both or none; got {order=} and {tol=}.")
    method = method_of(method)
    check_choice("tail", tail, _TAILS)
    shape, taps = kernel.shape[:-1], kernel.shape[-1]
    if tol is not None and not (isinstance(tol, int | float) and 0 < tol < math.inf):
        raise ValueError(f"tol must be a finite number above 0; got {tol!r}.")
    if max_order is not None and (order is not None or max_order < 1):
        raise ValueError(f"max_order must be at least 1 and goes with tol; got {max_order}.")
    orders = None if order is None else _orders(order, shape, taps)
    check_finite(kernel)

    dtype = kernel.dtype if kernel.dtype == torch.float64 else torch.float32
    device = work_device(kernel.device)
    flat = kernel.detach().to(device, torch.float64).reshape(math.prod(shape), taps)
    if taps == 1:
        flat = torch.nn.functional.pad(flat, (0, 1))  # one silent tap after the direct term
    told = _Progress(progress, len(flat))
    settings = Settings(
        _TAILS[tail],
        stable,
        dtype,
        isinstance(method, Balanced) and method.refine,
        lower=order is not None,
        tick=told.advance,
    )
    modal = isinstance(method, ModalTruncation)
    source = _source_modes(kernel_or_system, device) if modal else None
    told.advance(0)
    if orders is not None:
        orders = orders.reshape(-1).to(device)
        size = _block_size(flat, int(orders.max()))
        if modal:
            size = lanczos_block(flat, int(orders.max()))
        pieces = [None] * -(-len(flat) // size) if source is None else source.split(size)
        blocks = list(zip(flat.split(size), orders.split(size), pieces, strict=True))
        parts = work(lambda block: _reduce_to_order(*block, method, settings), blocks, flat)
    else:
        assert tol is not None
        largest = min(max(1, taps - 1), _MAX_ORDER if max_order is None else max_order)
        size = lanczos_block(flat, _FIRST_LEVEL)
        pieces = [None] * -(-len(flat) // size) if source is None else source.split(size)
        parts = work(
            lambda block: _reduce_to_tolerance(*block, tol, largest, method, settings),
            list(zip(flat.split(size), pieces, strict=True)),
            flat,
        )
    told.finish()
    return _assembled(parts, kernel.detach(), dtype)


class _Progress:
    """A counter of finished channels, which any thread may advance and which calls a callback."""

    def __init__(self, callback: Callable[[int, int], None] | None, total: int) -> None:
        self.callback, self.total = callback, total
        self.lock = threading.Lock()
        self.done, self.told = 0.0, -1

    def advance(self, channels: float) -> None:
        with self.lock:
            self.done += channels
            whole = min(self.total, int(self.done + 1e-6))
            if self.callback is not None and whole > self.told:
                self.told = whole
                self.callback(whole, self.total)

    def finish(self) -> None:
        self.advance(self.total - self.done)


def _source_modes(source: Tensor | System, device: torch.device) -> SourceModes | None:
    """Return the modes of a system for modal truncation, or None if it has none."""
    if isinstance(source, Modal):
        count = source.poles.shape[-1]
        poles, residues = (
            part.detach().to(device, torch.complex128).reshape(-1, count)
            for part in (source.poles, source.residues)
        )
        below = poles.imag < 0
        poles, residues = (torch.where(below, x.conj(), x) for x in (poles, residues))
        return SourceModes(torch.where(residues != 0, poles, torch.nan), residues)
    if isinstance(source, TransferFunction):
        poles = source.detach().to(device, torch.float64).poles().to(torch.complex128)
        return SourceModes(poles.reshape(-1, poles.shape[-1]), None)
    return None


def _orders(order: int | Tensor, shape: torch.Size, taps: int) -> Tensor:
    orders = torch.as_tensor(order)
    if orders.dtype.is_floating_point or orders.dtype.is_complex or orders.dtype == torch.bool:
        raise ValueError(f"order must be an integer or integers; got {order!r}.")
    try:
        orders = orders.broadcast_to(shape)
    except RuntimeError:
        raise ValueError(
            f"orders {tuple(orders.shape)} do not broadcast to the channels {tuple(shape)}."
        ) from None
    highest = max(1, taps - 1)  # a kernel of one tap is its direct term, for any order
    wrong = orders[(orders < 1) | (orders > highest)]
    if wrong.numel():
        raise ValueError(
            f"order must lie in 1 … {highest} for kernels of {taps} taps; got {int(wrong[0])}."
        )
    return orders


def _block_size(taps: Tensor, order: int) -> int:
    """Return how many channels to reduce to an order at one time.

    Operations on large blocks are more efficient, but the singular vectors of a block have to fit
    into memory. On a CPU every thread gets the same number of blocks.
    """
    count, length = taps.shape
    if taps.device.type != "cpu":
        return lanczos_block(taps, order)
    size = max(1, min(_LARGEST_BLOCK, 2**23 // (length * (order + 1))))
    threads = torch.get_num_threads()
    rounds = -(-count // (threads * size))
    return -(-count // (threads * rounds))


@dataclasses.dataclass(frozen=True)
class _Part:
    """The result for a block of channels, with `bound`, a lower bound of the squared l2 error."""

    fit: ModalFit
    bound: Tensor
    values: Tensor
    converged: Tensor


def _reduce_to_order(
    kernel: Tensor, order: Tensor, source: SourceModes | None, method: Method, settings: Settings
) -> _Part:
    everything = slice(None)
    largest = int(order.max())
    problem = Problem(kernel[:, 1:], largest + 1, settings, source)
    fit = method.solve(problem, order, torch.arange(len(kernel), device=kernel.device))
    settings.tick(len(kernel))
    return _Part(
        fit,
        problem.bound(fit, everything),
        problem.singular_values,
        torch.ones_like(order, dtype=torch.bool),
    )


class _Search:
    """A search, for every channel, for the smallest order in (low, high] whose error meets a goal.

    `fit` holds the fits of order `high`, and `met` marks the channels whose fits meet their goal.
    """

    def __init__(self, problem: Problem, method: Method, goal: Tensor, low: int, high: int) -> None:
        self.problem, self.method, self.goal = problem, method, goal
        self.rows = torch.arange(len(goal), device=goal.device)
        self.low, self.high = torch.full_like(self.rows, low), torch.full_like(self.rows, high)
        self.fit = method.solve(problem, self.high, self.rows)

    @property
    def met(self) -> Tensor:
        return self.fit.l2_error <= self.goal

    def retry(self, where: Tensor) -> None:
        """Fit the channels of the mask `where` again."""
        some = self.rows[where]
        if len(some):
            self.fit.put(some, self.method.solve(self.problem, self.high[some], some))

    def _try(self, order: Tensor, some: Tensor) -> Tensor:
        """Try lower orders for the channels `some`, and return which of them meet their goal."""
        trial = self.method.solve(self.problem, order, some)
        good = trial.l2_error <= self.goal[some]
        self.fit.put(some[good], trial[good])
        self.high[some[good]], self.low[some[~good]] = order[good], order[~good]
        return good

    def _open(self, some: Tensor) -> Tensor:
        return some[self.high[some] - self.low[some] > 1]

    def bisect(self) -> None:
        some = self.rows[self.met]
        while len(some := self._open(some)):
            self._try((self.low[some] + self.high[some]) // 2, some)

    def descend(self) -> None:
        """Lower the order in growing strides until the next failure, then bisect.

        Orders that did not meet the goal before are tried again.
        """
        self.low.zero_()
        some, stride = self.rows[self.met], 1
        while len(some := self._open(some)):
            some = some[self._try((self.high[some] - stride).clamp(min=1), some)]
            stride *= 2
        self.bisect()


def _reduce_to_tolerance(
    kernel: Tensor,
    source: SourceModes | None,
    tol: float,
    largest: int,
    method: Method,
    settings: Settings,
) -> _Part:
    """Reduce every channel to the smallest order whose error is within its tolerance.

    For every channel separately, the order is doubled until the error is small enough, and then
    bisected. Afterwards, lower orders are tried as long as their refined fits are within the
    tolerance.
    """
    taps, allowed = kernel[:, 1:], tol * kernel.norm(dim=-1)
    everywhere = torch.arange(len(kernel), device=kernel.device)
    best = fit_residues(taps, taps.new_zeros(len(taps), 0, dtype=torch.complex128), torch.float64)
    bound = taps.new_zeros(len(taps))
    values = taps.new_full((len(taps), 0), torch.nan)
    pending = everywhere[best.l2_error > allowed]
    converged = best.l2_error <= allowed
    refine = settings.refine
    plain = dataclasses.replace(settings, refine=False, tick=lambda channels: None)
    failed, level = 0, min(_FIRST_LEVEL, largest)
    while len(pending):
        problem = Problem(
            taps[pending], level + 1, plain, None if source is None else source[pending]
        )
        search = _Search(problem, method, allowed[pending], failed, level)
        if refine:
            refined = problem.with_settings(dataclasses.replace(plain, refine=True))
            near = search.fit.l2_error <= (math.inf if level == largest else _REACH) * search.goal
            search.problem = refined
            search.retry(near & ~search.met)
            search.problem = problem
        search.bisect()
        if refine:
            search.problem = refined
            search.descend()
        fit, done = search.fit, search.met
        if refine and settings.stable and len(settings.tails) > 1:
            _quieten(refined, fit, search.goal)
        closer = torch.nonzero(fit.l2_error < best.l2_error[pending]).flatten()
        best.put(pending[closer], fit[closer])
        bound[pending[closer]] = problem.bound(fit[closer], closer)
        converged[pending] = done
        found = problem.singular_values
        values = torch.nn.functional.pad(
            values, (0, found.shape[-1] - values.shape[-1]), value=torch.nan
        )
        values[pending] = found
        settings.tick(len(pending) if level == largest else int(done.sum()))
        pending = pending[~done] if level < largest else pending[:0]
        failed, level = level, min(2 * level, largest)
    return _Part(best, bound, values, converged)


def _quieten(problem: Problem, fit: ModalFit, goal: Tensor) -> None:
    """If possible, replace fits that meet their goal but have much energy beyond the taps.

    The replacement has no larger order, meets the goal too, and has less energy beyond the taps. It
    is refined for the infinite horizon, from the same poles or from poles that fade.
    """
    length = problem.taps.shape[-1] + 1
    tail = errors.tail_energy(fit.poles, fit.residues, length)
    rows = torch.nonzero((fit.l2_error <= goal) & (tail > goal.square())).flatten()
    if not len(rows):
        return
    order = fit.orders()
    fading = problem.with_settings(dataclasses.replace(problem.settings, tails=("zero",)))
    for candidate in (
        refined_further(fading, fit[rows], rows),
        balanced(fading, order[rows], rows),
    ):
        left = errors.tail_energy(candidate.poles, candidate.residues, length)
        better = (candidate.l2_error <= goal[rows]) & (left < tail[rows])
        better &= candidate.orders() <= order[rows]
        fit.put(rows[better], candidate[better])
        tail[rows[better]] = left[better]


def _assembled(parts: list[_Part], kernel: Tensor, dtype: torch.dtype) -> Reduction:
    shape, device = kernel.shape[:-1], kernel.device

    def joined(pieces: list[Tensor], padding: float = 0.0) -> Tensor:
        width = max(piece.shape[-1] for piece in pieces)
        pad = torch.nn.functional.pad
        return torch.cat([pad(p, (0, width - p.shape[-1]), value=padding) for p in pieces])

    def figure(pieces: list[Tensor]) -> Tensor:
        return returned(torch.cat(pieces), device).reshape(shape)

    kind = complex_dtype(dtype)
    poles = joined([part.fit.poles for part in parts])
    residues = joined([part.fit.residues for part in parts])
    system = Modal(
        poles.to(device, kind).reshape(*shape, -1),
        residues.to(device, kind).reshape(*shape, -1),
        kernel[..., 0].to(dtype),
    )
    norm = kernel.to(poles.device, torch.float64).norm(dim=-1).flatten()
    safe = torch.where(norm > 0, norm, 1)
    values = returned(joined([part.values for part in parts], torch.nan), device)
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
