r"""A residual block to drop into any model: `x + drop(GLU(W drop(gelu(mixer(norm(x))))))`.

Long-range models of the literature consist of such blocks (S4, Gu et al. 2022; RTF, Parnichkun et
al. 2024). The mixer has no projections of its own: a norm comes before it, and an activation and a
gated linear map over channels come after it.
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
    """A residual block of a norm, a mixer, GELU, a linear map with GLU, and dropout.

    The block is a mixer itself: it maps (batch, length, width) to the same shape. If the inner
    mixer accepts a mask and a state and has a recurrence, so does the block. The state of the block
    is the state of the inner mixer. In training, dropout acts on whole sequences. Nothing is
    dropped where a state is carried.

    In training, a batch norm computes its statistics over the real tokens of whole sequences.
    Everywhere else it uses its running statistics. So padding does not affect the statistics, and a
    recurrence can process one token at a time. Checkpointing computes a block twice, so each batch
    enters the running statistics twice.

    Args:
        width: Channels of input and output.
        mixer: A mixer of that width. If it is a filter, or the configuration of a filter, the mixer
            is a `LongConvolution` with this filter.
        max_length: The filter's `max_length`, if its configuration does not give it.
        bidirectional: Whether the `LongConvolution` is bidirectional. Its filter then has `2 width`
            channels.
        kernel_dropout: Probability of dropping a tap of the `LongConvolution` in training.
        norm: "layer", "rms" or "batch".
        eps: Number that the norm adds to the variance or mean square.
        prenorm: Whether the norm comes before the mixer. If false, it comes after the residual
            connection.
        dropout: Probability of dropping an activation, after the GELU and at the end.
        tied_dropout: Whether a channel is dropped either over the whole length of a sequence or
            not at all.
        glu: Whether the linear map has `2 width` outputs, one half of which gates the other half.
            If false, it has `width` outputs.

    Raises:
        TypeError: if `mixer` is not a mixer, a filter or a configuration.
        ValueError: if the norm is unknown, if a mixer or filter does not fit the width, or if a
            probability is invalid. Also if `bidirectional` or `kernel_dropout` is given together
            with a mixer, since a mixer has its own settings.
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
        """Make a frozen snapshot of the block, which contains a snapshot of its mixer."""
        return _BlockRecurrence(self)

    def make_operator(self, x: Tensor, channels: slice, mask: Tensor | None) -> System:
        return self.mixer.make_operator(self._normed(x) if self.prenorm else x, channels, mask)

    def make_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> State:
        return self.mixer.make_state(batch, dtype, device)

    def reserve(self, state: State, tokens: int) -> State:
        return self.mixer.reserve(state, tokens)

    def mix(self, x: Tensor, call: MixerCall) -> Tensor:
        """Apply the block to x, with `call` as its mixer.

        Args:
            x: (batch, length, width), or one token (batch, width) where a state is carried.
            call: The function that runs the mixer on these rows.

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
        """Apply the block to an input from a state, with `move` as its mixer.

        Args:
            x: (…, width).
            state: The mixer's state, or another object that `move` accepts in its place.
            move: A function that maps (input, state) of the mixer to (output, next state).

        Returns:
            The block's output, which has the shape of x, and the next state.
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
        """Apply dropout to x (batch, length, width) in training, and return x otherwise."""
        if not self.training or self.dropout == 0:
            return x
        if self.tied_dropout:
            return nn.functional.dropout1d(x.mT, self.dropout).mT
        return nn.functional.dropout(x, self.dropout)

    def _normed(self, x: Tensor) -> Tensor:
        """Apply the norm to x (…, width). A batch norm uses its running statistics."""
        if not isinstance(self.norm, nn.BatchNorm1d):
            return self.norm(x)
        norm, flat = self.norm, x.reshape(-1, self.width)
        if not norm.training:  # its forward has the hooks that fetch offloaded weights
            return norm(flat).reshape(x.shape)
        flat = nn.functional.batch_norm(
            flat, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
        )
        return flat.reshape(x.shape)

    def _normed_whole(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Apply the norm to whole sequences (batch, length, width).

        In training, a batch norm uses the statistics of the tokens where the mask is not zero.
        """
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
    """The recurrence of a block, which runs the block with the recurrence of its mixer."""

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
