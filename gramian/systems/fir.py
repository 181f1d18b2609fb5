"""FIR systems, whose kernel is zero after its last tap."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gramian.ops.online import OnlineBuffers, OnlineConvolution
from gramian.systems._recurrence import Recurrence
from gramian.systems._state import State, broadcasts, define_state
from gramian.systems._system import TimeInvariantSystem, check_tensor, working_dtype
from gramian.systems.companion import companion_form
from gramian.systems.state_space import StateSpace

__all__ = ["FIR", "FIRRecurrence", "FIRState"]


@define_state
class FIRState(State):
    """The buffers of an online convolution, whose window is P samples.

    Attributes:
        inputs: (*B, 2P): the previous window, then the current one up to `position`.
        owed: (*B, P): contributions of earlier inputs to the outputs of the current window.
        position: (), int64 on the CPU: the number of samples so far.
    """

    inputs: Tensor
    owed: Tensor
    position: Tensor

    def moved(self, u: Tensor, steps: Sequence[int]) -> tuple[Tensor, FIRState]:
        """Delay the past by `steps` samples, into the paused columns at the start of the chunk.

        The last `steps` samples of the past overwrite the first `steps` columns of the chunk, so
        that the past is followed directly by the rest of the chunk. The field `owed` is not moved,
        because an online convolution computes it anew after every chunk.

        Args:
            u: (batch, …, T): the chunk.
            steps: The number of paused columns of every stream of the batch, from 0 to T.

        Returns:
            The chunk and the past, which together hold the same samples as before.
        """
        inputs, owed, position = self
        window = inputs.shape[-1] // 2
        known = window + int(position) % window  # how many columns of `inputs` are filled
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
class FIR(TimeInvariantSystem[FIRState]):
    """`y_t = Σ_{j<K} kernel_j u_{t-j}`: a finite impulse response of K taps.

    Args:
        kernel: (*C, K), real floating point: the taps of every channel, K ≥ 1.

    Raises:
        TypeError: if the kernel is not a real floating-point tensor.
        ValueError: if the kernel has no taps.
    """

    _kind = "FIR system"
    _state_types = (FIRState,)

    kernel: Tensor

    def __post_init__(self) -> None:
        check_tensor("the kernel of an FIR system", self.kernel)
        if not self.kernel.dtype.is_floating_point:
            raise TypeError(f"an FIR kernel must be real floating point; got {self.kernel.dtype}.")
        if self.kernel.ndim == 0 or self.kernel.shape[-1] == 0:
            raise ValueError(
                "an FIR kernel must have shape (*channels, taps) with at least one tap; got "
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
        """Return K - 1, the largest delay in the kernel."""
        return self.kernel.shape[-1] - 1

    def impulse_response(self, length: int) -> Tensor:
        taps = self.kernel[..., :length]
        return torch.nn.functional.pad(taps, (0, length - taps.shape[-1]))

    def kernel_for(self, u: Tensor, length: int) -> Tensor:
        kernel = self.kernel if length > self.order else self.kernel[..., :length]
        return kernel.to(working_dtype(u))

    def recurrence(self, form: str | None = None) -> FIRRecurrence:
        """Return the exact online convolution, which takes amortized O(log² K) operations a sample.

        Raises:
            ValueError: for any form other than "online", which is the only one.
        """
        if form not in (None, "online"):
            raise ValueError(f'an FIR system has the recurrence form "online" only; got {form!r}.')
        return FIRRecurrence(self)

    def state_space(self) -> StateSpace:
        """Return a shift register of the last inputs as a state-space system, in float64."""
        kernel = self.kernel.double()
        return companion_form(kernel[..., 1:], torch.zeros_like(kernel[..., 1:]), kernel[..., 0])

    def _as_control(self, control: Any) -> Any:
        kernel = self.kernel.detach().double().cpu().numpy()
        return control.TransferFunction(kernel, np.eye(1, len(kernel))[0], True)

    def apply_from(self, u: Tensor, state: FIRState) -> tuple[Tensor, FIRState]:
        return _extend(OnlineConvolution(self.kernel_for(u, self.kernel.shape[-1])), u, state)

    def fits(self, state: FIRState, shape: torch.Size) -> bool:
        return _fits(state, OnlineConvolution(self.kernel).window, shape)

    def _infinite_hankel_singular_values(self) -> Tensor:
        taps = self.kernel[..., 1:].double()
        count = taps.shape[-1]
        if count == 0:
            return taps
        return torch.linalg.svdvals(
            torch.nn.functional.pad(taps, (0, count - 1)).unfold(-1, count, 1)
        )


class FIRRecurrence(Recurrence[FIRState]):
    """An FIR system that steps by online convolution.

    `step` writes into the buffers of its state, and `advance` into a copy of them. The place where
    they write depends on the number of samples so far, which a traced program cannot know.

    Args:
        system: The FIR system to step.
    """

    form = "online"
    state_type = FIRState

    def __init__(self, system: FIR) -> None:
        self.system: FIR = system.frozen()
        kernel = self.system.kernel
        self._dtype = working_dtype(kernel)
        self._online = OnlineConvolution(kernel.to(self._dtype))

    def initial_state(
        self,
        batch_shape: tuple[int, ...],
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> FIRState:
        shape = torch.broadcast_shapes(tuple(batch_shape), self.system.channel_shape)
        return FIRState(
            *self._online.buffers(shape, dtype or self._dtype, device or self.system.device)
        )

    def _prefill(self, u: Tensor, state: FIRState) -> tuple[Tensor, FIRState]:
        return _extend(self._online, u, state)

    def _advance(self, u_t: Tensor, state: FIRState) -> tuple[Tensor, FIRState]:
        return self._step(u_t, state.clone())

    def _step(self, u_t: Tensor, state: FIRState) -> tuple[Tensor, FIRState]:
        y, buffers = self._online.step(u_t, OnlineBuffers(*state))
        return y.to(u_t.dtype), FIRState(*buffers)

    def _fits(self, state: FIRState, shape: torch.Size) -> bool:
        return _fits(state, self._online.window, shape)


def _extend(online: OnlineConvolution, u: Tensor, state: FIRState) -> tuple[Tensor, FIRState]:
    """Return the outputs of a chunk in its dtype, and the buffers after it in theirs."""
    y, buffers = online.extend(u.to(state.inputs.dtype), OnlineBuffers(*state))
    return y.to(u.dtype), FIRState(*buffers)


def _fits(state: FIRState, window: int, shape: torch.Size) -> bool:
    """Return whether buffers belong to a convolution of this window and samples of `shape`."""
    inputs, owed = state.inputs.shape, state.owed.shape
    if inputs[:-1] != owed[:-1] or inputs[-1:] != (2 * window,) or owed[-1:] != (window,):
        return False
    return inputs[:-1] == shape or broadcasts(inputs[:-1], shape)
