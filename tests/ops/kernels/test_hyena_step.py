"""The kernel of Hyena's step, in Triton's interpreter, against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gramian.mixers import Hyena
from gramian.ops.kernels import hyena_step as module
from gramian.ops.kernels.hyena_step import hyena_step

pytest.importorskip("triton")


def definition(
    z: Tensor,
    past: Tensor,
    weight: Tensor,
    bias: Tensor,
    modes: Tensor,
    poles: Tensor,
    residues: Tensor,
    direct: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and what follows the past and the modes."""
    inputs = torch.cat([past, z.unsqueeze(1)], 1)  # (batch, taps, 3 width), the oldest first
    short = bias + (inputs.double() * weight.flip(1).T).sum(1)
    q, k, v = short.chunk(3, -1)
    e = k * v
    if modes.shape[1] == 1:
        x, turn, read = modes[:, 0] + 0j, poles[0] + 0j, residues[0] + 0j
    else:
        x = torch.complex(modes[:, 0], modes[:, 1])
        turn, read = torch.complex(poles[0], poles[1]), torch.complex(residues[0], -residues[1])
    y = q * ((read * x).sum(1).real + direct * e)
    after = turn * x + e.unsqueeze(1)
    parts = [after.real, after.imag][: modes.shape[1]]
    return y, inputs[:, 1:], torch.stack(parts, 1)


@pytest.mark.parametrize("width", [1, 2, 3, 63, 257, 1000])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("batch", "taps", "count"), [(1, 1, 1), (2, 3, 5), (3, 4, 2)])
def test_outputs_and_states_are_those_of_the_definition(
    width: int, parts: int, batch: int, taps: int, count: int
) -> None:
    inputs = draw(width, parts, batch, taps, count)
    y, past, modes = definition(*inputs)
    found = hyena_step(*inputs)
    torch.testing.assert_close(found, y)
    torch.testing.assert_close(inputs[1], past)
    torch.testing.assert_close(inputs[4], modes)


def draw(width: int, parts: int, batch: int, taps: int, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(width)
    shapes = [
        (batch, 3 * width),
        (batch, taps - 1, 3 * width),
        (3 * width, taps),
        (3 * width,),
        (batch, parts, count, width),
        (parts, count, width),
        (parts, count, width),
        (width,),
    ]
    return [torch.randn(one, generator=generator, dtype=torch.float64) for one in shapes]


def test_modes_beyond_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ELEMENTS", 8)
    inputs = draw(3, 2, 2, 3, 11)
    y, past, modes = definition(*inputs)
    torch.testing.assert_close(hyena_step(*inputs), y)
    torch.testing.assert_close(inputs[1], past)
    torch.testing.assert_close(inputs[4], modes)


@pytest.mark.usefixtures("triton_on")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "orders", [3, [2, 3, 1, 3, 3], pytest.param([1, 9, 1, 9, 1], id="several groups")]
)
@torch.no_grad()
def test_a_hyena_layer_uses_the_kernel(
    dtype: torch.dtype, orders: int | list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = {"type": "modal", "orders": orders}
    mixer = Hyena(5, config, max_length=20).to(dtype).eval()
    recurrence = mixer.recurrence()
    x = torch.randn(2, 12, 5).to(dtype)
    calls = []

    def counted(*inputs: Tensor) -> Tensor:
        calls.append(inputs)
        return hyena_step(*inputs)

    monkeypatch.setattr("gramian.mixers.hyena.hyena_step", counted)
    _, state = recurrence.prefill(x[:, :5])
    states = [state, state.clone()]
    outputs: list[list[Tensor]] = [[], []]
    for number, state in enumerate(states):
        if number:
            monkeypatch.setattr("gramian.mixers.hyena.runs_in_triton", lambda z: False)
        for token in x[:, 5:].unbind(1):
            y, state = recurrence.step(token, state)
            outputs[number].append(y)
        states[number] = state
    grouped = len(mixer.filter().groups) > 1
    assert len(calls) == (0 if grouped else 7)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    fast, plain = (torch.stack(some).double() for some in outputs)
    assert (fast - plain).norm() <= tolerance * plain.norm()
    for one, other in zip(states[0].long[0].modes, states[1].long[0].modes, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()
