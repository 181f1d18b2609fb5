"""Compile parts of steps, and fall back to the uncompiled functions if that fails."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

__all__ = ["CompiledStep"]

_RECOMPILATIONS = 128  # the number of shapes that torch compiles before it gives up


class CompiledStep:
    """A callable that runs `torch.compile(function)`, or `function` itself if compiling fails.

    Every shape of the arguments is compiled separately. A failure is reported once per process. A
    failure is harmless, since compiling does not change any state.

    Args:
        function: The function, called as `function(mixer, z, state, *long)`.
        options: Arguments of `torch.compile`.
    """

    _warned = False

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        self.function = function
        self.options = options
        self._compiled: Callable[..., Any] | None = None
        self._failed = False

    def __call__(self, mixer: Any, z: Any, state: Any, *long: tuple[Any, ...]) -> Any:
        online = any(one.form == "online" for recurrences in long for one in recurrences)
        if self._failed or online:
            return self.function(mixer, z, state, *long)
        try:
            if self._compiled is None:
                self._compiled = _compile(self.function, self.options)
            return self._compiled(mixer, z, state, *long)
        except Exception as error:
            self._failed = True
            if not CompiledStep._warned:
                CompiledStep._warned = True
                reason = (str(error).strip().splitlines() or [""])[0]
                warnings.warn(
                    f"steps run uncompiled, as compiling failed: {type(error).__name__}: {reason}",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return self.function(mixer, z, state, *long)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledStep:
        return CompiledStep(self.function, **self.options)

    def __reduce__(self) -> Any:
        return _restored, (self.function, self.options)


def _restored(function: Callable[..., Any], options: dict[str, Any]) -> CompiledStep:
    return CompiledStep(function, **options)


def _compile(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    import torch
    from torch._dynamo import config

    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, name, max(getattr(config, name), _RECOMPILATIONS))
    return torch.compile(function, dynamic=False, fullgraph=True, **options)
