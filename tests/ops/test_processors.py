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
        self.allowed = set(range(PROCESSORS))
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
        for number in self.allowed:
            self.busy[number] += (others + own) * seconds / len(self.allowed)
        self.write()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    made = Machine(tmp_path / "stat")
    monkeypatch.setattr(processors, "_STATISTICS", made.path)
    monkeypatch.setattr(processors, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(processors, "_CONTROL", tmp_path / "control")
    monkeypatch.setattr(processors.os, "sched_getaffinity", lambda _: made.allowed)
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


@pytest.mark.parametrize(
    ("group", "files", "expected"),
    [
        ("0::/", {"cpu.max": "200000 100000"}, 2),
        ("0::/", {"cpu.max": "max 100000"}, 4),
        ("0::/", {"cpu.max": "270000 100000"}, 2),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/", {"cpu.max": "nonsense"}, 4),
        ("0::/a/b", {"cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3),
        ("0::/a/b", {"a/b/cpu.max": "300000 100000", "a/cpu.max": "100000 100000"}, 1),
        ("0::/outside", {"cpu.max": "200000 100000"}, 2),
        (
            "3:memory:/m\n2:cpu,cpuacct:/a",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "200000", "cpu,cpuacct/a/cpu.cfs_period_us": "1e5"},
            4,
        ),
        (
            "3:memory:/m\n2:cpu,cpuacct:/a",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "30000", "cpu,cpuacct/a/cpu.cfs_period_us": "10000"},
            3,
        ),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ("3:memory:/m", {}, 4),
    ],
)
def test_a_container_may_limit_the_time(
    machine: Machine, tmp_path: Path, group: str, files: dict[str, str], expected: int
) -> None:
    (tmp_path / "groups").write_text(group + "\n")
    for name, text in files.items():
        file = tmp_path / "control" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    with adaptive_threads():
        machine.run(0.0)
        adapt_threads()
        assert torch.get_num_threads() == expected
        machine.run(3.0)
        adapt_threads()
        assert torch.get_num_threads() == 1


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


def test_statistics_that_may_not_be_read_change_nothing(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processors, "_STATISTICS", tmp_path)  # reading a folder is an OSError
    with adaptive_threads():
        assert processors._meter is None


def test_a_moment_without_statistics_is_passed_over(machine: Machine) -> None:
    with adaptive_threads():
        machine.path.rename(machine.path.with_name("away"))
        machine.now += 1
        adapt_threads()
        assert torch.get_num_threads() == 4
        machine.run(3.0)
        adapt_threads()
        assert torch.get_num_threads() < 4


def test_statistics_of_fewer_kinds(machine: Machine) -> None:
    def write(busy: int) -> None:
        lines = [f"cpu{number} {busy} 0 0 {99 * TICKS}" for number in range(PROCESSORS)]
        machine.path.write_text("\n".join([*lines, "", "intr"]))

    write(0)
    with adaptive_threads():
        machine.now, machine.own = 1.0, 1.0
        write(TICKS)
        adapt_threads()
        assert torch.get_num_threads() == 1


def test_processors_come_and_go(machine: Machine) -> None:
    machine.busy[3] = 1000.0
    machine.write()
    with adaptive_threads():
        machine.allowed = {0, 1}
        del machine.busy[3]  # a processor that is off has no statistics
        machine.run(0.0, own=2.0)
        adapt_threads()
        assert torch.get_num_threads() == 2
        machine.allowed = {0, 1, 2, 3}
        machine.busy[3] = 1000.0
        for _ in range(2):
            machine.run(0.0)
            adapt_threads()
        assert torch.get_num_threads() == 4


@pytest.mark.parametrize("value", ["true", "close", "false"])
def test_bound_threads_change_nothing(
    value: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mask of a bound thread has few processors, and says nothing about those of the others."""
    monkeypatch.setenv("OMP_PROC_BIND", value)
    with adaptive_threads():
        for _ in range(2):
            machine.run(3.0)
            adapt_threads()
        assert torch.get_num_threads() == (1 if value == "false" else 4)


def test_more_threads_than_processors_are_reduced(machine: Machine) -> None:
    torch.set_num_threads(2 * PROCESSORS)
    with adaptive_threads():
        machine.run(0.0)
        adapt_threads()
        assert torch.get_num_threads() == PROCESSORS
    assert torch.get_num_threads() == 2 * PROCESSORS


def test_a_copy_of_the_process_leaves_the_block(machine: Machine) -> None:
    with adaptive_threads():
        torch.set_num_threads(1)  # as a worker of a data loader does
        child = os.fork()
        if child == 0:
            machine.run(0.0)
            adapt_threads()
            os._exit(int(processors._meter is not None or torch.get_num_threads() != 1))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert processors._meter is not None


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
        now = processors._read()
        assert now.processors == len(now.busy) == len(os.sched_getaffinity(0))
        assert sum(now.busy.values()) > now.own > 0
        adapt_threads()
    assert torch.get_num_threads() == before
    assert processors._meter is None
