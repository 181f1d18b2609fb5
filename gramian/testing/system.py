"""Test that a system is one operator, run whole, in chunks, by steps or as a matrix."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from gramian.systems import State, System, TimeInvariantSystem
from gramian.testing.comparison import require, require_close

__all__ = ["check_system"]

_PRECISIONS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest relative error accepted for an input of each dtype."""


def check_system(
    system: System[Any], *, length: int = 63, tolerance: float | None = None, seed: int = 0
) -> None:
    """Check that a system computes the same causal operator in every mode.

    The reference is a plain sum over the system's taps, or over the rows of its dense matrix if the
    system is not time-invariant. The following results must agree with it:

    - the dense matrix;
    - the outputs for 1, 2, 3 and `length` samples;
    - chunks and steps that continue from a state;
    - the gradient with respect to the input;
    - the outputs for inputs in single precision and bfloat16.

    Derivatives with respect to the system's tensors must agree with finite differences. The
    operator must stay the same if a channel is indexed, the system is flattened as a pytree, or
    states are selected and repeated.

    Args:
        system: a system of any realization, with any channel dimensions.
        length: number of samples of the longest input, which must not exceed the length of the
            system, if the system has one.
        tolerance: largest relative error accepted; by default 1e-9 for a system in double precision
            and 1e-4 for others.
        seed: seed of the random inputs.

    Raises:
        AssertionError: if a property fails. The message names the property.
        TypeError: if `system` is not a `System`.
    """
    if not isinstance(system, System):
        raise TypeError(f"check_system takes a System; got {type(system).__name__}.")
    system = system.detach()
    if tolerance is None:
        tolerance = 1e-9 if system.dtype == torch.float64 else 1e-4
    random = torch.Generator().manual_seed(seed)
    name = f"the system {type(system).__name__}"
    shape = (2, *system.channel_shape)
    u = torch.randn(*shape, length, dtype=torch.float64, generator=random)
    u = u.to(system.device, system.dtype)
    expected = _apply_definition(system, name, u, tolerance)
    for short in sorted({1, min(2, length), min(3, length), length}):
        inputs, outputs = u[..., :short], expected[..., :short]
        claim = f"{name}: system(u) of {short} samples must be its definition"
        require_close(claim, system(inputs), outputs, tolerance)
        _check_recurrence(system, name, inputs, outputs, tolerance)
    _check_input_gradient(system, name, u, tolerance)
    _check_field_gradients(system, name, u[..., : min(length, 16)], random)
    for dtype, accepted in _PRECISIONS.items():
        rounded = u.to(dtype)
        outputs = _apply_definition(system, name, rounded.to(system.dtype), tolerance)
        y = system(rounded)
        require(y.dtype == dtype, f"{name}: an input in {dtype} must stay so; got {y.dtype}.")
        claim = f"{name}: an input in {dtype} must give the outputs of its definition"
        require_close(claim, y, outputs, max(accepted, tolerance))
    _check_structure(system, name, length)
    _check_states(system, name, u, tolerance)


def _apply_definition(system: System[Any], name: str, u: Tensor, tolerance: float) -> Tensor:
    """Return the output as a plain sum over taps or matrix rows, and check the dense matrix."""
    length = u.shape[-1]
    matrix = system.matrix(length)
    wanted = (*system.channel_shape, length, length)
    require(
        matrix.shape == wanted,
        f"{name}: matrix({length}) must be of shape {wanted}; got {tuple(matrix.shape)}.",
    )
    require(not matrix.triu(1).any(), f"{name}: matrix({length}) must be lower triangular.")
    if not isinstance(system, TimeInvariantSystem):
        return (matrix * u.unsqueeze(-2)).sum(-1)
    taps = system.impulse_response(length)
    require(taps.isfinite().all(), f"{name}: impulse_response({length}) must be finite.")
    y = torch.zeros_like(u)
    for lag in range(length):
        y[..., lag:] += taps[..., lag, None] * u[..., : length - lag]
        diagonal = matrix.diagonal(-lag, dim1=-2, dim2=-1)
        claim = f"{name}: diagonal {-lag} of matrix({length}) must be tap {lag}"
        require_close(claim, diagonal, taps[..., lag, None].expand_as(diagonal), tolerance)
    return y


def _check_recurrence(
    system: System[Any], name: str, u: Tensor, expected: Tensor, tolerance: float
) -> None:
    length, recurrence = u.shape[-1], system.recurrence()
    where = f'of the recurrence "{recurrence.form}", {length} samples'
    state, outputs = recurrence.initial_state(u.shape[:-1]), []
    for sample in u.unbind(-1):
        kept = state.clone()
        ahead, _ = recurrence.advance(sample, state)
        _require_same(f"{name}: advance must not write into its state, {where}", state, kept)
        y, state = recurrence.step(sample, state)
        require_close(f"{name}: advance must be the step, {where}", ahead, y, tolerance)
        outputs.append(y)
    y = torch.stack(outputs, -1)
    require_close(f"{name}: steps must give the outputs {where}", y, expected, tolerance)

    first, second = length // 3, length // 2
    state, outputs = recurrence.initial_state(u.shape[:-1]), []
    if first:
        y, state = recurrence.prefill(u[..., :first])
        outputs.append(y)
    for sample in u[..., first:second].unbind(-1):
        y, state = recurrence.step(sample, state)
        outputs.append(y.unsqueeze(-1))
    y, state = system(u[..., second:], state)
    claim = f"{name}: chunks and steps must give the outputs {where}"
    require_close(claim, torch.cat([*outputs, y], -1), expected, tolerance)


