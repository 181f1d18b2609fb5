"""FIR systems, whose kernel is zero past its end.

Short kernels step through their last K - 1 inputs, which is the smallest state that a kernel whose
last tap is not zero can have. Long ones step by online convolution, whose state is up to six times
as large and which takes O(log² K) operations for a sample where the other takes K.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from gramian.ops import causal_convolution
from gramian.ops.online import OnlineBuffers, OnlineConvolution
from gramian.systems._recurrence import Recurrence, VectorRecurrence
from gramian.systems._state import State, broadcasts, define_state, vector_fits
from gramian.systems._system import TimeInvariantSystem, check_tensor, working_dtype
from gramian.systems.blocks import ShiftBlocks, VectorBlockForm
from gramian.systems.companion import companion_form
from gramian.systems.state_space import StateSpace

__all__ = ["FIR", "FIRRecurrence", "FIRState", "FIRWindowRecurrence", "FIRWindowState"]

_LONGEST_WINDOW = 128
"""The largest order that steps through its last inputs by default."""


@define_state
class FIRState(State):
    """Buffers of an online convolution: inputs (*B, 2P), owed (*B, P), position ()."""

    inputs: Tensor
    owed: Tensor
    position: Tensor

    def moved(self, u: Tensor, steps: Sequence[int]) -> tuple[Tensor, FIRState]:
        """Return a chunk and a past that together hold the same samples, the past `steps` later.

        The chunk's first `steps` columns are overwritten by the end of the past, so that the
        past and the rest of the chunk follow each other. What is owed is not moved: an online
        convolution makes it anew after every chunk.

        Args:
            u: (batch, …, T).
            steps: For every stream of the batch, from 0 to T.
        """
        inputs, owed, position = self
        window = inputs.shape[-1] // 2
        known = window + int(position) % window  # columns of `inputs` that are filled
        past, chunk = _move_past(inputs[..., :known], u, steps)
        past = torch.nn.functional.pad(past, (0, 2 * window - known))
        return chunk, FIRState(past, owed, position)


@define_state
class FIRWindowState(State):
    """The last K - 1 inputs (*B, *C, K - 1), the latest one last."""

    inputs: Tensor

    def moved(self, u: Tensor, steps: Sequence[int]) -> tuple[Tensor, FIRWindowState]:
        """Return a chunk and a past that together hold the same samples, the past `steps` later.

        Args:
            u: (batch, …, T); the first `steps` columns are overwritten by the end of the past.
            steps: For every stream of the batch, from 0 to T.
        """
        past, chunk = _move_past(self.inputs, u, steps)
        return chunk, FIRWindowState(past)


def _move_past(past: Tensor, u: Tensor, steps: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return `past` (batch, …, k) and `u` (batch, …, T) with the end of the past over the first
    `steps` columns of `u`, stream by stream."""
    known = past.shape[-1]
    joined = torch.cat([past, u.to(past.dtype)], dim=-1)
    rows = [
        torch.nn.functional.pad(
            torch.cat([row[..., :known], row[..., known + step :]], dim=-1), (step, 0)
        )
        for row, step in zip(joined, steps, strict=True)
    ]
    joined = torch.stack(rows)
    return joined[..., :known], joined[..., known:]


AnyFIRState: TypeAlias = "FIRState | FIRWindowState"


