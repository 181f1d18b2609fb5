"""Define the object through which a block calls the mixer that it surrounds."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from gramian.mixers.segments import Segments

__all__ = ["MixerCall"]


class MixerCall:
    """A function through which a block runs its mixer: `call(x)` is the mixer's output for `x`.

    The same block runs on whole sequences, on chunks that continue from a state, on single tokens
    and in exported programs. In each of these cases, the block gets a different `MixerCall`.

    Args:
        function: A function that maps (batch, length, width), or one token (batch, width), to the
            same shape.
        mask: The positions of tokens and of the beginnings of sequences. None if every row is one
            sequence without padding.
        carries_state: Whether the mixer continues from a state. A block then skips operations on
            whole sequences, such as dropout in `gramian.mixers.Block`.
    """

    __slots__ = ("carries_state", "function", "mask")

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        mask: Segments | None = None,
        carries_state: bool = False,
    ) -> None:
        self.function = function
        self.mask = mask
        self.carries_state = carries_state

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)
