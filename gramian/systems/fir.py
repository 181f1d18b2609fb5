"""FIR systems, whose kernel is zero after its last tap.

The recurrence of a short kernel keeps a window of the last K - 1 inputs, the smallest state that a
kernel with a nonzero last tap can have. The recurrence of a long kernel uses online convolution.
Its state is up to six times as large as that window, but a step takes O(log² K) operations instead
of K.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from gramian.ops import causal_convolution
from gramian.ops.lengths import at_most
from gramian.ops.online import OnlineBuffers, OnlineConvolution
from gramian.systems._recurrence import Recurrence, VectorRecurrence
from gramian.systems._state import State, broadcasts, define_state, vector_fits
from gramian.systems._system import TimeInvariantSystem, check_tensor, working_dtype
from gramian.systems.blocks import ShiftBlocks, VectorBlockForm
from gramian.systems.companion import companion_form
from gramian.systems.state_space import StateSpace

__all__ = ["FIR", "FIRRecurrence", "FIRState", "FIRWindowRecurrence", "FIRWindowState"]

_LONGEST_WINDOW = 128
"""The largest order for which the default form of the recurrence is "window"."""

_SHORT_CHUNK = 16
"""Samples up to which a chunk after a window is a product of all its windows with the taps."""


@define_state
class FIRState(State):
    """The buffers of an online convolution with a window of P samples.

    Attributes:
        inputs: (*B, 2P): the previous window, then the current window up to `position`.
        owed: (*B, P): contributions of earlier inputs to the outputs of the current window.
        position: (), int64 on the CPU: the number of samples that have been processed.
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
        past, chunk = _move_past(inputs[..., :known], u, steps)
        past = torch.nn.functional.pad(past, (0, 2 * window - known))
        return chunk, FIRState(past, owed, position)


@define_state
class FIRWindowState(State):
    """The last inputs.

    Attributes:
        inputs: (*B, *C, K - 1): the last K - 1 inputs, the latest input last.
    """

    inputs: Tensor

    def moved(self, u: Tensor, steps: Sequence[int]) -> tuple[Tensor, FIRWindowState]:
        """Delay the past by `steps` samples, into the paused columns at the start of the chunk.

        Args:
            u: (batch, …, T): the chunk. The end of the past overwrites its first `steps` columns.
            steps: The number of paused columns of every stream of the batch, from 0 to T.

        Returns:
            The chunk and the past, which together hold the same samples as before.
        """
        past, chunk = _move_past(self.inputs, u, steps)
        return chunk, FIRWindowState(past)


