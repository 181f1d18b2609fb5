r"""Products with Vandermonde matrices, as matrix products of about √L × √L blocks.

A modal impulse response is `h_t = Re Σ_k c_k λ_k^t`. With `t = iJ + j` the power splits into
`λ^{iJ} λ^j`, so the L × m Vandermonde matrix is never formed: its product is one real matrix
product of `c_k λ_k^{iJ}` and `λ_k^j`, each with about √L rows. The transposed product,
`Σ_j λ^{T-1-j} u_j`, is the final state of a modal recurrence and splits in the same way.

Powers of about L^(1/4) steps are computed by doubling in double precision and then rounded, so that
a pole on the negative real axis keeps its phase over thousands of steps. All other powers are
products of two of these. The product and the transposed product are operators, and the backward
pass of each consists of the other. They work on blocks of channels that stay in cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake, register_vmap

from gramian.ops._blocks import Task, cut
from gramian.ops._operator import batch_first, differentiable, operator, total
from gramian.ops.derivatives import records_derivatives
from gramian.ops.precision import complex_dtype

__all__ = [
    "geometric_powers",
    "integer_power",
    "vandermonde_product",
    "vandermonde_transpose_product",
]

# The number of elements in one block on a CPU.
_CPU_NUMBERS = 2**21


def geometric_powers(base: Tensor, count: int) -> Tensor:
    """Compute the powers `base^0, …, base^(count - 1)` by doubling. They are exact for base 0.

    Args:
        base: (*C, m), real or complex: the numbers to raise to powers.
        count: The number of powers, at least 1.

    Returns:
        (*C, m, count), of the dtype of `base`.
    """
    powers = torch.ones_like(base).unsqueeze(-1)
    step = base.unsqueeze(-1)  # base^(number of powers so far)
    while (have := powers.shape[-1]) < count:
        powers = torch.cat([powers, powers[..., : count - have] * step], dim=-1)
        step = step * step
    return powers


def integer_power(base: Tensor, exponent: int) -> Tensor:
    """Raise `base` to a power ≥ 0 by squaring. Powers of 0 are exact, with `0^0 = 1`."""
    result = torch.ones_like(base)
    while exponent:
        if exponent & 1:
            result = result * base
        base = base * base
        exponent >>= 1
    return result


def vandermonde_product(poles: Tensor, coefficients: Tensor, length: int) -> Tensor:
    """Compute `Re Σ_k coefficients_k poles_k^t` for t = 0 … length - 1.

    The result is differentiable to any order. The backward pass is the transposed product and keeps
    only the arguments.

    Args:
        poles: (*C, m), complex: the poles.
        coefficients: (*B, m), complex: a coefficient for every pole. `C` broadcasts against `B`.
            Along dimensions where `C` has size 1, powers are computed once and shared.
        length: The number of samples, at least 1.

    Returns:
        (*B, length), real, of the precision of `coefficients`.
    """
    grouped, restore = group_channels(coefficients, poles.shape[:-1])  # (G, R, m)
    return restore(_product(poles.reshape(grouped.shape[0], -1), grouped, length))


def vandermonde_transpose_product(poles: Tensor, signal: Tensor) -> Tensor:
    """Compute `Σ_j poles_k^(T-1-j) signal_j`, the state of a modal recurrence after T inputs.

    The result is differentiable to any order.

    Args:
        poles: (*C, m), complex: the poles.
        signal: (*B, T), real: the inputs; `C` broadcasts against `B`.

    Returns:
        (*B, m), complex, of the precision of `signal`.
    """
    grouped, restore = group_channels(signal.flip(-1), poles.shape[:-1])  # (G, R, T)
    return restore(_transpose_product(poles.reshape(grouped.shape[0], -1), grouped))


def group_channels(tensor: Tensor, shape: torch.Size) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Reshape `tensor` (*B, k) to (G, R, k), where G runs over the axes along which `shape` varies.

    Returns:
        The grouped tensor, and the function that reshapes a (G, R, k') result back to (*B, k').
    """
    lead = torch.broadcast_shapes(tensor.shape[:-1], shape)
    tensor = tensor.expand(*lead, tensor.shape[-1])
    varies = [False] * (len(lead) - len(shape)) + [size != 1 for size in shape]
    order = [i for i, v in enumerate(varies) if v] + [i for i, v in enumerate(varies) if not v]
    groups = math.prod([lead[i] for i, v in enumerate(varies) if v])
    inverse = [order.index(axis) for axis in range(len(order))]

    def restore(result: Tensor) -> Tensor:
        result = result.reshape([*[lead[i] for i in order], result.shape[-1]])
        return result.permute(*inverse, len(order))

    permuted = tensor.permute(*order, len(order))
    repeats = math.prod(lead) // max(groups, 1)
    return permuted.reshape(groups, repeats, tensor.shape[-1]), restore


