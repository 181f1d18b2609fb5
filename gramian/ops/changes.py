"""Whether a tensor is still what it was: a record of it that is quickly compared.

The object, its address and its version do not tell: fused optimisers, ``.data`` and numpy views
write without moving any of them. A record also holds a few evenly spaced values, read where they
lie, so that whatever changes a tensor as a whole is seen. What it cannot see is an edit of other
values that moves no version; for that there is `digest`.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

__all__ = ["Record", "digest"]

_SAMPLES = 2  # each is a miss of the cache, once a token
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


class Record:
    """What a tensor was: the object, where it lay, its version and, on a CPU, a few of its values.

    The memory of the tensor is kept, so that its address is not given to another one.
    """

    __slots__ = ("_at", "_samples", "_values", "_version", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._at = tensor.data_ptr()
        self._version = None if tensor.is_inference() else tensor._version
        self._samples: Any = None
        self._values = b""
        if tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.numel():
            bits = tensor.detach().reshape(-1).view(_INTEGERS[tensor.itemsize]).numpy()
            flat = bits.reshape(tensor.numel(), -1)
            step = max(1, len(flat) // _SAMPLES)
            if tensor.ndim > 1 and step > 1 and step % tensor.shape[-1] == 0:
                step -= 1  # through different columns
            self._samples = flat[step // 2 :: step]
            self._values = self._samples.tobytes()

    def matches(self, tensor: Tensor | None) -> bool:
        """Whether ``tensor`` is that object, unmoved, with the values that were looked at."""
        return (
            tensor is self.tensor
            and tensor.data_ptr() == self._at
            and (self._version is None or tensor._version == self._version)
            and (self._samples is None or self._samples.tobytes() == self._values)
        )


def digest(tensor: Tensor) -> bytes:
    """A hash of dtype, shape and all values of a tensor."""
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    found = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)} ".encode(), digest_size=16)
    found.update(values.numpy().data)
    return found.digest()
