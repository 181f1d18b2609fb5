"""Replace attention heads by attention to a sliding window and the first tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

from torch import nn

from gramian.analysis import window_attention
from gramian.hybrids._replacement import Replacement, register, window_words

__all__ = ["SlidingWindow"]


@register("window")
class SlidingWindow(Replacement):
    """Attention to the last tokens and the first; see `gramian.analysis.window_attention`."""

    criterion = "output"

    def applied(
        self, model: nn.Module, heads: Mapping[str, Sequence[int] | None]
    ) -> AbstractContextManager[None]:
        return window_attention(model, heads, self.window, self.sinks)

    def description(self) -> str:
        return f"see {window_words(self.window, self.sinks)}"
