"""Readings of scans are what loops over the published recurrences compute, in double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gramian.analysis._scans import ScanReading, read
from gramian.ess import effective_state_size
from tests.analysis.scans import attention, delta_rules, state_spaces
from tests.analysis.scans.case import Arguments, Case

LENGTHS = [1, 2, 3, 63]
CASES = state_spaces.CASES | delta_rules.CASES | attention.CASES


def reading_of(case: Case, arguments: Arguments) -> tuple[ScanReading, Any]:
    return read(case.scan, (), arguments), case.loop(**arguments)


def dense(case: Case, arguments: Arguments, reading: ScanReading) -> Tensor:
    """(count, L, L): what the loop makes of an impulse in the first value channel at a position."""
    own = arguments[case.values]
    length = reading.values.shape[-1]
    time = list(own.shape).index(length)

    def run(v: Tensor) -> tuple[Tensor, Tensor]:
        given = {**arguments, case.values: v}
        read_again, result = reading_of(case, given)
        return read_again.values[:, 0], read_again.outputs(result)[:, 0]  # (count, L) both

    (_, zero), columns = run(0 * own), []
    for j in range(length):
        impulse = torch.zeros_like(own)
        impulse.select(time, j).fill_(1)
        values, outputs = run(impulse)
        columns.append((outputs - zero) / values[:, j : j + 1])
    gate = 1 if reading.gate is None else reading.gate[:, 0].unsqueeze(-1)
    return torch.stack(columns, -1) / gate


@pytest.mark.each
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", CASES)
def test_a_reading_predicts_what_a_loop_returns(name: str, length: int) -> None:
    case = CASES[name]
    reading, result = reading_of(case, case.arguments(length))
    assert reading.values.shape[0] == reading.count and reading.values.shape[2] == length
    assert reading.disagreement(result) < 1e-10


@pytest.mark.parametrize("name", CASES)
def test_the_operator_and_its_state_sizes_are_those_of_the_loops_impulse_responses(
    name: str,
) -> None:
    case, length = CASES[name], 13
    arguments = case.arguments(length)
    reading, _ = reading_of(case, arguments)
    T = dense(case, arguments, reading)
    system = reading.system(slice(1, reading.count))
    difference = (system.matrix(length) - T[1:]).norm()
    assert difference < 1e-10 * T.norm()
    sizes = effective_state_size(system, at=[1, 5, 11])
    for position, size in zip([1, 5, 11], sizes.unbind(-1), strict=True):
        s = torch.linalg.svdvals(T[1:, position:, :position])
        p = s / s.sum(-1, keepdim=True)
        torch.testing.assert_close(size, torch.special.entr(p).sum(-1).exp(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_another_result_disagrees(name: str) -> None:
    case = CASES[name]
    reading, result = reading_of(case, case.arguments(13))
    outputs = result[0] if isinstance(result, tuple) else result
    assert reading.disagreement(outputs * 1.001) == pytest.approx(1e-3, rel=0.1)
    assert reading.disagreement(outputs.roll(1, dims=-1)) > 1e-2


def test_large_keys_of_rwkv4_do_not_overflow() -> None:
    given = CASES["RWKV-4"].arguments(23)
    T = read("rwkv_linear_attention", (), given).system(slice(None)).matrix()
    for shift in (-1e4, 1e4):  # weights are relative to each other
        moved = read("rwkv_linear_attention", (), given | {"key": given["key"] + shift})
        torch.testing.assert_close(moved.system(slice(None)).matrix(), T, rtol=1e-8, atol=1e-10)


def test_large_gates_of_the_mlstm_do_not_overflow() -> None:
    given = CASES["mLSTM"].arguments(23)
    for shift in (-1e4, 1e4):
        moved = given | {"igate": given["igate"] + shift, "eps": 0.0}
        assert bool(read("_train_fn", (), moved).system(slice(None)).matrix().isfinite().all())
