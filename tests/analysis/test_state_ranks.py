"""`analyze` measures ranks of the states that models carry from token to token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import transformers

import gramian
from gramian.analysis import StateReport
from gramian.models import GramianConfig, GramianForCausalLM

IDS = torch.randint(3, 60, (21,), generator=torch.Generator().manual_seed(5))
AT = [0, 3, 9, 20]
COMMON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MAMBA2 = {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 6, "chunk_size": 16}
DELTA = {
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
    "layer_types": ["linear_attention", "full_attention"],
}


def foreign(kind: str, changes: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(COMMON | changes))
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def ranks(state: np.ndarray) -> tuple[float, float]:
    s = np.linalg.svd(state.astype(float), compute_uv=False)
    p = s / s.sum()
    p = p[p > 0]
    return float((s**2).sum() / s[0] ** 2), float(np.exp(-(p * np.log(p)).sum()))


def assert_ranks(layer: Any, column: int, states: torch.Tensor) -> None:
    """Compare with the states (heads, n, N) or (heads, N, n) of a cache."""
    for head, state in enumerate(states.detach().numpy()):
        stable, effective = ranks(state)
        assert float(layer.stable_rank[head, column]) == pytest.approx(stable, rel=1e-3)
        assert float(layer.effective_rank[head, column]) == pytest.approx(effective, rel=1e-3)


@pytest.mark.parametrize(("kind", "changes"), [("mamba2", MAMBA2), ("qwen3_5_text", DELTA)])
def test_ranks_are_those_of_the_states_in_a_cache(kind: str, changes: Any) -> None:
    model = foreign(kind, changes)
    report = gramian.analyze(model, IDS, at=AT, ranks=True)
    first = next(layer for layer in report.layers if layer.kind == "recurrence")
    assert first.stable_rank is not None and first.effective_rank is not None
    assert first.stable_rank.shape == first.ess.shape
    assert float(first.stable_rank[:, 0].max()) == 0  # nothing is stored before the first token
    for column, i in enumerate(AT[1:], 1):
        output = model(IDS[None, :i], use_cache=True)
        cache = output.get("past_key_values") or output["cache_params"]
        assert_ranks(first, column, cache.layers[0].recurrent_states[0][0])
    for layer in report.layers:
        assert (layer.stable_rank is None) == (layer.kind != "recurrence")
        if layer.effective_rank is not None:
            assert bool((layer.effective_rank <= min(first.tss.max(), 8) + 1e-4).all())


def test_ranks_of_our_mixers_and_what_has_none(tmp_path: Path) -> None:
    torch.manual_seed(0)
    mixers = ["gated_linear_attention", "softmax_attention", "s6", "gated_delta_net"]
    config = GramianConfig(
        vocab_size=64, hidden_size=24, num_hidden_layers=4, num_heads=3, mixers=mixers
    )
    model = GramianForCausalLM(config).eval()
    report = gramian.analyze(model, IDS, at=AT, ranks=True, max_channels=2)
    layers = report.main.layers
    known = [layer.stable_rank is not None for layer in layers]
    assert known == [True, False, False, True]  # S6 has one value channel for each of its states
    for column, i in enumerate(AT[1:], 1):
        output = model(IDS[None, :i], use_cache=True)
        for index in (0, 3):
            memory = output.past_key_values.layers[index].state.memory[0]
            assert_ranks(layers[index], column, memory[list(layers[index].channels)])

    loaded = StateReport.load(report.save(tmp_path / "report.json"))
    for one, other in zip(loaded.layers, report.layers, strict=True):
        for name in ("stable_rank", "effective_rank"):
            mine, theirs = getattr(one, name), getattr(other, name)
            assert (mine is None) == (theirs is None)
            assert mine is None or torch.equal(mine, theirs)
    assert "effective rank" in str(report) and "effective rank" not in str(
        gramian.analyze(model, IDS, at=AT)
    )
    narrowed = report.at([9])
    assert torch.equal(narrowed.main.layers[0].stable_rank, layers[0].stable_rank[:, [2]])
    pytest.importorskip("pandas")
    frame = report.to_frame()
    part = frame[frame.layer == layers[0].name]
    assert part.stable_rank.tolist() == layers[0].stable_rank.flatten().tolist()
    assert frame[frame.layer == layers[1].name].stable_rank.isna().all()
    assert "effective_rank_mean" in report.to_frame("layer")
    assert "stable_rank" not in gramian.analyze(model, IDS, at=AT).to_frame()
