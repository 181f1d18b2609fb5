"""The contract of every mixer, and the short convolution that most of them share."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any, TypeGuard, overload

import torch
from torch import Tensor, nn

from gramian.filters import Filter
from gramian.mixers._compiled import CompiledStep
from gramian.mixers._segments import Segments
from gramian.systems import (
    FIR,
    DenseOperator,
    Modal,
    Recurrence,
    State,
    System,
    TimeInvariantSystem,
    TimeVarying,
)
from gramian.systems._pausing import PausedOperator

__all__ = [
    "Mixer",
    "MixerRecurrence",
    "ShortConvolution",
    "apply_mask",
    "check_divides",
    "check_probability",
    "for_products",
    "has_small_state",
]


class Mixer(nn.Module, abc.ABC):
    """A causal map of a sequence (batch, length, width) that carries a state.

    ``mixer(x, mask=None) -> y`` takes a whole sequence from a silent past; ``mixer(x, state,
    mask=None) -> (y, state)`` continues from a state, through which gradients flow;
    ``recurrence()`` makes a frozen snapshot for generation. All of them compute the same map.

    The mask, (batch, length), is 1 where a token is real. Padding is not time: on the left, on the
    right, in between or before the tokens of a warm state, a row gives the outputs and the state
    that its tokens give alone. What stands at padding in the output means nothing. Rows that hold
    several sequences each are told by `Segments` in the mask's place, whole sequences only.

    Long convolutions go through FFTs, which mix all samples of a sequence: a NaN, an infinity or a
    number too large to round the others beside reaches earlier outputs of that sequence as well.

    ``kernel_dropout`` is the probability with which a tap of a long convolution is dropped in
    training, whole sequences only: what carries a state is never touched by it.
    """

    filter: Filter | None
    """The one filter of all long convolutions; None in a mixer that has none."""

    width: int
    kernel_dropout: float = 0.0
    _compiled: CompiledStep | None = None

    @overload
    def __call__(
        self, x: Tensor, state: None = None, mask: Tensor | Segments | None = None
    ) -> Tensor: ...

    @overload
    def __call__(
        self, x: Tensor, state: State, mask: Tensor | Segments | None = None
    ) -> tuple[Tensor, State]: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | Segments | None = None
    ) -> Tensor | tuple[Tensor, State]:
        """See the class.

        Args:
            x: (batch, length, width), length at least 1.
            state: From ``recurrence().initial_state(batch)`` or an earlier call.
            mask: (batch, length), boolean or numeric, nonzero for real tokens; or `Segments`.

        Raises:
            TypeError: if ``state`` is none.
            ValueError: for a shape other than these, or a state with rows of several sequences.
        """
        segments = self._segments(x, mask)
        if state is None:
            return self._whole(x, segments)
        if not isinstance(state, State):
            raise TypeError(
                "the second argument is the state that recurrence().initial_state(batch) or an "
                f"earlier call returned, got {type(state).__name__}; pass a mask by name, mask=…"
            )
        return self._carried(x, state, segments, self._systems())

    def operator(
        self,
        x: Tensor,
        channels: slice | None = None,
        mask: Tensor | Segments | None = None,
    ) -> System:
        """What the mixer applies to its values on this input: after projections and short
        convolution, before output gate and output projection.

        Args:
            x: (batch, length, width), length at least 1, from a silent past.
            channels: Which heads or channels; all by default.
            mask: (batch, length), nonzero for real tokens. What depends on the input passes over
                padding: its rows and columns are zero. Where padding stands between the tokens of a
                row, the operator is that of the tokens moved together to the end.

        Returns:
            A system of ``length`` steps with channels (batch, heads) or (batch, width), or, where
            it does not depend on the input, a time-invariant one with channels (width).

        Raises:
            ValueError: for an input of another shape, a mixer that is not causal, or rows of
                several sequences: their operators are one for each of `Segments.parts`.
        """
        segments = self._segments(x, mask)
        real = None if segments is None else segments.real
        x = apply_mask(x, real)
        if segments is not None and not segments.unbroken:
            if segments.packed:
                raise ValueError("packed rows have one operator for each sequence: take its part.")
            (part,) = segments.parts
            x, real = part.take(x), part.real
        system = self._operator(x, slice(None) if channels is None else channels, real)
        return system if real is None else _silent_at_padding(system, real)

    def recurrence(self) -> MixerRecurrence:
        """A frozen snapshot for generation; filters are evaluated once, here."""
        return MixerRecurrence(self)

    def _segments(self, x: Tensor, mask: Tensor | Segments | None) -> Segments | None:
        """The checked mask, where there is one."""
        self.check_input(x, mask)
        segments = Segments.of(mask)
        return None if segments is None else segments.to(x.device)

    def _whole(self, x: Tensor, segments: Segments | None) -> Tensor:
        """Whole sequences from a silent past, wherever their tokens stand."""
        if segments is None or segments.unbroken:
            real = None if segments is None else segments.real
            return self._parallel(apply_mask(x, real), real, self._filters(x.shape[1]))
        parts = segments.parts
        longest = max(part.source.shape[1] for part in parts)
        systems = self._filters(longest)
        if len(parts) > 1:  # a kernel is made once for all of them
            systems = tuple(FIR(_taps(system, x, longest)) for system in systems)
        return segments.restore(
            [self._parallel(part.take(x), part.real, systems) for part in parts]
        )

    def _carried(
        self,
        x: Tensor,
        state: State,
        segments: Segments | None,
        operators: tuple[Any, ...],
        silent: bool = False,
    ) -> tuple[Tensor, State]:
        """A chunk from ``state``, which remembers nothing if it is ``silent``."""
        if segments is None:
            return self._chunk(x, state, None, operators)
        if segments.packed:
            raise ValueError(
                "a state is that of rows of one sequence each: packed rows can neither begin with "
                "one nor leave one."
            )
        if segments.aligned:
            x, real = apply_mask(x, segments.real), segments.real
        else:
            (part,) = segments.parts
            x, real = part.take(x), part.real
        if operators and not silent:
            pause = segments.pause()
            operators = tuple(PausedOperator(operator, pause) for operator in operators)
        y, state = self._chunk(x, state, real, operators)
        return y if segments.aligned else segments.restore([y]), state

    @abc.abstractmethod
    def _parallel(self, x: Tensor, mask: Tensor | None, systems: tuple[System, ...]) -> Tensor:
        """Whole sequences from a silent past, without padding between tokens; ``systems`` are
        `_filters` of at least their length."""

    @abc.abstractmethod
    def _operator(self, x: Tensor, channels: slice, mask: Tensor | None) -> System:
        """See `operator`."""

    def _filters(self, length: int) -> tuple[System, ...]:
        """The systems that `_parallel` convolves with."""
        return self._systems(length)

    @abc.abstractmethod
    def _systems(self, length: int | None = None) -> tuple[System, ...]:
        """The long convolutions in the order of their application, each broadcasting against
        `_long_shape`."""

    @property
    @abc.abstractmethod
    def _long_shape(self) -> tuple[int, ...]:
        """Streams of a long convolution, without the batch."""

    @abc.abstractmethod
    def _chunk(
        self, x: Tensor, state: State, mask: Tensor | None, operators: tuple[Any, ...]
    ) -> tuple[Tensor, State]:
        """A chunk from ``state``; each of ``operators`` maps (u, state) to (y, state), all of its
        columns at once or part by part.

        Where there is a mask, padding stands before the tokens of a row, and moves no state.
        """

    @abc.abstractmethod
    def _step(
        self, x_t: Tensor, state: State, long: tuple[Recurrence, ...]
    ) -> tuple[Tensor, State]:
        """One token (batch, width) from ``state``; ``long`` are the recurrences of the long
        convolutions. What is between the projections belongs into `_inner`."""

    def _inner(self, z: Tensor, state: State, long: tuple[Recurrence, ...]) -> tuple[Tensor, State]:
        """What a step does between the input and output projections: the part that compiles."""
        raise NotImplementedError

    def _fused(self, z: Tensor, state: State, long: tuple[Recurrence, ...]) -> tuple[Tensor, State]:
        """`_inner`, compiled where that was asked for."""
        if self._compiled is None:
            return self._inner(z, state, long)
        return self._compiled(self, z, state, long)

    @property
    def compiles(self) -> bool:
        """Whether steps have a part that `compile_step` compiles."""
        return type(self)._inner is not Mixer._inner

    def compile_step(self, enabled: bool = True, **options: Any) -> None:
        """Compile what steps do between the projections, or stop doing so.

        Layers of one class and one shape share the result; each other shape, a batch size too,
        is compiled at its first step. Where that fails, steps run as they are, after one warning.

        Args:
            enabled: Whether to.
            options: For ``torch.compile``: ``backend``, ``mode``, ``options``.
        """
        self._compiled = None
        if enabled and self.compiles:
            self._compiled = CompiledStep(type(self)._inner, **options)

    @abc.abstractmethod
    def _make_state(
        self, batch: int, long: tuple[State, ...], dtype: torch.dtype, device: torch.device
    ) -> State:
        """The state of a silent past around the states of the long convolutions."""

    def reserve(self, state: State, tokens: int) -> State:
        """``state`` with room for so many more tokens, where a mixer's state grows at all."""
        return state

    def _kernel(self, system: System, like: Tensor) -> Tensor:
        """Taps for a whole sequence ``like``, (batch, length, …), in training with dropout."""
        assert isinstance(system, TimeInvariantSystem)
        kernel = system.kernel_for(like, like.shape[1])
        if self.training and self.kernel_dropout > 0:
            kernel = nn.functional.dropout(kernel, self.kernel_dropout)
        return kernel

    def check_input(self, x: Tensor, mask: Tensor | Segments | None) -> None:
        """Raise a ValueError unless x is (batch, length ≥ 1, width) and the mask fits."""
        if x.ndim != 3 or x.shape[-1] != self.width or x.shape[1] == 0:
            raise ValueError(
                f"a mixer of width {self.width} takes (batch, length, {self.width}) with a length "
                f"of at least 1, got {tuple(x.shape)}."
            )
        if mask is not None and mask.shape != x.shape[:2]:
            raise ValueError(
                f"the mask must be (batch, length) = {tuple(x.shape[:2])}, got {tuple(mask.shape)}."
            )


