"""Online convolution against the direct one, and its cost in multiplications."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gramian.ops.online import OnlineConvolution


def direct(u: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    rows = [
        np.convolve(x, h)[: u.shape[-1]]
        for x, h in zip(
            u.reshape(-1, u.shape[-1]),
            kernel.expand(*u.shape[:-1], -1).reshape(-1, kernel.shape[-1]),
            strict=True,
        )
    ]
    return torch.from_numpy(np.stack(rows)).reshape(u.shape)


@pytest.mark.parametrize("taps", [1, 2, 3, 20, 33, 63, 64, 65, 257, 1000])
def test_steps_are_the_direct_convolution(taps):
    torch.manual_seed(taps)
    kernel = torch.randn(3, 1, taps, dtype=torch.float64)
    u = torch.randn(2, 3, 2, 700, dtype=torch.float64)
    online = OnlineConvolution(kernel)
    buffers = online.buffers((2, 3, 2), torch.float64, torch.device("cpu"))
    outputs = []
    for t in range(u.shape[-1]):
        y, buffers = online.step(u[..., t], buffers)
        outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, -1), direct(u, kernel), rtol=0, atol=1e-11)


@pytest.mark.parametrize("taps", [1, 2, 40, 129])
def test_chunks_and_steps_mix(taps):
    torch.manual_seed(taps)
    kernel = torch.randn(2, taps, dtype=torch.float64)
    u = torch.randn(2, 600, dtype=torch.float64)
    online = OnlineConvolution(kernel)
    buffers = online.buffers((2,), torch.float64, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    outputs, at = [], 0
    while at < u.shape[-1]:
        size = int(torch.randint(1, 90, (), generator=generator))
        chunk = u[..., at : at + size]
        if size % 2:
            y, buffers = online.extend(chunk, buffers)
        else:
            steps = []
            for t in range(chunk.shape[-1]):
                y, buffers = online.step(chunk[..., t], buffers)
                steps.append(y)
            y = torch.stack(steps, -1)
        outputs.append(y)
        at += size
    torch.testing.assert_close(torch.cat(outputs, -1), direct(u, kernel), rtol=0, atol=1e-11)


class CountMultiplications(TorchDispatchMode):
    """Counts the multiplications of the operators that an online convolution uses; an unknown
    operator that does arithmetic is an error, so that nothing is missed.
    """

    FREE = ("view", "slice", "select", "copy", "clone", "add", "empty", "zeros", "ones", "pad",
            "expand",
            "unsqueeze", "squeeze", "detach", "permute", "reshape", "_to_copy", "local_scalar",
            "fill", "flip", "alias", "lift", "constant", "as_strided", "zero_")  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.count = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name.startswith("_fft"):
            points = result.shape[-1] if name == "_fft_c2r" else args[0].shape[-1]
            rows = result.numel() / result.shape[-1]
            self.count += rows * 2 * points * max(1.0, math.log2(points))
        elif name in ("mul", "mul_", "div", "div_"):
            self.count += result.numel() * (4 if result.is_complex() else 1)
        elif name in ("bmm", "mm", "dot", "mv"):
            self.count += result.numel() * args[0].shape[-1]
        elif name in ("sum",):
            pass
        elif not any(free in name for free in self.FREE):
            raise AssertionError(f"uncounted operator {name}")
        return result


def multiplications(length: int) -> float:
    online = OnlineConvolution(torch.randn(1, length))
    buffers = online.buffers((1,), torch.float32, torch.device("cpu"))
    with torch.no_grad(), CountMultiplications() as counter:
        for _ in range(length):
            _, buffers = online.step(torch.ones(1), buffers)
    return counter.count


def test_cost_grows_as_length_times_squared_logarithm():
    lengths = [2**9, 2**11, 2**13]
    counts = [multiplications(n) for n in lengths]
    per_unit = [m / (n * math.log2(n) ** 2) for m, n in zip(counts, lengths, strict=True)]
    assert max(per_unit) / min(per_unit) < 2  # against 8 for a dot product a token (n² / log² n)
    assert counts[-1] < 0.2 * 2**26 / 2  # a dot product with all past inputs
