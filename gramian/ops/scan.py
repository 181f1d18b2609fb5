r"""Time-varying linear recurrences by doubling, without a loop over time and without division.

The recurrence is `x_{i+1} = A_i x_i + B_i u_i`, `y_i = C_i x_i + D_i u_i`. A block of c steps is
one step of a larger system with four matrices. The transition maps the state before the block to
the state after it. The input matrix (n × c) maps the inputs in the block to the state after it, and
the output matrix (c × n) maps the state before it to the outputs. The operator (c × c) maps the
inputs in the block to the outputs. Two neighboring blocks merge into a block of twice the length,

    Ā = Ā₂ Ā₁,  B̄ = [Ā₂ B̄₁, B̄₂],  C̄ = [C̄₁; C̄₂ Ā₁],  D̄ = [[D̄₁, 0], [C̄₂ B̄₁, D̄₂]],

so log₂ c rounds of batched matrix products give blocks of c steps, and a scan over the blocks
carries the state from one to the next. Unlike chunked forms in log space, this never divides by a
product of gates, so gates may be zero or negative.

Merging is as accurate as plain steps if no product of transitions is much larger than the identity.
Products of gates and of the delta rule's transitions never are. `bounded_products` checks this for
dense transitions. `step_by_step` handles dense transitions that fail the check.

A transition is diagonal, diagonal plus low rank (products of Householder-like factors in the WY
form, as in the delta rule), or dense. All tensors are (G, K, …), with G groups and K steps or
blocks.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

__all__ = [
    "Blocks",
    "Dense",
    "Diagonal",
    "DiagonalPlusLowRank",
    "Transition",
    "bounded_products",
    "join",
    "run_blocks",
    "scan",
    "step_by_step",
]

_BOUND = 32.0
"""The largest norm of products, in multiples of the identity's, with which merging is accurate."""


