"""What exported recurrences are compared with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from gramian.export import ExportedRecurrence

WIDTH = 6


def padded_rows(length: int, vocabulary: int = 101) -> tuple[np.ndarray, np.ndarray]:
    """Four prompts and their mask: no padding, then on the left, on the right, between tokens."""
    generator = np.random.default_rng(length)
    ids, mask = generator.integers(vocabulary, size=(4, length)), np.ones((4, length), dtype=int)
    mask[1, : length // 3] = 0
    mask[2, length // 2 :] = 0
    mask[3] = generator.random(length) < 0.5
    mask[3, 1] = 1
    return ids, mask


def run_both(
    target: Any, run: ExportedRecurrence, x: torch.Tensor, time: int, tolerance: float
) -> None:
    """Chunk, steps, chunk: the whole of x (batch, …)."""
    recurrence = target.recurrence() if hasattr(target, "recurrence") else target
    length = x.shape[time]
    first, second, third = x.split([length // 2, 5, length - length // 2 - 5], dim=time)
    found, state = run.prefill(first.numpy())
    expected, reference = recurrence.prefill(first)
    pairs = [(found, expected)]
    for sample in second.unbind(time):
        found, state = run.step(sample.numpy(), state)
        expected, reference = recurrence.step(sample, reference)
        pairs.append((found, expected))
    found, state = run.prefill(third.numpy(), state)
    expected, reference = recurrence.prefill(third, reference)
    pairs.append((found, expected))
    assert state.taken == length
    for found, expected in pairs:
        scale = float(expected.abs().max())
        np.testing.assert_allclose(found, expected.detach().numpy(), atol=tolerance * scale)
