"""Whether a tensor is still what it was: a record of it that is quickly compared.

The object, its address and its version do not tell: fused optimisers, `.data` and numpy views
write without moving any of them. A record also holds a few evenly spaced values, read where they
lie, so that whatever changes a tensor as a whole is seen. What it cannot see is an edit of other
values that moves no version; for that there is `digest`.
"""

from __future__ import annotations

import ctypes
import hashlib

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
    """What a tensor was: the object, where it lay, its version and, on a CPU, a few of its values.

    The tensor is kept, so that its address is not given to another one. Values are read by their
    address, and only where the tensor still lies there: a numpy view would keep its memory from
    being freed, as sharding does between layers, and costs more than the misses of the cache.
    """

    __slots__ = ("_at", "_first", "_read", "_second", "_values", "_version", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._at = tensor.data_ptr()
        self._version = None if tensor.is_inference() else tensor._version
        self._read = None
        if tensor.device.type == "cpu" and tensor.is_contiguous() and self._at:
            size = tensor.numel() * tensor.itemsize
            width = next(width for width in _WORDS if width <= size)  # one value, or several
            self._read = _WORDS[width]
            self._first = self._at + size // width // 3 * width
            self._second = self._at + 2 * (size // width) // 3 * width
            self._values = self._read(self._first).value, self._read(self._second).value

    def matches(self, tensor: Tensor | None) -> bool:
        """Whether `tensor` is that object, unmoved, with the values that were looked at."""
        if (
            tensor is not self.tensor
            or tensor.data_ptr() != self._at
            or (self._version is not None and tensor._version != self._version)
        ):
            return False
        read = self._read  # twice by hand: this is asked of every weight once a token
        return read is None or self._values == (read(self._first).value, read(self._second).value)


def digest(tensor: Tensor) -> bytes:
    """A hash of dtype, shape and all values of a tensor."""
    values = tensor.detach().to("cpu", copy=True).contiguous().reshape(-1).view(torch.uint8)
    found = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)} ".encode(), digest_size=16)
    found.update(values.numpy().data)
    return found.digest()
