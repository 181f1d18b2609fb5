"""Define the interface of mixers that convolve with filters."""

from __future__ import annotations

import abc
from functools import partial
from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor, nn

from gramian.filters import Filter
from gramian.mixers.mixer import Mixer, MixerRecurrence
from gramian.mixers.segments import Segments
from gramian.systems import (
    FIR,
    Modal,
    PausedOperator,
    Recurrence,
    State,
    System,
    TimeInvariantSystem,
)

__all__ = ["ConvolutionMixer", "ConvolutionRecurrence", "for_products", "has_small_state"]


class ConvolutionMixer(Mixer):
    """A mixer whose memory consists of the states of long convolutions, all made by one filter.

    Long convolutions use FFTs, which mix all samples of a sequence. So a NaN or an infinity also
    affects earlier outputs of its sequence, and so does a number so large that the other numbers
    are lost in its rounding error.

    A subclass makes the systems of its long convolutions (`systems`) and says what shape their
    inputs have (`streams`). It defines how the systems convolve whole sequences (`convolve_whole`),
    chunks (`convolve_chunk`) and tokens (`convolve_token`), and how their states form the state of
    the mixer (`join_state`).
    """

    family: ClassVar[str] = "convolution"

    filter: Filter
    """The filter that makes all long convolutions."""

    kernel_dropout: float = 0.0
    """The probability of dropping a tap of a long convolution in training. Taps are dropped for
    whole sequences only, never where a state is carried."""

    @abc.abstractmethod
    def systems(self, length: int | None = None) -> tuple[System, ...]:
        """Make the systems of the long convolutions.

        Args:
            length: Number of taps; by default, as many as the filter has.

        Returns:
            The systems in the order in which they are applied. The channels of each broadcast
            against `streams`.
        """

    @property
    @abc.abstractmethod
    def streams(self) -> tuple[int, ...]:
        """The shape of the input of a long convolution, without batch and length."""

    @abc.abstractmethod
    def convolve_whole(self, x: Tensor, mask: Tensor | None, systems: tuple[System, ...]) -> Tensor:
        """Mix whole sequences, which have no padding between their tokens, from a zero state.

        Args:
            x: (batch, length, width).
            mask: (batch, length), false for padding. None if there is no padding.
            systems: The systems of the long convolutions, with at least `length` taps.

        Returns:
            (batch, length, width).
        """

    @abc.abstractmethod
    def convolve_chunk(
        self, x: Tensor, state: State, mask: Tensor | None, operators: tuple[Any, ...]
    ) -> tuple[Tensor, State]:
        """Mix a chunk that continues from `state`.

        Args:
            x: (batch, length, width).
            state: The state before the chunk.
            mask: (batch, length), false for padding, which comes before the tokens of a row and
                leaves the state unchanged. None if there is no padding.
            operators: One function for each long convolution, which maps its input and state to its
                output and next state.

        Returns:
            The output, (batch, length, width), and the state after the chunk.
        """

    @abc.abstractmethod
    def convolve_token(
        self, x_t: Tensor, state: State, long: tuple[Recurrence, ...]
    ) -> tuple[Tensor, State]:
        """Mix one token (batch, width) from `state`.

        The computation between the projections belongs in `inner`, so that it can be compiled.

        Args:
            x_t: (batch, width).
            state: The state before the token.
            long: The recurrence of each long convolution.

        Returns:
            The output, (batch, width), and the state after the token.
        """

    @abc.abstractmethod
    def join_state(
        self, batch: int, long: tuple[State, ...], dtype: torch.dtype, device: torch.device
    ) -> State:
        """Make the mixer's zero state from the zero states of its long convolutions.

        Args:
            batch: Number of sequences.
            long: The zero state of each long convolution.
            dtype: Dtype of the short convolution's past.
            device: Device of the state.
        """

    def config(self) -> dict[str, Any]:
        own = {"filter": self.filter.config(), "kernel_dropout": self.kernel_dropout}
        return super().config() | own

    def recurrence(self) -> ConvolutionRecurrence:
        """Evaluate the filters once, and make a frozen snapshot for generation."""
        self.check_causal()
        return ConvolutionRecurrence(self)

    def kernel(self, system: System, like: Tensor) -> Tensor:
        """Return the taps for a sequence `like` (batch, length, …), with dropout in training."""
        kernel = _taps(system, like, like.shape[1])
        if self.training and self.kernel_dropout > 0:
            kernel = nn.functional.dropout(kernel, self.kernel_dropout)
        return kernel

    def mix_whole(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.convolve_whole(x, mask, self.systems(x.shape[1]))

    def mix_chunk(self, x: Tensor, state: State, mask: Tensor | None) -> tuple[Tensor, State]:
        return self.convolve_chunk(x, state, mask, self.systems())

    def mix_token(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """Mix one token. `recurrence()` is faster, because it evaluates the filter only once."""
        return self.recurrence().step(x_t, state)

    def make_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> State:
        return self.recurrence().initial_state(batch, dtype, device)

    def mix_rows(self, x: Tensor, segments: Segments | None, mix: Any = None) -> Tensor:
        parts = () if segments is None or segments.unbroken else segments.parts
        longest = max([part.source.shape[1] for part in parts] or [x.shape[1]])
        systems = self.systems(longest)
        if len(parts) > 1:  # make the taps once for all parts
            systems = tuple(FIR(_taps(system, x, longest)) for system in systems)
        return super().mix_rows(x, segments, partial(self.convolve_whole, systems=systems))

    def continue_rows(
        self,
        x: Tensor,
        state: State,
        segments: Segments | None,
        mix: Any = None,
        operators: tuple[Any, ...] | None = None,
        silent: bool = False,
    ) -> tuple[Tensor, State]:
        operators = self.systems() if operators is None else operators
        if segments is not None and not segments.packed and not silent:
            pause = segments.pause()
            operators = tuple(PausedOperator(operator, pause) for operator in operators)
        mix = partial(self.convolve_chunk, operators=operators)
        return super().continue_rows(x, state, segments, mix)


class ConvolutionRecurrence(MixerRecurrence):
    """The snapshot of a convolution mixer for generation, with a recurrence for each system."""

    mixer: ConvolutionMixer

    def __init__(self, mixer: ConvolutionMixer) -> None:
        super().__init__(mixer)
        with torch.no_grad():
            self.long = tuple(system.recurrence() for system in mixer.systems())

    def _silence(self, batch: int, dtype: torch.dtype, device: torch.device) -> State:
        shape = (batch, *self.mixer.streams)
        long = tuple(recurrence.initial_state(shape, device=device) for recurrence in self.long)
        return self.mixer.join_state(batch, long, dtype, device)

    def _carry(
        self, x: Tensor, state: State, segments: Segments | None, silent: bool
    ) -> tuple[Tensor, State]:
        operators = tuple(recurrence.prefill for recurrence in self.long)
        return self.mixer.continue_rows(x, state, segments, operators=operators, silent=silent)

    @torch.no_grad()
    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """Mix one token (batch, width). This overwrites `state`: use only the returned state."""
        return self.mixer.convolve_token(x_t, state, self.long)


def _taps(system: System, like: Tensor, length: int) -> Tensor:
    assert isinstance(system, TimeInvariantSystem)
    return system.kernel_for(like, length)


def for_products(x: Tensor) -> Tensor:
    """Return x in a dtype whose range is large enough for products of activations.

    Only whole sequences need this. float16, whose largest number is 65,504, becomes float32.
    bfloat16 has the range of float32, so it stays as it is, which saves memory.
    """
    return x.float() if x.dtype == torch.float16 else x


def has_small_state(system: System, length: int, copies: int = 1) -> TypeGuard[Modal]:
    """Return whether the recurrence of a system is cheaper to measure than its matrix.

    The result is false for systems that are not modal, since other realizations can be less
    accurate than the taps from which they were made.

    Args:
        system: The system.
        length: Rows of the matrix.
        copies: Number of copies of the system's state in the recurrence.
    """
    return isinstance(system, Modal) and 0 < 2 * copies * system.order < length
