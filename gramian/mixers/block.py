r"""A residual block to drop into any model: `x + drop(GLU(W drop(gelu(mixer(norm(x))))))`.

The block of the field's long-range models (S4, Gu et al. 2022; RTF, Parnichkun et al. 2024): a
mixer without projections of its own between a norm, an activation and a gated linear map over
channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gramian._checks import check_choice, check_probability
from gramian.filters import Filter
from gramian.mixers._call import MixerCall
from gramian.mixers.long_convolution import LongConvolution
from gramian.mixers.mixer import Mixer, MixerRecurrence
from gramian.mixers.segments import Segments
from gramian.ops.packed import Linear
from gramian.systems import State, System

__all__ = ["Block"]

_NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "batch": nn.BatchNorm1d}


class Block(Mixer):
    """Norm, mixer, GELU, linear map with GLU, and dropout, beside a residual connection.

    The block is a mixer itself: it maps (batch, length, width) to the same shape, and accepts a
    mask, a state and a recurrence where the inner mixer does; the state is the inner mixer's.
    Dropout acts on whole sequences in training; nothing is dropped where a state is carried.

    In training, a batch norm computes its statistics over the real tokens of whole sequences;
    everywhere else it uses its running statistics. So padding does not affect them, and a
    recurrence can be stepped. Checkpointing computes a block twice, so each batch enters the
    running statistics twice.

    Args:
        width: Channels of input and output.
        mixer: A mixer of that width; or a filter or its configuration, for a
            `LongConvolution`.
        max_length: The filter's `max_length`, if its configuration does not give one.
        bidirectional: Whether the `LongConvolution` is bidirectional; its filter then has
            `2 width` channels.
        kernel_dropout: `kernel_dropout` of the `LongConvolution`.
        norm: "layer", "rms" or "batch".
        eps: Added to the variance or mean square in the norm.
        prenorm: Whether the norm comes before the mixer, as above, or after the residual
            connection.
        dropout: Probability of dropping an activation, after the GELU and at the end.
        tied_dropout: Whether a channel is dropped either over the whole length of a sequence or
            not at all.
        glu: Whether the linear map has `2 width` outputs, one half of which gates the other
            half; if not, it has `width` outputs.

    Raises:
        TypeError: if `mixer` is none of these.
        ValueError: for an unknown norm, a mixer or filter that does not fit the width, an invalid
            probability, or `bidirectional` or `kernel_dropout` together with a mixer, which has
            its own.
    """

    def __init__(
        self,
        width: int,
        mixer: Mixer | Filter | dict[str, Any],
        max_length: int | None = None,
        *,
        bidirectional: bool = False,
        kernel_dropout: float = 0.0,
        norm: str = "layer",
        eps: float = 1e-5,
        prenorm: bool = True,
        dropout: float = 0.0,
        tied_dropout: bool = False,
        glu: bool = True,
    ) -> None:
        super().__init__()
        check_choice("norm", norm, _NORMS)
        if not isinstance(mixer, Mixer | Filter | Mapping):
            raise TypeError(
                f"a mixer, a filter or its configuration is needed; got {type(mixer).__name__}."
            )
        if not isinstance(mixer, Mixer):
            options = {"width": width, "max_length": max_length}
            mixer = LongConvolution(mixer, bidirectional, kernel_dropout, **options)
        elif bidirectional or kernel_dropout:
            raise ValueError(
                "bidirectional and kernel_dropout are for a block that makes its mixer from a "
                f"filter; it was given a {type(mixer).__name__}, which has its own."
            )
        if mixer.width != width:
            raise ValueError(f"a mixer of width {width} is needed; got one of {mixer.width}.")
        self.width = width
        self.prenorm = prenorm
        self.dropout = check_probability("dropout", dropout)
        self.tied_dropout = tied_dropout
        self.norm = _NORMS[norm](width, eps=eps)
        self.mixer = mixer
        self.linear = Linear(width, 2 * width if glu else width)
        self.glu = glu

    @property
    def channels(self) -> int:
        return self.mixer.channels

    @property
    def causal(self) -> bool:
        return self.mixer.causal

    @property
    def core(self) -> Mixer:
        return self.mixer.core

    def recurrence(self) -> MixerRecurrence:
        """Make a frozen snapshot of the block around that of its mixer."""
        return _BlockRecurrence(self)

    def make_operator(self, x: Tensor, channels: slice, mask: Tensor | None) -> System:
        return self.mixer.make_operator(self._normed(x) if self.prenorm else x, channels, mask)

    def make_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> State:
        return self.mixer.make_state(batch, dtype, device)

    def reserve(self, state: State, tokens: int) -> State:
        return self.mixer.reserve(state, tokens)

    def mix(self, x: Tensor, call: MixerCall) -> Tensor:
        """Apply the block around `call`: norm, activation, linear map and residual sum.

        Args:
            x: (batch, length, width), or one token (batch, width) where a state is carried.
            call: The call of the mixer on these rows.

        Returns:
            A tensor of the shape of x.
        """
        norm: Callable[[Tensor], Tensor] = self._normed
        drop: Callable[[Tensor], Tensor] = _unchanged
        if not call.carries_state:
            real = None if call.mask is None else call.mask.real
            norm, drop = partial(self._normed_whole, mask=real), self._drop
        mixed = call(norm(x) if self.prenorm else x)
        y = x + drop(self._transform(drop(nn.functional.gelu(mixed))))
        return y if self.prenorm else norm(y)

    def carry(
        self, x: Tensor, state: Any, move: Callable[[Tensor, Any], tuple[Tensor, State]]
    ) -> tuple[Tensor, State]:
        """Apply the block around `move`, which maps (input, state) to (output, next state).

        Args:
            x: (…, width).
            state: The mixer's state, or whatever `move` accepts in its place.
            move: The map of the mixer.
        """

        def call(z: Tensor) -> Tensor:
            nonlocal state
            y, state = move(z, state)
            return y

        y = self.mix(x, MixerCall(call, carries_state=True))
        return y, state

    def mix_whole(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.mix_rows(x, Segments.of(mask))

    def mix_chunk(self, x: Tensor, state: State, mask: Tensor | None) -> tuple[Tensor, State]:
        return self.continue_rows(x, state, Segments.of(mask))

    def mix_token(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        return self.carry(x_t, state, self.mixer.mix_token)

    def mix_rows(self, x: Tensor, segments: Segments | None, mix: Any = None) -> Tensor:
        return self.mix(x, MixerCall(partial(self.mixer, mask=segments), segments))

    def continue_rows(
        self, x: Tensor, state: State, segments: Segments | None, mix: Any = None
    ) -> tuple[Tensor, State]:
        return self.carry(x, state, lambda z, before: self.mixer(z, before, mask=segments))

    def _transform(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return nn.functional.glu(y) if self.glu else y

    def _drop(self, x: Tensor) -> Tensor:
        """Apply dropout to (batch, length, width) in training."""
        if not self.training or self.dropout == 0:
            return x
        if self.tied_dropout:
            return nn.functional.dropout1d(x.mT, self.dropout).mT
        return nn.functional.dropout(x, self.dropout)

    def _normed(self, x: Tensor) -> Tensor:
        """Apply the norm to (…, width), with running statistics where it has any."""
        if not isinstance(self.norm, nn.BatchNorm1d):
            return self.norm(x)
        norm, flat = self.norm, x.reshape(-1, self.width)
        if not norm.training:  # call its forward: its hooks fetch offloaded weights
            return norm(flat).reshape(x.shape)
        flat = nn.functional.batch_norm(
            flat, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
        )
        return flat.reshape(x.shape)

    def _normed_whole(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Apply the norm to whole sequences; in training, use the statistics of real tokens."""
        if not (self.training and isinstance(self.norm, nn.BatchNorm1d)):
            return self._normed(x)
        real = None if mask is None or bool(mask.all()) else mask != 0
        tokens = x.reshape(-1, self.width) if real is None else x[real]
        if len(tokens) < 2:
            raise ValueError(
                "a batch norm needs at least two real tokens to train on; got "
                f"{len(tokens)} in a batch of shape {tuple(x.shape[:2])}."
            )
        normed = self.norm(tokens)
        if real is None:
            return normed.reshape(x.shape)
        return torch.zeros_like(x, dtype=normed.dtype).index_put((real,), normed)

    def extra_repr(self) -> str:
        return (
            f"prenorm={self.prenorm}, dropout={self.dropout}, tied_dropout={self.tied_dropout}, "
            f"glu={self.glu}"
        )


def _unchanged(x: Tensor) -> Tensor:
    return x


class _BlockRecurrence(MixerRecurrence):
    """A block around the recurrence of its mixer."""

    mixer: Block

    def __init__(self, block: Block) -> None:
        super().__init__(block)
        self.inner = block.mixer.recurrence()
        self.long = self.inner.long

    def _silence(self, batch: int, dtype: torch.dtype, device: torch.device) -> State:
        return self.inner.initial_state(batch, dtype, device)

    @torch.no_grad()
    def prefill(
        self, x: Tensor, state: State | None = None, mask: Tensor | Segments | None = None
    ) -> tuple[Tensor, State]:
        self.mixer.check_input(x, mask)
        return self.mixer.carry(x, state, partial(self.inner.prefill, mask=mask))

    @torch.no_grad()
    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        return self.mixer.carry(x_t, state, self.inner.step)
