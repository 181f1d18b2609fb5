"""How a block calls the mixer that it surrounds."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from gramian.mixers.segments import Segments

__all__ = ["MixerCall"]


class MixerCall:
    """A mixer as the block around it calls it: `call(x)` returns the mixer's output for `x`.

    The same block runs on whole sequences, on chunks from a state, on single tokens and in
    exported programs; each of these passes a call of its own.

    Args:
        function: Maps (batch, length, width), or one token (batch, width), to the same shape.
        mask: Which positions are tokens, and where sequences begin; None if all are tokens.
        carries_state: Whether the mixer continues from a state. A block then skips what applies
            to whole sequences only, such as dropout in `gramian.mixers.Block`.
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
