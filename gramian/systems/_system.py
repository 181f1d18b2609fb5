"""The contract of systems: causal operators, each an immutable batch of channels."""

from __future__ import annotations

import abc
import dataclasses
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Generic, overload

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from typing_extensions import Self

from gramian.ops import causal_convolution
from gramian.ops.precision import complex_dtype
from gramian.systems._state import State, StateT, broadcasts, check_state, vector_fits, wrong_shapes

if TYPE_CHECKING:
    from gramian.systems._recurrence import Recurrence
    from gramian.systems.state_space import StateSpace

__all__ = [
    "STATIC",
    "System",
    "TimeInvariantSystem",
    "check_single",
    "check_tensor",
    "import_control",
    "working_dtype",
]

STATIC = {"static": True}
"""The metadata of a dataclass field that holds a hashable value instead of a tensor."""

_TAPS = 4096
"""The largest number of taps that are compared when a system is cast to another precision."""

_TAPS_IN_ALL = 2**24
"""The largest number of taps that are compared in all channels together."""


@dataclasses.dataclass(frozen=True, eq=False)
class System(abc.ABC, Generic[StateT]):
    """A causal operator `y = T u` on every channel of a batch.

    A field is either a tensor whose leading dimensions `(*C)` are the channels, or a static value.
    The dataclass field of a static value has the metadata `STATIC`. A system is immutable and a
    pytree. Gradients flow through it to the tensors from which its fields were computed.
    Constructors check shapes and dtypes, but never values.
    """

    _kind: ClassVar[str] = "system"
    """The name of this kind of system in messages."""

    _state_types: ClassVar[tuple[type[State], ...]] = (State,)
    """The types of the states from which the system can continue."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        pytree.register_pytree_node(
            cls,
            cls._flattened,
            lambda fields, static: cls._from_fields(fields, static),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        )

    def _fields(self) -> list[Any]:
        """Return the tensors, in the order of their fields."""
        return [getattr(self, field.name) for field in _split_fields(self)[0]]

    @property
    def _static(self) -> tuple[Any, ...]:
        """Return the values of the static fields, which are hashable."""
        return tuple(getattr(self, field.name) for field in _split_fields(self)[1])

    def _flattened(self) -> tuple[list[Any], tuple[Any, ...]]:
        """Return the tensors and the static values, as a pytree needs them."""
        return self._fields(), self._static

    @classmethod
    def _from_fields(cls, values: Iterable[Any], static: tuple[Any, ...] | None = None) -> Self:
        """Make a system without checks. Static fields have their defaults if `static` is None."""
        system = object.__new__(cls)
        tensors, rest = _split_fields(system)
        if static is None:
            static = tuple(field.default for field in rest)
        for field, value in zip((*tensors, *rest), (*values, *static), strict=True):
            object.__setattr__(system, field.name, value)
        return system

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return the system with `function` applied to every tensor and the same static fields."""
        return self._from_fields(
            [function(value) if value is not None else None for value in self._fields()],
            self._static,
        )

    @property
    @abc.abstractmethod
    def channel_shape(self) -> torch.Size:
        """Return the channel dimensions `(*C)`."""

    @property
    @abc.abstractmethod
    def dtype(self) -> torch.dtype:
        """Return the real floating-point dtype of the impulse response."""

    @property
    @abc.abstractmethod
    def device(self) -> torch.device:
        """Return the device of the fields."""

    @property
    @abc.abstractmethod
    def order(self) -> int:
        """Return the state dimension of the largest channel, counted in real numbers."""

    @abc.abstractmethod
    def matrix(self, length: int) -> Tensor:
        """Return the operator on `length` samples, (*C, length, length), lower triangular."""

    @abc.abstractmethod
    def hankel_singular_values(self, length: int | None = None, at: int | None = None) -> Tensor:
        """Return the singular values of the block `T[at:length, :at]`, (*C, k), descending."""

    @abc.abstractmethod
    def recurrence(self, form: str | None = None) -> Recurrence[StateT]:
        """Return the system as a recurrence. `form=None` chooses an accurate form."""

    @abc.abstractmethod
    def _apply(self, u: Tensor) -> Tensor:
        """Compute the outputs after a silent past."""

    @abc.abstractmethod
    def apply_from(self, u: Tensor, state: StateT) -> tuple[Tensor, StateT]:
        """Compute the outputs of a chunk that starts from `state`, and the state after it.

        Neither `u` nor `state` is checked; `system(u, state)` checks both.
        """

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Return the shape of a state's tensor after its channel dimensions."""
        return (self.order,)

    def fits(self, state: StateT, shape: torch.Size) -> bool:
        """Return whether a state has the shapes that samples of `shape` need."""
        return vector_fits(state[0], self.state_shape, shape)

    def __getitem__(self, index: Any) -> Self:
        """Index the channels like the dimensions of a tensor: `system[::2]`, `system[:, None]`."""
        index = index if isinstance(index, tuple) else (index,)
        if Ellipsis in index:
            raise IndexError("a system is indexed along its channels; `...` is not accepted.")
        return self._map(lambda value: value[index])

    def reshape_channels(self, *shape: int) -> Self:
        """Return a system of the same channels whose channel dimensions are `shape`."""
        skip = len(self.channel_shape)
        return self._map(lambda value: value.reshape((*shape, *value.shape[skip:])))

    def to(
        self,
        device: torch.device | torch.dtype | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Move to another device or to another real floating-point dtype.

        Complex tensors become complex128 for float64, and complex64 for any narrower dtype.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device

        def move(value: Tensor) -> Tensor:
            kind = complex_dtype(dtype) if dtype is not None and value.is_complex() else dtype
            return value.to(device=device, dtype=kind)

        return self._map(move)

    def detach(self) -> Self:
        """Return the same system, detached from the autograd graph."""
        return self._map(Tensor.detach)

    def frozen(self) -> Self:
        """Return a copy that neither gradients nor later changes of parameters reach."""
        return self._map(lambda value: value.detach().clone())

    @overload
    def __call__(self, u: Tensor) -> Tensor: ...

    @overload
    def __call__(self, u: Tensor, state: StateT) -> tuple[Tensor, StateT]: ...

    def __call__(self, u: Tensor, state: StateT | None = None) -> Tensor | tuple[Tensor, StateT]:
        """Apply the system to `u` (*B, *C', L), where C' broadcasts against the channels C.

        A time-invariant system is causal only up to rounding errors, because it computes Fourier
        transforms of the whole chunk. So a NaN in the input also reaches the earlier outputs of its
        chunk (see `gramian.causal_convolution`).

        Args:
            u: Real input. For an input in half precision, y is computed in float32 and cast back.
            state: The state after the samples before `u`, from `recurrence()` or an earlier call.
                None means that the past is silent.

        Returns:
            y, which has the shape of `u`. If a state is given, `(y, new state)`.

        Raises:
            TypeError: if `u` is not a real floating-point tensor, or if `state` is not a state of
                this kind of system.
            ValueError: if the channels of `u` do not broadcast against the channels of the system,
                or if the shapes of `state` do not fit.
        """
        shape = u.shape[:-1]
        self._check_input(u, shape)
        if state is None:
            return self._apply(u)
        check_state(f"this {self._kind}", state, self._state_types)
        if not self.fits(state, shape):
            raise wrong_shapes(state, shape)
        return self.apply_from(u, state)

    def _check_input(self, u: Tensor, shape: torch.Size) -> None:
        if not broadcasts(self.channel_shape, shape, onto=shape):
            raise ValueError(
                f"the input's channels {tuple(shape)} do not broadcast against the system's "
                f"{tuple(self.channel_shape)}."
            )
        if not u.dtype.is_floating_point:
            raise TypeError(f"the input must be real floating point; got {u.dtype}.")


@dataclasses.dataclass(frozen=True, eq=False)
class TimeInvariantSystem(System[StateT]):
    """A system that acts as a convolution: `y_t = Σ_j h_j u_{t-j}`."""

    @abc.abstractmethod
    def impulse_response(self, length: int) -> Tensor:
        """Return the Markov parameters `h_0, …, h_{length-1}`, (*C, length)."""

    @abc.abstractmethod
    def state_space(self) -> StateSpace:
        """Return the same system with a dense state matrix, in float64."""

    def to(
        self,
        device: torch.device | torch.dtype | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Move to another device or to another real floating-point dtype.

        Complex tensors become complex128 for float64, and complex64 for any narrower dtype.

        Warns:
            UserWarning: if `dtype` is narrower than the system's dtype, and rounding to `dtype`
                changes the impulse response in more than half of the digits of `dtype`. The first
                4,096 taps are compared, which synchronizes with a GPU. If the dtype stays the same
                or becomes wider, nothing is compared.
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
                stacklevel=4,  # past the decorator and `to`, to the caller
            )

    @abc.abstractmethod
    def _infinite_hankel_singular_values(self) -> Tensor:
        """Return the Hankel singular values over the infinite horizon.

        Returns:
            (*C, k), float64, descending.
        """

    def _apply(self, u: Tensor) -> Tensor:
        return causal_convolution(u, self.kernel_for(u, u.shape[-1]))

    def to_control(self) -> Any:
        """Return the system as a discrete-time system of python-control.

        Returns:
            A `control.TransferFunction` for a transfer function or an FIR, and a
            `control.StateSpace` for every other system.

        Raises:
            ImportError: if python-control is not installed.
            ValueError: if the system has several channels. Index one of them first.
        """
        control = import_control()
        check_single(self)
        return self._as_control(control)

    def _as_control(self, control: Any) -> Any:
        """Return the single channel as a system of python-control, given its module `control`."""
        return control.StateSpace(*self.state_space().to_scipy(), True)

    def kernel_for(self, u: Tensor, length: int) -> Tensor:
        """Return `impulse_response(length)` in the precision in which `u` is convolved.

        The precision is float64 for a float64 input, and float32 for every other input.
        """
        return self.impulse_response(length).to(working_dtype(u))

    def matrix(self, length: int) -> Tensor:
        """Return the operator on `length` samples, (*C, length, length), lower triangular."""
        taps = torch.nn.functional.pad(self.impulse_response(length), (length - 1, 0))
        return taps.unfold(-1, length, 1).flip(-1)

    def hankel_singular_values(self, length: int | None = None, at: int | None = None) -> Tensor:
        """Return the singular values of a Hankel block, through which the past acts on the future.

        Args:
            length: The horizon L. The block is `T[at:L, :at]`. None means the infinite horizon.
            at: The first step of the future, 1 … L - 1; by default `L // 2`.

        Returns:
            (*C, k), descending. They are computed in float64 and returned in the system's dtype.

        Raises:
            ValueError: if the horizon is infinite and a pole is not inside the unit circle, or if
                `at` is out of range.
        """
        if length is None:
            if at is not None:
                raise ValueError("`at` needs a finite horizon: give `length` too.")
            return self._infinite_hankel_singular_values().to(self.dtype)
        at = length // 2 if at is None else at
        if not 0 < at < length:
            raise ValueError(f"`at` must lie in 1 … {length - 1} for length {length}; got {at}.")
        double = self.to(dtype=torch.float64)
        taps = double.impulse_response(length)[..., 1:]  # h_1 … h_{L-1}
        return torch.linalg.svdvals(taps.unfold(-1, at, 1)).to(self.dtype)


def working_dtype(u: Tensor) -> torch.dtype:
    """Return the dtype in which `u` is convolved: float64 if `u` is in float64, else float32."""
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def check_tensor(name: str, value: Any) -> None:
    """Raise a TypeError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(value).__name__}.")


def check_single(system: System) -> None:
    """Raise a ValueError if the system has channel dimensions, rather than a single channel."""
    if system.channel_shape:
        raise ValueError(
            f"one channel at a time: index the system, whose channels are "
            f"{tuple(system.channel_shape)}, as in system[0]."
        )


def import_control() -> Any:
    """Import python-control, or raise an ImportError that says what to install."""
    try:
        import control
    except ImportError as error:
        raise ImportError("this needs python-control: pip install control.") from error
    return control


_Fields = tuple[dataclasses.Field[Any], ...]


def _split_fields(system: System) -> tuple[_Fields, _Fields]:
    """Return the fields of a system that hold tensors, and its static fields.

    The fields are those of an instance, because torch.compile cannot trace those of a class.
    """
    fields = dataclasses.fields(system)
    return (
        tuple(field for field in fields if not field.metadata.get("static")),
        tuple(field for field in fields if field.metadata.get("static")),
    )
