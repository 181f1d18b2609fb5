"""The reader of all mixers finds values that are no plain channels of a sequence of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gramian
from gramian.analysis import _general
from tests.analysis.toys import (
    HEADS,
    LENGTH,
    SIZE,
    WIDTH,
    Gated,
    Shift,
    Sink,
    Toy,
    heads_of,
    joined,
    recorded,
    softmax_map,
)


def shift_by(lag: int, length: int) -> Tensor:
    return torch.eye(length).roll(lag, 0).tril(-lag)


def kernels_as_matrices(weight: Tensor, length: int) -> Tensor:
    """Kernels (n, K), of which the last tap acts at lag 0, as matrices (n, length, length)."""
    taps = weight.shape[-1]
    lags = torch.stack([shift_by(lag, length) for lag in range(taps)])
    return torch.einsum("nk,kij->nij", weight.flip(-1), lags)


def same_sets(found: Tensor, expected: Tensor) -> bool:
    """Whether each of some matrices is one of the expected ones, and the other way round."""
    apart = torch.cdist(found.flatten(1).double(), expected.flatten(1).double())
    limit = 1e-4 * float(expected.flatten(1).norm(dim=1).min())
    return bool((apart.amin(0) < limit).all() and (apart.amin(1) < limit).all())


class Grouped(Toy):
    """A depthwise convolution, and then one over all channels of a group, after common padding."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(WIDTH, WIDTH, 2, groups=WIDTH)
        self.second = nn.Conv1d(WIDTH, WIDTH, 2, groups=HEADS)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.second(self.first(F.pad(x.mT, (2, 0)))).mT.tanh())


@pytest.mark.parametrize("length", [3, LENGTH, 63, 130])
def test_every_pair_of_channels_of_a_group_has_a_kernel(length: int) -> None:
    model = Grouped().eval()
    found, unread = recorded(model, torch.randn(1, length, WIDTH))
    assert not unread
    (first, own), (second, pairs) = found
    assert (first.name, first.count) == ("first", WIDTH)
    assert (second.name, second.count) == ("second", WIDTH * SIZE)
    assert {first.kind, second.kind} == {"convolution"}
    expected = kernels_as_matrices(model.first.weight.detach()[:, 0], length)
    torch.testing.assert_close(own, expected, atol=2e-5, rtol=1e-4)
    kernels = model.second.weight.detach().reshape(-1, 2)
    assert same_sets(pairs, kernels_as_matrices(kernels, length))


