"""Convolution over past and future against its definition in float64."""

import pytest
import torch
from torch import Tensor

from gramian.ops import bidirectional_convolution
from tests.ops.test_convolution import LENGTHS, draw, toeplitz_product


def two_sided_product(u: Tensor, kernel: Tensor, ahead: Tensor, dim: int) -> Tensor:
    """The definition in float64: what lies ahead is the past of reversed time, one sample on."""
    ahead = torch.nn.functional.pad(ahead, (1, 0))
    mirrored = toeplitz_product(u.flip(dim), ahead, None, None, dim).flip(dim)
    return toeplitz_product(u, kernel, None, None, dim) + mirrored


@pytest.mark.pairs
@pytest.mark.parametrize(
    ("taps", "ahead"), [(1, 1), (4, 63), (63, 4), (1, 300), (300, 1), (257, 257)]
)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bidirectional_is_the_sum_over_past_and_future(
    length: int, taps: int, ahead: int, dim: int, dtype: torch.dtype
) -> None:
    u = draw(*((3, 5, length) if dim == -1 else (3, length, 5)), seed=length, dtype=dtype)
    past = draw(5, taps, seed=taps, dtype=dtype) / taps**0.5
    future = draw(5, ahead, seed=ahead + 1, dtype=dtype) / ahead**0.5
    inputs = [tensor.requires_grad_() for tensor in (u, past, future)]
    y = bidirectional_convolution(*inputs, dim=dim)
    expected = two_sided_product(*inputs, dim)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    assert y.dtype == dtype and y.stride() == u.stride()
    assert (y - expected).norm() <= tolerance * expected.norm()
    g = draw(*u.shape, seed=4, dtype=dtype)
    actual = torch.autograd.grad(y, inputs, g)
    wanted = torch.autograd.grad(expected, inputs, g.double())
    for one, other in zip(actual, wanted, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()


@pytest.mark.each
@pytest.mark.parametrize("length", [2, 5])
@pytest.mark.parametrize(("taps", "ahead"), [(1, 4), (4, 1), (4, 4)])
@pytest.mark.parametrize("channels", [(3,), (1,), (2, 3)])
def test_bidirectional_has_second_derivatives(
    length: int, taps: int, ahead: int, channels: tuple[int, ...]
) -> None:
    inputs = [draw(2, 3, length, seed=0), draw(*channels, taps, seed=1), draw(3, ahead, seed=2)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(bidirectional_convolution, inputs)
    # Of more samples in one random direction, in which all entries have part.
    assert torch.autograd.gradgradcheck(bidirectional_convolution, inputs, fast_mode=length > 2)


def test_bidirectional_broadcasts_in_half_precision_and_under_vmap() -> None:
    u, past, future = draw(2, 3, 63, seed=0), draw(9, seed=1), draw(3, 70, seed=2)
    wide = bidirectional_convolution(u, past.expand(3, 9), future)
    torch.testing.assert_close(bidirectional_convolution(u, past, future), wide)
    half = bidirectional_convolution(u.bfloat16(), past.bfloat16(), future.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), wide, rtol=0.02, atol=0.2)
    mapped = torch.func.vmap(bidirectional_convolution, (0, None, None))(u, past, future)
    torch.testing.assert_close(mapped, wide)


def test_bidirectional_bad_input_is_one_clear_sentence() -> None:
    u, taps = torch.zeros(2, 3, 7), torch.zeros(3, 4)
    for arguments, message in (
        ((u[..., :0], taps, taps), "bidirectional_convolution: u .* is empty along dim=-1"),
        ((u, taps, taps[..., :0]), "ahead .* has no taps"),
        (
            (u, taps, torch.zeros(2, 4)),
            r"do not broadcast: u \(2, 3\), kernel \(3,\), ahead \(2,\)",
        ),
        ((u, taps, torch.tensor(1.0)), "ahead needs at least one dimension, time"),
    ):
        with pytest.raises(ValueError, match=message):
            bidirectional_convolution(*arguments)
    with pytest.raises(TypeError, match="ahead must be real floating point"):
        bidirectional_convolution(u, taps, taps.long())
