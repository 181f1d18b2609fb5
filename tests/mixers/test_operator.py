"""`operator(x)` is what a mixer applies to its values: the whole map is rebuilt around it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.filters import build
from gramian.mixers import Block, Hyena, LongConvolution, Mixer, MultiHyena, SoftmaxAttention
from gramian.systems import DenseOperator, TimeVarying

WIDTH, MAX_LENGTH = 12, 40
FILTERS = {
    "rtf": {"type": "rtf", "state_size": 4, "initialization": "montel"},
    "implicit": {"type": "implicit", "hidden": 16},
    "modal": {"type": "modal", "orders": 3},
    "s4": {"type": "s4", "state_size": 8},
}
MAKE = {
    "long_convolution": lambda f: LongConvolution(build(f, channels=WIDTH, max_length=MAX_LENGTH)),
    "hyena": lambda f: Hyena(WIDTH, f, max_length=MAX_LENGTH),
    "hyena3": lambda f: Hyena(WIDTH, f, max_length=MAX_LENGTH, order=3),
    "multi_hyena": lambda f: MultiHyena(WIDTH, 6, f, max_length=MAX_LENGTH),
}


def apply(mixer: Mixer, x: Tensor) -> Tensor:
    """The mixer's output by way of the matrix of its operator."""
    length = x.shape[1]
    T = mixer.operator(x).matrix(length).to(x.dtype)
    if isinstance(mixer, LongConvolution):
        return (T @ x.mT.unsqueeze(-1)).squeeze(-1).mT
    if isinstance(mixer, SoftmaxAttention):
        v = mixer.in_proj(x)[..., -mixer.kv_heads * mixer.head_width :]
        v = v.unflatten(-1, (mixer.kv_heads, -1)).transpose(1, 2)
        v = v.repeat_interleave(mixer.heads // mixer.kv_heads, dim=1)
        return mixer.out_proj((T @ v).transpose(1, 2).flatten(-2))
    z = mixer.in_proj(x)
    short = torch.zeros_like(z) + mixer.short.bias
    for j in range(mixer.short.taps):
        short = short + F.pad(z, (0, 0, j, 0))[:, :length] * mixer.short.weight[:, j]
    if isinstance(mixer, MultiHyena):
        v = short[..., -WIDTH:].unflatten(-1, (mixer.heads, -1)).transpose(1, 2)
        return mixer.out_proj((T @ v).transpose(1, 2).flatten(-2))
    assert isinstance(mixer, Hyena)
    outer, value = short[..., :WIDTH], short[..., -WIDTH:]
    return mixer.out_proj(outer * (T @ value.mT.unsqueeze(-1)).squeeze(-1).mT)


def close(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    error = float((actual - expected).detach().norm() / expected.detach().norm())
    assert error < tolerance, error


@pytest.mark.pairs
@pytest.mark.parametrize("filter_name", FILTERS)
@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("length", [1, 2, 31])
def test_the_mixer_is_rebuilt_from_its_operator(name: str, filter_name: str, length: int) -> None:
    torch.manual_seed(length)
    mixer = MAKE[name](FILTERS[filter_name]).eval()
    x = torch.randn(2, length, WIDTH)
    close(apply(mixer, x), mixer(x))


@pytest.mark.parametrize("window", [None, 5])
def test_attention_is_rebuilt_from_its_map(window: int | None) -> None:
    mixer = SoftmaxAttention(WIDTH, 4, 2, head_width=6, window=window, bias=True)
    x = torch.randn(3, 23, WIDTH)
    assert isinstance(mixer.operator(x), DenseOperator)
    close(apply(mixer, x), mixer(x))


def test_modes_stay_a_recurrence() -> None:
    x = torch.randn(2, 31, WIDTH)
    assert isinstance(MAKE["hyena"](FILTERS["modal"]).operator(x), TimeVarying)
    multi = MAKE["multi_hyena"](FILTERS["modal"]).operator(x)
    assert isinstance(multi, TimeVarying) and multi.order == 2 * 6
    assert isinstance(MAKE["hyena"](FILTERS["implicit"]).operator(x), DenseOperator)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("filter_name", ["modal", "implicit"])
def test_channels_are_picked(name: str, filter_name: str) -> None:
    mixer = MAKE[name](FILTERS[filter_name])
    x = torch.randn(2, 31, WIDTH)
    picked = mixer.operator(x, slice(1, 5, 2)).matrix(31)
    close(picked, mixer.operator(x).matrix(31)[..., 1:5:2, :, :], 1e-6)


def test_a_block_has_the_operator_of_its_mixer_behind_the_norm() -> None:
    block = Block(WIDTH, Hyena(WIDTH, FILTERS["implicit"], max_length=MAX_LENGTH)).eval()
    x = torch.randn(2, 9, WIDTH)
    close(block.operator(x).matrix(), block.mixer.operator(block.norm(x)).matrix(), 1e-6)


def test_what_has_no_operator_says_so() -> None:
    ahead = LongConvolution(
        build(FILTERS["rtf"], channels=2 * WIDTH, max_length=MAX_LENGTH), bidirectional=True
    )
    with pytest.raises(ValueError, match="whole sequence"):
        ahead.operator(torch.randn(1, 5, WIDTH))
    with pytest.raises(ValueError, match="width 12"):
        MAKE["hyena"](FILTERS["rtf"]).operator(torch.randn(1, 5, 3))
