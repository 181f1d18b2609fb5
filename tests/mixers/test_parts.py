"""Steps of a large state, a few sequences at a time."""

import warnings

import pytest
import torch

from gramian.mixers import Mixer, _parts
from tests.mixers.test_mixers import every_pair, make

TOKENS, BATCH = 4, 5


def stepped(mixer: Mixer, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the outputs of all tokens, and the tensors of the last state."""
    recurrence = mixer.recurrence()
    state = recurrence.initial_state(len(x), dtype=x.dtype)
    outputs = []
    for x_t in x.unbind(1):
        y, state = recurrence.step(x_t, state)
        outputs.append(y)
    return torch.stack(outputs, 1), list(_parts._tensors(state))


@pytest.mark.each
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("rows", [1, 2, 3])
@every_pair
def test_parts_of_a_batch_are_stepped_as_the_whole(
    name: str, filter_name: str, rows: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make(name, filter_name).double()
    x = torch.randn(BATCH, TOKENS, whole.width, dtype=torch.float64)
    expected, last = stepped(whole, x)
    calls = []

    def rows_in_cache(state: object, batch: int) -> int:
        if found(state, batch) < batch:
            calls.append(batch)
            return rows
        return batch

    found = _parts.rows_in_cache
    monkeypatch.setattr(_parts, "_BYTES", 1)
    monkeypatch.setattr("gramian.mixers.mixer.rows_in_cache", rows_in_cache)
    if compiled:
        whole.compile_step(backend="eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "steps run uncompiled")
        outputs, state = stepped(whole, x)
    assert len(calls) == TOKENS
    torch.testing.assert_close(outputs, expected)
    for one, other in zip(state, last, strict=True):
        torch.testing.assert_close(one, other)


def test_a_state_is_stepped_in_parts_of_a_few_megabytes() -> None:
    class Numbers(tuple):
        pass

    assert _parts.rows_in_cache(Numbers([torch.zeros(64, 2**10)]), 64) == 64
    assert _parts.rows_in_cache(Numbers([torch.zeros(64, 2**18)]), 64) == 4
    assert _parts.rows_in_cache(Numbers([torch.zeros(63, 2**18)]), 63) == 4
    assert _parts.rows_in_cache(Numbers([torch.zeros(2, 2**23)]), 2) == 1
    assert _parts.rows_in_cache(Numbers([torch.zeros(64, 2**18), torch.zeros(())]), 64) == 64


def test_a_large_state_is_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = make("multi_hyena", "modal")
    recurrence = mixer.recurrence()
    state = recurrence.initial_state(64)
    modes = state.long.modes[0]
    monkeypatch.setattr(_parts, "_BYTES", modes.nbytes // 8)
    _, after = recurrence.step(torch.randn(64, mixer.width), state)
    assert after.long.modes[0].data_ptr() == modes.data_ptr()
