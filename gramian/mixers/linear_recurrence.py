r"""Define mixers that are linear recurrences of their values.

The coefficients of the recurrences depend on the input. The memory of every head is a matrix S
(state × value width):

    S_t = A_t S_{t-1} + B_t v_tᵀ,  y_t = C_tᵀ S_{t-1} + D_t v_t,  A_t = diag(a_t) + p_t q_tᵀ,

This is a `gramian.TimeVarying` system that acts on each column of values. Linear attention with and
without gates, S6 and the gated delta rule differ in how they compute the coefficients. This module
contains the parts that they share.

A whole sequence is processed in blocks of steps (`gramian.ops.scan`), by matrix products within a
block and a scan across blocks. Nothing is divided by a product of gates. Coefficients and memory
are float32 or float64.
"""

from __future__ import annotations

import abc
import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from typing_extensions import Self

from gramian._modules import SinglePrecisionModule
from gramian.mixers._recomputation import recomputed
from gramian.mixers.mixer import Mixer, apply_mask
from gramian.mixers.short_convolution import ShortConvolution
from gramian.ops.lengths import is_symbol
from gramian.ops.opaque_recurrence import run_opaquely
from gramian.ops.packed import Linear
from gramian.systems import State, TimeVarying

__all__ = ["Coefficients", "Dynamics", "LinearRecurrence", "LinearRecurrenceState", "Steps"]

_ELEMENTS = 2**24  # the maximal number of coefficients that are held at once


