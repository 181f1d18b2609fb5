"""Convolution, `y_t = gate_t (Σ_{j≤t} h_j u_{t−j} + s u_t)`, the library's hot path.

Let `T_h` be the Toeplitz operator of a kernel h. This module has a forward and a backward operator.
The derivatives of both, of any order, consist of the same two operators:

    forward    (u, h) -> T_h u
    backward   (g, u, h) -> (T_hᵀ g,  k_j = Σ_{batch, t} g_t u_{t−j})

Kernels of few taps are applied tap by tap (`gramian.ops._few_taps`), and all others by FFT. For the
latter, both operators iterate over blocks of rows that are small enough to stay in the processor's
cache. A block of either memory layout is copied into a contiguous scratch buffer that is padded
with zeros. There it is transformed, multiplied in place and transformed back, and then it is
written to its place in the output. The backward operator transforms the gradient, the input and the
kernel once each. It sums the kernel's gradient over the batch as a spectrum, so that it needs one
inverse transform per kernel row.

`T_h` is lower triangular unless the last `ahead` taps of the kernel have negative lags, which reach
into the future. Lags are in circular order, 0, 1, …, −ahead, …, −1, so that both directions
together take as many transforms as one direction.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake, register_vmap

from gramian.ops._blocks import cut
from gramian.ops._few_taps import convolve_directly, differentiate_directly, has_few_taps
from gramian.ops._operator import batch_first, differentiable, operator, total
from gramian.ops.kernels import runs_in_triton
from gramian.ops.kernels.causal_convolution import covers, fused_convolution, fused_correlation
from gramian.ops.lengths import at_most, fft_length
from gramian.ops.precision import complex_dtype

# The number of elements in one padded block. This is a compromise: every call of the FFT has a
# fixed cost, which favors many rows, but a block and its spectrum should stay in cache. 16 rows of
# (batch, length, channels) in float32 fill a cache line.
_CPU_BLOCK = 2**19
_CPU_MIN_ROWS = 16

# Rows whose distance is a power of two map to few cache sets, so that reading across them evicts
# each line before its neighbors are read. This many extra elements per row prevent that.
_PITCH = 16


def causal_convolution(
    u: Tensor,
    kernel: Tensor,
    *,
    skip: Tensor | None = None,
    gate: Tensor | None = None,
    dim: int = -1,
    save_spectra: bool = False,
) -> Tensor:
    """Convolve `u` causally with `kernel` along `dim`, in O(L log L) operations.

    Kernels of few taps K are applied in O(L K) operations.

    The result `y_t = gate_t (Σ_{j≤t} kernel_j u_{t−j} + skip u_t)` is differentiable to any order.
    A kernel that is longer than the input is cut to the input's length. A shorter kernel is zero
    past its end.

    The result is causal except for rounding errors. A transform mixes all samples of a row. So
    every output has an error of about eps `‖u‖₂ ‖kernel‖₂`, with the norms of the whole row. A
    sample that is NaN, infinite, or so large that spectra overflow also affects the outputs before
    it. It does not affect other rows, except the row that `use_triton` lets a kernel compute
    together with this one. If the input is processed in chunks or steps, it does not affect earlier
    chunks or steps.

    Args:
        u: The real input, of the shape S with a time axis of length L at `dim`: (batch, channels,
            length) for `dim=-1`, (batch, length, channels) for `dim=-2`. With either layout, the
            input is copied only block by block.
        kernel: (*C, K), real: the taps of the kernels; C broadcasts against S, aligned on the
            right.
        skip: Real, with a shape that broadcasts against S: a number that is added to tap 0 of each
            kernel.
        gate: Real, of the shape of `u`: the factors by which the result is multiplied.
        dim: The time axis of `u`.
        save_spectra: Whether to keep the spectrum of `u` for the backward pass (about twice the
            memory of `u` in float32) instead of transforming `u` again.

    Returns:
        A tensor with the shape, dtype and memory layout of `u`. If `kernel` or `skip` has more
        channels than `u`, the shape is larger, as in broadcasting. Inputs in float64 are convolved
        in float64, and all others in float32.

    Raises:
        TypeError: if an argument is complex or not floating point.
        ValueError: if the input or the kernel has length 0, or if the shapes do not broadcast.
    """
    operands = {"u": u, "kernel": kernel, "skip": skip, "gate": gate}
    _check("causal_convolution", operands, dim)
    signal, (kernel,) = _prepare("causal_convolution", u, {"kernel": kernel}, skip, dim)
    if skip is not None and _fits(skip.shape, kernel.shape[:-1]):
        tap = skip.to(kernel.dtype).expand(kernel.shape[:-1]).unsqueeze(-1)
        kernel = torch.cat((kernel[..., :1] + tap, kernel[..., 1:]), dim=-1)
        skip = None
    fused_gate = None
    if gate is not None and skip is None:
        fused_gate = gate.movedim(dim, -1).expand_as(signal)
    y, _ = _forward(signal, kernel, fused_gate, 0, save_spectra)
    if skip is not None:
        y = y + skip.unsqueeze(-1) * signal
        if gate is not None:
            y = gate.movedim(dim, -1) * y
        y = y.to(u.dtype)
    return y.movedim(-1, dim)


def bidirectional_convolution(u: Tensor, kernel: Tensor, ahead: Tensor, *, dim: int = -1) -> Tensor:
    """Convolve with the past and with the future of `u` along `dim`, in O(L log L) operations.

    The result `y_t = Σ_{j≥0} kernel_j u_{t−j} + Σ_{j≥0} ahead_j u_{t+1+j}` is differentiable to any
    order. The kernel `ahead` begins with the next sample, so the present sample enters once. The
    number of transforms is the same as for the causal convolution of the same input.

    Args:
        u: The real input, of the shape S with a time axis of length L at `dim`.
        kernel: (*C, K), real: the taps for the present and the past; C broadcasts against S,
            aligned on the right. A kernel longer than the input is cut to its first L taps.
        ahead: (*A, J), real: the taps for the future; A broadcasts against S and C.
        dim: The time axis of `u`.

    Returns:
        A tensor of the shape, dtype, memory layout and precision that `causal_convolution` returns.

    Raises:
        TypeError: if an argument is complex or not floating point.
        ValueError: if the input or a kernel has length 0, or if the shapes do not broadcast.
    """
    _check("bidirectional_convolution", {"u": u, "kernel": kernel, "ahead": ahead}, dim)
    kernels = {"kernel": kernel, "ahead": ahead}
    signal, (past, future) = _prepare("bidirectional_convolution", u, kernels, None, dim)
    future = future[..., : signal.shape[-1] - 1].flip(-1)
    channels = torch.broadcast_shapes(past.shape[:-1], future.shape[:-1])
    circular = torch.cat((past.expand(*channels, -1), future.expand(*channels, -1)), dim=-1)
    y, _ = _forward(signal, circular, None, future.shape[-1], False)
    return y.movedim(-1, dim)


def _prepare(
    name: str, u: Tensor, kernels: dict[str, Tensor], skip: Tensor | None, dim: int
) -> tuple[Tensor, list[Tensor]]:
    """Return the input with time last, (*S, L), and the kernels, (*S or 1, K).

    The kernels are cut to L taps and cast to the dtype in which the convolution is computed.
    """
    compute_dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    signal = u.movedim(dim, -1)
    channels = _channels(name, signal, kernels, skip)
    if channels != signal.shape[:-1]:
        signal = signal.expand(*channels, -1)
    cut_kernels = []
    for kernel in kernels.values():
        kernel = kernel[..., : at_most(signal.shape[-1], kernel.shape[-1])].to(compute_dtype)
        cut_kernels.append(kernel.reshape(*(1,) * (signal.ndim - kernel.ndim), *kernel.shape))
    return signal, cut_kernels


def _check(name: str, operands: dict[str, Tensor | None], dim: int) -> None:
    """Raise an error unless the operands are real with a time axis, and the gate fits `u`."""
    given = {key: tensor for key, tensor in operands.items() if tensor is not None}
    for key, tensor in given.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: {key} must be real floating point, not {tensor.dtype}.")
        if key in ("u", "kernel", "ahead") and tensor.ndim == 0:
            raise ValueError(f"{name}: {key} needs at least one dimension, time.")
    u = given["u"]
    if not -u.ndim <= dim < u.ndim:
        raise ValueError(f"{name}: dim={dim} is not an axis of u, which has {u.ndim} dimensions.")
    if u.shape[dim] == 0:
        raise ValueError(f"{name}: u {tuple(u.shape)} is empty along dim={dim}.")
    for key in ("kernel", "ahead"):
        if key in given and given[key].shape[-1] == 0:
            raise ValueError(f"{name}: {key} {tuple(given[key].shape)} has no taps.")
    if "gate" in given and given["gate"].shape != u.shape:
        raise ValueError(
            f"{name}: gate {tuple(given['gate'].shape)} must have the shape of u, {tuple(u.shape)}."
        )


def _channels(
    name: str, signal: Tensor, kernels: dict[str, Tensor], skip: Tensor | None
) -> torch.Size:
    """Return the shape to which the channels of all arguments broadcast."""
    operands = {"u": signal[..., 0], **{key: kernel[..., 0] for key, kernel in kernels.items()}}
    if skip is not None:
        operands["skip"] = skip
    try:
        return torch.broadcast_tensors(*operands.values())[0].shape
    except RuntimeError as error:
        given = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in operands.items())
        raise ValueError(
            f"{name}: the dimensions other than time do not broadcast: {given}."
        ) from error


def _fits(shape: torch.Size, into: torch.Size) -> bool:
    """Return whether broadcasting `shape` against `into` leaves `into` unchanged."""
    pairs = zip(reversed(shape), reversed(into), strict=False)
    return len(shape) <= len(into) and all(size in (1, own) for size, own in pairs)


class _PaddedTransform:
    """Fourier transforms of blocks of rows, in a scratch buffer that is padded with zeros."""

    def __init__(self, like: Tensor, rows: int, length: int, points: int) -> None:
        self.length, self.points = length, points
        scratch = like.new_empty(rows, points)
        scratch[:, length:] = 0
        self.scratch = scratch
        self.pitched = like.new_empty(rows, length + _PITCH) if like.device.type == "cpu" else None
        self.views: dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor | None]] = {}

    def _views(self, rows: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the scratch buffer of a block (*b, L), its first L columns and a result buffer."""
        if rows not in self.views:
            count = math.prod(rows)
            padded = self.scratch[:count].view(*rows, self.points)
            pitched = self.pitched
            if pitched is not None:
                pitched = pitched[:count, : self.length].view(*rows, self.length)
            self.views[rows] = (padded, padded[..., : self.length], pitched)
        return self.views[rows]

    def spectrum(self, signal: Tensor, factor: Tensor | None = None) -> Tensor:
        """Compute the spectrum (*b, F) of a block (*b, L) times `factor`, padded with zeros."""
        padded, inside, _ = self._views(tuple(signal.shape[:-1]))
        if factor is not None:
            torch.mul(signal, factor, out=inside)
        elif signal.stride(-1) == 1:
            inside.copy_(signal)
        else:  # copying whole cache lines first makes the transposition twice as fast
            inside.copy_(signal.clone())
        return torch.fft.rfft(padded)

    def signal(self, spectrum: Tensor, interleaved: bool = False) -> Tensor:
        """Transform `spectrum` (*b, F) back to (*b, L); the result is valid until the next call.

        If the result will be written to `interleaved` rows, the distance between its own rows is
        not a power of two.
        """
        result = torch.fft.irfft(spectrum, n=self.points)[..., : self.length]
        if not interleaved:
            return result
        pitched = self._views(tuple(spectrum.shape[:-1]))[2]
        return result if pitched is None else pitched.copy_(result)


