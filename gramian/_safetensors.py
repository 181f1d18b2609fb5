"""Read and write the layout of safetensors files, so that tensors are read and written one by one.

A file begins with the length of its header, as 8 bytes, little-endian. The header is JSON. It maps
the name of each tensor to its dtype, its shape, and the begin and end of its bytes after the
header. Files of any size are read by their places, which needs no address space for the whole file.
A file that is written has its header and its size from the start, so that tensors may be written in
any order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from gramian._json import to_json

__all__ = ["Entry", "as_bytes", "create_file", "read_header"]

# In the order of safetensors, which sorts the tensors of a file by dtype, the last dtype first.
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(_CODES)}
_LONGEST_HEADER = 100_000_000  # bytes; safetensors refuses a longer one
_METADATA = "__metadata__"


class Entry(NamedTuple):
    """A tensor in a file.

    Attributes:
        dtype: dtype of the tensor.
        shape: shape of the tensor, whose elements are contiguous.
        offset: number of bytes in the file before the tensor.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


def read_header(stream: BinaryIO, size: int) -> dict[str, Entry]:
    """Return the tensors of a safetensors file by their names, without their values.

    Args:
        stream: the file, at its beginning.
        size: number of bytes of the file.

    Raises:
        ValueError: if this is no safetensors file, if its header describes tensors that are not
            completely in the file, or if a tensor has a dtype that PyTorch lacks.
    """
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > min(size - 8, _LONGEST_HEADER):
        raise ValueError("its header is incomplete or too long.")
    try:
        header = json.loads(stream.read(length))
        header.pop(_METADATA, None)
        return {name: _entry(name, values, 8 + length, size) for name, values in header.items()}
    except (AttributeError, KeyError, RecursionError, TypeError, UnicodeError) as error:
        raise ValueError("its header cannot be read.") from error


def _entry(name: str, values: Mapping[str, object], begin: int, size: int) -> Entry:
    code, shape, offsets = values["dtype"], values["shape"], values["data_offsets"]
    if code not in _DTYPES:
        raise ValueError(f"{name} has the dtype {code}, which cannot be read.")
    dtype = _DTYPES[str(code)]
    numbers = [*shape, *offsets]  # type: ignore[misc]  # a TypeError is the caller's
    if any(type(number) is not int or number < 0 for number in numbers) or len(offsets) != 2:  # type: ignore[arg-type]
        raise ValueError(f"the shape or place of {name} is not valid.")
    first, last = numbers[-2:]
    if last - first != math.prod(numbers[:-2]) * dtype.itemsize or begin + last > size:
        raise ValueError(f"{name} is not completely in the file.")
    return Entry(dtype, tuple(numbers[:-2]), begin + first)


def create_file(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Entry]:
    """Create a safetensors file of full size, whose tensors are still to be written.

    Args:
        path: the file.
        tensors: a mapping from names to tensors of the shapes and dtypes to be written. Their
            values are not read, so they may be on the meta device.

    Returns:
        For each name the place in the file at which the tensor's bytes have to be written.
    """
    header: dict[str, object] = {_METADATA: {"format": "pt"}}
    ends = [0]
    ordered = sorted(tensors, key=lambda name: (-_RANKS[tensors[name].dtype], name))
    for name in ordered:
        tensor = tensors[name]
        ends.append(ends[-1] + tensor.nbytes)
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": ends[-2:],
        }
    text = to_json(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(begin + ends[-1])
    return {
        name: Entry(tensors[name].dtype, tuple(tensors[name].shape), begin + offset)
        for name, offset in zip(ordered, ends, strict=False)
    }


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU, for reading and writing."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