def _check_input_gradient(system: System[Any], name: str, u: Tensor, tolerance: float) -> None:
    """Check that the gradient of `weight · T u` with respect to u is `Tᵀ weight`."""
    weight = u.flip(0, -1)
    matrix = system.matrix(u.shape[-1])
    expected = (matrix.mT * weight.unsqueeze(-2)).sum(-1)
    u = u.detach().requires_grad_()
    (found,) = torch.autograd.grad((system(u) * weight).sum(), [u])
    claim = f"{name}: the gradient in the input must be the transposed matrix on the outputs'"
    require_close(claim, found, expected, tolerance)
    half = u.shape[-1] // 2
    if half:
        state = system.recurrence().initial_state(u.shape[:-1])
        first, state = system(u[..., :half], state)
        second, _ = system(u[..., half:], state)
        loss = (torch.cat([first, second], -1) * weight).sum()
        (found,) = torch.autograd.grad(loss, [u])
        claim = f"{name}: gradients must flow through the state that chunks carry"
        require_close(claim, found, expected, tolerance)


def _check_field_gradients(
    system: System[Any], name: str, u: Tensor, random: torch.Generator
) -> None:
    """Compare derivatives with respect to each tensor, in a random direction, with differences.

    The differences are central differences of the outputs.
    """
    double, u = system.to(dtype=torch.float64), u.double()
    leaves, spec = pytree.tree_flatten(double)
    for n, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor) or not leaf.numel():
            continue
        if not (leaf.is_floating_point() or leaf.is_complex()):
            continue
        direction = torch.randn(leaf.shape, dtype=leaf.dtype, generator=random).to(leaf.device)
        step = 1e-6 * float(leaf.abs().max().clamp_min(1e-3))

        def evaluate(value: Tensor, n: int = n) -> Tensor:
            made = pytree.tree_unflatten([*leaves[:n], value, *leaves[n + 1 :]], spec)
            return (made(u) * u).sum()

        moving = leaf.detach().requires_grad_()
        loss = evaluate(moving)
        gradient = torch.zeros_like(leaf)
        if loss.requires_grad:  # the outputs need not depend on every tensor
            (gradient,) = torch.autograd.grad(
                loss, [moving], allow_unused=True, materialize_grads=True
            )
        found = (gradient.conj() * direction).sum().real
        with torch.no_grad():
            ends = [evaluate(leaf + sign * step * direction) for sign in (1, -1)]
            size = evaluate(leaf).abs() * 1e-7 + gradient.abs().max() * 1e-2
        expected = (ends[0] - ends[1]) / (2 * step)
        require(
            (found - expected).abs() <= 1e-4 * expected.abs() + 1e-3 * size,
            f"{name}: the derivative in tensor {n} of its pytree must be that of a difference: "
            f"{float(found):.6g} is not {float(expected):.6g}.",
        )


def _check_structure(system: System[Any], name: str, length: int) -> None:
    order = system.order
    require(
        isinstance(order, int) and order >= 0,
        f"{name}: order must be an integer of at least 0; got {order!r}.",
    )
    leaves, spec = pytree.tree_flatten(system)
    again = pytree.tree_unflatten(leaves, spec)
    matrix = system.matrix(length)
    require(
        type(again) is type(system) and torch.equal(again.matrix(length), matrix),
        f"{name}: its pytree must make the same system again.",
    )
    if system.channel_shape and system.channel_shape[0]:
        claim = f"{name}: system[0] must be its first channel"
        require_close(claim, system[0].matrix(length), matrix[0], 1e-6)


def _check_states(system: System[Any], name: str, u: Tensor, tolerance: float) -> None:
    """Check that a selected or repeated state continues as the state of its sequence does."""
    recurrence, half = system.recurrence(), u.shape[-1] // 2
    if not half:
        return
    _, state = recurrence.prefill(u[..., :half])
    require(isinstance(state, State), f"{name}: a state must be a State; got {type(state)}.")
    for tensor in pytree.tree_leaves(state):
        require(not tensor.is_complex(), f"{name}: a state must hold real tensors only.")
    expected, _ = recurrence.prefill(u[..., half:], state.clone())
    chosen = torch.tensor([1, 0, 1], device=u.device)
    rest = u[..., half:]
    for method, changed, index in (
        ("select", state.select(chosen), chosen),
        ("repeat", state.repeat(2), torch.arange(2, device=u.device).repeat_interleave(2)),
    ):
        y, _ = recurrence.prefill(rest[index], changed)
        claim = f"{name}: a state after {method}() must go on as its streams do"
        require_close(claim, y, expected[index], tolerance)


def _require_same(claim: str, state: State, kept: State) -> None:
    pairs = zip(pytree.tree_leaves(state), pytree.tree_leaves(kept), strict=True)
    require(all(torch.equal(one, other) for one, other in pairs), f"{claim}.")
