"""Fused kernels in Triton for GPUs, which are off by default.

Each kernel computes what a function of PyTorch's operations computes, in one pass over its inputs.
`use_triton` turns the kernels on. They stay off by default until a benchmark on a GPU shows that
they are faster. The extra `triton` installs what they need. Triton's interpreter runs them on the
CPU, if the environment variable TRITON_INTERPRET is 1 before this package is used.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from gramian.ops.derivatives import forward_mode_is_on

__all__ = ["runs_in_triton", "use_triton"]

_transforms_are_active = torch._C._are_functorch_transforms_active  # noqa: SLF001 (no public name)
_enabled = False


def use_triton(enabled: bool = True) -> None:
    """Turn the kernels in Triton on or off, for the whole process.

    The causal convolution of up to 32,768 samples in single precision, the selective scan of S6 and
    the decoding step of Hyena with modal filters then run as one kernel each on GPUs. Derivatives
    of the convolution of any order are computed by kernels too, and those of the scan of first
    order. Higher derivatives of the scan raise an error, and forward-mode derivatives, `torch.func`
    and `torch.compile` use PyTorch's operations as before.

    Args:
        enabled: Whether to use the kernels.

    Raises:
        ImportError: if the kernels are turned on and Triton is not installed.
    """
    global _enabled
    if enabled and importlib.util.find_spec("triton") is None:
        raise ImportError('the kernels need Triton: pip install "gramian[triton]".')
    _enabled = enabled


def runs_in_triton(tensor: Tensor) -> bool:
    """Return whether an operation on `tensor` uses a kernel in Triton."""
    if not _enabled:
        return False
    there = tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    special = forward_mode_is_on() or _transforms_are_active() or torch.compiler.is_compiling()
    return there and not special
