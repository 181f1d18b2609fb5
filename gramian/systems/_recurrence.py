"""The contract of recurrences: frozen copies of systems that process samples one by one."""

from __future__ import annotations

import abc
import math
from typing import Any, ClassVar, Generic

import torch
from torch import Tensor

from gramian.systems._state import (
    State,
    StateT,
    check_state,
    joined_shape,
    vector_fits,
    wrong_shapes,
)
from gramian.systems._system import System
from gramian.systems.blocks import BlockForm

__all__ = ["Recurrence", "VectorRecurrence"]

_LONG = 1 << 14
"""The least length of an impulse response whose blocks are tried."""

REPRODUCED = 1e-5
"""The largest relative l2 error with which a recurrence is said to reproduce the known taps."""


class Recurrence(abc.ABC, Generic[StateT]):
    """A frozen copy of a system that processes samples one by one. No gradient flows through it.

    A subclass names the type of its states, and sets `_like`, a tensor with the dtype and device of
    a new state. It defines `initial_state`, `_prefill` and `_advance`. If a step can reuse the
    memory of its state, the subclass defines `_step` too.
    """

    form: str
    """The form in which the recurrence steps: "modal", "lattice", "companion", "state_space",
    "dplr", "window", "online", "time_varying" or "dense"."""

    error: float = 0.0
    """The largest relative l2 error of a channel: the distance of the recurrence's impulse response
    from the taps from which the system was made. It is 0 if the system was not made from taps."""

    state_type: ClassVar[type[State]]
    """The type of the recurrence's states."""

    system: System
    """The frozen copy of the system."""

    @abc.abstractmethod
    def initial_state(
        self,
        batch_shape: tuple[int, ...],
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> StateT:
        """Return the state of a silent past for samples of shape `batch_shape` = (*B, *C').

        Args:
            batch_shape: The shape of one sample, broadcast against the channels of the system.
            dtype: The dtype of the state; by default the dtype in which the recurrence computes.
            device: The device of the state; by default the device of the system.
        """

    @torch.no_grad()
    def prefill(self, u: Tensor, state: StateT | None = None) -> tuple[Tensor, StateT]:
        """Process the chunk `u` (*B, *C', T) at once.

        Args:
            u: The chunk.
            state: The state after the samples before the chunk. None means that the past is silent.

        Returns:
            y (*B, *C', T) and the new state.

        Raises:
            TypeError: if `state` does not have the type `state_type`.
            ValueError: if the shape of `state` does not fit the system and `u`.
        """
        if state is None:
            state = self.initial_state(u.shape[:-1], device=u.device)
        else:
            self._check_state(state, u.shape[:-1])
        return self._prefill(u, state)

    def advance(self, u_t: Tensor, state: StateT) -> tuple[Tensor, StateT]:
        """Process one sample (*B, *C') without writing into any tensor.

        This is the step that `torch.export` can trace.

        Returns:
            y (*B, *C') and the new state. The given `state` keeps its values.

        Raises:
            TypeError: if `state` does not have the type `state_type`.
            ValueError: if the shape of `state` does not fit the system and `u_t`.
        """
        self._check_state(state, u_t.shape)
        return self._advance(u_t, state)

    def step(self, u_t: Tensor, state: StateT) -> tuple[Tensor, StateT]:
        """Process one sample (*B, *C') as `advance` does, but overwrite the memory of `state`.

        Returns:
            y (*B, *C') and the new state. `state` is overwritten: use only the returned state.

        Raises:
            TypeError: if `state` does not have the type `state_type`.
            ValueError: if the shape of `state` does not fit the system and `u_t`.
        """
        self._check_state(state, u_t.shape)
        if not torch.is_grad_enabled():  # entering `no_grad` costs more than the check
            return self._step(u_t, state)
        with torch.no_grad():
            return self._step(u_t, state)

    def block_form(self, size: int, streams: int = 0) -> BlockForm[StateT]:
        """Return the matrices that process `size` samples at once, in the layout of the state.

        Args:
            size: The number of samples in a block, a power of two, at least 2.
            streams: The number of dimensions of size 1 that follow the first channel dimension
                and along which all streams share the system, as in MultiHyena's outer products.

        Raises:
            ValueError: if the recurrence has no constant state matrix.
        """
        raise ValueError(
            f'a recurrence of the form "{self.form}" has no constant state matrix, so it has no '
            "block form."
        )

    @abc.abstractmethod
    def _prefill(self, u: Tensor, state: StateT) -> tuple[Tensor, StateT]:
        """Compute `prefill` from a state that has been checked."""

    @abc.abstractmethod
    def _advance(self, u_t: Tensor, state: StateT) -> tuple[Tensor, StateT]:
        """Compute `advance` from a state that has been checked."""

    def _step(self, u_t: Tensor, state: StateT) -> tuple[Tensor, StateT]:
        """Compute `step` from a state that has been checked. The default calls `_advance`."""
        return self._advance(u_t, state)

    def _fits(self, state: StateT, shape: torch.Size) -> bool:
        """Return whether a state has the shapes that samples of `shape` need."""
        return self.system.fits(state, shape)

    def _check_state(self, state: StateT, shape: torch.Size) -> None:
        if not isinstance(state, self.state_type):
            check_state(f'this recurrence of the form "{self.form}"', state, [self.state_type])
        if not self._fits(state, shape):
            raise wrong_shapes(state, shape)


class VectorRecurrence(Recurrence[StateT]):
    """The base class of recurrences whose state holds one tensor (*B, *C', *S).

    A subclass sets `_like`, a tensor with the dtype and device of the state, and `_state_shape`,
    the shape S.
    """

    _like: Tensor
    _state_shape: tuple[int, ...]

    def initial_state(
        self,
        batch_shape: tuple[int, ...],
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> StateT:
        shape = joined_shape(tuple(batch_shape), self.system.channel_shape)
        return self._make_state(
            self._like.new_zeros(*shape, *self._state_shape, dtype=dtype, device=device)
        )

    def _make_state(self, tensor: Tensor) -> StateT:
        """Return a state that holds the tensor."""
        make: Any = self.state_type
        return make(tensor)

    def _prefill(self, u: Tensor, state: StateT) -> tuple[Tensor, StateT]:
        return self.system.apply_from(u, state)

    def _fits(self, state: StateT, shape: torch.Size) -> bool:
        return vector_fits(state[0], self._state_shape, shape)

    def _measured_error(self, taps: Tensor) -> float:
        """Measure how far the impulse response, computed by steps, is from `taps` (*C, K).

        Steps of a long response take long, so its blocks are tried first. Where sums cancel, they
        lose more digits than steps. If they reproduce the taps, their error is returned.

        Returns:
            The largest relative l2 error of a channel, or infinity if the recurrence overflows.
        """
        length = taps.shape[-1]
        if not taps.numel():
            return 0.0
        sample = torch.ones_like(taps[..., 0])
        first, start = self.step(sample, self.initial_state(sample.shape))  # silence follows
        first = first.unsqueeze(-1)
        order = math.prod(self._state_shape)
        size = math.isqrt(length)  # blocks then need no more memory than the taps
        if length >= _LONG and 0 < order <= size // 2:
            blocks = self._block_outputs(sample, start[0], size)[..., : length - 1]
            error = _relative_error(torch.cat([first, blocks.to(first.dtype)], dim=-1), taps)
            if error <= REPRODUCED:
                return error
        steps, _ = self._silent_steps(sample, start, length - 1)
        return _relative_error(torch.cat([first, steps], dim=-1), taps)

    def _block_outputs(self, sample: Tensor, start: Tensor, size: int) -> Tensor:
        """Return the outputs (*C, at least size²) of silence after the state `start` (*C, n).

        Steps from all unit states at once show how a state becomes the outputs of `size` steps and
        the state after them. These matrices have the rounding errors of the steps.
        """
        order = start.shape[-1]
        unit = torch.eye(order, dtype=start.dtype, device=start.device)
        unit = unit.reshape(order, *(1,) * (start.ndim - 1), order).repeat(1, *start.shape[:-1], 1)
        like = sample.to(start.dtype).expand(order, *sample.shape)
        outputs, ends = self._silent_steps(like, self._make_state(unit), size)
        outputs, transition = outputs.movedim(0, -1), ends[0].movedim(0, -1)
        starts = [start]
        for _ in range(size + 1):
            starts.append((transition @ starts[-1].unsqueeze(-1)).squeeze(-1))
        return (torch.stack(starts, dim=-2) @ outputs.mT).flatten(-2)

    def _silent_steps(self, like: Tensor, state: StateT, count: int) -> tuple[Tensor, StateT]:
        """Step `count` samples of silence, each like `like` (*B, *C): outputs (*B, *C, count)."""
        silence = torch.zeros_like(like)
        outputs = like.new_empty(*like.shape, count)
        for index in range(count):
            outputs[..., index], state = self.step(silence, state)
        return outputs, state


def _relative_error(response: Tensor, taps: Tensor) -> float:
    """Return the largest relative l2 error of a channel of `response` (*C, K)."""
    difference = torch.linalg.vector_norm(response - taps, dim=-1)
    scale = torch.linalg.vector_norm(taps, dim=-1).clamp_min(torch.finfo(taps.dtype).tiny)
    return float((difference / scale).nan_to_num(torch.inf).amax())