def _split(length: int) -> tuple[int, int]:
    """Return I and J, about equal, where J is a power of two and I J ≥ length > (I - 1) J."""
    columns = 2 ** round(math.log2(length) / 2)
    return -(-length // columns), columns


def _tasks(rows: Tensor, poles: Tensor, length: int) -> list[Task]:
    """Divide `rows` (G, R, …) that share their poles (G, m) into blocks that fit into the cache."""
    numbers = 4 * poles.shape[-1] * sum(_split(length)) + length
    return cut(rows, poles.unsqueeze(1), numbers, _CPU_NUMBERS, 1)[1]


def _powers(base: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Compute `base^0, …, base^(count - 1)`, (count, *base), by doubling.

    The second result is the last square, which is `base^count` if `count` is a power of two.
    """
    powers = base.new_empty(count, *base.shape)
    powers[0] = 1
    have, square = 1, base
    while have < count:
        more = min(have, count - have)
        torch.mul(powers[:more], square, out=powers[have : have + more])
        have, square = have + more, square * square
    return powers, square


def _progression(base: Tensor, first: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Compute `first · base^t` for t = 0 … count - 1 in the precision of `first`.

    Every power is a product of two powers that were computed in double precision and then rounded.
    So most of the work is in the precision of the result, and no error accumulates.

    Args:
        base: (g, m), complex128: the ratio of each progression.
        first: (*R, g, m): its first element.

    Returns:
        (*R, count, g, m), and `base^count` in complex128 if `count` is a power of two.
    """
    fine = 2 ** math.ceil(math.log2(count) / 2)
    low, square = _powers(base, fine)
    high, square = _powers(square, -(-count // fine))
    high = (first.unsqueeze(-3) * high).to(first.dtype)  # (*R, ⌈count / fine⌉, g, m)
    powers = (high.unsqueeze(-3) * low.to(first.dtype)).flatten(-4, -3)
    return powers[..., :count, :, :], square


def _basis(poles: Tensor, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute λ^j, j < J = `columns`, as real pairs (J, g, 2m), and λ^J in complex128."""
    wide = poles.to(torch.complex128)
    powers, stride = _progression(wide, torch.ones_like(poles, dtype=dtype), columns)
    return _pairs(powers), stride


def _pairs(values: Tensor) -> Tensor:
    """View complex (…, m) as real (…, 2m) with alternating real and imaginary parts."""
    return torch.view_as_real(values).flatten(-2)


def _unpair(values: Tensor) -> Tensor:
    """View real (…, 2m) as complex (…, m)."""
    return torch.view_as_complex(values.unflatten(-1, (-1, 2)))


def _folded(signal: Tensor, columns: int) -> Tensor:
    """Pad (g, r, T) with zeros at the end, and cut it into rows of J = `columns`, (g, r I, J)."""
    padded = torch.nn.functional.pad(signal, (0, -signal.shape[-1] % columns))
    return padded.reshape(len(signal), -1, columns)


@operator("vandermonde_product")
def _product(poles: Tensor, coefficients: Tensor, length: int) -> Tensor:
    """Compute `Re Σ_k c_k λ_k^t`, (G, R, length), for poles (G, m), coefficients (G, R, m)."""
    samples = coefficients.real.new_empty(*coefficients.shape[:2], length)
    rows, columns = _split(length)

    for task in _tasks(samples, poles, length):
        inner, stride = _basis(poles[task.shared[0]], columns, coefficients.dtype)
        right = inner.permute(1, 2, 0)  # (g, 2m, J)
        for block in task.blocks:
            # Re(x y) is the inner product of the pairs of x̄ and y. PyTorch ignores a lazy conj in
            # the first call of a compiled function.
            first = coefficients[block].conj_physical().transpose(0, 1)  # (r, g, m)
            left, _ = _progression(stride.conj_physical(), first, rows)  # (r, I, g, m)
            left = _pairs(left).flatten(0, 1)  # (r I, g, 2m)
            values = left.transpose(0, 1) @ right  # (g, r I, J)
            samples[block] = values.reshape(*samples[block].shape[:2], -1)[..., :length]
    return samples


@operator("vandermonde_transpose_product")
def _transpose_product(poles: Tensor, signal: Tensor) -> Tensor:
    """Compute `Σ_t signal_t λ_k^t`, (G, R, m), for poles (G, m) and a signal (G, R, T)."""
    length, dtype = signal.shape[-1], complex_dtype(signal.dtype)
    sums = signal.new_empty(*signal.shape[:2], poles.shape[-1], dtype=dtype)
    rows, columns = _split(length)

    for task in _tasks(sums, poles, length):
        inner, stride = _basis(poles[task.shared[0]], columns, dtype)
        for block in task.blocks:
            partial = _folded(signal[block], columns) @ inner.transpose(0, 1)  # (g, r I, 2m)
            partial = _unpair(partial).unflatten(1, (-1, rows))  # (g, r, I, m)
            _fold_rows(partial, stride)
            sums[block] = partial[:, :, 0]
    return sums


@operator("vandermonde_product_backward")
def _product_backward(g: Tensor, poles: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of poles (G, m) and coefficients (G, R, m) from g (G, R, L).

    Here g is the gradient of the samples. The gradients are the conjugates of
    `Σ_r c_r Σ_t t g_t λ^{t-1}` and `Σ_t g_t λ^t`. One product with the powers λ^j and their
    derivatives gives the sums over the columns. Then the rows, of both values and derivatives, are
    folded in half until one row is left.
    """
    modes, (rows, columns) = poles.shape[-1], _split(g.shape[-1])
    of_poles, of_coefficients = torch.empty_like(poles), coefficients.new_empty(coefficients.shape)
    if not modes:  # there is nothing to differentiate
        return of_poles, of_coefficients
    count = torch.arange(1, columns, dtype=g.dtype, device=g.device).reshape(-1, 1, 1)
    for task in _tasks(of_coefficients, poles, g.shape[-1]):
        own = poles[task.shared[0]]
        inner, stride = _basis(own, columns, coefficients.dtype)
        basis = inner.new_empty(*inner.shape[:2], 4 * modes)
        basis[..., : 2 * modes] = inner
        basis[0, :, 2 * modes :] = 0
        torch.mul(inner[:-1], count, out=basis[1:, :, 2 * modes :])  # j λ^{j-1}
        slope = columns * _unpair(inner[-1])  # J λ^{J-1}
        total = torch.zeros_like(own)
        for block in task.blocks:
            partial = _folded(g[block], columns) @ basis.transpose(0, 1)  # (g, r I, 4m)
            partial = _unpair(partial).unflatten(1, (-1, rows))  # (g, r, I, 2m)
            plain, steep = partial.split(modes, dim=-1)
            _fold_rows(plain, stride, steep, slope)
            of_coefficients[block] = plain[:, :, 0].conj_physical()
            total += (steep[:, :, 0] * coefficients[block]).sum(1)
        of_poles[task.shared[0]] = total.conj_physical()
    return of_poles, of_coefficients


def _fold_rows(
    values: Tensor, stride: Tensor, derivatives: Tensor | None = None, slope: Tensor | None = None
) -> None:
    """Leave `Σ_i stride^i values_i` in row 0 of values (g, r, I, m).

    If the derivatives of the rows and of the stride (g, m) are given, leave the derivative of the
    sum in row 0 of `derivatives`.
    """
    rows = values.shape[-2]
    steps = [(stride, slope)]  # stride^h and its derivative for h = 1, 2, 4, …
    while 2 ** len(steps) < rows:
        square, slope = steps[-1]
        steps.append((square * square, None if slope is None else 2 * square * slope))
    while rows > 1:
        half = 2 ** ((rows - 1).bit_length() - 1)
        power, slope = steps[half.bit_length() - 1]
        early, late = slice(rows - half), slice(half, rows)
        factor = power.to(values.dtype)[:, None, None]
        if derivatives is not None and slope is not None:
            rate = slope.to(values.dtype)[:, None, None]
            derivatives[:, :, early].addcmul_(derivatives[:, :, late], factor)
            derivatives[:, :, early].addcmul_(values[:, :, late], rate)
        values[:, :, early].addcmul_(values[:, :, late], factor)
        rows = half


@register_fake(_product)
def _product_fake(poles: Tensor, coefficients: Tensor, length: int) -> Tensor:
    return coefficients.real.new_empty(*coefficients.shape[:2], length)


@register_fake(_transpose_product)
def _transpose_product_fake(poles: Tensor, signal: Tensor) -> Tensor:
    shape = (*signal.shape[:2], poles.shape[-1])
    return signal.new_empty(shape, dtype=complex_dtype(signal.dtype))


@register_fake(_product_backward)
def _product_backward_fake(g: Tensor, poles: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(poles), coefficients.new_empty(coefficients.shape)


def _pole_sums(poles: Tensor, signal: Tensor) -> Tensor:
    """Compute `Σ_t t signal_t λ^{t-1}`, the derivative of the transposed product, (G, R, m)."""
    time = torch.arange(1, signal.shape[-1], dtype=signal.dtype, device=signal.device)
    weighted = torch.nn.functional.pad(time * signal[..., 1:], (0, 1))
    return _transpose_product(poles, weighted)


def _setup_product(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _differentiate_product(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
    poles, coefficients = ctx.saved_tensors
    if records_derivatives():  # the gradient is differentiated too: record the same formula
        of_coefficients = _transpose_product(poles, g).conj_physical()
        of_poles = (coefficients * _pole_sums(poles, g)).sum(1).conj_physical().to(poles.dtype)
    else:
        of_poles, of_coefficients = _product_backward(g, poles, coefficients)
    return of_poles, of_coefficients, None


def _setup_transpose_product(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_transpose_product(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    poles, signal = ctx.saved_tensors
    of_poles = (g * _pole_sums(poles, signal).conj_physical()).sum(1).to(poles.dtype)
    return of_poles, _product(poles, g.conj_physical(), signal.shape[-1])


def _product_jvp(inputs: Sequence[Any], tangents: Sequence[Tensor | None]) -> Tensor | None:
    """Compute the tangent of the product.

    The tangents τ of the coefficients contribute `Re Σ_k τ_k λ_k^t`. The tangents s of the poles
    contribute `t Re Σ_k c_k s_k λ_k^{t-1}`.
    """
    poles, coefficients, length = inputs
    t_poles, t_coefficients, _ = tangents
    of_poles = None
    if t_poles is not None:
        turned = coefficients * t_poles.to(coefficients.dtype).unsqueeze(1)
        if length == 1:
            of_poles = torch.zeros_like(coefficients.real[..., :1])
        else:
            values = _product(poles, turned, length - 1)
            time = torch.arange(1, length, dtype=values.dtype, device=values.device)
            of_poles = torch.nn.functional.pad(time * values, (1, 0))
    return total(
        of_poles, None if t_coefficients is None else _product(poles, t_coefficients, length)
    )


def _transpose_product_jvp(
    inputs: Sequence[Any], tangents: Sequence[Tensor | None]
) -> Tensor | None:
    poles, signal = inputs
    t_poles, t_signal = tangents
    of_poles = None
    if t_poles is not None:
        sums = _pole_sums(poles, signal)
        of_poles = t_poles.to(sums.dtype).unsqueeze(1) * sums
    return total(of_poles, None if t_signal is None else _transpose_product(poles, t_signal))


differentiable(_product, setup=_setup_product, backward=_differentiate_product, jvp=_product_jvp)
differentiable(
    _transpose_product,
    setup=_setup_transpose_product,
    backward=_differentiate_transpose_product,
    jvp=_transpose_product_jvp,
)
differentiable(_product_backward)


def _register_vmap(op: Any) -> None:
    """Register the vmap rule of an operator, in which mapped entries become further groups."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        size = info.batch_size
        values = [
            batch_first(value, axis, size) for value, axis in zip(inputs, in_dims, strict=True)
        ]
        outputs = op(*(v.flatten(0, 1) if isinstance(v, Tensor) else v for v in values))
        if isinstance(outputs, tuple):
            return tuple(one.unflatten(0, (size, -1)) for one in outputs), (0,) * len(outputs)
        return outputs.unflatten(0, (size, -1)), 0

    register_vmap(op, rule)


_register_vmap(_product)
_register_vmap(_transpose_product)
_register_vmap(_product_backward)
