"""Linear layers that keep a copy of their weights in the layout that few rows at a time want.

Decoding multiplies a handful of rows by every weight of a model, once a token: the time is that of
reading the weights. On a CPU, oneDNN reads them from a layout of its own, packed once, which suits
that better than the general matrix product (benchmarks/decoding.py measures the whole).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gramian.ops._operator import records_derivatives

__all__ = ["Linear", "can_pack"]

_MAX_ROWS = 64  # above this the general matrix product reads its weights as seldom


class _Packed(NamedTuple):
    weight: Tensor
    source: int  # where the weight was, and its version then
    version: int


class Linear(nn.Linear):
    """``nn.Linear`` that may be packed: same parameters, same results up to rounding.

    A packed layer that is given few rows, without gradients, in float32 on a CPU multiplies by the
    packed copy. The copy is made anew when the weight has changed since, is never saved, and costs
    the memory of the weight once more.
    """

    _packed: _Packed | None = None
    _packing = False

    def pack(self, enabled: bool = True) -> None:
        """Use a packed copy of the weight from now on, or, disabled, drop it."""
        self._packing = enabled and can_pack()
        self._packed = None

    def forward(self, x: Tensor) -> Tensor:
        if self._packing and self._fits(x):
            weight = self._packed_weight()
            return torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, "none", [], "")
        return super().forward(x)

    def _fits(self, x: Tensor) -> bool:
        return (
            x.dtype == self.weight.dtype == torch.float32
            and x.device.type == self.weight.device.type == "cpu"
            and x.numel() <= _MAX_ROWS * self.in_features
            and not records_derivatives()
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and type(self.weight) is nn.Parameter
            and not self.weight.is_inference()
        )

    def _packed_weight(self) -> Tensor:
        weight, packed = self.weight, self._packed
        at, version = weight.data_ptr(), weight._version
        if packed is None or packed.source != at or packed.version != version:
            copied = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
            packed = self._packed = _Packed(copied, at, version)
        return packed.weight

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}


def can_pack() -> bool:
    """Whether this build of torch has what packing needs."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
