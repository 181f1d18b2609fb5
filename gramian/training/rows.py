"""Read rows of a `datasets.Dataset` by slicing tensors.

`datasets` takes milliseconds to format a batch of rows. This is a considerable part of the time of
a small model's step. Here a column is stored as tensors of values, in memory or in a mapped file,
together with the offsets at which its rows begin. A row is a view of the values.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import datasets

__all__ = ["Rows"]


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The rows of a dataset as read-only tensors.

    Args:
        dataset: a dataset whose columns hold numbers, lists of numbers, or arrays. The rows of a
            column may differ in the size of their first dimension only.
    """

    def __init__(self, dataset: datasets.Dataset) -> None:
        self.features = dataset.features  # flattening the indices loses the types of arrays
        selected = getattr(dataset, "_indices", None) is not None
        self.dataset = dataset.flatten_indices() if selected else dataset
        self._columns: dict[str, _Column] | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Tensor]]:
        """Return the rows `indices`. A `DataLoader` calls this method for each batch."""
        if self._columns is None:
            table, features = self.dataset.data.table, self.features
            self._columns = {
                name: _Column(table.column(name), tuple(getattr(features[name], "shape", ())[1:]))
                for name in table.column_names
            }
        columns = self._columns.items()
        return [{name: column.row(index) for name, column in columns} for index in indices]

    def __getstate__(self) -> dict[str, Any]:  # each worker process maps the files itself
        return {**self.__dict__, "_columns": None}


class _Column:
    """An Arrow column, stored as chunks of values and the offset at which each row begins.

    Args:
        column: a chunked array.
        shape: shape of a row without its first dimension.
    """

    def __init__(self, column: Any, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.values: list[Tensor] = []
        self.offsets: list[np.ndarray | None] = []
        starts = [0]
        for chunk in column.chunks:
            starts.append(starts[-1] + len(chunk))
            chunk = getattr(chunk, "storage", chunk)  # `datasets` stores an array as lists of lists
            offsets = None
            while hasattr(chunk, "offsets"):
                inner = chunk.offsets.to_numpy()
                offsets = inner if offsets is None else inner[offsets]
                chunk = chunk.values
            values = chunk.to_numpy()
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", UserWarning
                )  # the warning says that the array is read-only
                self.values.append(torch.from_numpy(values))
            self.offsets.append(offsets)
        self.starts = np.array(starts)

    def row(self, index: int) -> Tensor:
        chunk = int(np.searchsorted(self.starts, index, side="right")) - 1
        place, offsets = index - int(self.starts[chunk]), self.offsets[chunk]
        values = self.values[chunk]
        if offsets is None:
            return values[place]
        row = values[int(offsets[place]) : int(offsets[place + 1])]
        return row.view(-1, *self.shape) if self.shape else row