def _move_past(past: Tensor, u: Tensor, steps: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Delay `past` (batch, …, k), so that its end overwrites the first columns of `u`.

    Args:
        past: (batch, …, k).
        u: (batch, …, T): the samples after the past.
        steps: How many columns of `u` are overwritten, for every stream of the batch.

    Returns:
        The new past and the new `u`.
    """
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


def _follow(past: Tensor, u: Tensor) -> Tensor:
    """Return `past` (*B, *C, k) and then `u` (*B, *C', T), in the memory layout of `u`."""
    u = u.to(past.dtype)
    if u.shape[-1] > _SHORT_CHUNK and u.ndim > 1 and u.stride(-1) != 1 and u.stride(-2) == 1:
        return torch.cat([past.mT, u.mT], dim=-2).mT
    return torch.cat([past, u], dim=-1)


AnyFIRState: TypeAlias = "FIRState | FIRWindowState"


@dataclasses.dataclass(frozen=True, eq=False)
class FIR(TimeInvariantSystem[AnyFIRState]):
    """`y_t = Σ_{j<K} kernel_j u_{t-j}`: a finite impulse response of K taps.

    Args:
        kernel: (*C, K), real floating point: the taps of every channel, K ≥ 1.

    Raises:
        TypeError: if the kernel is not a real floating-point tensor.
        ValueError: if the kernel has no taps.
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
        """Return K - 1, the largest delay in the kernel."""
        return self.kernel.shape[-1] - 1

    def impulse_response(self, length: int) -> Tensor:
        taps = self.kernel[..., :length]
        return torch.nn.functional.pad(taps, (0, length - taps.shape[-1]))

    def kernel_for(self, u: Tensor, length: int) -> Tensor:
        kernel = self.kernel[..., : at_most(length, self.order + 1)]
        return kernel.to(working_dtype(u))

    def recurrence(self, form: str | None = None) -> Recurrence[Any]:
        """Return a recurrence. Both forms are exact.

        Args:
            form: "window" keeps the last K - 1 inputs and takes K operations a sample. "online" is
                online convolution (van der Hoeven's relaxed multiplication; in the literature of
                language models FutureFill, arXiv 2410.03766, and Flash Inference, arXiv
                2410.12982), which keeps up to six times as many numbers and takes an amortized
                O(log² K) operations a sample. The default is "window" up to order 128, and
                "online" above.

        Raises:
            ValueError: if `form` is neither of these.
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
        """Return a shift register of the last inputs as a state-space system, in float64."""
        kernel = self.kernel.double()
        return companion_form(kernel[..., 1:], torch.zeros_like(kernel[..., 1:]), kernel[..., 0])

    def _as_control(self, control: Any) -> Any:
        kernel = self.kernel.detach().double().cpu().numpy()
        return control.TransferFunction(kernel, np.eye(1, len(kernel))[0], True)

    def apply_from(self, u: Tensor, state: AnyFIRState) -> tuple[Tensor, AnyFIRState]:
        kernel = self.kernel_for(u, self.kernel.shape[-1])
        if isinstance(state, FIRWindowState):
            past = _follow(*_in_one_shape(state.inputs, u.to(state.inputs.dtype)))
            if u.shape[-1] <= _SHORT_CHUNK:  # all windows at once
                windows = past.unfold(-1, self.order + 1, 1)
                y = (windows * kernel.flip(-1).unsqueeze(-2)).sum(-1)
            else:
                y = causal_convolution(past, kernel)[..., self.order :]
            kept = past[..., u.shape[-1] :].clone(memory_format=torch.contiguous_format)
            return y.to(u.dtype), FIRWindowState(kept)  # a view would keep the whole input
        return _extend(OnlineConvolution(kernel), u, state)

    def fits(self, state: AnyFIRState, shape: torch.Size) -> bool:
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
    """The recurrence of an FIR system that computes each output as a sum over the last K inputs.

    Args:
        system: The FIR system to step.
    """

    form = "window"
    state_type = FIRWindowState

    def __init__(self, system: FIR) -> None:
        self.system: FIR = system.frozen()
        self._like = self.system.kernel.to(working_dtype(self.system.kernel))
        self._reversed = self._like.flip(-1)
        self._state_shape = (system.order,)

    @property
    def kernel(self) -> Tensor:
        """Return the taps (*C, K), in the dtype of the state."""
        return self._like

    def _advance(self, u_t: Tensor, state: FIRWindowState) -> tuple[Tensor, FIRWindowState]:
        latest = u_t.to(state.inputs.dtype).unsqueeze(-1)
        window = torch.cat([state.inputs, latest.expand(*state.inputs.shape[:-1], 1)], dim=-1)
        return (window * self._reversed).sum(-1).to(u_t.dtype), FIRWindowState(window[..., 1:])

    def block_form(self, size: int, streams: int = 0) -> VectorBlockForm[FIRWindowState]:
        blocks = ShiftBlocks.from_kernel(self._like.reshape(-1, self._like.shape[-1]), size)
        return VectorBlockForm([blocks], streams)


class FIRRecurrence(Recurrence[FIRState]):
    """The recurrence of an FIR system that uses online convolution.

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
    """Return the outputs in the dtype of `u`, and the buffers after `u` in the dtype of `state`."""
    inputs, signal = _in_one_shape(state.inputs, u.to(state.inputs.dtype))
    y, buffers = online.extend(signal, OnlineBuffers(inputs, state.owed, state.position))
    return y.to(u.dtype), FIRState(*buffers)


def _in_one_shape(past: Tensor, u: Tensor) -> list[Tensor]:
    """Return the past (*B, *C', k) and a chunk (*B, *C', T) with dimensions before the last equal.

    The channels of one may be broadcast to the channels of the other.
    """
    if past.shape[:-1] == u.shape[:-1]:
        return [past, u]
    shape = torch.broadcast_shapes(past.shape[:-1], u.shape[:-1])
    return [x.expand(*shape, x.shape[-1]) for x in (past, u)]


def _fits(state: FIRState, window: int, shape: torch.Size) -> bool:
    """Return whether a state fits an online convolution of this window and samples of `shape`."""
    inputs, owed = state.inputs.shape, state.owed.shape
    if inputs[:-1] != owed[:-1] or inputs[-1:] != (2 * window,) or owed[-1:] != (window,):
        return False
    return inputs[:-1] == shape or broadcasts(inputs[:-1], shape)
