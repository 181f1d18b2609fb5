"""The simulated device notices what a GPU would, and `check_device` says so in a sentence."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gramian import FIR
from gramian.filters import ExplicitFilter
from gramian.mixers import LinearAttention
from gramian.testing import check_device, recorded_waits, without_float64


@pytest.fixture
def device(simulated: torch.device) -> torch.device:
    return simulated


def test_values_are_those_of_the_cpu(device: torch.device) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(3, 4), torch.randn(4, 5)
    results = []
    for place in (torch.device("cpu"), device):
        u, v = (t.clone().to(place).requires_grad_() for t in (x, w))
        y = torch.fft.rfft((u @ v).relu(), n=9).conj().abs().cumsum(-1)
        y.sum().backward()
        results.append([value.detach().cpu() for value in (y, u.grad, v.grad)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_autograd_may_have_run_before_the_device_was_made(simulated: torch.device) -> None:
    code = (
        "import torch; torch.ones(1, requires_grad=True).sum().backward()\n"
        "from gramian.testing import simulated_device\n"
        "x = torch.ones(3, device=simulated_device(), requires_grad=True)\n"
        "x.square().sum().backward(); print(x.grad.tolist())"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert made.stdout.split("\n")[0] == "[2.0, 2.0, 2.0]"


def test_random_numbers_are_those_of_the_cpu(device: torch.device) -> None:
    torch.manual_seed(3)
    with torch.random.fork_rng():
        there = torch.randn(4, device=device)
    torch.testing.assert_close(torch.randn(4), there.cpu())


def test_views_share_memory_and_outlive_their_base(device: torch.device) -> None:
    x = torch.arange(12.0).to(device).reshape(3, 4)
    part = x[1:, ::2]
    part.mul_(10)
    assert x.cpu().tolist() == [[0, 1, 2, 3], [40, 5, 60, 7], [80, 9, 100, 11]]
    turned = x.t()
    del x, part
    gc.collect()
    assert turned.cpu()[2].tolist() == [2, 60, 100]
    out = torch.empty(0, device=device)
    assert torch.mul(turned, 2, out=out).shape == out.shape == (4, 3)


def test_modules_are_copied_and_trained(device: torch.device) -> None:
    torch.manual_seed(0)
    here = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    there = copy.deepcopy(copy.deepcopy(here).to(device))
    x = torch.randn(5, 4)
    for model, place in ((here, torch.device("cpu")), (there, device)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(3):
            model(x.to(place)).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(one, other.cpu())
    assert pickle.loads(pickle.dumps(there[0].weight.cpu())).shape == (8, 4)


@pytest.mark.parametrize(
    "mix",
    [
        lambda x, y: x + y,
        lambda x, y: x @ y,
        lambda x, y: torch.cat([x, y]),
        lambda x, y: torch.where(y > 0, x, x),
        lambda x, y: x.mul_(y),
        lambda x, y: y.mul_(x),
        lambda x, y: torch.nn.functional.linear(x, y),
        lambda x, y: x.index_select(0, y[0].long()),
        lambda x, y: x + torch.arange(3),
        lambda x, y: torch.randn(3, 3, device=x.device, generator=torch.Generator()),
    ],
)
def test_a_tensor_on_the_cpu_is_refused(device: torch.device, mix: Any) -> None:
    with pytest.raises(RuntimeError, match=r"(?i)expected (all tensors|a .*generator)"):
        mix(torch.ones(3, 3, device=device), torch.ones(3, 3))


def test_a_scalar_on_the_cpu_is_accepted(device: torch.device) -> None:
    assert (torch.ones(3, device=device) * torch.tensor(2.0)).cpu().tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool((x > 0).all()),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: torch.allclose(x, x),
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: torch.ones(3).to(x.device),
        lambda x: x[torch.tensor([1, 0])],
        lambda x: x.repeat_interleave(torch.ones(2, dtype=torch.int64, device=x.device), 0),
        lambda x: torch.linalg.svd(x),
        lambda x: torch.linalg.solve(x, x),
        lambda x: x.__setitem__(x > 0, torch.ones(2, device=x.device)),
    ],
)
def test_a_wait_is_recorded(device: torch.device, wait: Any) -> None:
    x = torch.eye(2).to(device)
    with recorded_waits() as waits:
        wait(x)
    assert waits and all(one.place == "" for one in waits)


@pytest.mark.parametrize(
    "run",
    [
        lambda x: (x @ x).softmax(-1).cumsum(0),
        lambda x: x.masked_fill(x > 0, 2.0),
        lambda x: x.__setitem__(x > 0, 2.0),
        lambda x: x.index_select(0, torch.arange(2, device=x.device).flip(0)),
        lambda x: torch.ones(3).to(x.device, non_blocking=True),
        lambda x: x.repeat_interleave(3, 0),
        lambda x: torch.full((2,), 3.0, device=x.device).remainder(2),
        lambda x: torch.linalg.qr(x),
    ],
)
def test_what_does_not_wait_is_not_recorded(device: torch.device, run: Any) -> None:
    x = torch.eye(2).to(device)
    with recorded_waits() as waits:
        run(x)
    assert not waits


def test_a_device_may_have_no_double_precision(device: torch.device) -> None:
    x = torch.ones(2, device=device)
    with without_float64():
        for double in (
            lambda: x.double(),
            lambda: torch.ones(2, dtype=torch.float64, device=device),
            lambda: torch.ones(2, dtype=torch.float64).to(device),
            lambda: x.to(torch.complex128),
        ):
            with pytest.raises(TypeError, match="has no tensors in torch"):
                double()
        assert (x + 1.5).dtype == torch.float32
    assert x.double().dtype == torch.float64


class Forgotten(FIR):
    """A system that keeps a window on the CPU."""

    def kernel_for(self, u: Tensor, length: int) -> Tensor:
        taps = super().kernel_for(u, length)
        return taps * torch.ones(taps.shape[-1], dtype=taps.dtype)


class Looking(ExplicitFilter):
    """A filter that looks at its taps."""

    def forward(self, length: int | None = None) -> FIR:
        system = super().forward(length)
        return system if bool(system.kernel.isfinite().all()) else FIR(system.kernel * 0)


class Astray(LinearAttention):
    """A mixer that computes something else on a device that is not the CPU."""

    def mix_whole(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = super().mix_whole(x, mask)
        return y if x.device.type == "cpu" else y * (1 + 1e-3)


def test_a_part_that_needs_the_cpu_is_refused(device: torch.device) -> None:
    check_device(FIR(torch.ones(1, 4, dtype=torch.float64)))
    with pytest.raises(RuntimeError, match=r"(?i)expected all tensors"):
        check_device(Forgotten(torch.ones(1, 4, dtype=torch.float64)))
    looking = Looking(channels=2, max_length=16)
    with pytest.raises(AssertionError, match=r"the filter Looking: the stage 'whole' .* must not"):
        check_device(looking)
    with pytest.raises(AssertionError, match=r"Astray: the stage 'whole' .* must be that of the"):
        check_device(Astray(4, 2))
    with pytest.raises(TypeError, match="takes a System, a Filter or a Mixer; got int"):
        check_device(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="length must be at least 8; got 7"):
        check_device(looking, length=7)