@dataclasses.dataclass(frozen=True, eq=False)
class FIR(TimeInvariantSystem[AnyFIRState]):
    """`y_t = Σ_{j<K} kernel_j u_{t-j}`: a finite impulse response, zero past its end.

    Args:
        kernel: (*C, K), real floating point, K ≥ 1.

    Raises:
        TypeError: if the kernel is not a real floating-point tensor.
        ValueError: if it has no taps.
    """

    _kind = "FIR system"
    _state_types = (FIRState, FIRWindowState)

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
        """Return K - 1, the number of delays that the kernel needs."""
        return self.kernel.shape[-1] - 1

    def impulse_response(self, length: int) -> Tensor:
        taps = self.kernel[..., :length]
        return torch.nn.functional.pad(taps, (0, length - taps.shape[-1]))

    def kernel_for(self, u: Tensor, length: int) -> Tensor:
        kernel = self.kernel if length > self.order else self.kernel[..., :length]
        return kernel.to(working_dtype(u))

    def recurrence(self, form: str | None = None) -> Recurrence[Any]:
        """Return a recurrence, which is exact in both forms.

        Args:
            form: "window" keeps the last K - 1 inputs and takes K operations for a sample; "online"
                is online convolution, which keeps up to six times as many numbers and takes an
                amortized O(log² K). By default "window" up to order 128, "online" above.

        Raises:
            ValueError: for any other form.
        """
        if form is None:
            form = "window" if self.order <= _LONGEST_WINDOW else "online"
        if form == "window":
            return FIRWindowRecurrence(self)
        if form == "online":
            return FIRRecurrence(self)
        raise ValueError(
            f'an FIR system has the recurrence forms "window" and "online"; got {form!r}.'
        )

    def state_space(self) -> StateSpace:
        """Return the shift register of the last inputs, in float64."""
        kernel = self.kernel.double()
        return companion_form(kernel[..., 1:], torch.zeros_like(kernel[..., 1:]), kernel[..., 0])

    def _as_control(self, control: Any) -> Any:
        kernel = self.kernel.detach().double().cpu().numpy()
        return control.TransferFunction(kernel, np.eye(1, len(kernel))[0], True)

    def _apply_from(self, u: Tensor, state: AnyFIRState) -> tuple[Tensor, AnyFIRState]:
        kernel = self.kernel_for(u, self.kernel.shape[-1])
        if isinstance(state, FIRWindowState):
            past = torch.cat([state.inputs, u.to(state.inputs.dtype)], dim=-1)
            y = causal_convolution(past, kernel)[..., self.order :]
            return y.to(u.dtype), FIRWindowState(past[..., u.shape[-1] :])
        return _extend(OnlineConvolution(kernel), u, state)

    def _fits(self, state: AnyFIRState, shape: torch.Size) -> bool:
        if isinstance(state, FIRWindowState):
            return vector_fits(state.inputs, (self.order,), shape)
        return _fits(state, OnlineConvolution(self.kernel).window, shape)

    def _infinite_hankel_singular_values(self) -> Tensor:
        taps = self.kernel[..., 1:].double()
        count = taps.shape[-1]
        if count == 0:
            return taps
        return torch.linalg.svdvals(
            torch.nn.functional.pad(taps, (0, count - 1)).unfold(-1, count, 1)
        )


class FIRWindowRecurrence(VectorRecurrence[FIRWindowState]):
    """An FIR system one sample at a time, as a sum over its last K inputs."""

    form = "window"
    state_type = FIRWindowState

    def __init__(self, system: FIR) -> None:
        self.system: FIR = system.frozen()
        self._like = self.system.kernel.to(working_dtype(self.system.kernel))
        self._reversed = self._like.flip(-1)
        self._state_shape = (system.order,)

    @property
    def kernel(self) -> Tensor:
        """The taps (*C, K), in the dtype of the state."""
        return self._like

    def _advance(self, u_t: Tensor, state: FIRWindowState) -> tuple[Tensor, FIRWindowState]:
        latest = u_t.to(state.inputs.dtype).unsqueeze(-1)
        window = torch.cat([state.inputs, latest.expand(*state.inputs.shape[:-1], 1)], dim=-1)
        return (window * self._reversed).sum(-1).to(u_t.dtype), FIRWindowState(window[..., 1:])

    def block_form(self, size: int, streams: int = 0) -> VectorBlockForm[FIRWindowState]:
        blocks = ShiftBlocks.from_kernel(self._like.reshape(-1, self._like.shape[-1]), size)
        return VectorBlockForm([blocks], streams)


class FIRRecurrence(Recurrence[FIRState]):
    """An FIR system one sample at a time, by online convolution.

    `step` writes into its buffers and `advance` into a copy of them. Where both are depends on how
    many samples were taken, which a traced program cannot know.
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
    """Return the outputs of a chunk and the buffers after it, in the dtypes of both."""
    y, buffers = online.extend(u.to(state.inputs.dtype), OnlineBuffers(*state))
    return y.to(u.dtype), FIRState(*buffers)


def _fits(state: FIRState, window: int, shape: torch.Size) -> bool:
    """Return whether the buffers are those of a window for samples of `shape`."""
    inputs, owed = state.inputs.shape, state.owed.shape
    if inputs[:-1] != owed[:-1] or inputs[-1:] != (2 * window,) or owed[-1:] != (window,):
        return False
    return inputs[:-1] == shape or broadcasts(inputs[:-1], shape)