class Sum(Toy):
    """Sums that decay at two rates, of values of their own, and that are added."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        slow, fast, rows = torch.zeros(WIDTH), torch.zeros(WIDTH), []
        for value in self.both(x[0]):
            slow, fast = 0.9 * slow + value[:WIDTH], 0.5 * fast + value[WIDTH:]
            rows.append(slow + fast)
        return self.o(torch.stack(rows)[None])


def test_both_of_two_maps_are_read_whose_results_are_added() -> None:
    found, unread = recorded(Sum().eval(), torch.randn(1, 63, WIDTH))
    assert not unread
    ((operator, maps),) = found
    assert operator.count == 2
    lag = torch.arange(63)[:, None] - torch.arange(63)
    rates = torch.tensor([0.9, 0.5])[:, None, None]
    assert same_sets(maps, torch.where(lag >= 0, rates ** lag.clamp_min(0), 0.0))


def test_single_pairs_of_channels_can_be_measured() -> None:
    report = gramian.analyze(Grouped().eval(), torch.randn(1, 40, WIDTH), max_channels=5, at=[20])
    second = next(layer for layer in report.layers if layer.name == "second")
    assert second.count == WIDTH * SIZE and len(second.ess) <= 5
    torch.testing.assert_close(second.ess, torch.ones_like(second.ess))  # one past input matters


class Delayed(Toy):
    """Half of the values comes one token late, after the projection of zeros."""

    def forward(self, x: Tensor) -> Tensor:
        late = self.v(x)
        first = self.v(torch.zeros_like(x[:, :1]))
        return torch.cat([self.g(x), torch.cat([first, late[:, :-1]], 1)], -1)


@pytest.mark.parametrize("length", [5, LENGTH, WIDTH, 63])
def test_a_module_that_runs_on_something_else_too_may_return_the_values(length: int) -> None:
    found, unread = recorded(Delayed().eval(), torch.randn(1, length, WIDTH))
    assert not unread
    ((operator, matrix),) = found
    assert (operator.kind, operator.count) == ("convolution", 1)
    torch.testing.assert_close(matrix[0], shift_by(1, length))


class NGrams(nn.Module):
    """Embeddings of hashes of a token and the tokens before it, as a model of tokens."""

    def __init__(self, back: int = 2, *, sort: bool = False) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.back, self.sort = back, sort
        self.table, self.head = nn.Embedding(997, WIDTH), nn.Linear(WIDTH, WIDTH)

    def moved(self, ids: Tensor, lag: int) -> Tensor:
        if self.sort:
            return ids.cummax(-1).values
        return F.pad(ids, (lag, 0), value=1)[:, : ids.shape[1]]

    def forward(self, ids: Tensor) -> Tensor:
        padded = F.pad(ids, (self.back, 0), value=2)
        code = sum(
            ((31 * lag + 7) * self.moved(padded, lag) ** 2 for lag in range(self.back + 1)),
            torch.zeros_like(padded),
        )
        return self.head(self.table(code[:, self.back :] % 997))


@pytest.mark.parametrize("length", [3, LENGTH, 257])
@pytest.mark.parametrize("back", [1, 2, 3])
def test_tokens_that_are_moved_have_shifts_as_operators(back: int, length: int) -> None:
    ids = torch.randint(3, 97, (1, length), generator=torch.Generator().manual_seed(length))
    found, unread = recorded(NGrams(back).eval(), ids, length)
    assert not unread
    assert {(f.name, f.kind, f.reader) for f, _ in found} == {("NGrams", "convolution", "general")}
    matrices = torch.cat([matrix for _, matrix in found])
    expected = torch.stack([shift_by(lag, length) for lag in range(1, back + 1)])
    torch.testing.assert_close(matrices, expected)


def test_tokens_that_are_not_only_moved_are_named() -> None:
    ids = torch.randint(3, 97, (1, LENGTH))
    found, unread = recorded(NGrams(sort=True).eval(), ids, LENGTH)
    assert not found and [name for name, _ in unread] == ["NGrams"]


class Heads(nn.Module):
    """torch's attention, with a causal mask."""

    def __init__(self, *, batch_first: bool, kdim: int | None, extra: bool = False) -> None:
        super().__init__()
        torch.manual_seed(4)
        options: dict[str, Any] = {"kdim": kdim, "vdim": kdim, "add_bias_kv": extra}
        self.layer = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, **options)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        x = x if self.batch_first else x.transpose(0, 1)
        y = self.layer(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
        return y if self.batch_first else y.transpose(0, 1)


@pytest.mark.pairs
@pytest.mark.parametrize("kdim", [None, WIDTH])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("length", [3, LENGTH, 130])
def test_the_maps_of_torchs_attention_are_read(
    length: int, batch_first: bool, kdim: int | None
) -> None:
    model, x = Heads(batch_first=batch_first, kdim=kdim).eval(), torch.randn(1, length, WIDTH)
    found, unread = recorded(model, x)
    assert not unread
    ((operator, maps),) = found
    assert (operator.reader, operator.kind) == ("attention", "attention")
    with torch.no_grad():
        q, k = (
            heads_of(F.linear(x[0], w, b))
            for w, b in zip(
                model.layer.in_proj_weight.chunk(3)[:2],
                model.layer.in_proj_bias.chunk(3)[:2],
                strict=True,
            )
        )
        ahead = torch.ones(length, length).triu(1).bool()
        expected = (q @ k.mT / SIZE**0.5).masked_fill(ahead, -torch.inf).softmax(-1)
    torch.testing.assert_close(maps, expected, atol=2e-5, rtol=1e-4)


def test_a_layer_of_torchs_encoder_is_read_by_its_attention() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 24, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
            return self.layer(x, src_mask=mask, is_causal=True)

    found, unread = recorded(Encoder().eval(), torch.randn(1, LENGTH, WIDTH))
    assert not unread
    assert [(operator.name, operator.count) for operator, _ in found] == [
        ("layer.self_attn", HEADS)
    ]


@dataclass(frozen=True)
class Result:
    hidden: Tensor
    name: str


class WithResult(Toy):
    """A recurrence that returns a dataclass, and takes one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Gated()

    def forward(self, x: Result) -> Result:
        return Result(self.inner(x.hidden), x.name)


class Around(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.part, self.shifting = WithResult(), Shifting()

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.shifting(self.part(Result(x, "a"))).hidden)


class Shifting(Toy):
    def forward(self, x: Result) -> Result:
        return Result(Shift.forward(self, x.hidden), x.name)  # type: ignore[arg-type]

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.rand(WIDTH))


def test_results_may_be_dataclasses() -> None:
    model, x = Around().eval(), torch.randn(1, LENGTH, WIDTH)
    found, unread = recorded(model, x)
    assert not unread
    assert [operator.name for operator, _ in found] == ["part.inner", "shifting"]
    expected = model.part.inner.operators(x[0]).detach()
    torch.testing.assert_close(found[0][1], expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found[1][1], shift_by(1, LENGTH)[None])


class Carried(Toy):
    """A decaying sum whose state is a plain attribute that runs carry on."""

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state, self.seen = state, {"tokens": 0}

    def forward(self, x: Tensor) -> Tensor:
        rows = []
        state = self.state[0] if isinstance(self.state, list) else self.state
        for value in self.v(x)[0]:
            state = value if state is None else 0.8 * state + value
            self.seen["tokens"] += 1
            rows.append(state)
        self.state = [state] if isinstance(self.state, list) else state
        return torch.stack(rows)[None]


@pytest.mark.parametrize("state", [None, torch.ones(WIDTH), [torch.ones(WIDTH)]], ids=str)
def test_a_state_in_a_plain_attribute_is_the_one_of_a_single_run(state: Any) -> None:
    model = nn.Sequential(Carried(state), nn.Linear(WIDTH, WIDTH)).eval()
    x = torch.randn(1, 63, WIDTH)
    before = [x.clone() for x in state] if isinstance(state, list) else state
    found, unread = recorded(model, x)
    assert not unread
    ((_, matrix),) = found
    lag = torch.arange(63)[:, None] - torch.arange(63)
    expected = torch.where(lag >= 0, 0.8 ** lag.clamp_min(0), 0.0)
    torch.testing.assert_close(matrix[0], expected, atol=2e-5, rtol=1e-4)
    report = gramian.analyze(model, x, every=9)
    assert not report.unread and model[0].seen == {"tokens": 0}
    assert model[0].state is state
    if isinstance(state, list):
        assert torch.equal(state[0], before[0])


class Distant(Toy):
    """A shift by many positions, which a short sequence does not show."""

    def __init__(self, lag: int) -> None:
        super().__init__()
        self.lag = lag

    def forward(self, x: Tensor) -> Tensor:
        moved = F.pad(x, (0, 0, self.lag, 0))[:, : x.shape[1]]
        return self.o(x + 0.5 * moved)


@pytest.mark.parametrize(
    ("length", "named"),
    [(240, True), pytest.param(1300, True, marks=pytest.mark.slow), (60, False)],
)
def test_mixing_of_positions_that_are_far_apart_is_named(length: int, named: bool) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Sink(), Distant(70)).eval()
    report = gramian.analyze(model, torch.randn(1, length, WIDTH), at=[20])
    assert [layer.name for layer in report.layers] == ["1"]
    assert [name for name, _ in report.unread] == (["2"] if named else [])
    assert all("far apart" in reason for _, reason in report.unread)


class Numbered(nn.Module):
    """A layer that knows its number, with a sink and possibly a distant shift."""

    def __init__(self, number: int, lag: int | None) -> None:
        super().__init__()
        self.number, self.sink = number, Sink()
        self.shift = nn.Linear(WIDTH, WIDTH) if lag is None else Distant(lag)

    def forward(self, x: Tensor) -> Tensor:
        return self.shift(x + self.sink(x))


class Stack(nn.Module):
    """Numbered layers, with a distant shift of the stack's own before the last of them."""

    def __init__(self, lags: list[int | None], own: bool) -> None:
        super().__init__()
        self.own = own
        self.layers = nn.ModuleList(Numbered(i, lag) for i, lag in enumerate(lags))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x)
        if self.own:
            x = x + F.pad(x, (0, 0, 70, 0))[:, : x.shape[1]]
        return self.layers[-1](x)


