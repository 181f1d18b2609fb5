"""Define the interface of every mixer, and of the recurrence with which it generates."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, overload

import torch
from torch import Tensor, nn

from gramian._modules import NoTorchScript
from gramian.mixers._compiled import CompiledStep
from gramian.mixers._parts import in_parts, rows_in_cache
from gramian.mixers.segments import Segments
from gramian.systems import DenseOperator, Recurrence, State, System, TimeVarying

__all__ = ["Mixer", "MixerRecurrence", "apply_mask"]


class Mixer(NoTorchScript, nn.Module, abc.ABC):
    """A causal map of a sequence (batch, length, width) that carries a state.

    A mixer runs in three ways, all of which compute the same map. `mixer(x, mask=None) -> y` maps
    a whole sequence from a zero state. `mixer(x, state, mask=None) -> (y, state)` continues from a
    state, through which gradients flow. `recurrence()` makes a frozen snapshot for generation.

    The mask, (batch, length), is 1 where a token is real. Padding does not count as time. It may
    come on the left, on the right, between tokens, or after a state from earlier tokens. In all
    these cases, a row has the outputs and the state that its tokens would have without padding.
    Outputs at padding are meaningless. For rows that hold several sequences, `Segments` replace the
    mask. Such rows must consist of whole sequences.

    A subclass sets `width` and defines how a chunk is mixed (`mix_chunk`), what the zero state is
    (`make_state`) and which operator is applied (`make_operator`). By default, `mix_whole` and
    `mix_token` call `mix_chunk`. `gramian.mixers.register` gives the class a name. Mixers that
    convolve with filters derive from `gramian.mixers.ConvolutionMixer`.
    """

    kind: ClassVar[str]
    """The name under which the class is registered."""

    family: ClassVar[str] = "recurrence"
    """The mixer's family in reports: "attention", "convolution" or "recurrence"."""

    width: int
    """The number of channels of input and output."""

    compiled_step: CompiledStep | None = None
    """The compiled step, set by `compile_step`."""

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
        """Mix whole sequences, or a chunk that continues from a state.

        Args:
            x: (batch, length, width), length at least 1.
            state: The state from which to continue, made by `recurrence().initial_state(batch)` or
                returned by an earlier call. If None, the sequences are whole.
            mask: (batch, length), boolean or numeric, nonzero for real tokens, or `Segments`. By
                default, there is no padding.

        Returns:
            The output, (batch, length, width). If a state is given, also the next state.

        Raises:
            TypeError: if `state` is not a `State`.
            ValueError: if x or the mask has another shape, if a state is given together with rows
                of several sequences, or if a state is given to a mixer that is not causal.
        """
        segments = self.read_mask(x, mask)
        if state is None:
            return self.mix_rows(x, segments)
        if not isinstance(state, State):
            raise TypeError(
                "the second argument is the state that recurrence().initial_state(batch) or an "
                f"earlier call returned; got {type(state).__name__}. Pass a mask by name: mask=…."
            )
        self.check_causal()
        return self.continue_rows(x, state, segments)

    def operator(
        self,
        x: Tensor,
        channels: slice | None = None,
        mask: Tensor | Segments | None = None,
    ) -> System:
        """Return the operator that the mixer applies to its values on this input.

        The mixer applies the operator after the projections and the short convolution, and before
        the output gate and the output projection.

        Args:
            x: The input, (batch, length, width), length at least 1. The state before it is zero.
            channels: The heads or channels of the operator to return. By default, all are returned.
            mask: (batch, length), nonzero for real tokens. In an operator that depends on the
                input, rows and columns at padding are zero. If there is padding between the tokens
                of a row, the tokens are first moved together to the end of the row.

        Returns:
            A system of `length` steps with channels (batch, heads) or (batch, width). If the
            operator does not depend on the input, a time-invariant system with channels (width).

        Raises:
            ValueError: if x has another shape, or if the mixer is not causal. Also if rows hold
                several sequences, since each part in `Segments.parts` has its own operator.
        """
        self.check_causal()
        segments = self.read_mask(x, mask)
        real = None if segments is None else segments.real
        x = apply_mask(x, real)
        if segments is not None and not segments.unbroken:
            if segments.packed:
                raise ValueError("packed rows have one operator for each sequence: take its part.")
            (part,) = segments.parts
            x, real = part.take(x), part.real
        system = self.make_operator(x, slice(None) if channels is None else channels, real)
        return system if real is None else _silent_at_padding(system, real)

    def recurrence(self) -> MixerRecurrence:
        """Make a frozen snapshot for generation.

        Raises:
            ValueError: if the mixer is not causal.
        """
        self.check_causal()
        return MixerRecurrence(self)

    # Properties of a mixer

    @property
    def channels(self) -> int:
        """The number of heads or channels of `operator`."""
        return self.width

    @property
    def causal(self) -> bool:
        """Whether no output depends on later inputs.

        Only a causal mixer has a state, a recurrence and an operator.
        """
        return True

    @property
    def core(self) -> Mixer:
        """The mixer that has the state: this mixer or, for a block, the mixer inside it."""
        return self

    def config(self) -> dict[str, Any]:
        """Return the configuration from which `gramian.mixers.build` makes this mixer again.

        The configuration can be written as JSON.
        """
        return {"type": self.kind, "width": self.width}

    @classmethod
    def splits_width(cls, options: Mapping[str, Any]) -> bool:
        """Return whether the heads must divide the width.

        Args:
            options: The arguments with which the mixer is built.
        """
        return False

    def reset_parameters(self) -> None:
        """Initialize the mixer's own parameters again, in place, but not those of submodules."""

    @property
    def output_projection(self) -> Any:
        """The projection onto the residual stream, `out_proj`, or None if the mixer has none.

        Models initialize it with smaller weights than other projections.
        """
        return self._modules.get("out_proj")

    # Maps of a mixer

    @abc.abstractmethod
    def mix_chunk(self, x: Tensor, state: State, mask: Tensor | None) -> tuple[Tensor, State]:
        """Mix a chunk that continues from `state`, with gradients.

        Args:
            x: The chunk, (batch, length, width), zero where the mask is false.
            state: The state of the past. The method must not write into it.
            mask: (batch, length), false for padding, which comes before the tokens of a row and
                leaves the state unchanged. None if there is no padding.

        Returns:
            The output, (batch, length, width), and the state after the chunk.
        """

    @abc.abstractmethod
    def make_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> State:
        """Make the zero state, which is the state before the first token.

        Args:
            batch: Number of sequences.
            dtype: Dtype of activations.
            device: Device of the state. It may be "meta".
        """

    @abc.abstractmethod
    def make_operator(self, x: Tensor, channels: slice, mask: Tensor | None) -> System:
        """Make the system that `operator` returns. The mask is as in `mix_chunk`."""

    def mix_whole(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Mix whole sequences from a zero state.

        The mask is as in `mix_chunk`, but padding may also come after the tokens of a row.
        """
        return self.mix_chunk(x, self.make_state(x.shape[0], x.dtype, x.device), mask)[0]

    def mix_token(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """Mix one token (batch, width). This may overwrite `state`: use only the returned state."""
        y, state = self.mix_chunk(x_t.unsqueeze(1), state, None)
        return y.squeeze(1), state

    def reserve(self, state: State, tokens: int) -> State:
        """Return `state` with room for `tokens` more tokens, if the mixer's state grows."""
        return state

    def inner(self, *args: Any, **kwargs: Any) -> tuple[Tensor, State]:
        """Compute the part of a step between the input projection and the output projection.

        `compile_step` compiles this part. A mixer that has such a part overrides this method, and
        its `mix_token` calls `self.fused`, which runs the compiled or the uncompiled part.
        """
        raise NotImplementedError

    def fused(self, z: Tensor, state: State, *long: Any) -> tuple[Tensor, State]:
        """Call `inner`, in its compiled form if `compile_step` was called.

        On a CPU, a large state is stepped a few sequences at a time, so that intermediate results
        stay in cache. This may overwrite `state`.
        """
        if self.compiled_step is None:
            step: Callable[..., tuple[Tensor, State]] = self.inner
        else:
            step = partial(self.compiled_step, self)
        traced = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if z.device.type == "cpu" and not traced:  # a trace would keep the size of this batch
            batch = len(z)
            rows = rows_in_cache(state, batch)
            if rows < batch:
                return in_parts(lambda z, state: step(z, state, *long), z, state, rows)
        return step(z, state, *long)

    @property
    def compiles(self) -> bool:
        """Whether a step has a part that `compile_step` compiles."""
        return type(self).inner is not Mixer.inner

    def compile_step(self, enabled: bool = True, **options: Any) -> None:
        """Compile the part of a step between the projections, or stop doing so.

        Layers of one class and one shape share the compiled part. Every other shape, and so every
        other batch size, is compiled at its first step. If compiling fails, a warning is given
        once, and steps run uncompiled.

        Args:
            enabled: Whether to compile. False undoes an earlier call.
            options: Arguments of `torch.compile`: `backend`, `mode`, `options`.
        """
        self.compiled_step = None
        if enabled and self.compiles:
            self.compiled_step = CompiledStep(type(self).inner, **options)

    # Checks, and the handling of padded and packed rows

    def check_input(self, x: Tensor, mask: Tensor | Segments | None) -> None:
        """Raise a ValueError unless x is (batch, length ≥ 1, width) and fits the mask."""
        if x.ndim != 3 or x.shape[-1] != self.width or x.shape[1] == 0:
            raise ValueError(
                f"a mixer of width {self.width} takes (batch, length, {self.width}) with a length "
                f"of at least 1; got {tuple(x.shape)}."
            )
        if mask is not None and mask.shape != x.shape[:2]:
            raise ValueError(
                f"the mask must be (batch, length) = {tuple(x.shape[:2])}; got {tuple(mask.shape)}."
            )

    def check_causal(self) -> None:
        """Raise a ValueError unless the mixer is causal."""
        if not self.causal:
            raise ValueError(
                "a bidirectional layer looks at the whole sequence: it has no recurrence and "
                "carries no state."
            )

    def read_mask(self, x: Tensor, mask: Tensor | Segments | None) -> Segments | None:
        """Check x and the mask, and return the mask as segments, or None if there is no mask."""
        self.check_input(x, mask)
        segments = Segments.of(mask)
        return None if segments is None else segments.to(x.device)

    def mix_rows(
        self,
        x: Tensor,
        segments: Segments | None,
        mix: Callable[[Tensor, Tensor | None], Tensor] | None = None,
    ) -> Tensor:
        """Mix whole sequences from a zero state, even if padding separates their tokens.

        Args:
            x: (batch, length, width).
            segments: The positions of the tokens. None if there is no padding.
            mix: The function that mixes rows without padding between their tokens; by default,
                `mix_whole`.

        Returns:
            (batch, length, width).
        """
        mix = self.mix_whole if mix is None else mix
        if segments is None or segments.unbroken:
            real = None if segments is None else segments.real
            return mix(apply_mask(x, real), real)
        return segments.restore([mix(part.take(x), part.real) for part in segments.parts])

    def continue_rows(
        self,
        x: Tensor,
        state: State,
        segments: Segments | None,
        mix: Callable[[Tensor, State, Tensor | None], tuple[Tensor, State]] | None = None,
    ) -> tuple[Tensor, State]:
        """Mix a chunk that continues from `state`, even if padding separates its tokens.

        Args:
            x: (batch, length, width).
            state: The state before the chunk.
            segments: The positions of the tokens. None if there is no padding.
            mix: The function that mixes rows whose padding comes before their tokens; by default,
                `mix_chunk`.

        Returns:
            The output, (batch, length, width), and the state after the chunk.

        Raises:
            ValueError: if rows hold several sequences.
        """
        mix = self.mix_chunk if mix is None else mix
        if segments is None:
            return mix(x, state, None)
        if segments.packed:
            raise ValueError(
                "a state is that of rows of one sequence each: packed rows can neither begin with "
                "one nor leave one."
            )
        if segments.aligned:
            return mix(apply_mask(x, segments.real), state, segments.real)
        (part,) = segments.parts
        y, state = mix(part.take(x), state, part.real)
        return segments.restore([y]), state


def _silent_at_padding(system: System, real: Tensor) -> System:
    """Return a system whose outputs are zero where `real` (batch, length) is false.

    The channels of `system` are (batch, …). A time-invariant system is returned unchanged.
    """
    if not isinstance(system, TimeVarying | DenseOperator):
        return system
    hidden = real.logical_not().unsqueeze(1)
    if isinstance(system, DenseOperator):
        return DenseOperator(system.entries.masked_fill(hidden.unsqueeze(-1), 0))
    C, D = system.C.masked_fill(hidden.unsqueeze(-1), 0), system.D.masked_fill(hidden, 0)
    return dataclasses.replace(system, C=C, D=D)


class MixerRecurrence:
    """A snapshot of a mixer for generation.

    The snapshot holds the evaluated filters and shares all other weights with the mixer.
    """

    long: tuple[Recurrence, ...] = ()
    """The recurrences of the long convolutions, if the mixer has any."""

    def __init__(self, mixer: Mixer) -> None:
        self.mixer = mixer

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms of the recurrences of the long convolutions, in their order."""
        return tuple(recurrence.form for recurrence in self.long)

    def initial_state(
        self,
        batch_size: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> State:
        """Make the zero state, which is the state before the first token.

        Args:
            batch_size: Number of sequences, at least 1.
            dtype: Dtype of the short convolution's past; by default, the mixer's. The states of
                long convolutions and recurrences keep the dtype that their form needs.
            device: Device of the state; by default, the mixer's.

        Raises:
            ValueError: if `batch_size` is not a positive integer.
        """
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(
                f"batch_size must be a positive number of sequences; got {batch_size!r}."
            )
        parameter = next(self.mixer.parameters())
        place = torch.device(device) if device is not None else parameter.device
        return self._silence(batch_size, dtype or parameter.dtype, place)

    def _silence(self, batch: int, dtype: torch.dtype, device: torch.device) -> State:
        return self.mixer.make_state(batch, dtype, device)

    @torch.no_grad()
    def prefill(
        self,
        x: Tensor,
        state: State | None = None,
        mask: Tensor | Segments | None = None,
    ) -> tuple[Tensor, State]:
        """Mix a chunk at once.

        Args:
            x: (batch, length, width).
            state: The state before the chunk; by default, the zero state.
            mask: As for `Mixer.forward`. Padding leaves the state unchanged, even between tokens.

        Returns:
            The output, (batch, length, width), and the state after each row's last token.
        """
        segments = self.mixer.read_mask(x, mask)
        silent = state is None
        if state is None:
            state = self.initial_state(x.shape[0], dtype=x.dtype, device=x.device)
        return self._carry(x, state, segments, silent)

    def _carry(
        self, x: Tensor, state: State, segments: Segments | None, silent: bool
    ) -> tuple[Tensor, State]:
        """Mix a chunk that continues from `state`, which is the zero state if `silent` is true."""
        return self.mixer.continue_rows(x, state, segments)

    @torch.no_grad()
    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """Mix one token (batch, width). This overwrites `state`: use only the returned state."""
        state = self.mixer.reserve(state, 1)
        return self.mixer.mix_token(x_t, state)

    def state_bytes(
        self, batch_size: int, dtype: torch.dtype | None = None, context: int = 1
    ) -> int:
        """Count the bytes of the state for `batch_size` sequences after `context` tokens.

        Only the state of attention depends on `context`. No memory is allocated.
        """
        state = self.initial_state(batch_size, dtype=dtype, device="meta")
        return self.mixer.reserve(state, context).nbytes


def apply_mask(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return x (batch, length, …) with zeros where the mask (batch, length) is zero."""
    if mask is None:
        return x
    return x.masked_fill((mask == 0).reshape(*mask.shape, *(1,) * (x.ndim - 2)), 0)
