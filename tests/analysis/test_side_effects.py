"""An analysis leaves the model, the process and other threads as they are without it."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gramian
from tests.analysis import toys
from tests.analysis.toys import LENGTH, TOYS, WIDTH, Gated, Shift, Toy, Two


class Failing(Toy):
    def __init__(self, error: type[BaseException], at: int) -> None:
        super().__init__()
        self.error, self.at, self.runs = error, at, itertools.count(1)

    def forward(self, x: Tensor) -> Tensor:
        if next(self.runs) == self.at:
            raise self.error
        return x


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("at", [1, 3])
def test_everything_is_put_back_after_an_error(error: type[BaseException], at: int) -> None:
    model = nn.Sequential(Two(), Gated(), Failing(error, at))
    model[1].train()
    model[0].eval()
    names = dict(vars(toys))
    before = [(dict(m.__dict__), len(m._forward_hooks), m.training) for m in model.modules()]
    with pytest.raises(error):
        gramian.analyze(model, torch.randn(LENGTH, WIDTH))
    for module, (own, hooks, training) in zip(model.modules(), before, strict=True):
        assert module.__dict__.keys() == own.keys()
        assert len(module._forward_hooks) == hooks and module.training == training
    assert dict(vars(toys)) == names


def test_other_threads_run_the_model_meanwhile() -> None:
    model = nn.Sequential(*(Two() for _ in range(3))).eval()
    x = torch.randn(1, LENGTH, WIDTH)
    with torch.no_grad():
        right = model(x)
    wrong: list[float] = []
    stop = threading.Event()

    def run() -> None:
        with torch.no_grad():
            while not stop.is_set():
                wrong.append(float((model(x) - right).abs().max()))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        alone = gramian.analyze(model, torch.randn(LENGTH, WIDTH), every=9)
    finally:
        stop.set()
        thread.join()
    assert len(alone.layers) == 6 and wrong and max(wrong) == 0


def test_concurrent_analyses_give_what_single_ones_give() -> None:
    model = nn.Sequential(Two(), Gated()).eval()
    x = torch.randn(LENGTH, WIDTH)
    expected = gramian.analyze(model, x, every=5)
    results: list[Any] = []
    threads = [
        threading.Thread(target=lambda: results.append(gramian.analyze(model, x, every=5)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    for report in results:
        for one, other in zip(report.layers, expected.layers, strict=True):
            assert one.name == other.name and torch.equal(one.ess, other.ess)


def compiles() -> bool:
    """Return whether `torch.compile` compiles what it is given."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(3))
    return bool(graphs)


def test_analyses_that_would_overlap_put_everything_back() -> None:
    model = nn.Sequential(Two(), Gated()).train()
    x = torch.randn(LENGTH, WIDTH)
    assert compiles()  # analyses treat compiled models once `torch.compile` is loaded
    expected = gramian.analyze(model, x, every=5)
    names = dict(vars(toys))
    before = [(dict(m.__dict__), m.training) for m in model.modules()]
    first_runs, second_runs, first_ended = (threading.Event() for _ in range(3))
    reports: list[Any] = []

    def first_progress(*counts: int) -> None:
        if not first_runs.is_set():
            first_runs.set()
            second_runs.wait(1)

    def second_progress(*counts: int) -> None:
        second_runs.set()
        first_ended.wait(1)

    def second() -> None:
        first_runs.wait()
        reports.append(gramian.analyze(model, x, every=5, progress=second_progress))

    thread = threading.Thread(target=second)
    thread.start()
    reports.append(gramian.analyze(model, x, every=5, progress=first_progress))
    first_ended.set()
    thread.join()
    for report in reports:
        for one, other in zip(report.layers, expected.layers, strict=True):
            assert one.name == other.name and torch.equal(one.ess, other.ess)
    for module, (own, training) in zip(model.modules(), before, strict=True):
        assert module.__dict__.keys() == own.keys() and module.training == training
    assert dict(vars(toys)) == names
    assert compiles()


def test_the_model_computes_what_it_computes_alone() -> None:
    model = nn.Sequential(*(cls() for cls, _, _ in TOYS.values()), Two()).eval()
    x = torch.randn(1, 71, WIDTH)
    outputs: list[Tensor] = []
    hook = model.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        expected = model(x)
    gramian.analyze(model, x, every=30)
    hook.remove()
    assert torch.equal(outputs[-1], expected)


class Restless(Toy):
    """A decaying sum with noise, scaled by a count of the runs, which is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("runs", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        self.mean = 0.9 * self.mean + 0.1 * x.mean((0, 1))
        values = self.v(x) + torch.randn_like(x)
        states = [values[:, 0]]
        for value in values.unbind(1)[1:]:
            states.append(0.8 * states[-1] + value)
        return self.runs * torch.stack(states, 1)


def test_buffers_and_random_numbers_are_those_of_one_run() -> None:
    model = nn.Sequential(Restless(), Restless()).eval()
    x = torch.randn(1, 71, WIDTH)
    outputs: list[Tensor] = []
    hook = model.register_forward_hook(lambda module, args, output: outputs.append(output))
    torch.manual_seed(1)
    report = gramian.analyze(model, x, every=30)
    after, random = outputs[-1], torch.get_rng_state()
    hook.remove()
    assert [layer.name for layer in report.layers] == ["0", "1"] and not report.unread
    assert all(not buffer.any() for buffer in model.buffers())
    torch.manual_seed(1)
    with torch.no_grad():
        assert torch.equal(model(x), after)
    assert torch.equal(torch.get_rng_state(), random)


def test_compiled_models_are_read_as_they_were_before() -> None:
    model = nn.Sequential(Shift(), Gated()).eval()
    x = torch.randn(1, 71, WIDTH)
    expected = gramian.analyze(model, x, every=30)
    compiled = torch.compile(model, backend="eager")
    report = gramian.analyze(compiled, x, every=30)
    assert not report.unread
    for one, other in zip(report.layers, expected.layers, strict=True):
        assert one.name == f"_orig_mod.{other.name}" and torch.equal(one.ess, other.ess)
