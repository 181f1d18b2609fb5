"""Detection of changes to a tensor by means of a record that is quick to compare.

The object, its address and its version are not enough: fused optimizers, `.data` and numpy views
write without changing any of them. A record therefore also holds a few evenly spaced values, which
are read directly from memory. A record detects every change of the whole tensor. If only values
that the record does not hold change, and the version stays the same, the record misses the change.
`digest` detects such changes.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

__all__ = ["Record", "digest"]


_WORDS = {
    8: ctypes.c_uint64.from_address,
    4: ctypes.c_uint32.from_address,
    2: ctypes.c_uint16.from_address,
    1: ctypes.c_uint8.from_address,
}


class Record:
    """The identity of a tensor: the object, its address, its version and, on a CPU, a few values.

    The record keeps the tensor object alive, so that no other tensor gets its address. It reads the
    values by address, and only while the tensor still has its memory. A numpy view does not serve
    this purpose. Sharding frees the memory between layers, which a view would prevent, and making a
    view takes more time than the cache misses of reading by address.
    """

    __slots__ = ("_at", "_first", "_read", "_second", "_values", "_version", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._at = tensor.data_ptr()
        self._version = None if tensor.is_inference() else tensor._version  # noqa: SLF001 (no public name)
        self._read = None
        if tensor.device.type == "cpu" and tensor.is_contiguous() and self._at:
            size = tensor.numel() * tensor.itemsize
            width = next(width for width in _WORDS if width <= size)  # one value, or several
            self._read = _WORDS[width]
            self._first = self._at + size // width // 3 * width
            self._second = self._at + 2 * (size // width) // 3 * width
            self._values = self._read(self._first).value, self._read(self._second).value

    def matches(self, tensor: Tensor | None) -> bool:
        """Return whether `tensor` is the recorded object, with the recorded address and values."""
        if (
            tensor is not self.tensor
            or tensor.data_ptr() != self._at
            or (self._version is not None and tensor._version != self._version)  # noqa: SLF001 (no public name)
        ):
            return False
        read = self._read  # no loop: this runs for every weight at every token
        return read is None or self._values == (read(self._first).value, read(self._second).value)


def digest(tensor: Tensor) -> int:
    """Return a hash of the dtype, the shape and all values of a tensor.

    It has 64 bits and is another one in every process.
    """
    values = tensor.detach().to("cpu", copy=True).contiguous().reshape(-1).view(torch.uint8)
    return hash((str(tensor.dtype), tuple(tensor.shape), values.numpy().tobytes()))
