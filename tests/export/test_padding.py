"""Padding changes neither what exported programs compute for a row nor the row's state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("transformers")

from gramian.export import ExportedRecurrence, export_recurrence
from gramian.export._mixers import make_program
from gramian.filters import build
from gramian.mixers import Block, LongConvolution
from gramian.systems import FIR
from tests.export.reference import padded_rows
from tests.export.test_models import KINDS, make

FAST = ("hyena_order_3", "grouped", "mapped", "s6")  # those that are traced fastest
LENGTHS = torch.tensor([40, 33, 4]), torch.tensor([6, 0, 34])  # of two chunks of 40 columns


@torch.no_grad()
@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in KINDS]
)
def test_padding_is_no_time_for_any_mixer_and_filter(name: str) -> None:
    """Two padded chunks and a step, in double precision, against each row alone."""
    model = make(**KINDS[name]).double()
    for layer in model.model.layers:
        mixer = layer.mixer
        program, recurrence = make_program(mixer, name, context=90), mixer.recurrence()
        x = torch.randn(3, 81, mixer.width, dtype=torch.float64)
        state = program.template.map(lambda t: t.expand(3, *t.shape[1:]).clone() if t.ndim else t)
        found, tokens = [], []
        for index, lengths in enumerate(LENGTHS):
            real = torch.arange(40) >= 40 - lengths[:, None]
            chunk = x[:, 40 * index : 40 * index + 40]
            y, state = program.prefill(chunk.masked_fill(~real[..., None], 0), state, real)
            assert y.isfinite().all()  # also at padding, so that later layers stay finite
            found.append(y)
            tokens.append(real)
        y, _ = program.step(x[:, 80], state)
        found, tokens = torch.cat([*found, y[:, None]], 1), torch.cat([*tokens, real[:, -1:]], 1)
        tokens[:, 80] = True
        for row in range(3):
            alone, _ = recurrence.prefill(x[row : row + 1, tokens[row]])
            assert_close(found[row, tokens[row]], alone[0], rtol=0, atol=1e-10)


@torch.no_grad()
def test_exported_mixers_take_a_mask(tmp_path: Path) -> None:
    torch.manual_seed(0)
    filter = build({"type": "explicit", "taps": 5}, channels=6, max_length=70)
    mixer: Any = Block(6, LongConvolution(filter)).eval()
    export_recurrence(mixer, tmp_path / "out", "torch", verify=5)
    run = ExportedRecurrence(tmp_path / "out")
    _, mask = padded_rows(20)
    x = torch.randn(4, 20, 6)
    y, state = run.prefill(x.numpy(), mask=mask)
    after, _ = run.step(x[:, 0].numpy(), state)
    assert not y[mask == 0].any()
    for row in range(4):
        expected = mixer(torch.cat([x[row, mask[row] == 1], x[row, :1]])[None])[0]
        assert_close(torch.from_numpy(y[row, mask[row] == 1]), expected[:-1])
        assert_close(torch.from_numpy(after[row]), expected[-1])


def test_a_system_takes_no_mask(tmp_path: Path) -> None:
    export_recurrence(FIR(torch.randn(3, 4)), tmp_path / "filter", "torch", verify=2)
    run, signal = ExportedRecurrence(tmp_path / "filter"), np.zeros((2, 3, 6))
    with pytest.raises(ValueError, match="the programs of this system take no mask"):
        run.prefill(signal, mask=np.ones((2, 6)))
