"""The kernels that a reduction takes, and the device on which it computes."""

from __future__ import annotations

import torch
from torch import Tensor

from gramian.systems import FIR, System, TimeInvariantSystem

__all__ = ["check_finite", "kernel_of"]


def kernel_of(source: Tensor | System, length: int | None) -> Tensor:
    """Return the kernel (*C, L) to reduce: a tensor itself, or the first taps of a system."""
    if isinstance(source, Tensor):
        if length is not None:
            raise ValueError(
                f"length goes with a system; a kernel ends where it ends; got {length=}."
            )
        if not source.dtype.is_floating_point or source.ndim == 0 or source.numel() == 0:
            raise TypeError(
                "a kernel is a real floating-point tensor (*channels, taps) that is not empty; got "
                f"{source.dtype} of shape {tuple(source.shape)}."
            )
        return source
    if not isinstance(source, TimeInvariantSystem):
        raise TypeError(
            "a reduction takes a kernel (a torch tensor) or a time-invariant system; got "
            f"{type(source).__name__}."
        )
    if length is None:
        if not isinstance(source, FIR):
            raise ValueError(
                f"the impulse response of a {type(source).__name__} has no end: give the length "
                "over which to reduce it."
            )
        length = source.kernel.shape[-1]
    if length < 1:
        raise ValueError(f"length must be at least 1; got {length}.")
    return source.impulse_response(length)


def check_finite(kernel: Tensor) -> None:
    """Raise a ValueError that names the first channel with taps that are not finite."""
    bad = (~kernel.isfinite()).any(-1)
    if bool(bad.any()):
        first = tuple(torch.nonzero(bad)[0].tolist()) if bad.ndim else ()
        where = "the kernel" if not first else f"channel {first[0] if len(first) == 1 else first}"
        raise ValueError(f"{where} holds NaN or infinite taps; a reduction needs finite ones.")