def _points(u: Tensor, kernel: Tensor, ahead: int) -> int:
    """Return the length of the transforms."""
    return fft_length(u.shape[-1], max(kernel.shape[-1] - ahead, ahead + 1))


def _transfer(kernel: Tensor, points: int, ahead: int) -> Tensor:
    """Return the spectrum (*C, F) of kernels (*C, K) whose last `ahead` taps have negative lags."""
    if ahead:
        behind = kernel.shape[-1] - ahead
        gap = kernel.new_zeros(*kernel.shape[:-1], points - kernel.shape[-1])
        kernel = torch.cat((kernel[..., :behind], gap, kernel[..., behind:]), dim=-1)
    return torch.fft.rfft(kernel, n=points)


def _taps(spectrum: Tensor, points: int, taps: int, ahead: int) -> Tensor:
    """Apply the transpose of `_transfer`, which maps (*C, F) to (*C, taps)."""
    circular = torch.fft.irfft(spectrum, n=points)
    if not ahead:
        return circular[..., :taps]
    return torch.cat((circular[..., : taps - ahead], circular[..., points - ahead :]), dim=-1)


@operator("causal_convolution")
def _forward(
    u: Tensor, kernel: Tensor, gate: Tensor | None, ahead: int, save_spectra: bool
) -> tuple[Tensor, Tensor]:
    """Compute gate (T_h u) for u, gate (*S, L) and kernel (*S or 1, K), in the kernel's dtype.

    The last `ahead` taps have the lags −ahead to −1. The second result is the spectrum (*S, F) of
    u. It is empty if `save_spectra` is false.
    """
    if not ahead:  # a traced graph could not cut it before, where lengths are symbols
        kernel = kernel[..., : u.shape[-1]]
    if not ahead and not save_spectra and has_few_taps(u, kernel):
        return convolve_directly(u, kernel, gate), _empty_spectra(u, kernel, 0)
    if not ahead and not save_spectra and runs_in_triton(u) and covers(u, kernel):
        return fused_convolution(u, kernel, u, gate=gate), _empty_spectra(u, kernel, 0)
    points = _points(u, kernel, ahead)
    rows, tasks = cut(u, kernel, points, _CPU_BLOCK, _CPU_MIN_ROWS)
    y = torch.empty_like(u)
    spectra = _empty_spectra(u, kernel, points if save_spectra else 0)

    interleaved = y.stride(-1) != 1
    transform = _PaddedTransform(kernel, rows, u.shape[-1], points)
    for task in tasks:
        transfer = _transfer(kernel[task.shared], points, ahead)
        for block in task.blocks:
            spectrum = transform.spectrum(u[block])
            if save_spectra:
                spectra[block] = spectrum
            result = transform.signal(spectrum.mul_(transfer), interleaved)
            if gate is None:
                y[block] = result
            else:
                torch.mul(result, gate[block], out=y[block])
    return y, spectra


