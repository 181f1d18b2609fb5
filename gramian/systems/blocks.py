r"""The block form of time-invariant recurrences: c samples at a time, by matrix products.

With the realization `x ← A x + B u`, `y = C x + D u`, a block of c samples is processed by

    y_block = T u_block + O x,  O = [C; CA; …; CA^(c-1)],  T = Toeplitz(D, CB, CAB, …),
    x ← A^c x + R u_block,      R = [A^(c-1)B, …, AB, B].

The products with T, O and R are computed for all blocks at once. Only the products `A^c x` are
computed one block after the other. Matrices are computed in double precision and then rounded to
the dtype of the state.

Powers of a state matrix are computed one factor at a time rather than by squaring, as in
`gramian.ops.krylov`. A companion matrix whose poles crowd has powers of norm 1e10 and more, and the
error of a squared power grows with the square of that norm.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic

import torch
from torch import Tensor

from gramian.ops.vandermonde import integer_power
from gramian.systems._state import StateT

if TYPE_CHECKING:
    from gramian.systems.state_space import StateSpace

__all__ = [
    "BlockForm",
    "Blocks",
    "MatrixBlocks",
    "RotationBlocks",
    "ScalingBlocks",
    "ShiftBlocks",
    "VectorBlockForm",
]


@dataclasses.dataclass(frozen=True, eq=False)
class Blocks(abc.ABC):
    """The block matrices of G channels whose states (batch, G, n, streams) have the same size n."""

    inside: Tensor
    """T, (G, c, c): from the inputs of a block to its outputs."""
    observe: Tensor
    """O, (G, c, n): from the state before a block to its outputs."""
    reach: Tensor
    """R, (G, n, c): from the inputs of a block to the state after it."""
    whole: Tensor
    """A^c, in the layout that `advance` reads."""
    powers: Tensor
    """Lower powers of A, in the layout that `advance_by` reads."""
    channels: Tensor | None = None
    """The indices of the G channels along the first channel dimension. None means all channels."""

    @abc.abstractmethod
    def advance(self, x: Tensor) -> Tensor:
        """Return `A^c x` for x (batch, G, n, streams)."""

    @abc.abstractmethod
    def advance_by(self, x: Tensor, steps: Tensor) -> Tensor:
        """Return `A^steps x`, where `steps` (batch), int64, is below c for every sequence."""

    @property
    def is_static(self) -> bool:
        """Whether n = 0. Exported programs cannot reshape the empty states of such channels."""
        return self.observe.shape[-1] == 0

    def select(self, u: Tensor) -> Tensor:
        """Return the channels of u (batch, channels, …) to which these matrices belong."""
        return u if self.channels is None else u.index_select(1, self.channels)


class RotationBlocks(Blocks):
    """The block matrices of a modal system, whose state matrix rotates and scales pairs of numbers.

    A state holds first the real parts of all modes and then the imaginary parts. The tensor `whole`
    is (2, G, m, 1): the real and imaginary parts of λ^c. `powers` is (c, 2, G, m, 1): the real and
    imaginary parts of λ^0 … λ^(c-1).
    """

    @classmethod
    def from_modes(
        cls,
        poles: Tensor,
        residues: Tensor,
        d: Tensor,
        size: int,
        dtype: torch.dtype,
        channels: Tensor | None = None,
    ) -> RotationBlocks:
        """Make the blocks of `h_0 = d`, `h_t = Re Σ_k residues_k poles_k^(t-1)`.

        Args:
            poles: (G, m), complex: the poles of every channel.
            residues: (G, m), complex: their residues.
            d: (G), real: the direct term.
            size: The number of samples in a block, c.
            dtype: The dtype of the state.
            channels: The indices of the G channels along the first channel dimension. None means
                all channels.
        """
        poles, residues = poles.to(torch.complex128), residues.to(torch.complex128)
        powers = torch.stack([integer_power(poles, t) for t in range(size + 1)])
        read = (residues * powers).movedim(0, 1)[:, :size]  # (G, c, m)
        taps = torch.cat([d.double().unsqueeze(-1), read.real.sum(-1)[:, : size - 1]], dim=-1)
        enter = powers[:size].flip(0).movedim(0, 2)  # (G, m, c)
        planes = torch.stack([powers.real, powers.imag], dim=1).unsqueeze(-1).to(dtype)
        return cls(
            inside=_toeplitz(taps).to(dtype),
            observe=torch.cat([read.real, -read.imag], dim=-1).to(dtype),
            reach=torch.cat([enter.real, enter.imag], dim=1).to(dtype),
            whole=planes[size],
            powers=planes[:size],
            channels=channels,
        )

    def advance(self, x: Tensor) -> Tensor:
        return _rotate(x, self.whole)

    def advance_by(self, x: Tensor, steps: Tensor) -> Tensor:
        return _rotate(x, self._powers_by(steps))

    def _powers_by(self, steps: Tensor) -> Tensor:
        """Return the powers of the poles, (2, batch, G, m, 1)."""
        return self.powers.index_select(0, steps).transpose(0, 1)


class ScalingBlocks(RotationBlocks):
    """The block matrices of a system with real modes, where A multiplies each mode by its pole.

    `whole` is (1, G, m, 1): λ^c. `powers` is (c, 1, G, m, 1): λ^0 … λ^(c-1).
    """

    @classmethod
    def from_modes(
        cls,
        poles: Tensor,
        residues: Tensor,
        d: Tensor,
        size: int,
        dtype: torch.dtype,
        channels: Tensor | None = None,
    ) -> ScalingBlocks:
        """Make the blocks as `RotationBlocks.from_modes` does, but for modes that are all real."""
        pairs = RotationBlocks.from_modes(poles, residues, d, size, dtype, channels)
        modes = poles.shape[-1]
        return cls(
            inside=pairs.inside,
            observe=pairs.observe[..., :modes],
            reach=pairs.reach[:, :modes],
            whole=pairs.whole[:1],
            powers=pairs.powers[:, :1],
            channels=channels,
        )

    def advance(self, x: Tensor) -> Tensor:
        return x * self.whole[0]

    def advance_by(self, x: Tensor, steps: Tensor) -> Tensor:
        return x * self._powers_by(steps)[0]


class MatrixBlocks(Blocks):
    """The block matrices of a system with a dense state matrix.

    `whole` is A^c, (G, n, n). `powers` is (log₂ c, G, n, n): A, A², A⁴ and so on.
    """

    @classmethod
    def from_matrices(
        cls, A: Tensor, B: Tensor, C: Tensor, D: Tensor, size: int, dtype: torch.dtype
    ) -> MatrixBlocks:
        """Make the blocks of a realization.

        Args:
            A: (*C, n, n): the state matrix.
            B: (*C, n): the input vector.
            C: (*C, n): the output vector.
            D: (*C): the direct term.
            size: The number of samples in a block, c: a power of two, at least 2.
            dtype: The dtype of the state.
        """
        order, groups = B.shape[-1], D.numel()
        A, D = A.double().reshape(groups, order, order), D.double().reshape(groups)
        B, C = (vector.double().reshape(groups, order) for vector in (B, C))
        rows, columns, power, powers = [C], [B], A, []
        for t in range(1, size):
            rows.append((rows[-1].unsqueeze(-2) @ A).squeeze(-2))
            columns.append((A @ columns[-1].unsqueeze(-1)).squeeze(-1))
            if not t & (t - 1):
                powers.append(power)
            power = A @ power
        observe = torch.stack(rows, dim=-2)
        markov = (observe @ B.unsqueeze(-1)).squeeze(-1)
        taps = torch.cat([D.unsqueeze(-1), markov[:, : size - 1]], dim=-1)
        return cls(
            inside=_toeplitz(taps).to(dtype),
            observe=observe.to(dtype),
            reach=torch.stack(columns[::-1], dim=-1).to(dtype),
            whole=power.to(dtype),
            powers=torch.stack(powers).to(dtype),
        )

    def advance(self, x: Tensor) -> Tensor:
        return self.whole @ x

    def advance_by(self, x: Tensor, steps: Tensor) -> Tensor:
        for bit, power in enumerate(self.powers.unbind()):
            x = torch.where(_has_bit(steps, bit), power @ x, x)
        return x


class ShiftBlocks(Blocks):
    """The block matrices of an FIR system whose state is its last n inputs, the latest input last.

    A drops the first of these inputs. `whole` (n) and `powers` (log₂ c) hold no values, because a
    shift needs only their shapes.
    """

    @classmethod
    def from_kernel(cls, kernel: Tensor, size: int) -> ShiftBlocks:
        """Make the blocks of `y_t = Σ_j kernel_j u_{t-j}`.

        Args:
            kernel: (G, n + 1), in the dtype of the state: the taps.
            size: The number of samples in a block, c: a power of two, at least 2.
        """
        groups, order = kernel.shape[0], kernel.shape[1] - 1
        taps = torch.nn.functional.pad(kernel, (0, max(0, size - order - 1)))
        row = torch.arange(size, device=kernel.device)[:, None]
        column = torch.arange(order, device=kernel.device)
        lag = row + order - column  # from input j of the window to output i of the block
        padded = torch.nn.functional.pad(kernel, (0, size))
        reach = (size - row.flatten() == order - column[:, None]).to(kernel.dtype)  # (n, c)
        return cls(
            inside=_toeplitz(taps[:, :size]),
            observe=padded[:, lag],
            reach=reach.expand(groups, -1, -1),
            whole=kernel.new_empty(order),
            powers=kernel.new_empty(size.bit_length() - 1),
        )

    def advance(self, x: Tensor) -> Tensor:
        return _shift(x, self.inside.shape[-1])

    def advance_by(self, x: Tensor, steps: Tensor) -> Tensor:
        for bit in range(len(self.powers)):
            x = torch.where(_has_bit(steps, bit), _shift(x, 2**bit), x)
        return x


class BlockForm(abc.ABC, Generic[StateT]):
    """The block matrices of a recurrence, and conversions of its states to their layout and back.

    Args:
        parts: One set of block matrices for each group of channels that share a tensor of the
            state.
        streams: The number of dimensions after the first channel dimension along which all streams
            share the system.
    """

    def __init__(self, parts: Sequence[Blocks], streams: int = 0) -> None:
        self.parts = tuple(parts)
        self.streams = streams

    @abc.abstractmethod
    def pack(self, state: StateT) -> list[Tensor]:
        """Return the tensors of a state as (batch, G, n, streams), one for each part.

        The tensor of a static part has no entries, and keeps its shape.
        """

    @abc.abstractmethod
    def unpack(self, packed: Sequence[Tensor], like: StateT) -> StateT:
        """Undo `pack`, and return the state in the shapes of `like`."""

    def restore_order(self, outputs: Sequence[Tensor]) -> Tensor:
        """Join the outputs of the parts, (batch, channels, …), in the order of the channels."""
        channels = [part.channels for part in self.parts if part.channels is not None]
        if len(outputs) == 1 or not channels:
            return outputs[0]
        return torch.cat([*outputs], dim=1).index_select(1, torch.cat(channels).argsort())


class VectorBlockForm(BlockForm[StateT]):
    """The block form of a recurrence whose state is one tensor (batch, *C, *S)."""

    @classmethod
    def from_state_space(
        cls, system: StateSpace, size: int, dtype: torch.dtype, streams: int = 0
    ) -> VectorBlockForm[StateT]:
        """Make the block form of a recurrence from its realization, whose states are flattened.

        Args:
            system: The realization.
            size: The number of samples in a block, c: a power of two, at least 2.
            dtype: The dtype of the state.
            streams: As in `BlockForm`.
        """
        matrices = system.A, system.B, system.C, system.D
        return cls([MatrixBlocks.from_matrices(*matrices, size, dtype)], streams)

    def pack(self, state: StateT) -> list[Tensor]:
        x: Tensor = state[0]
        if self.parts[0].is_static:
            return [x]
        if self.streams:  # (batch, heads, *streams, *S)
            x = x.flatten(2 + self.streams)
            return [x.flatten(2, 1 + self.streams).mT]
        return [x.reshape(x.shape[0], self.parts[0].inside.shape[0], -1, 1)]

    def unpack(self, packed: Sequence[Tensor], like: StateT) -> StateT:
        shape = like[0].shape
        x = packed[0].mT if self.streams else packed[0]
        if self.parts[0].is_static:
            x = like[0].clone()
            shape = x.shape
        kind: Any = type(like)
        return kind(x.reshape(shape))


def _toeplitz(taps: Tensor) -> Tensor:
    """Return the lower-triangular Toeplitz matrices (G, c, c) of taps (G, c)."""
    size = taps.shape[-1]
    return torch.nn.functional.pad(taps, (size - 1, 0)).unfold(-1, size, 1).flip(-1)


def _rotate(x: Tensor, factor: Tensor) -> Tensor:
    re, im = x.chunk(2, dim=2)
    real, imaginary = factor[0], factor[1]
    return torch.cat([re * real - im * imaginary, re * imaginary + im * real], dim=2)


def _has_bit(steps: Tensor, bit: int) -> Tensor:
    """Return whether a bit of the numbers (batch) is set, as (batch, 1, 1, 1)."""
    return (torch.div(steps, 2**bit, rounding_mode="floor") % 2 == 1).reshape(-1, 1, 1, 1)


def _shift(x: Tensor, steps: int) -> Tensor:
    """Drop the first `steps` inputs of windows (batch, G, n, streams), and append zeros."""
    return torch.nn.functional.pad(x, (0, 0, 0, steps))[:, :, steps:]
