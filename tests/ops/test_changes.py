"""Records of tensors tell changes, and nothing else."""

from __future__ import annotations

import pytest
import torch

from gramian.ops.changes import Record, digest

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
]
SHAPES = [(), (0,), (1,), (7,), (3, 5), (64, 32), (2, 3, 257), (1000,)]


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_the_same_matches_and_what_changed_as_a_whole_does_not(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensor = torch.zeros(shape, dtype=dtype)
    record, before = Record(tensor), digest(tensor)
    assert record.matches(tensor) and digest(tensor.clone()) == before
    assert not record.matches(tensor.clone())
    tensor.detach().data.fill_(-1 if dtype.is_floating_point else 1)
    changed = tensor.numel() > 0
    assert record.matches(tensor) is not changed
    assert (digest(tensor) == before) is not changed


def test_a_digest_has_dtype_shape_and_every_value() -> None:
    tensor = torch.arange(600.0).reshape(20, 30)
    found = {digest(tensor), digest(tensor.double()), digest(tensor.reshape(30, 20))}
    for row, column in ((0, 0), (7, 3), (19, 29)):
        other = tensor.clone()
        other[row, column] += 0.5
        found.add(digest(other))
    assert len(found) == 6
    assert digest(tensor.T) == digest(tensor.T.contiguous())


def test_gradients_and_views_do_not_matter() -> None:
    parameter = torch.nn.Parameter(torch.randn(8, 8))
    record = Record(parameter)
    (parameter * 2).sum().backward()
    assert record.matches(parameter)
    with torch.inference_mode():
        made = torch.randn(4, 4)
    assert Record(made).matches(made)


def test_memory_can_be_freed() -> None:
    """As sharding does between two layers, and as no numpy view would let it."""
    tensor = torch.randn(64, 64)
    record = Record(tensor)
    digest(tensor)
    size = tensor.untyped_storage().nbytes()
    tensor.untyped_storage().resize_(0)
    assert not record.matches(tensor)
    tensor.untyped_storage().resize_(size)
    assert isinstance(record.matches(tensor), bool)
