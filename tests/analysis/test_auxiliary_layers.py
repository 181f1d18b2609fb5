"""Short convolutions of layers with another operator have rows of their own, and count nowhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gramian
from gramian.analysis import StateReport
from gramian.analysis._inputs import read_inputs
from gramian.analysis._recording import RecordedOperator, Recorder
from gramian.mixers import LinearRecurrence
from gramian.models import GramianConfig, GramianForCausalLM

IDS = torch.arange(3, 23) % 16

MIXERS: dict[str, dict[str, Any]] = {
    "hyena": {"type": "hyena", "short_kernel": 3},
    "multi_hyena": {"type": "multi_hyena", "num_heads": 2, "short_kernel": 3},
    "gated_delta_net": {"type": "gated_delta_net", "num_heads": 2, "short_kernel": 3},
}


def analyzed(mixer: dict[str, Any]) -> tuple[GramianForCausalLM, StateReport]:
    torch.manual_seed(0)
    config = GramianConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=2, max_length=32, mixer=mixer
    )
    model = GramianForCausalLM(config).eval()
    return model, gramian.analyze(model, IDS)


@pytest.mark.parametrize("kind", list(MIXERS))
def test_short_convolutions_of_mixers_are_layers_that_averages_leave_out(kind: str) -> None:
    model, report = analyzed(MIXERS[kind])
    short = [layer for layer in report.layers if layer.auxiliary]
    assert [layer.kind for layer in short] == ["convolution"] * 2
    assert len(report.main.layers) == 2
    assert not any(layer.auxiliary for layer in report.main.layers)
    module: Any = model.get_submodule(short[0].name)
    taps = module.weight.detach().double()
    matrix = torch.zeros(len(taps), 20, 20, dtype=torch.float64)
    for t in range(20):
        for j in range(min(3, t + 1)):
            matrix[:, t, t - j] = taps[:, j]
    values = torch.linalg.svdvals(matrix[:, 10:, :10])
    p = values / values.sum(-1, keepdim=True)
    expected = torch.special.entr(p).sum(-1).exp()[list(short[0].channels)]
    assert (short[0].ess[:, 10] - expected).abs().max() <= 1e-5
    assert float(short[0].tss.max()) == 2
    means = torch.stack([layer.ess.double().mean() for layer in report.main.layers])
    assert float(report.average()) == pytest.approx(float(means.mean()), rel=1e-5)
    assert float(report.total()) < sum(float(layer.ess.mean(1).sum()) for layer in report.layers)
    assert [one.name for one in report.ranking().layers if "short" in one.name] == []


def test_labels_of_auxiliary_layers_follow_those_of_their_layers() -> None:
    report = analyzed(MIXERS["hyena"])[1]
    assert report.labels == ("0 short", "0", "1 short", "1")
    assert report.main.labels == ("0", "1")


def test_auxiliary_layers_come_back_from_json() -> None:
    report = analyzed(MIXERS["hyena"])[1]
    again = StateReport.from_dict(report.to_dict())
    assert [layer.auxiliary for layer in again.layers] == [True, False, True, False]


def test_a_report_of_auxiliary_layers_alone_counts_them() -> None:
    report = analyzed(MIXERS["hyena"])[1]
    alone = StateReport.from_dict(
        report.to_dict() | {"layers": [layer.to_dict() for layer in report.layers[::2]]}
    )
    assert alone.main is alone
    assert float(alone.average()) > 0


@pytest.mark.each
@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 3, 21])
@pytest.mark.parametrize(
    "kind",
    [
        "linear_attention",
        "weighted_linear_attention",
        "gated_linear_attention",
        "gla_s6",
        "s6",
        "gated_delta_net",
    ],
)
def test_joined_operators_of_mixers_map_the_inputs_of_their_convolutions(
    kind: str, length: int
) -> None:
    torch.manual_seed(0)
    config = GramianConfig(
        vocab_size=16, hidden_size=8, num_heads=2, num_hidden_layers=1, mixers=kind
    )
    model = GramianForCausalLM(config).double().eval()
    mixer: Any = model.model.layers[0].mixer
    assert isinstance(mixer, LinearRecurrence)
    with torch.no_grad():
        mixer.short.bias.zero_()
    seen = {}
    mixer.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].detach()))
    found: list[RecordedOperator] = []
    recorder = Recorder(model, found.append, joins=True)
    recorder.record(read_inputs(IDS.repeat(2)[:length], None))
    assert [(one.kind, one.auxiliary) for one in found] == [(str(mixer.family), False)]
    x = seen["x"]
    steps, values, _, _ = mixer.features(x, None, None)
    memory = values.new_zeros(1, values.shape[1], mixer.state_size, values.shape[-1])
    expected = steps.run(values, memory)[0].transpose(-1, -2).reshape(-1, length)
    operators = found[0].system(slice(None)).matrix(length)
    assert operators.shape == (found[0].count, length, length)
    assert found[0].count == len(expected)
    inputs = mixer.in_proj(x)[0, :, : mixer.convolved]  # of the convolution, (L, convolved)
    errors = (operators @ inputs - expected.unsqueeze(-1)).norm(dim=1)  # (values, convolved)
    fed_by = errors.argmin(1)
    assert len(set(fed_by.tolist())) == len(expected)
    assert float((errors.amin(1) / expected.norm(dim=1)).max()) < 1e-10
