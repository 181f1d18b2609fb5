"""Define the task of sequential digits: scikit-learn's 8 × 8 images are read pixel by pixel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gramian.tasks._task import Description, Row, Task, register

__all__ = ["Digits"]


@register("digits")
@dataclass(frozen=True, kw_only=True)
class Digits(Task):
    """A task that classifies 1,797 images of digits, given as 64 gray values in [-1, 1].

    The splits train, validation and test have 1,257, 180 and 360 images. The splits are fixed: the
    seed has no effect.
    """

    def description(self) -> Description:
        return Description("classification", 64, input_size=1, num_labels=10)

    def rows(self, split: str, seed: int) -> Iterator[Row]:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError(
                'the task digits needs scikit-learn: pip install "gramian[train]".',
                name="sklearn",
            ) from error
        data = load_digits()
        order = np.random.default_rng(0).permutation(len(data.target))
        bounds = {"train": (0, 1257), "validation": (1257, 1437), "test": (1437, 1797)}
        for index in order[slice(*bounds[split])]:
            values = data.images[index].reshape(64, 1).astype(np.float32) / 8 - 1
            yield {"input_values": values, "labels": int(data.target[index])}
