"""FIR systems: a kernel and nothing past its end."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gramian.ops.online import OnlineBuffers, OnlineConvolution
from gramian.systems._state import State
from gramian.systems._system import TimeInvariantSystem, check_tensor, working_dtype

__all__ = ["FIR", "FIRRecurrence", "FIRState"]


class _Fields(NamedTuple):
    inputs: Tensor
    owed: Tensor
    position: Tensor


class FIRState(_Fields, State):
    """Buffers of an online convolution: inputs (*B, 2P), owed (*B, P), position ()."""

    __slots__ = ()

    def moved(self, u: Tensor, steps: Sequence[int]) -> tuple[Tensor, FIRState]:
        """A chunk and a past that together hold the same samples, the past ``steps`` later.

        The chunk's first ``steps`` columns are overwritten by the end of the past, so that the
        past and the rest of the chunk follow each other. What is owed is not moved: an online
        convolution makes it anew after every chunk.

        Args:
            u: (batch, …, T).
            steps: For every stream of the batch, from 0 to T.
        """
        inputs, owed, position = self
        window = inputs.shape[-1] // 2
        known = window + int(position) % window  # columns of `inputs` that are filled
        joined = torch.cat([inputs[..., :known], u.to(inputs.dtype)], dim=-1)
        rows = [
            torch.nn.functional.pad(
                torch.cat([row[..., :known], row[..., known + step :]], dim=-1), (step, 0)
            )
            for row, step in zip(joined, steps, strict=True)
        ]
        joined = torch.stack(rows)
        past = torch.nn.functional.pad(joined[..., :known], (0, 2 * window - known))
        return joined[..., known:], FIRState(past, owed, position)


@dataclasses.dataclass(frozen=True, eq=False)
class FIR(TimeInvariantSystem):
    """``y_t = Σ_{j<K} kernel_j u_{t-j}``: a finite impulse response, zero past its end.

    Args:
        kernel: (*C, K), real floating point, K ≥ 1.

    Raises:
        TypeError: if the kernel is not a real floating-point tensor.
        ValueError: if it has no taps.
    """

    kernel: Tensor

    def __post_init__(self) -> None:
        check_tensor("the kernel of an FIR system", self.kernel)
        if not self.kernel.dtype.is_floating_point:
            raise TypeError(f"an FIR kernel must be real floating point, got {self.kernel.dtype}.")
        if self.kernel.ndim == 0 or self.kernel.shape[-1] == 0:
            raise ValueError(
                "an FIR kernel must have shape (*channels, taps) with at least one tap, got "
                f"{tuple(self.kernel.shape)}."
            )

    @property
    def channel_shape(self) -> torch.Size:
        return self.kernel.shape[:-1]

    @property
    def dtype(self) -> torch.dtype:
        return self.kernel.dtype

    @property
    def device(self) -> torch.device:
        return self.kernel.device

    @property
    def order(self) -> int:
        """K - 1: the delays that the kernel needs."""
        return self.kernel.shape[-1] - 1

    def impulse_response(self, length: int) -> Tensor:
        taps = self.kernel[..., :length]
        return torch.nn.functional.pad(taps, (0, length - taps.shape[-1]))

    def kernel_for(self, u: Tensor, length: int) -> Tensor:
        kernel = self.kernel if length > self.order else self.kernel[..., :length]
        return kernel.to(working_dtype(u))

    def recurrence(self, form: str | None = None) -> FIRRecurrence:
        """Online convolution: exact, amortised O(log² K) a sample; the only form of an FIR.

        Raises:
            ValueError: for any other form than "online".
        """
        if form not in (None, "online"):
            raise ValueError(f'an FIR system has the recurrence form "online" only, got {form!r}.')
        return FIRRecurrence(self)

    def _apply_from(self, u: Tensor, state: State) -> tuple[Tensor, State]:
        return extend(OnlineConvolution(self.kernel_for(u, self.kernel.shape[-1])), u, state)

    def _infinite_hankel_singular_values(self) -> Tensor:
        taps = self.kernel[..., 1:].double()
        count = taps.shape[-1]
        if count == 0:
            return taps
        return torch.linalg.svdvals(
            torch.nn.functional.pad(taps, (0, count - 1)).unfold(-1, count, 1)
        )


class FIRRecurrence:
    """An FIR system one sample at a time, by online convolution. Writes into its buffers."""

    form = "online"
    error = 0.0

    def __init__(self, system: FIR) -> None:
        self.system = system.frozen()
        kernel = self.system.kernel
        self._dtype = working_dtype(kernel)
        self._online = OnlineConvolution(kernel.to(self._dtype))

    def initial_state(
        self,
        batch_shape: tuple[int, ...],
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> FIRState:
        """Buffers of a silent past for samples of shape ``batch_shape`` = (*B, *C')."""
        shape = torch.broadcast_shapes(tuple(batch_shape), self.system.channel_shape)
        return FIRState(
            *self._online.buffers(shape, dtype or self._dtype, device or self.system.device)
        )

    @torch.no_grad()
    def prefill(self, u: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Take the chunk ``u`` (*B, *C', T) at once, by FFT; continue from ``state`` if given."""
        if state is None:
            state = self.initial_state(u.shape[:-1], device=u.device)
        return extend(self._online, u, state)

    @torch.no_grad()
    def step(self, u_t: Tensor, state: State) -> tuple[Tensor, State]:
        """Take one sample (*B, *C'). Consumes ``state``: use only the one returned."""
        assert isinstance(state, FIRState)
        y, buffers = self._online.step(u_t, OnlineBuffers(*state))
        return y.to(u_t.dtype), FIRState(*buffers)


def extend(online: OnlineConvolution, u: Tensor, state: State) -> tuple[Tensor, State]:
    """Outputs of a chunk and the buffers after it, in the dtype of ``u`` and of the buffers."""
    if not isinstance(state, FIRState):
        raise TypeError(f"an FIR system continues from an FIRState, got {type(state).__name__}.")
    y, buffers = online.extend(u.to(state.inputs.dtype), OnlineBuffers(*state))
    return y.to(u.dtype), FIRState(*buffers)
