"""Kernels in Triton run in its interpreter, which `tests/conftest.py` chooses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gramian.ops.kernels import use_triton


@pytest.fixture
def triton_on() -> Iterator[None]:
    """Let the library use its kernels wherever it has one."""
    use_triton()
    yield
    use_triton(False)
