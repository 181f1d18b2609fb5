"""Modules of other libraries, whose filters the user can name, are distilled in place."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import gramian
from gramian.distillation import ForeignFilter
from gramian.filters import ModalFilter
from gramian.mixers import LongConvolution

LENGTH, CHANNELS, MODES = 63, 4, 3


class Convolution(nn.Module):
    """Somebody's long convolution: taps are a parameter, the input is (batch, length, channels)."""

    def __init__(self) -> None:
        super().__init__()
        time = torch.arange(LENGTH)
        decay, pitch = 0.7 + 0.25 * torch.rand(CHANNELS, MODES, 1), torch.rand(CHANNELS, MODES, 1)
        self.taps = nn.Parameter((decay**time * torch.cos(3 * pitch * time)).sum(1))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(self.taps, n=2 * LENGTH)
        y = torch.fft.irfft(torch.fft.rfft(x.mT, n=2 * LENGTH) * spectrum)
        return y[..., : x.shape[1]].mT


class FilterBank(nn.Module):
    """Somebody's implicit filter, which hands out taps (1, length, channels)."""

    def __init__(self) -> None:
        super().__init__()
        self.taps = Convolution().taps

    def forward(self, length: int) -> Tensor:
        return self.taps[:, :length].T.unsqueeze(0)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"conv": Convolution(), "out": nn.Linear(CHANNELS, CHANNELS)})
            for _ in range(2)
        )
        self.bank = FilterBank()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["out"](torch.tanh(layer["conv"](x)))
        taps = self.bank(x.shape[1])[0].T
        spectrum = torch.fft.rfft(x.mT, n=2 * LENGTH) * torch.fft.rfft(taps, n=2 * LENGTH)
        return torch.fft.irfft(spectrum)[..., : x.shape[1]].mT


class Held(nn.Module):
    def __init__(self, filter: ModalFilter) -> None:
        super().__init__()
        self.filter = filter

    def forward(self, length: int) -> Tensor:
        return self.filter(length).impulse_response(length).T.unsqueeze(0)


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network().eval()


EVERY: dict[str, Any] = {
    "layers.0.conv": lambda module: module.taps,
    "layers.1.conv": lambda module: module.taps,
    "bank": ForeignFilter(lambda module: module(LENGTH)[0].T, lambda _, filter: Held(filter)),
}


@torch.no_grad()
def test_every_named_filter_is_replaced_and_the_network_computes_the_same(
    network: Network,
) -> None:
    before = copy.deepcopy(network.state_dict())
    calls: list[tuple[int, int]] = []
    small, report = gramian.distill(
        network, tol=1e-4, filters=EVERY, progress=lambda done, total: calls.append((done, total))
    )
    assert calls == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert [layer.layer for layer in report.layers] == list(EVERY)
    assert [layer.mixer for layer in report.layers] == ["Convolution", "Convolution", "FilterBank"]
    assert report.converged and max(report.orders) <= 2 * MODES
    assert 0 < report.distilled_state_bytes < report.original_state_bytes
    x = torch.randn(2, LENGTH, CHANNELS)
    expected = network(x)
    assert float((small(x) - expected).norm() / expected.norm()) < 1e-3
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())

    layer = small.layers[0]["conv"]
    assert isinstance(layer, LongConvolution) and not layer.training
    recurrence, state, stepped = layer.recurrence(), None, []
    state = recurrence.initial_state(2)
    for x_t in x.unbind(1):
        y_t, state = recurrence.step(x_t, state)
        stepped.append(y_t)
    torch.testing.assert_close(torch.stack(stepped, 1), layer(x), rtol=1e-4, atol=1e-5)


def test_an_order_for_all(network: Network) -> None:
    _, report = gramian.distill(network, order=2, filters=EVERY)
    assert set(report.orders) == {2} and report.order == 2 and report.tol is None


@pytest.mark.parametrize(
    ("filters", "options", "message"),
    [
        ({}, {}, "nothing to distil"),
        ({"layers.7.conv": lambda m: m.taps}, {}, "no submodule 'layers.7.conv'"),
        ({"": lambda m: m.bank.taps}, {}, "not the model itself"),
        ({"bank": lambda m: m(LENGTH)}, {}, r"\(1, 63, 4\)"),
        ({"bank": lambda m: m.taps.long()}, {}, "int64"),
        ({"bank": lambda m: "taps"}, {}, "got str"),
        ({"bank": lambda m: m.taps * torch.nan}, {}, "bank"),
        ({"bank": lambda m: m.taps}, {"order": LENGTH}, "1 to 62"),
        ({"bank": lambda m: m.taps}, {"tol": 2.0}, "tolerance"),
    ],
)
def test_refuses(
    network: Network, filters: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        gramian.distill(network, filters=filters, **options)


def test_refuses_what_is_no_module() -> None:
    with pytest.raises(TypeError, match="given a dict"):
        gramian.distill({}, filters=EVERY)  # type: ignore[type-var]