class Transition(abc.ABC):
    """State matrices A of K steps or blocks in each of G groups."""

    @abc.abstractmethod
    def left(self, x: Tensor) -> Tensor:
        """Return `A x` for x (G, K, n, r)."""

    @abc.abstractmethod
    def right(self, y: Tensor) -> Tensor:
        """Return `y A` for y (G, K, r, n)."""

    @abc.abstractmethod
    def after(self, earlier: Transition) -> Transition:
        """Return `A A'`, which applies `earlier` (A') first and then this transition (A)."""

    @abc.abstractmethod
    def dense(self) -> Tensor:
        """Return the matrices, (G, K, n, n)."""

    @abc.abstractmethod
    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return the result of applying `function` (a cast, say) to every tensor (G, K, …)."""

    @abc.abstractmethod
    def padded(self, steps: int) -> Self:
        """Return the transition with `steps` identities after the last step."""

    def __getitem__(self, steps: slice | int) -> Self:
        return self.map(lambda tensor: tensor[:, steps])


class Diagonal(Transition):
    """Diagonal matrices `diag(a)`, a (G, K, n)."""

    def __init__(self, a: Tensor) -> None:
        self.a = a

    def left(self, x: Tensor) -> Tensor:
        return self.a.unsqueeze(-1) * x

    def right(self, y: Tensor) -> Tensor:
        return y * self.a.unsqueeze(-2)

    def after(self, earlier: Transition) -> Transition:
        assert isinstance(earlier, Diagonal)
        return Diagonal(self.a * earlier.a)

    def dense(self) -> Tensor:
        return torch.diag_embed(self.a)

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(function(self.a))

    def padded(self, steps: int) -> Self:
        return type(self)(torch.nn.functional.pad(self.a, (0, 0, 0, steps), value=1.0))


class DiagonalPlusLowRank(Transition):
    """Matrices `diag(a) + p qᵀ`, a (G, K, n), p and q (G, K, n, r)."""

    def __init__(self, a: Tensor, p: Tensor, q: Tensor) -> None:
        self.a, self.p, self.q = a, p, q

    def left(self, x: Tensor) -> Tensor:
        return self.a.unsqueeze(-1) * x + self.p @ (self.q.mT @ x)

    def right(self, y: Tensor) -> Tensor:
        return y * self.a.unsqueeze(-2) + (y @ self.p) @ self.q.mT

    def after(self, earlier: Transition) -> Transition:
        if isinstance(earlier, Dense):
            return Dense(self.left(earlier.a))
        assert isinstance(earlier, DiagonalPlusLowRank)
        if 2 * (self.p.shape[-1] + earlier.p.shape[-1]) > self.a.shape[-1]:
            return Dense(self.left(earlier.dense()))
        p = torch.cat([self.left(earlier.p), self.p], dim=-1)
        q = torch.cat([earlier.q, earlier.a.unsqueeze(-1) * self.q], dim=-1)
        return DiagonalPlusLowRank(self.a * earlier.a, p, q)

    def dense(self) -> Tensor:
        return torch.diag_embed(self.a) + self.p @ self.q.mT

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(function(self.a), function(self.p), function(self.q))

    def padded(self, steps: int) -> Self:
        pad = torch.nn.functional.pad
        p, q = (pad(factor, (0, 0, 0, 0, 0, steps)) for factor in (self.p, self.q))
        return type(self)(pad(self.a, (0, 0, 0, steps), value=1.0), p, q)


class Dense(Transition):
    """Matrices without structure, a (G, K, n, n)."""

    def __init__(self, a: Tensor) -> None:
        self.a = a

    def left(self, x: Tensor) -> Tensor:
        return self.a @ x

    def right(self, y: Tensor) -> Tensor:
        return y @ self.a

    def after(self, earlier: Transition) -> Transition:
        return Dense(earlier.right(self.a))

    def dense(self) -> Tensor:
        return self.a

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(function(self.a))

    def padded(self, steps: int) -> Self:
        groups, _, order, _ = self.a.shape
        eye = torch.eye(order, dtype=self.a.dtype, device=self.a.device)
        return type(self)(torch.cat([self.a, eye.expand(groups, steps, -1, -1)], dim=1))


class Blocks(NamedTuple):
    """Blocks of c steps, given by their maps from states and inputs to states and outputs."""

    transition: Transition
    reach: Tensor
    """(G, K, n, c): from the inputs to the state after the block."""
    observe: Tensor
    """(G, K, c, n): from the state before the block to the outputs."""
    inside: Tensor
    """(G, K, c, c), lower triangular: from the inputs to the outputs."""


def join(transition: Transition, B: Tensor, C: Tensor, D: Tensor, size: int) -> Blocks:
    """Join steps to blocks of `size` steps.

    Steps that change no state and give no output fill up the last block.

    Args:
        transition: The transition of T steps.
        B: (G, T, n): the input vectors.
        C: (G, T, n): the output vectors.
        D: (G, T): the direct terms.
        size: The number of steps in a block, a power of two.

    Returns:
        The K = ⌈T / size⌉ blocks.
    """
    pad = torch.nn.functional.pad
    missing = -B.shape[1] % size
    if missing:
        transition = transition.padded(missing)
        B, C, D = pad(B, (0, 0, 0, missing)), pad(C, (0, 0, 0, missing)), pad(D, (0, missing))
    reach, observe, inside = B.unsqueeze(-1), C.unsqueeze(-2), D[..., None, None]
    while (have := reach.shape[-1]) < size:
        first, second = transition[::2], transition[1::2]
        early, late = reach[:, ::2], observe[:, 1::2]
        corner = late @ early
        reach = torch.cat([second.left(early), reach[:, 1::2]], dim=-1)
        observe = torch.cat([observe[:, ::2], first.right(late)], dim=-2)
        top = pad(inside[:, ::2], (0, have))
        inside = torch.cat([top, torch.cat([corner, inside[:, 1::2]], dim=-1)], dim=-2)
        transition = second.after(first)
    return Blocks(transition, reach, observe, inside)


def scan(transition: Transition, inputs: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Solve `x_{k+1} = A_k x_k + inputs_k` by merging neighbors, in log₂ K rounds.

    Args:
        transition: The transition of K blocks.
        inputs: (G, K, n, r): the vectors that each block adds to the state.
        start: (G, n, r): the state before the first block.

    Returns:
        The state before each block (G, K, n, r), and the state after the last block (G, n, r).
    """
    count = inputs.shape[1]
    if count == 1:
        end = transition.left(start.unsqueeze(1)) + inputs
        return start.unsqueeze(1), end.squeeze(1)
    even = count - count % 2
    first, second = transition[:even:2], transition[1:even:2]
    early = inputs[:, :even:2]
    merged = second.left(early) + inputs[:, 1:even:2]
    starts, end = scan(second.after(first), merged, start)
    middles = first.left(starts) + early
    states = torch.stack([starts, middles], dim=2).flatten(1, 2)
    if even < count:
        states = torch.cat([states, end.unsqueeze(1)], dim=1)
        end = (transition[even:].left(end.unsqueeze(1)) + inputs[:, even:]).squeeze(1)
    return states, end


