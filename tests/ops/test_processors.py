"""The number of threads follows how many processors other processes leave free."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from gramian.ops import adaptive_threads, causal_convolution, processors
from gramian.ops.processors import adapt_threads
from gramian.ops.threads import work

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity"), reason="the number of threads is adapted on Linux only"
)

PROCESSORS = 4
TICKS = 100


class Machine:
    """A machine whose clock moves when it is told to."""

    def __init__(self, path: Path) -> None:
        self.path, self.now, self.own = path, 0.0, 0.0
        self.busy = dict.fromkeys(range(2 * PROCESSORS), 0.0)
        self.write()

    def write(self) -> None:
        lines = ["cpu 1 2 3 4 5 6 7 8 9 10"]
        for number, seconds in self.busy.items():
            # half of the time is a user's, and a quarter each is nice and an interrupt's
            ticks = round(seconds * TICKS)
            user, nice = ticks // 2, ticks // 4
            lines.append(
                f"cpu{number} {user} {nice} 0 {99 * TICKS} 7 0 {ticks - user - nice} 0 0 0"
            )
        self.path.write_text("\n".join([*lines, "intr 5 5", "ctxt 7"]) + "\n")

    def run(self, others: float, own: float = 1.0, seconds: float = 1.0) -> None:
        """Let other processes and this one use some processors for some time."""
        self.now += seconds
        self.own += own * seconds
        for number in range(PROCESSORS):
            self.busy[number] += (others + own) * seconds / PROCESSORS
        self.write()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    made = Machine(tmp_path / "stat")
    monkeypatch.setattr(processors, "_STATISTICS", made.path)
    monkeypatch.setattr(processors.os, "sched_getaffinity", lambda _: set(range(PROCESSORS)))
    monkeypatch.setattr(processors.os, "sysconf", lambda _: TICKS)
    monkeypatch.setattr(processors.time, "monotonic", lambda: made.now)
    monkeypatch.setattr(processors.time, "process_time", lambda: made.own)
    before = torch.get_num_threads()
    torch.set_num_threads(PROCESSORS)
    yield made
    torch.set_num_threads(before)


def test_threads_leave_processors_to_others_and_take_them_back(machine: Machine) -> None:
    with adaptive_threads():
        for others, expected in ((0.0, 4), (0.4, 4), (1.0, 3), (3.2, 1), (4.0, 1), (9.0, 1)):
            machine.run(others)
            adapt_threads()
            assert torch.get_num_threads() == expected
        machine.run(0.0)
        adapt_threads()
        assert torch.get_num_threads() == 1, "one quiet moment is no reason to take processors"
        machine.run(2.0)
        adapt_threads()
        assert torch.get_num_threads() == 2
        machine.run(0.0)
        adapt_threads()
        machine.run(0.0)
        adapt_threads()
        assert torch.get_num_threads() == 4
        machine.run(3.0)
        adapt_threads()
    assert torch.get_num_threads() == 4


def test_processors_that_the_process_may_not_use_do_not_count(machine: Machine) -> None:
    with adaptive_threads():
        machine.busy[PROCESSORS] += 1.0
        machine.run(0.0)
        adapt_threads()
        assert torch.get_num_threads() == 4


def test_there_are_never_more_threads_than_at_the_beginning(machine: Machine) -> None:
    torch.set_num_threads(2)
    with adaptive_threads():
        for others, expected in ((0.0, 2), (3.0, 1), (0.0, 1), (0.0, 2)):
            machine.run(others)
            adapt_threads()
            assert torch.get_num_threads() == expected


def test_measurements_are_some_time_apart(machine: Machine) -> None:
    with adaptive_threads():
        machine.run(4.0, seconds=0.2)
        adapt_threads()
        assert torch.get_num_threads() == 4
        machine.run(4.0, seconds=0.1)
        adapt_threads()
        assert torch.get_num_threads() == 1


def test_the_number_is_restored_after_an_error(machine: Machine) -> None:
    def fail() -> None:
        with adaptive_threads():
            machine.run(3.0)
            adapt_threads()
            assert torch.get_num_threads() == 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.get_num_threads() == 4
    machine.run(3.0)
    adapt_threads()
    assert torch.get_num_threads() == 4


def test_other_threads_and_inner_blocks_change_nothing(machine: Machine) -> None:
    def elsewhere() -> None:
        torch.set_num_threads(3)
        with adaptive_threads():
            adapt_threads()
        found.append(torch.get_num_threads())

    found: list[int] = []
    with adaptive_threads():
        machine.run(3.0)
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert found == [3]
        with adaptive_threads():
            adapt_threads()
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 4


def test_without_statistics_nothing_changes(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processors, "_STATISTICS", tmp_path / "none")
    with adaptive_threads():
        adapt_threads()
        assert torch.get_num_threads() == 4


def _convolve() -> None:
    causal_convolution(torch.ones(2, 8), torch.ones(2, 8))


def _work() -> None:
    work(lambda x: x, [1, 2, 3], torch.ones(1))


def _model() -> None:
    from gramian.models import GramianConfig, GramianForCausalLM

    config = GramianConfig(
        hidden_size=8, num_hidden_layers=1, vocab_size=5, mixers="linear_attention", num_heads=2
    )
    GramianForCausalLM(config).eval()(torch.zeros(1, 3, dtype=torch.long))


@pytest.mark.parametrize("compute", [_convolve, _work, _model])
def test_operators_tasks_and_models_adapt(compute: Callable[[], None], machine: Machine) -> None:
    compute()  # imports and draws weights
    with adaptive_threads():
        machine.run(3.0)
        compute()
        assert torch.get_num_threads() == 1


def test_the_own_machine_can_be_measured() -> None:
    before = torch.get_num_threads()
    with adaptive_threads():
        meter = processors._meter
        assert meter is not None
        _, busy, own = meter._read()
        assert busy > own > 0
        adapt_threads()
    assert torch.get_num_threads() == before
    assert processors._meter is None