class Steps(Protocol):
    """The steps of a recurrence over a sequence, in a form that holds its coefficients."""

    def masked(self, mask: Tensor) -> Self:
        """Return steps that leave the memory unchanged where the mask (batch, length) is zero."""

    def steps(self, start: int, stop: int) -> Self:
        """Return the steps `start` … `stop - 1`."""

    def coefficients(self) -> Coefficients:
        """Return the coefficients of the steps as a system with channels (batch, heads)."""

    def run(self, values: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Run all steps from a memory.

        Args:
            values: (batch, heads, length, N).
            memory: (batch, heads, n, N).

        Returns:
            The outputs, (batch, heads, length, N), and the memory after the last step.
        """

    def step(self, values: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Run a single step, as `run` does for a length of 1."""


class _Fields(NamedTuple):
    short: Tensor
    memory: Tensor


class LinearRecurrenceState(_Fields, State):
    """The past of the short convolution and the memory of the heads.

    `short` has the last inputs of the short convolution, (batch, taps - 1, channels). `memory` is
    (batch, heads, n, N), in float32 or float64: heads × n × N numbers per sequence, for inputs of
    any length.
    """

    __slots__ = ()


class Coefficients(NamedTuple):
    """The coefficients of a `gramian.TimeVarying` system with channels (batch, heads)."""

    A: Tensor
    """The gates, (batch, heads, length, n). B, C, p and q have the same shape."""
    B: Tensor
    C: Tensor
    D: Tensor
    """(batch, heads, length)."""
    p: Tensor | None = None
    q: Tensor | None = None

    def masked(self, mask: Tensor) -> Coefficients:
        """Return steps that leave the memory unchanged where the mask (batch, length) is zero."""
        real = (mask != 0).to(self.A.device)[:, None, :, None]
        p = None if self.p is None else self.p * real
        return self._replace(A=torch.where(real, self.A, 1), B=self.B * real, p=p)

    def steps(self, start: int, stop: int) -> Coefficients:
        """Return the steps `start` … `stop - 1`."""
        part = slice(start, stop)
        return Coefficients(
            *(x[:, :, part] for x in self[:4]),
            *(None if x is None else x[:, :, part] for x in self[4:]),
        )

    def coefficients(self) -> Coefficients:
        return self

    def run(self, values: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Run all steps from a memory, as a `TimeVarying` system does; see `Steps.run`."""
        if is_symbol(values.shape[2]):
            y, after = run_opaquely(*self, values, memory)
            return y, after
        y, after = TimeVarying(*self).run_from(
            values.permute(3, 0, 1, 2), memory.permute(3, 0, 1, 2)
        )
        return y.permute(1, 2, 3, 0), after.permute(1, 2, 3, 0)

    def step(self, values: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Run a single step by a few products; see `Steps.step`."""
        A, B, C = (x[:, :, 0, :, None] for x in self[:3])  # (batch, heads, n, 1)
        y = (C * memory).sum(-2, keepdim=True) + self.D[..., None] * values
        after = A * memory + B * values
        if self.p is not None and self.q is not None:
            p, q = self.p[:, :, 0, :, None], self.q[:, :, 0, :, None]
            after = after + p * (q * memory).sum(-2, keepdim=True)
        return y, after


class Dynamics(SinglePrecisionModule, abc.ABC):
    """Parameters that determine how fast a memory decays.

    The parameters stay in float32 when a model is cast to half precision, because a gate of 0.999
    must not become 1.0.
    """

    @abc.abstractmethod
    def reset_parameters(self) -> None:
        """Initialize the parameters again."""

    @abc.abstractmethod
    def slow(self, amount: Tensor) -> None:
        """Make the memories of the heads decay more slowly, in place.

        Args:
            amount: (heads), the numbers to add to the logits of gates, or to subtract from the
                logarithms of rates. A negative number makes the decay faster.
        """


class LinearRecurrence(Mixer):
    """A mixer with a short convolution and a linear recurrence between two projections.

    Subclasses compute the coefficients of the recurrence (`_read`) and process its outputs
    (`_write`). Where the mask is zero, the short convolution reads zeros and the memory stays
    unchanged. The docstring of the module gives the equations of the recurrence.

    Args:
        width: Channels of input and output.
        heads: Number of heads.
        state_size: n, the number of rows of a head's memory.
        value_width: N, the number of columns of a head's memory.
        convolved: Number of features of the input projection that pass through the short
            convolution. They come first.
        others: Number of the other features of the input projection. They follow the convolved
            features.
        inner: Number of features that the output projection reads.
        short_kernel: Taps of the short convolution.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        state_size: int,
        value_width: int,
        *,
        convolved: int,
        others: int,
        inner: int,
        short_kernel: int,
    ) -> None:
        super().__init__()
        self.width = width
        self.heads = heads
        self.state_size = state_size
        self.value_width = value_width
        self.convolved = convolved
        self.in_proj = Linear(width, convolved + others, bias=False)
        self.short = ShortConvolution(convolved, short_kernel)
        self.out_proj = Linear(inner, width, bias=False)

    @property
    def channels(self) -> int:
        return self.heads

    def config(self) -> dict[str, Any]:
        own = {"state_size": self.state_size, "short_kernel": self.short.taps}
        return super().config() | own

    @abc.abstractmethod
    def _read(self, mixed: Tensor, rest: Tensor) -> tuple[Steps, Tensor]:
        """Compute the steps of the recurrence and the values that it reads.

        Args:
            mixed: The features after the short convolution, (batch, length, convolved).
            rest: The other features, (batch, length, others).

        Returns:
            The steps, and the values (batch, heads, length, N) in the dtype of the coefficients.
        """

    @abc.abstractmethod
    def _write(self, y: Tensor, rest: Tensor) -> Tensor:
        """Map the recurrence's outputs (batch, heads, length, N) to (batch, length, inner)."""

    def make_operator(self, x: Tensor, channels: slice, mask: Tensor | None) -> TimeVarying:
        return TimeVarying(*self.features(x, None, mask)[0].coefficients())[:, channels]

    def features(
        self, x: Tensor, past: Tensor | None, mask: Tensor | None
    ) -> tuple[Steps, Tensor, Tensor, Tensor]:
        """Compute the steps of the recurrence from an input.

        Args:
            x: (batch, length, width).
            past: The last inputs of the short convolution. None means zeros.
            mask: (batch, length), false for padding. None if there is no padding.

        Returns:
            The steps, the values, the features that are not convolved, and the short convolution's
            new past.
        """
        mixed, rest, past = self.convolve(x, past, mask)
        coefficients, values = self._read(mixed, rest)
        return coefficients if mask is None else coefficients.masked(mask), values, rest, past

    def convolve(
        self, x: Tensor, past: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Apply the input projection and the short convolution.

        Args:
            x: (batch, length, width).
            past: The last inputs of the short convolution. None means zeros.
            mask: (batch, length), false for padding. None if there is no padding.

        Returns:
            The output of the short convolution, (batch, length, convolved), the features that are
            not convolved, (batch, length, others), and the short convolution's new past.
        """
        mixed, rest = self._split(self.in_proj(x))
        mixed, past = self.short(apply_mask(mixed, mask), past, mask)
        return mixed, rest, past

    def values(self, mixed: Tensor, rest: Tensor) -> Tensor:
        """Compute the values that the recurrence reads, (batch, heads, length, N).

        Args:
            mixed: The output of the short convolution, (batch, length, convolved).
            rest: The features that are not convolved, (batch, length, others).
        """
        return self._read(mixed, rest)[1]

    def _split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z[..., : self.convolved], z[..., self.convolved :]

    def mix_whole(self, x: Tensor, mask: Tensor | None) -> Tensor:
        coefficients, values, rest, _ = self.features(x, None, mask)
        memory = values.new_zeros(x.shape[0], self.heads, self.state_size, self.value_width)
        return self.finish(self._run(coefficients, values, memory)[0], rest)

    def mix_chunk(self, x: Tensor, state: State, mask: Tensor | None) -> tuple[Tensor, State]:
        assert isinstance(state, LinearRecurrenceState)
        coefficients, values, rest, past = self.features(x, state.short, mask)
        y, memory = self._run(coefficients, values, state.memory.to(values.dtype))
        return self.finish(y, rest), LinearRecurrenceState(past, memory)

    def _most_elements(self, device: torch.device) -> int:
        """Return the maximal number of coefficients (batch, heads, length, n) to hold at once."""
        return _ELEMENTS

    def finish(self, y: Tensor, rest: Tensor) -> Tensor:
        return self.out_proj(self._write(y, rest).to(rest.dtype))

    def _run(self, coefficients: Steps, values: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Run all steps, in stretches if the sequence is long.

        The backward pass recomputes each stretch, so that only one stretch at a time needs working
        memory.
        """
        length = values.shape[2]
        size = max(
            64,
            self._most_elements(values.device) // (values.shape[0] * self.heads * self.state_size),
        )
        if is_symbol(length) or length <= size:
            return coefficients.run(values, memory)
        outputs = []
        for begin in range(0, length, size):
            part = coefficients.steps(begin, begin + size), values[:, :, begin : begin + size]
            y, memory = recomputed(_stretch, *part, memory)
            outputs.append(y)
        return torch.cat(outputs, dim=2), memory

    def mix_token(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        y, state = self.fused(self.in_proj(x_t), state)
        return self.out_proj(y), state

    def inner(self, z: Tensor, state: State) -> tuple[Tensor, State]:
        assert isinstance(state, LinearRecurrenceState)
        mixed, rest = self._split(z.unsqueeze(1))
        mixed, past = self.short(mixed, state.short)
        coefficients, values = self._read(mixed, rest)
        y, memory = coefficients.step(values, state.memory.to(values.dtype))
        return self._write(y, rest).squeeze(1).to(z.dtype), LinearRecurrenceState(past, memory)

    def make_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> State:
        shape = (batch, self.heads, self.state_size, self.value_width)
        return LinearRecurrenceState(
            torch.zeros(batch, self.short.taps - 1, self.convolved, dtype=dtype, device=device),
            torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32), device=device),
        )

    def extra_repr(self) -> str:
        return f"heads={self.heads}, state_size={self.state_size}, value_width={self.value_width}"


def _stretch(coefficients: Steps, values: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    return coefficients.run(values, memory)


def steps_of_time(parameter: Tensor, low: float = 1e-3, high: float = 1e-1) -> None:
    """Fill a parameter with softplus⁻¹(Δ), Δ log-uniform in [low, high] (Mamba, section 3.6)."""
    with torch.no_grad():
        step = parameter.uniform_(math.log(low), math.log(high)).exp()
        parameter.copy_(step + torch.log(-torch.expm1(-step)))