def run_blocks(
    transition: Transition,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    signal: Tensor,
    start: Tensor,
    size: int,
) -> tuple[Tensor, Tensor]:
    """Run T steps in blocks of `size` steps.

    Args:
        transition: The transition of T steps.
        B: (G, T, n): the input vectors.
        C: (G, T, n): the output vectors.
        D: (G, T): the direct terms.
        signal: (G, r, T): r signals, which do not interact.
        start: (G, n, r): the states before the first step.
        size: The number of steps in a block, a power of two.

    Returns:
        The outputs (G, r, T), and the states after the last step (G, n, r).
    """
    length = signal.shape[-1]
    blocks = join(transition, B, C, D, size)
    padded = torch.nn.functional.pad(signal, (0, -length % size))
    samples = padded.unflatten(-1, (-1, size)).permute(0, 2, 3, 1)  # (G, K, c, r)
    starts, end = scan(blocks.transition, blocks.reach @ samples, start)
    y = blocks.inside @ samples + blocks.observe @ starts
    return y.permute(0, 3, 1, 2).flatten(-2)[..., :length], end


def bounded_products(A: Tensor) -> bool:
    """Return whether products of 2^k neighboring state matrices are bounded, for every k.

    Bounded means that no product is much larger than the identity. The function reads values, so it
    synchronizes with a GPU.

    Args:
        A: (G, K, n, n): the state matrices.
    """
    if A.numel() == 0:
        return True
    bound = _BOUND * math.sqrt(A.shape[-1])
    A = A.double()
    while True:
        largest = float(torch.linalg.matrix_norm(A).nan_to_num(torch.inf).max())
        if largest <= 1 or largest > bound or A.shape[1] == 1:
            return largest <= bound
        even = A.shape[1] - A.shape[1] % 2
        A = torch.cat([A[:, 1:even:2] @ A[:, :even:2], A[:, even:]], dim=1)


def step_by_step(
    A: Tensor, B: Tensor, C: Tensor, D: Tensor, signal: Tensor, x: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute `y_i = C_i x + D_i u_i`, `x ← A_i x + B_i u_i` by a loop over time, in float64.

    Args:
        A: (G, T, n, n): the state matrices.
        B: (G, T, n): the input vectors.
        C: (G, T, n): the output vectors.
        D: (G, T): the direct terms.
        signal: (G, T, r): r signals, which do not interact.
        x: (G, n, r): the states before the first step.

    Returns:
        The outputs (G, T, r) and the last states (G, n, r).
    """
    A, B, C, D, signal, x = (value.double() for value in (A, B, C, D, signal, x))
    outputs = []
    for i in range(signal.shape[1]):
        sample = signal[:, i : i + 1]  # (G, 1, r)
        outputs.append(C[:, i : i + 1] @ x + D[:, i, None, None] * sample)
        x = A[:, i] @ x + B[:, i].unsqueeze(-1) * sample
    return torch.cat(outputs, dim=1), x
