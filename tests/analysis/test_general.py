"""The reader of all mixers finds known operators in modules that it does not know."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gramian
from tests.analysis.toys import LENGTH, TOYS, WIDTH, Sink, Toy, Two, recorded


@pytest.mark.each
@pytest.mark.parametrize("length", [3, LENGTH, 63, 130])
@pytest.mark.parametrize("name", TOYS)
def test_known_operators_are_found(name: str, length: int) -> None:
    cls, count, kind = TOYS[name]
    model = cls().eval()
    x = torch.randn(1, length, WIDTH)
    found, unread = recorded(model, x)
    assert not unread and len(found) == 1
    operator, T = found[0]
    assert operator.count == count and operator.kind == kind and operator.reader == "general"
    expected = model.operators(x[0]).detach()
    torch.testing.assert_close(T, expected, atol=2e-5, rtol=1e-4)


def test_every_call_of_a_module_that_mixes_is_read() -> None:
    model = Two().eval()
    x = torch.randn(1, LENGTH, WIDTH)
    found, unread = recorded(model, x)
    assert not unread
    assert [operator.kind for operator, _ in found] == ["convolution", "recurrence"]
    assert len({operator.name for operator, _ in found}) == 2
    gates = model.g(x)[0, :, 0].sigmoid()
    expected = torch.zeros(LENGTH, LENGTH)
    for i in range(LENGTH):
        for j in range(i + 1):
            expected[i, j] = gates[j + 1 : i + 1].prod()
    torch.testing.assert_close(found[1][1][0], expected.detach(), atol=2e-5, rtol=1e-4)


def test_a_short_convolution_can_be_part_of_the_operator_that_it_feeds() -> None:
    model = Two().eval()
    x = torch.randn(1, 60, WIDTH)
    report = gramian.analyze(model, x, every=7, include="mixer", max_channels=None)
    assert report.include == "mixer" and not report.unread
    (layer,) = report.layers
    assert layer.kind == "recurrence" and layer.count == WIDTH
    # a naive operator: the response of the whole chain with the factor of tanh frozen
    with torch.no_grad():
        before = F.conv1d(F.pad(x.mT, (2, 0)), model.first.taps.weight, groups=WIDTH)[0]
        factors = before.tanh() / before  # (WIDTH, L)
        gates = model.g(x)[0, :, :1].sigmoid()
        columns = []
        for j in range(60):
            impulse = torch.zeros(1, WIDTH, 60)
            impulse[..., j] = 1
            y = F.conv1d(F.pad(impulse, (2, 0)), model.first.taps.weight, groups=WIDTH)[0]
            columns.append(model.accumulate((factors * y).T, gates).T)
    T = torch.stack(columns, -1).double()
    for c, i in ((0, 14), (5, 28), (11, 56)):
        s = torch.linalg.svdvals(T[c, i:, :i])
        p = s / s.sum()
        expected = torch.exp(torch.special.entr(p).sum())
        torch.testing.assert_close(layer.ess[c, i // 7].double(), expected, atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="include"):
        gramian.analyze(model, x, include="all")


class Ahead(Toy):
    def forward(self, x: Tensor) -> Tensor:
        return self.o(x + x.roll(-1, 1))


class Square(Toy):
    """A recurrence that is not linear."""

    def forward(self, x: Tensor) -> Tensor:
        rows = [x[:, 0]]
        for t in range(1, x.shape[1]):
            rows.append((rows[-1] + x[:, t]).sin())
        return self.o(torch.stack(rows, 1))


class Between(Toy):
    """A shift before a layer that is read: no part of that layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Sink()

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x.exp(), (0, 0, 1, -1)) * x
        return self.inner(x)


def test_layers_that_look_ahead_or_are_not_linear_are_named() -> None:
    x = torch.randn(1, LENGTH, WIDTH)
    model = nn.Sequential(Sink(), Ahead())
    found, unread = recorded(model, x)
    assert [operator.name for operator, _ in found] == ["0"]
    assert unread == (("1", "it is not causal: it looks ahead."),)
    found, unread = recorded(nn.Sequential(Sink(), Square()), x)
    assert [operator.name for operator, _ in found] == ["0"]
    assert [name for name, _ in unread] == ["1"] and "not linear" in unread[0][1]


def test_what_mixes_tokens_before_a_layer_that_is_read_is_no_part_of_it() -> None:
    found, unread = recorded(Between().eval(), torch.randn(1, LENGTH, WIDTH))
    assert not unread
    assert [operator.name for operator, _ in found] == ["Between", "inner"]