@operator("causal_convolution_backward")
def _backward(
    g: Tensor,
    u: Tensor,
    kernel: Tensor,
    gate: Tensor | None,
    spectra: Tensor,
    ahead: int,
    needs_u: bool,
    needs_kernel: bool,
    needs_gate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of u, kernel and gate for the gradient g of `_forward`'s output.

    Gradients that are not needed are empty.
    """
    needs = [needs_u, needs_kernel, needs_gate]
    if not ahead and not spectra.numel() and has_few_taps(u, kernel):
        found = differentiate_directly(g, u, kernel, gate, needs)
        grads = zip(found, _empty_gradients(u, kernel, gate, [False] * 3), strict=True)
        of_u, of_kernel, of_gate = (none if grad is None else grad for grad, none in grads)
        return of_u, of_kernel, of_gate
    if not ahead and not spectra.numel() and runs_in_triton(u) and covers(u, kernel):
        return _differentiate_in_triton(g, u, kernel, gate, needs)
    points = _points(u, kernel, ahead)
    rows, tasks = cut(u, kernel, points, _CPU_BLOCK, _CPU_MIN_ROWS)
    grad_u, grad_kernel, grad_gate = _empty_gradients(u, kernel, gate, needs)
    summed = [axis for axis, size in enumerate(kernel.shape[:-1]) if size == 1]

    interleaved = u.stride(-1) != 1
    transform = _PaddedTransform(kernel, rows, u.shape[-1], points)
    for task in tasks:
        transfer = _transfer(kernel[task.shared], points, ahead)
        adjoint = transfer.conj_physical()
        total = None  # spectrum of the kernel's gradient
        for block in task.blocks:
            if needs_kernel or needs_gate:
                saved = spectra.numel() > 0
                signal = spectra[block].clone() if saved else transform.spectrum(u[block])
            if needs_gate:
                torch.mul(transform.signal(signal * transfer), g[block], out=grad_gate[block])
            if needs_u or needs_kernel:
                incoming = transform.spectrum(g[block], None if gate is None else gate[block])
            if needs_kernel:
                part = signal.conj_physical_().mul_(incoming)
                many = [axis for axis in summed if part.shape[axis] > 1]
                part = part.sum(many, keepdim=True) if many else part
                total = part if total is None else total.add_(part)
            if needs_u:
                grad_u[block] = transform.signal(incoming.mul_(adjoint), interleaved)
        if needs_kernel and total is None:  # a batch of no rows
            grad_kernel[task.shared] = 0
        elif total is not None:
            grad_kernel[task.shared] = _taps(total, points, kernel.shape[-1], ahead)
    return grad_u, grad_kernel, grad_gate


def _differentiate_in_triton(
    g: Tensor, u: Tensor, kernel: Tensor, gate: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    needs_u, needs_kernel, needs_gate = needs
    of_u, of_kernel, of_gate = _empty_gradients(u, kernel, gate, [False] * 3)
    if needs_u:
        of_u = fused_convolution(g, kernel, u, factor=gate, adjoint=True)
    if needs_kernel:
        of_kernel = fused_correlation(g, u, kernel, factor=gate)
    if needs_gate and gate is not None:
        of_gate = fused_convolution(u, kernel, gate, gate=g)
    return of_u, of_kernel, of_gate


def _empty_gradients(
    u: Tensor, kernel: Tensor, gate: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    needs_u, needs_kernel, needs_gate = needs
    return (
        torch.empty_like(u) if needs_u else u.new_empty(0),
        torch.empty_like(kernel) if needs_kernel else kernel.new_empty(0),
        torch.empty_like(gate) if needs_gate and gate is not None else u.new_empty(0),
    )


def _empty_spectra(u: Tensor, kernel: Tensor, points: int) -> Tensor:
    """Allocate memory for the spectra of u by transforms of `points` points; none for 0 points."""
    dtype = complex_dtype(kernel.dtype)
    shape = (*u.shape[:-1], points // 2 + 1) if points else (0,)
    return u.new_empty(shape, dtype=dtype)


@register_fake(_forward)
def _forward_fake(
    u: Tensor, kernel: Tensor, gate: Tensor | None, ahead: int, save_spectra: bool
) -> tuple[Tensor, Tensor]:
    points = _points(u, kernel, ahead) if save_spectra else 0
    return torch.empty_like(u), _empty_spectra(u, kernel, points)


@register_fake(_backward)
def _backward_fake(
    g: Tensor,
    u: Tensor,
    kernel: Tensor,
    gate: Tensor | None,
    spectra: Tensor,
    ahead: int,
    needs_u: bool,
    needs_kernel: bool,
    needs_gate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(u, kernel, gate, [needs_u, needs_kernel, needs_gate])


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    u, kernel, gate, ctx.ahead, _ = inputs
    _, spectra = output
    ctx.mark_non_differentiable(spectra)
    ctx.save_for_backward(u, kernel, gate, spectra)


def _forward_backward(ctx: Any, g: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    u, kernel, gate, spectra = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    grads = _backward(g, u, kernel, gate, spectra, ctx.ahead, *needs)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    g, u, kernel, gate, _, ctx.ahead, *needs = inputs
    ctx.set_materialize_grads(False)
    ctx.needs = needs
    ctx.save_for_backward(g, u, kernel, gate)


def _backward_backward(
    ctx: Any, v_u: Tensor | None, v_kernel: Tensor | None, v_gate: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Differentiate ⟨v_u, T_hᵀ p⟩ + ⟨v_h, k(p, u)⟩ + ⟨v_gate, g (T_h u)⟩, p = gate g.

    Because ⟨v_h, k(p, u)⟩ = ⟨p, T_{v_h} u⟩, each term is again a forward or backward operator.
    """
    g, u, kernel, gate = ctx.saved_tensors
    ahead = ctx.ahead
    v_u, v_kernel, v_gate = (
        v if need else None for v, need in zip((v_u, v_kernel, v_gate), ctx.needs, strict=True)
    )
    wants_u, wants_kernel = ctx.needs_input_grad[1:3]
    grads: list[Tensor | None] = [None, None, None, None]  # of g, u, kernel, gate

    def add(position: int, value: Tensor) -> None:
        total = grads[position]
        grads[position] = value if total is None else total + value

    for v, h in ((v_u, kernel), (u, v_kernel)):
        if v is not None and h is not None:
            result, _ = _forward(v, h, None, ahead, False)
            add(0, result if gate is None else gate * result)
            if gate is not None:
                add(3, g * result)
    if v_gate is not None:
        add(0, v_gate * _forward(u, kernel, None, ahead, False)[0])

    first = (g if gate is None else gate * g, v_u, v_kernel)
    second = (None if v_gate is None else v_gate * g, u, kernel)
    for p, v, h in (first, second):
        needs = [wants_u and h is not None, wants_kernel and v is not None, False]
        if p is not None and any(needs):
            v, h = u if v is None else v, kernel if h is None else h
            of_u, of_kernel, _ = _backward(p, v, h, None, _empty_spectra(v, h, 0), ahead, *needs)
            if needs[0]:
                add(1, of_u)
            if needs[1]:
                add(2, of_kernel)
    return (
        *(
            None if grad is None else grad.to(like.dtype)
            for grad, like in zip(grads, (g, u, kernel, gate), strict=True)
        ),
        *(None,) * 5,
    )


def _forward_jvp(
    inputs: Sequence[Any], tangents: Sequence[Tensor | None]
) -> tuple[Tensor | None, None]:
    """Compute the tangent from the linearity of the operator in each of u, kernel and gate."""
    u, kernel, gate, ahead, _ = inputs
    t_u, t_kernel, t_gate, *_ = tangents
    terms = [
        _forward(v, h, gate, ahead, False)[0]
        for v, h in ((t_u, kernel), (u, t_kernel))
        if v is not None and h is not None
    ]
    if t_gate is not None:
        terms.append((t_gate * _forward(u, kernel, None, ahead, False)[0]).to(u.dtype))
    return total(*terms), None


def _backward_jvp(
    inputs: Sequence[Any], tangents: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Compute the tangents of `(T_hᵀ p, k(p, u), g (T_h u))`, p = gate g.

    Each of the three expressions is linear in every variable that it contains.
    """
    g, u, kernel, gate, _, ahead, *needs = inputs
    t_g, t_u, t_kernel, t_gate, *_ = tangents
    p = g if gate is None else gate * g
    t_p = t_g if gate is None or t_g is None else gate * t_g
    if t_gate is not None:
        t_p = total(t_p, t_gate * g)
    nothing = _empty_spectra(u, kernel, 0)
    of_u: list[Tensor] = []
    of_kernel: list[Tensor] = []
    for q, v, h in ((t_p, u, kernel), (p, t_u, t_kernel)):
        wanted = [needs[0] and h is not None, needs[1] and v is not None, False]
        if q is None or not any(wanted):
            continue
        v, h = u if v is None else v, kernel if h is None else h
        first, second, _ = _backward(q, v, h, None, nothing, ahead, *wanted)
        of_u += [first] * wanted[0]
        of_kernel += [second] * wanted[1]
    of_gate = []
    if needs[2]:
        for f, v, h in ((t_g, u, kernel), (g, t_u, kernel), (g, u, t_kernel)):
            if f is not None and v is not None and h is not None:
                of_gate.append(f * _forward(v, h, None, ahead, False)[0])
    wanted_of = zip(
        (of_u, of_kernel, of_gate), _empty_gradients(u, kernel, gate, needs), strict=True
    )
    return tuple(sum(terms, torch.zeros_like(empty)).to(empty.dtype) for terms, empty in wanted_of)


differentiable(_forward, setup=_forward_setup, backward=_forward_backward, jvp=_forward_jvp)
differentiable(_backward, setup=_backward_setup, backward=_backward_backward, jvp=_backward_jvp)


@register_vmap(_forward)
def _forward_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    u: Tensor,
    kernel: Tensor,
    gate: Tensor | None,
    ahead: int,
    save_spectra: bool,
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    size = info.batch_size
    y, spectra = _forward(
        batch_first(u, in_dims[0], size),
        batch_first(kernel, in_dims[1]),
        batch_first(gate, in_dims[2], size),
        ahead,
        save_spectra,
    )
    return (y, spectra), (0, 0 if save_spectra else None)


@register_vmap(_backward)
def _backward_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    g: Tensor,
    u: Tensor,
    kernel: Tensor,
    gate: Tensor | None,
    spectra: Tensor,
    ahead: int,
    *needs: bool,
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    size = info.batch_size
    mapped = batch_first(spectra, in_dims[4], size) if spectra.numel() else spectra
    grads = _backward(
        batch_first(g, in_dims[0], size),
        batch_first(u, in_dims[1], size),
        batch_first(kernel, in_dims[2], size),
        batch_first(gate, in_dims[3], size),
        mapped,
        ahead,
        *needs,
    )
    return grads, tuple(0 if need else None for need in needs)