@pytest.mark.parametrize(
    ("lags", "own", "named"),
    [
        ([None] * 4, False, []),
        ([None, None, 70, None], False, ["layers.2.shift"]),
        ([70, 75, 70, None], False, ["layers.0.shift", "layers.1.shift", "layers.2.shift"]),
        ([None] * 4, True, [""]),
    ],
)
def test_layers_that_are_alike_run_once_to_find_distant_mixing(
    lags: list[int | None], own: bool, named: list[str]
) -> None:
    model = Stack(lags, own).eval()
    x = torch.randn(1, 240, WIDTH)
    before = model(x)
    report = gramian.analyze(model, x, at=[20])
    assert [layer.name for layer in report.layers] == [f"layers.{i}.sink" for i in range(4)]
    assert sorted(name for name, _ in report.unread) == [name or "Stack" for name in named]
    assert torch.equal(model(x), before)


class Chosen(Toy):
    """Every token goes through one of two parts, sorted by the part; they mix nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.act = Activation()

    def forward(self, x: Tensor) -> Tensor:
        rows = x[0]
        order = (self.g(rows)[:, 0] > 0).long().argsort(stable=True)
        result = torch.empty_like(rows)
        result[order] = self.o(self.act(self.v(rows[order])))
        return result[None]


class Activation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.sigmoid()


def test_tokens_that_are_sorted_are_not_far_apart() -> None:
    model = nn.Sequential(Chosen(), Chosen(), Sink(), Chosen()).eval()
    report = gramian.analyze(model, torch.randn(1, 240, WIDTH), at=[20])
    assert [layer.name for layer in report.layers] == ["2"] and not report.unread


class Positions(nn.Module):
    """A mixer with a table of positions."""

    def __init__(self, mixer: type[Toy], count: int) -> None:
        super().__init__()
        self.table, self.mixer = nn.Embedding(count, WIDTH), mixer()

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(x + self.table(torch.arange(x.shape[1])))


@pytest.mark.parametrize("count", [22, 16, WIDTH, 9])
@pytest.mark.parametrize("mixer", [Gated, Sink, Shift])
def test_models_of_few_positions_are_read(mixer: type[Toy], count: int) -> None:
    model = Positions(mixer, count).eval()
    for length in {3, 5, min(count, WIDTH), count}:
        x = torch.randn(1, length, WIDTH)
        found, unread = recorded(model, x)
        assert not unread
        expected = model.mixer.operators(x[0] + model.table.weight[:length]).detach()
        torch.testing.assert_close(found[0][1], expected, atol=2e-5, rtol=1e-4)


def test_positions_that_are_not_integers_are_refused() -> None:
    with pytest.raises(TypeError, match=r"positions must be integers; got \[1.5\]"):
        gramian.analyze(Sink().eval(), torch.randn(1, LENGTH, WIDTH), at=[1.5])  # type: ignore[list-item]


class Streams(Toy):
    """Two streams, one after the other: the second one also reads the past of the first."""

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1] // 2
        maps = softmax_map(self, x[0, :length])
        main, other = self.v(x[0]).split(length)
        past, present = (heads_of(values) for values in (main, other))
        strict = maps.tril(-1)
        answers = torch.matmul(
            torch.cat([strict, maps - strict], -1), torch.cat([past, present], 1)
        )
        return torch.cat([self.o(joined(maps @ past)), self.o(joined(answers))], 1)


class InStreams(Toy):
    """Streams that are made of one sequence, and the second of which is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Streams()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.cat([x, self.g(x)], 1))[:, x.shape[1] :]


@pytest.mark.parametrize("length", [3, LENGTH, 63])
def test_streams_that_lie_one_after_the_other_are_read(length: int) -> None:
    model, x = InStreams().eval(), torch.randn(1, length, WIDTH)
    found, unread = recorded(model, x)
    assert not unread
    assert {operator.name for operator, _ in found} == {"inner"}
    maps = softmax_map(model.inner, x[0]).detach()
    assert same_sets(torch.cat([m for _, m in found]), torch.cat([maps, maps.tril(-1)]))


def test_many_distinct_operators_are_not_compared_with_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_general, "_DISTINCT", 3)
    model, x = Grouped().eval(), torch.randn(1, LENGTH, WIDTH)
    found, unread = recorded(model, x)
    assert not unread
    assert [operator.count for operator, _ in found] == [WIDTH, WIDTH * SIZE]
    kernels = model.second.weight.detach().reshape(-1, 2)
    assert same_sets(found[1][1], kernels_as_matrices(kernels, LENGTH))