def _taps(system: System, like: Tensor, length: int) -> Tensor:
    assert isinstance(system, TimeInvariantSystem)
    return system.kernel_for(like, length)


def _silent_at_padding(system: System, real: Tensor) -> System:
    """With rows of zeros where ``real`` (batch, length) is false; channels are (batch, …)."""
    if not isinstance(system, TimeVarying | DenseOperator):
        return system
    hidden = real.logical_not().unsqueeze(1)
    if isinstance(system, DenseOperator):
        return DenseOperator(system.entries.masked_fill(hidden.unsqueeze(-1), 0))
    C, D = system.C.masked_fill(hidden.unsqueeze(-1), 0), system.D.masked_fill(hidden, 0)
    return dataclasses.replace(system, C=C, D=D)


class MixerRecurrence:
    """A mixer made ready to be stepped: its filters evaluated, its other weights shared with it."""

    def __init__(self, mixer: Mixer) -> None:
        self.mixer = mixer
        with torch.no_grad():
            self.long = tuple(system.recurrence() for system in mixer._systems())

    @property
    def forms(self) -> tuple[str, ...]:
        """The form that each long convolution steps in."""
        return tuple(recurrence.form for recurrence in self.long)

    def initial_state(
        self,
        batch_size: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> State:
        """The state of a silent past.

        Args:
            batch_size: Number of sequences, an integer.
            dtype: Of the short convolution's past; default: the mixer's. Dynamic states keep the
                dtype that their form needs.
            device: Default: the mixer's.
        """
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(
                f"batch_size must be a positive number of sequences, got {batch_size!r}."
            )
        parameter = next(self.mixer.parameters())
        place = torch.device(device) if device is not None else parameter.device
        shape = (batch_size, *self.mixer._long_shape)
        long = tuple(recurrence.initial_state(shape, device=place) for recurrence in self.long)
        return self.mixer._make_state(batch_size, long, dtype or parameter.dtype, place)

    @torch.no_grad()
    def prefill(
        self,
        x: Tensor,
        state: State | None = None,
        mask: Tensor | Segments | None = None,
    ) -> tuple[Tensor, State]:
        """Take (batch, T, width) at once; returns y and the state after each row's last token.

        The mask is that of `Mixer.forward`: padding moves no state, wherever it stands.
        """
        segments = self.mixer._segments(x, mask)
        silent = state is None
        if state is None:
            state = self.initial_state(x.shape[0], dtype=x.dtype, device=x.device)
        operators = tuple(recurrence.prefill for recurrence in self.long)
        return self.mixer._carried(x, state, segments, operators, silent)

    @torch.no_grad()
    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """Take one token (batch, width). Consumes ``state``: use only the one returned."""
        state = self.mixer.reserve(state, 1)
        return self.mixer._step(x_t, state, self.long)

    def state_bytes(
        self, batch_size: int, dtype: torch.dtype | None = None, context: int = 1
    ) -> int:
        """Bytes of the state for ``batch_size`` sequences after ``context`` tokens, which only
        attention's depends on; nothing is allocated."""
        state = self.initial_state(batch_size, dtype=dtype, device="meta")
        return self.mixer.reserve(state, context).nbytes


class ShortConvolution(nn.Module):
    """A depthwise causal convolution of a few explicit taps, with bias.

    Args:
        channels: Number of channels.
        taps: K ≥ 1; tap 0 acts on the present.
    """

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        if taps < 1:
            raise ValueError(f"a short convolution needs at least one tap, got {taps}.")
        self.taps = taps
        self.weight = nn.Parameter(torch.empty(channels, taps))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within ±1/√K, as in torch's depthwise convolutions."""
        bound = 1 / math.sqrt(self.taps)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self, x: Tensor, past: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (batch, length, channels) after the K - 1 inputs ``past``; returns y and new past.

        Where the mask (batch, length) is zero, at the beginning of rows, the past is still to come.
        One token, (batch, channels), comes through here too, since hooks that bring parameters in
        (offloading) see no other method.
        """
        if x.ndim == 2 and past is not None:
            return self._one(x, past)
        length = x.shape[1]
        if past is None:
            extended = nn.functional.pad(x, (0, 0, self.taps - 1, 0))
        else:
            extended = torch.cat([past.to(x.dtype), x], dim=1)
            if mask is not None:
                extended = self._moved_past(extended, mask)
        weight = self.weight.flip(-1).to(x.dtype)
        y = self.bias.to(x.dtype)
        for j in range(self.taps):
            y = torch.addcmul(y, extended[:, j : j + length], weight[:, j])
        return y, extended[:, length:]

    def _moved_past(self, extended: Tensor, mask: Tensor) -> Tensor:
        """The leading K - 1 columns of a row moved to where its first token is."""
        batch, width = extended.shape[:2]
        padding = (mask == 0).sum(1, keepdim=True)
        columns = torch.arange(width, device=extended.device)
        source = torch.where(columns < self.taps - 1 + padding, columns - padding, columns)
        rows = torch.arange(batch, device=extended.device)[:, None] * width
        moved = extended.flatten(0, 1).index_select(0, (rows + source.clamp_min(0)).flatten())
        return moved.unflatten(0, (batch, width)).masked_fill((source < 0).unsqueeze(-1), 0)

    def step(self, x_t: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """One token (batch, channels)."""
        y, past = self(x_t, past)
        return y, past

    def _one(self, x_t: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.weight.to(x_t.dtype)
        past = past.to(x_t.dtype)
        y = torch.addcmul(self.bias.to(x_t.dtype), x_t, weight[:, 0])
        for j in range(1, self.taps):
            y = torch.addcmul(y, past[:, -j], weight[:, j])
        return y, torch.cat([past, x_t.unsqueeze(1)], dim=1)[:, 1:]

    def extra_repr(self) -> str:
        return f"channels={self.weight.shape[0]}, taps={self.taps}"


def apply_mask(x: Tensor, mask: Tensor | None) -> Tensor:
    """Zero the positions (batch, length) of x (batch, length, …) where the mask is zero."""
    if mask is None:
        return x
    return x.masked_fill((mask == 0).reshape(*mask.shape, *(1,) * (x.ndim - 2)), 0)


def for_products(x: Tensor) -> Tensor:
    """x of a whole sequence in a dtype whose range holds products of activations.

    float16, which ends at 65,504, becomes float32; bfloat16, which does not, keeps its memory.
    """
    return x.float() if x.dtype == torch.float16 else x


def has_small_state(system: System, length: int, copies: int = 1) -> TypeGuard[Modal]:
    """Whether ``copies`` of a system are better taken as a recurrence than as a matrix of so many
    steps: only modes are, since other realisations may be less exact than their taps."""
    return isinstance(system, Modal) and 0 < 2 * copies * system.order < length


def check_probability(name: str, value: float) -> float:
    """``value`` as a float, or a ValueError unless it is a probability below 1."""
    if not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"{name} must be a probability, at least 0 and below 1, got {value!r}.")
    return float(value)


def check_divides(name: str, parts: int, width: int) -> None:
    """Raise a ValueError unless ``parts`` is positive and divides ``width``."""
    if parts < 1 or width % parts:
        raise ValueError(f"{name} must divide the width {width}, got {parts}.")