def test_shared_modules_count_by_their_runs() -> None:
    shared = Sink()
    found, unread = recorded(nn.Sequential(shared, nn.Tanh(), shared), torch.randn(1, 40, WIDTH))
    assert not unread
    assert [operator.name for operator, _ in found] == ["0", "0 (run 2)"]
    assert not torch.allclose(found[0][1], found[1][1])


def test_a_pointwise_model_mixes_nothing() -> None:
    found, unread = recorded(nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh()), torch.randn(1, 9, 12))
    assert not found and not unread


class FarBack(Toy):
    """A depthwise convolution with two taps that are far from each other."""

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.short = nn.Conv1d(WIDTH, WIDTH, 2, dilation=dilation, groups=WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.short(F.pad(x.mT, (self.dilation, 0))).mT


@pytest.mark.parametrize("dilation", [30, 64, 113])
def test_convolutions_with_large_dilations_are_read(dilation: int) -> None:
    report = gramian.analyze(FarBack(dilation).eval(), torch.randn(1, 240, WIDTH), at=[20, 120])
    assert not report.unread
    (layer,) = report.layers
    assert layer.count == WIDTH
    expected = torch.tensor([20.0, dilation]).expand(WIDTH, 2)
    torch.testing.assert_close(layer.ess, expected)


def test_a_segment_up_to_the_end_of_a_module_is_all_of_it() -> None:
    class Decaying(Toy):
        def forward(self, x: Tensor) -> Tensor:
            values = self.v(x)
            states = [values[:, 0]]
            for value in values.unbind(1)[1:]:
                states.append(0.8 * states[-1] + value)
            return torch.stack(states, 1)

    report = gramian.analyze(Decaying().eval(), torch.randn(1, 71, WIDTH), every=30)
    assert len(report.layers) == 1 and not report.unread


class ShiftInSome(Toy):
    """A module of which some instances shift tokens, by an array that no attribute tells."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.shares = [share]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) + self.shares[0] * nn.functional.pad(x, (0, 0, 1, -1))


class Layered(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(ShiftInSome(share) for share in (0.0, 0.0, 0.5, 0.0))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


def test_a_module_that_looks_like_others_but_mixes_tokens_is_found() -> None:
    found, unread = recorded(Layered().eval(), torch.randn(1, LENGTH, WIDTH))
    assert [operator.name for operator, _ in found] + [n for n, _ in unread] == ["parts.2"]


def eager_attention_forward(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """Attention that scales its values over more than 100 positions, beside its map."""
    weights = torch.softmax(q @ k.mT + mask, dim=-1)
    gain = cast(Tensor, module.gain) if q.shape[-2] > 100 else torch.ones(())
    return (weights @ (v * gain)).transpose(1, 2), weights


class Scaling(Toy):
    def __init__(self, gain: Tensor) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (cast(nn.Linear, layer)(x)[:, None] for layer in (self.q, self.k, self.v))
        mask = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)
        return eager_attention_forward(self, q, k, v, mask)[0].flatten(2)


def test_a_fast_reader_that_fails_on_the_whole_text_is_replaced() -> None:
    model, x = Scaling(torch.full((WIDTH,), 2.0)).eval(), torch.randn(1, 130, WIDTH)
    found, unread = recorded(model, x)
    assert not unread
    ((operator, matrix),) = found
    assert operator.reader == "general"
    q, k = (cast(nn.Linear, layer)(x) for layer in (model.q, model.k))
    mask = torch.full((130, 130), -torch.inf).triu(1)
    torch.testing.assert_close(matrix, 2 * torch.softmax(q @ k.mT + mask, dim=-1))


def test_what_no_reader_reads_on_the_whole_text_is_named_with_all_reasons() -> None:
    model = Scaling(torch.linspace(1, 2, WIDTH)).eval()
    found, unread = recorded(model, torch.randn(1, 130, WIDTH))
    assert not found
    assert "cannot be run again: RuntimeError. From its responses: " in unread[0][1]


def test_a_fast_reader_reads_what_it_can() -> None:
    ((operator, _),), unread = recorded(
        Scaling(torch.linspace(1, 2, WIDTH)).eval(), torch.randn(1, 99, WIDTH)
    )
    assert operator.reader == "attention" and not unread


def test_a_whole_model_that_is_not_read_is_named_by_its_class() -> None:
    report = gramian.analyze(Square().eval(), torch.randn(1, 71, WIDTH), every=30)
    assert [name for name, _ in report.unread] == ["Square"]
