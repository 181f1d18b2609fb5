"""Small modules that mix positions, with naive computations of their operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gramian.analysis._inputs import read_inputs
from gramian.analysis._recording import RecordedOperator, Recorder

LENGTH, WIDTH = 29, 12
HEADS, SIZE = 3, 4  # WIDTH = HEADS * SIZE


def softmax_map(module: nn.Module, x: Tensor) -> Tensor:
    """(heads, L, L): the causal map of a layer with projections q and k."""
    q, k = (f(x).reshape(-1, HEADS, SIZE).transpose(0, 1) for f in (module.q, module.k))
    scores = q @ k.mT / SIZE**0.5
    ahead = torch.ones(len(x), len(x)).triu(1).bool()
    return scores.masked_fill(ahead, -torch.inf).softmax(-1)


def heads_of(values: Tensor) -> Tensor:
    return values.reshape(-1, HEADS, SIZE).transpose(0, 1)


def joined(values: Tensor) -> Tensor:
    return values.transpose(0, 1).reshape(-1, WIDTH)[None]


class Toy(nn.Module):
    """A module with projections; `operators` computes its operators naively, (heads, L, L)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        for name in ("q", "k", "v", "g", "o"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH))

    def operators(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Shift(Toy):
    """A mix of the present token and the last one: what mixes tokens is the shift alone."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        before = F.pad(x, (0, 0, 1, -1))
        return self.o(x * self.mix + before * (1 - self.mix))

    def operators(self, x: Tensor) -> Tensor:
        return torch.eye(len(x)).roll(1, 0).tril(-1)[None]


class Dilated(Toy):
    """A depthwise convolution, dilated and padded on both sides, with an activation after it."""

    def __init__(self) -> None:
        super().__init__()
        self.taps = nn.Conv1d(WIDTH, WIDTH, 3, dilation=2, padding=4, groups=WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.silu(self.taps(x.mT)[..., : x.shape[1]]).mT)

    def operators(self, x: Tensor) -> Tensor:
        T = torch.zeros(WIDTH, len(x), len(x))
        for c in range(WIDTH):
            for lag in range(3):
                T[c] += self.taps.weight[c, 0, 2 - lag] * torch.eye(len(x)).roll(2 * lag, 0).tril(
                    -2 * lag
                )
        return T


class Gated(Toy):
    """A recurrence in a loop, with a gate of each head."""

    def forward(self, x: Tensor) -> Tensor:
        gates = self.g(x)[0, :, :HEADS].sigmoid()
        values = self.v(x)[0].reshape(-1, HEADS, SIZE)
        state, rows = torch.zeros(HEADS, SIZE), []
        for t in range(len(values)):
            state = gates[t, :, None] * state + values[t]
            rows.append(state)
        return self.o(torch.stack(rows).reshape(1, -1, WIDTH))

    def operators(self, x: Tensor) -> Tensor:
        gates = self.g(x)[:, :HEADS].sigmoid()
        T = torch.zeros(HEADS, len(x), len(x))
        for i in range(len(x)):
            for j in range(i + 1):
                T[:, i, j] = gates[j + 1 : i + 1].prod(0)
        return T


class Sink(Toy):
    """Attention whose output a sink scales, so that its rows sum to less than 1."""

    def forward(self, x: Tensor) -> Tensor:
        return self.o(joined(self.operators(x[0]) @ heads_of(self.v(x[0]))))

    def operators(self, x: Tensor) -> Tensor:
        scale = self.g(x)[:, :HEADS].sigmoid()
        return softmax_map(self, x) * scale.T[..., None]


class Differential(Toy):
    """The difference of two maps that act on the same values."""

    def forward(self, x: Tensor) -> Tensor:
        values = heads_of(self.v(x[0]))
        one, other = softmax_map(self, x[0]) @ values, softmax_map(self, -x[0]) @ values
        return self.o(joined(one - 0.3 * other))

    def operators(self, x: Tensor) -> Tensor:
        return softmax_map(self, x) - 0.3 * softmax_map(self, -x)


class Fused(Toy):
    """Attention with queries, keys and values from one projection, interleaved head by head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).reshape(-1, HEADS, 3, SIZE).permute(2, 1, 0, 3)
        ahead = torch.ones(len(x), len(x)).triu(1).bool()
        return q, k, v, ahead  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, ahead = self.parts(x[0])
        return self.o(joined((q @ k.mT).masked_fill(ahead, -torch.inf).softmax(-1) @ v))

    def operators(self, x: Tensor) -> Tensor:
        q, k, _, ahead = self.parts(x)
        return (q @ k.mT).masked_fill(ahead, -torch.inf).softmax(-1)


TOYS = {
    "shift": (Shift, 1, "convolution"),
    "dilated": (Dilated, WIDTH, "convolution"),
    "gated": (Gated, HEADS, "recurrence"),
    "sink": (Sink, HEADS, "recurrence"),
    "differential": (Differential, HEADS, "recurrence"),
    "fused": (Fused, HEADS, "attention"),
}


class Two(Toy):
    """A convolution, an activation and then a recurrence, in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Dilated(), Gated()

    def forward(self, x: Tensor) -> Tensor:
        values = F.conv1d(F.pad(x.mT, (2, 0)), self.first.taps.weight, groups=WIDTH).mT.tanh()
        gates = self.g(x)[0, :, :1].sigmoid()
        return self.o(self.accumulate(values[0], gates)[None])

    def accumulate(self, values: Tensor, gates: Tensor) -> Tensor:
        state, rows = torch.zeros(WIDTH), []
        for value, gate in zip(values, gates, strict=True):
            state = gate * state + value
            rows.append(state)
        return torch.stack(rows)


def recorded(
    model: nn.Module, x: Tensor, length: int | None = None
) -> tuple[list[tuple[RecordedOperator, Tensor]], Any]:
    """The operators of a model with their matrices (count, L, L), and what was not read."""
    length = x.shape[-2] if length is None else length
    found: list[tuple[RecordedOperator, Tensor]] = []

    def visit(operator: RecordedOperator) -> None:
        system = operator.system(slice(0, operator.count))
        found.append((operator, system.matrix(length).reshape(-1, length, length)))

    recorder = Recorder(model, visit)
    recorder.record(read_inputs(x, None))
    return found, recorder.unread()
