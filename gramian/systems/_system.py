"""The contract of every system: a causal operator, held as an immutable batch of channels."""

from __future__ import annotations

import abc
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, Protocol, overload

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from typing_extensions import Self

from gramian.ops import causal_convolution
from gramian.systems._state import State

__all__ = ["LinearRecurrence", "Recurrence", "System", "TimeInvariantSystem"]

_TAPS = 4096
"""Taps over which a system is compared with itself in another precision."""

_TAPS_IN_ALL = 2**24
"""The same for all channels together."""


class Recurrence(Protocol):
    """A system made ready to be stepped: a frozen snapshot, through which no gradient flows."""

    form: str
    """How it steps: "modal", "lattice", "companion", "state_space", "dplr", "online",
    "time_varying" or "dense"."""

    error: float
    """Relative l2 error of the impulse response that it steps through, where that was converted."""

    def initial_state(
        self,
        batch_shape: tuple[int, ...],
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> State:
        """The state of a silent past, for samples of shape ``batch_shape`` = (*B, *C')."""

    def prefill(self, u: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Take the chunk ``u`` (*B, *C', T) at once; returns y (*B, *C', T) and the new state."""

    def step(self, u_t: Tensor, state: State) -> tuple[Tensor, State]:
        """Take one sample (*B, *C'). Consumes ``state``: use only the one returned."""


class LinearRecurrence(abc.ABC):
    """What the recurrences of finite-dimensional systems share: one state tensor (*B, *C', *S).

    A subclass sets ``_state`` (the type of its states), ``_like`` (a tensor of their dtype and
    device) and ``_state_shape`` S, and steps.
    """

    form: str
    error: float = 0.0
    """Largest relative l2 error, over channels, of the impulse response that the recurrence steps
    through against the taps that the system was made from; 0 where it was made from no taps."""

    system: System
    _state: Callable[[Tensor], State]
    _like: Tensor
    _state_shape: tuple[int, ...]

    def initial_state(
        self,
        batch_shape: tuple[int, ...],
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> Any:
        """Zeros for samples of shape ``batch_shape`` = (*B, *C')."""
        shape = torch.broadcast_shapes(tuple(batch_shape), self.system.channel_shape)
        return self._state(
            self._like.new_zeros(*shape, *self._state_shape, dtype=dtype, device=device)
        )

    @torch.no_grad()
    def prefill(self, u: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Take the chunk ``u`` (*B, *C', T) at once, by blocks; go on from ``state`` if given."""
        if state is None:
            state = self.initial_state(u.shape[:-1], device=u.device)
        return self.system._apply_from(u, state)

    @abc.abstractmethod
    def step(self, u_t: Tensor, state: State) -> tuple[Tensor, State]:
        """Take one sample (*B, *C'). Consumes ``state``: use only the one returned."""

    def _measured_error(self, taps: Tensor) -> float:
        """Largest relative l2 error, over channels, of the impulse response as stepped against
        ``taps`` (*C, K); infinite where the recurrence overflows."""
        state = self.initial_state(taps.shape[:-1])
        sample = torch.ones_like(taps[..., 0])
        outputs = []
        for _ in range(taps.shape[-1]):
            y, state = self.step(sample, state)
            outputs.append(y)
            sample = torch.zeros_like(sample)
        difference = torch.linalg.vector_norm(torch.stack(outputs, -1) - taps, dim=-1)
        scale = torch.linalg.vector_norm(taps, dim=-1).clamp_min(torch.finfo(taps.dtype).tiny)
        return float((difference / scale).nan_to_num(torch.inf).amax()) if taps.numel() else 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class System(abc.ABC):
    """A causal operator ``y = T u`` on every channel of a batch.

    Fields are tensors whose leading dimensions ``(*C)`` are the channels. A system is immutable and
    a pytree; gradients flow through it to whatever its fields were made of. Constructors check
    shapes and dtypes, never values.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        pytree.register_pytree_node(
            cls,
            lambda system: (system._fields(), system._static),
            lambda fields, static: cls._from_fields(fields, static),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        )

    def _fields(self) -> list[Any]:
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    @property
    def _static(self) -> Any:
        """What belongs to the system besides its tensors; hashable."""
        return None

    @classmethod
    def _from_fields(cls, values: Any, static: Any = None) -> Self:
        system = object.__new__(cls)
        for field, value in zip(dataclasses.fields(cls), values, strict=True):
            object.__setattr__(system, field.name, value)
        return system

    def _map(self, function: Any) -> Self:
        return self._from_fields(
            [function(value) if value is not None else None for value in self._fields()],
            self._static,
        )

    @property
    @abc.abstractmethod
    def channel_shape(self) -> torch.Size:
        """The channel dimensions ``(*C)``."""

    @property
    @abc.abstractmethod
    def dtype(self) -> torch.dtype:
        """The real floating-point dtype of the impulse response."""

    @property
    @abc.abstractmethod
    def device(self) -> torch.device:
        """Where the fields are."""

    @property
    @abc.abstractmethod
    def order(self) -> int:
        """State dimension over the reals, of the largest channel."""

    @abc.abstractmethod
    def matrix(self, length: int) -> Tensor:
        """The operator on ``length`` samples, (*C, length, length), lower triangular."""

    @abc.abstractmethod
    def hankel_singular_values(self, length: int | None = None, at: int | None = None) -> Tensor:
        """Singular values of the Hankel block ``T[at:length, :at]``, (*C, k), descending."""

    @abc.abstractmethod
    def recurrence(self, form: str | None = None) -> Recurrence:
        """The system as a recurrence; ``form=None`` picks the one that is safe."""

    @abc.abstractmethod
    def _apply(self, u: Tensor) -> Tensor:
        """Outputs from a silent past."""

    @abc.abstractmethod
    def _apply_from(self, u: Tensor, state: State) -> tuple[Tensor, State]:
        """Outputs and final state of a chunk that starts in ``state``."""

    def __getitem__(self, index: Any) -> Self:
        """Index the channel dimensions, as with a tensor: ``system[::2]``, ``system[:, None]``."""
        index = index if isinstance(index, tuple) else (index,)
        if Ellipsis in index:
            raise IndexError("a system is indexed along its channels; `...` is not accepted.")
        return self._map(lambda value: value[index])

    def reshape_channels(self, *shape: int) -> Self:
        """The same channels in another shape."""
        skip = len(self.channel_shape)
        return self._map(lambda value: value.reshape(*shape, *value.shape[skip:]))

    def to(
        self,
        device: torch.device | torch.dtype | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """The system on another device, or in another real floating-point dtype."""

        if isinstance(device, torch.dtype):
            device, dtype = None, device

        def move(value: Tensor) -> Tensor:
            kind = dtype.to_complex() if dtype is not None and value.is_complex() else dtype
            return value.to(device=device, dtype=kind)

        return self._map(move)

    def detach(self) -> Self:
        """The same values, cut off from the graph."""
        return self._map(Tensor.detach)

    def frozen(self) -> Self:
        """A copy of the values, cut off from the graph and from later changes of parameters."""
        return self._map(lambda value: value.detach().clone())

    @overload
    def __call__(self, u: Tensor) -> Tensor: ...

    @overload
    def __call__(self, u: Tensor, state: State) -> tuple[Tensor, State]: ...

    def __call__(self, u: Tensor, state: State | None = None) -> Tensor | tuple[Tensor, State]:
        """Apply the system to ``u`` (*B, *C', L), C' broadcasting against the channels C.

        Time-invariant systems transform a whole chunk: causal but for rounding errors, so that a
        NaN in a stream reaches the outputs of its chunk before it (`gramian.causal_convolution`).

        Args:
            u: Real input. Half precision is computed in float32 and cast back.
            state: Where the past left off: a state of ``recurrence()``, or what an earlier call
                returned. None: a silent past.

        Returns:
            y of the shape of ``u``; with a state, ``(y, new state)``.

        Raises:
            ValueError: if the channels of ``u`` do not broadcast against the system's.
        """
        self._check_input(u, u.shape[:-1])
        if state is None:
            return self._apply(u)
        return self._apply_from(u, state)

    def _check_input(self, u: Tensor, shape: torch.Size) -> None:
        try:
            fits = torch.broadcast_shapes(shape, self.channel_shape) == shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"the input's channels {tuple(shape)} do not broadcast against the system's "
                f"{tuple(self.channel_shape)}."
            )
        if not u.dtype.is_floating_point:
            raise TypeError(f"the input must be real floating point, got {u.dtype}.")


@dataclasses.dataclass(frozen=True, eq=False)
class TimeInvariantSystem(System):
    """A system that is a convolution: ``y_t = Σ_j h_j u_{t-j}``."""

    @abc.abstractmethod
    def impulse_response(self, length: int) -> Tensor:
        """The Markov parameters ``h_0, …, h_{length-1}``, (*C, length)."""

    def to(
        self,
        device: torch.device | torch.dtype | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """The system on another device, or in another real floating-point dtype.

        Warns:
            UserWarning: if rounding to a narrower dtype loses more than half of that dtype's digits
                of the impulse response. Its first 4,096 taps are compared, so a GPU waits; to a
                wider dtype or another device alone nothing is.
        """
        moved = super().to(device, dtype)
        if torch.finfo(moved.dtype).eps > torch.finfo(self.dtype).eps:
            self._warn_of_rounding(moved)
        return moved

    @torch.no_grad()
    def _warn_of_rounding(self, rounded: Self) -> None:
        channels = self.channel_shape.numel()
        if not channels or rounded.device.type == "meta" or torch.compiler.is_compiling():
            return
        length = max(64, min(_TAPS, _TAPS_IN_ALL // channels))
        before, after = (
            system.to(device=self.device, dtype=torch.float64).impulse_response(length)
            for system in (self, rounded)
        )
        norm = torch.linalg.vector_norm(before, dim=-1)
        error = torch.linalg.vector_norm(after - before, dim=-1) / torch.where(norm > 0, norm, 1)
        if not bool((error <= torch.finfo(rounded.dtype).eps ** 0.5).all()):
            warnings.warn(
                f"in {str(rounded.dtype)[6:]} the impulse response of this {type(self).__name__} "
                f"differs by {float(error.nan_to_num(torch.inf).max()):.0e} (relative l2 norm, "
                f"{length} taps) from that in {str(self.dtype)[6:]}: what cancels in its "
                "coefficients is lost in rounding.",
                stacklevel=4,  # past the decorator and `to`
            )

    @abc.abstractmethod
    def _infinite_hankel_singular_values(self) -> Tensor:
        """Hankel singular values over the infinite horizon, float64, descending."""

    def _apply(self, u: Tensor) -> Tensor:
        return causal_convolution(u, self.kernel_for(u, u.shape[-1]))

    def to_control(self) -> Any:
        """The system for python-control: a discrete-time ``control.TransferFunction`` of a transfer
        function or FIR, a ``control.StateSpace`` of others.

        Raises:
            ImportError: if python-control is not installed.
            ValueError: if the system has several channels: index one.
        """
        from gramian.systems.interop import to_control

        return to_control(self)

    def kernel_for(self, u: Tensor, length: int) -> Tensor:
        """``impulse_response(length)`` in the precision in which ``u`` is convolved: float64 for
        a float64 input, float32 otherwise."""
        return self.impulse_response(length).to(working_dtype(u))

    def matrix(self, length: int) -> Tensor:
        """The operator on ``length`` samples, (*C, length, length), lower triangular."""
        taps = torch.nn.functional.pad(self.impulse_response(length), (length - 1, 0))
        return taps.unfold(-1, length, 1).flip(-1)

    def hankel_singular_values(self, length: int | None = None, at: int | None = None) -> Tensor:
        """Singular values of the Hankel block, through which the past reaches the future.

        Args:
            length: Horizon L: the values of ``T[at:L, :at]``. None: the infinite horizon.
            at: Where past and future part, 1 … L - 1; by default L // 2.

        Returns:
            (*C, k), descending, decided in float64 and returned in the system's dtype.

        Raises:
            ValueError: if the horizon is infinite and a pole is not inside the unit circle, or
                ``at`` is out of range.
        """
        if length is None:
            if at is not None:
                raise ValueError("`at` needs a finite horizon: give `length` too.")
            return self._infinite_hankel_singular_values().to(self.dtype)
        at = length // 2 if at is None else at
        if not 0 < at < length:
            raise ValueError(f"`at` must lie in 1 … {length - 1} for length {length}, got {at}.")
        double = self.to(dtype=torch.float64)
        taps = double.impulse_response(length)[..., 1:]  # h_1 … h_{L-1}
        return torch.linalg.svdvals(taps.unfold(-1, at, 1)).to(self.dtype)


def working_dtype(u: Tensor) -> torch.dtype:
    """The dtype in which a signal is convolved: float64 stays, all else is float32."""
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def check_tensor(name: str, value: Any) -> None:
    """Raise a TypeError unless ``value`` is a tensor (or a stand-in that a transform put there)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}.")
