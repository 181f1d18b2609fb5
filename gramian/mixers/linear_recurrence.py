r"""Mixers that are linear recurrences of their values, with coefficients made from the input.

In every head a matrix S (state × value width) is what is remembered:

    S_t = A_t S_{t-1} + B_t v_tᵀ,  y_t = C_tᵀ S_{t-1} + D_t v_t,  A_t = diag(a_t) + p_t q_tᵀ,

which is a `gramian.TimeVarying` system on each column of values. Linear attention, gated or
not, S6 and the gated delta rule differ in how they make the coefficients; everything else is here.

A whole sequence is taken by blocks of steps (`gramian.ops.scan`): matrix products inside, a
scan across, nothing divided by a product of gates. Coefficients and memory are float32, or float64.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import Self

from gramian.mixers._recomputation import recomputed
from gramian.mixers.mixer import Mixer, apply_mask
from gramian.mixers.short_convolution import ShortConvolution
from gramian.ops.packed import Linear
from gramian.systems import State, TimeVarying
from gramian.systems.time_varying import TimeVaryingState

__all__ = ["Coefficients", "Dynamics", "LinearRecurrence", "LinearRecurrenceState", "Steps"]

_ELEMENTS = 2**24


class Steps(Protocol):
    """What a mixer does with a sequence of inputs, step by step, made from them."""

    def masked(self, mask: Tensor) -> Self:
        """With steps that leave the memory as it is where the mask (batch, length) is zero."""

    def steps(self, start: int, stop: int) -> Self:
        """The steps `start` … `stop - 1`."""

    def coefficients(self) -> Coefficients:
        """As those of a system with channels (batch, heads)."""

    def run(self, values: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs of values (batch, heads, length, N), and the memory after them."""

    def step(self, values: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """`run` for a length of 1."""


class _Fields(NamedTuple):
    short: Tensor
    memory: Tensor


class LinearRecurrenceState(_Fields, State):
    """The last inputs of the short convolution, (batch, taps - 1, channels), and what the heads
    remember, (batch, heads, n, N), float32 or float64: heads × n × N numbers, whatever came."""

    __slots__ = ()


class Coefficients(NamedTuple):
    """Of a `gramian.TimeVarying` system with channels (batch, heads)."""

    A: Tensor
    """(batch, heads, length, n), the gates; B, C, p and q likewise."""
    B: Tensor
    C: Tensor
    D: Tensor
    """(batch, heads, length)."""
    p: Tensor | None = None
    q: Tensor | None = None

    def masked(self, mask: Tensor) -> Coefficients:
        """With steps that leave the memory as it is where the mask (batch, length) is zero."""
        real = (mask != 0).to(self.A.device)[:, None, :, None]
        p = None if self.p is None else self.p * real
        return self._replace(A=torch.where(real, self.A, 1), B=self.B * real, p=p)

    def steps(self, start: int, stop: int) -> Coefficients:
        """The steps `start` … `stop - 1`."""
        part = slice(start, stop)
        return Coefficients(
            *(x[:, :, part] for x in self[:4]),
            *(None if x is None else x[:, :, part] for x in self[4:]),
        )

    def coefficients(self) -> Coefficients:
        return self

    def run(self, values: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs of values (batch, heads, length, N), and the memory after them, by blocks."""
        state = TimeVaryingState(memory.permute(3, 0, 1, 2), torch.zeros((), dtype=torch.int64))
        y, after = TimeVarying(*self)(values.permute(3, 0, 1, 2), state)
        assert isinstance(after, TimeVaryingState)
        return y.permute(1, 2, 3, 0), after.x.permute(1, 2, 3, 0)

    def step(self, values: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """`run` for a length of 1, where a few products do it."""
        A, B, C = (x[:, :, 0, :, None] for x in self[:3])  # (batch, heads, n, 1)
        y = (C * memory).sum(-2, keepdim=True) + self.D[..., None] * values
        after = A * memory + B * values
        if self.p is not None and self.q is not None:
            p, q = self.p[:, :, 0, :, None], self.q[:, :, 0, :, None]
            after = after + p * (q * memory).sum(-2, keepdim=True)
        return y, after


class Dynamics(nn.Module, abc.ABC):
    """Parameters that decide how fast a memory fades; float32 when a model is cast to half
    precision, as a gate of 0.999 must not become 1.0."""

    @abc.abstractmethod
    def reset_parameters(self) -> None:
        """Initialise anew."""

    @abc.abstractmethod
    def slow(self, amount: Tensor) -> None:
        """Make the memories of the heads fade more slowly, in place: `amount` (heads) more of the
        logits of gates, or less of the logarithms of rates; less than zero makes them faster."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.is_floating_point() and torch.finfo(moved.dtype).bits < 32:
                return tensor.to(device=moved.device, dtype=torch.float32)
            return moved

        return super()._apply(keep_precision, recurse)


class LinearRecurrence(Mixer):
    """Projection, short convolution, linear recurrence, projection; see the module.

    Subclasses make the coefficients (`_read`) and treat the outputs (`_write`). Where
    the mask is zero the short convolution reads zeros and the memory stays as it is.

    Args:
        width: Channels of input and output.
        heads: Of the recurrence.
        state_size: n, the rows of a head's memory.
        value_width: N, its columns.
        convolved: Leading features of the input projection that the short convolution takes.
        others: Features after them.
        inner: Features before the output projection.
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
        """Coefficients, and values (batch, heads, length, N) of their dtype, from the convolved
        features (batch, length, …) and the others."""

    @abc.abstractmethod
    def _write(self, y: Tensor, rest: Tensor) -> Tensor:
        """(batch, length, inner) from the recurrence's outputs (batch, heads, length, N)."""

    def make_operator(self, x: Tensor, channels: slice, mask: Tensor | None) -> TimeVarying:
        return TimeVarying(*self.features(x, None, mask)[0].coefficients())[:, channels]

    def features(
        self, x: Tensor, past: Tensor | None, mask: Tensor | None
    ) -> tuple[Steps, Tensor, Tensor, Tensor]:
        """Coefficients, values, the features that are not convolved, and the new past."""
        mixed, rest = self._split(self.in_proj(x))
        mixed, past = self.short(apply_mask(mixed, mask), past, mask)
        coefficients, values = self._read(mixed, rest)
        return coefficients if mask is None else coefficients.masked(mask), values, rest, past

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
        """Coefficients (batch, heads, length, n) of the steps taken at once."""
        return _ELEMENTS

    def finish(self, y: Tensor, rest: Tensor) -> Tensor:
        return self.out_proj(self._write(y, rest).to(rest.dtype))

    def _run(self, coefficients: Steps, values: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """A long sequence stretch by stretch, recomputed backward, so that working memory is
        bounded by a stretch's."""
        length = values.shape[2]
        size = max(
            64,
            self._most_elements(values.device) // (values.shape[0] * self.heads * self.state_size),
        )
        if length <= size:
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
    """Fill with softplus⁻¹(Δ), Δ log-uniform in [low, high] (Mamba, section 3.6)."""
    with torch.no_grad():
        step = parameter.uniform_(math.log(low), math.log(high)).exp()
        parameter.copy_(step + torch.log(-torch.expm1(-step)))
