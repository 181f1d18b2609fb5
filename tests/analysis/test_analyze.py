"""What `analyze` reports is the entropy of singular values of blocks of matrices built naively."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import transformers

import gramian
from gramian.analysis import StateReport
from gramian.mixers import Hyena, LongConvolution, MultiHyena, SoftmaxAttention
from gramian.models import GramianConfig, GramianForCausalLM

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 6, "mamba_n_groups": 1}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
    "layer_types": ["linear_attention", "full_attention"],
}
ATTENTION: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "gpt2": {},
    "mistral": {**GROUPED, "sliding_window": 5},
    "gemma2": {**GROUPED, "sliding_window": 6, "attn_logit_softcapping": 0.5},
    "gpt_oss": {
        **GROUPED,
        "sliding_window": 6,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
}
SCANS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "mamba": ("mamba_selective_scan", {"state_size": 5}, ["MambaMixer"] * 2),
    "falcon_mamba": ("mamba_selective_scan", {"state_size": 5}, ["FalconMambaMixer"] * 2),
    "jamba": (
        "mamba_selective_scan",
        {
            "num_key_value_heads": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 5,
            "mamba_dt_rank": 4,
            "num_experts": 2,
        },
        ["JambaMambaMixer", "JambaAttention"],
    ),
    "zamba": (
        "mamba_selective_scan",
        {
            "mamba_d_state": 5,
            "mamba_dt_rank": 4,
            "n_mamba_heads": 2,
            "num_key_value_heads": 4,
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "hybrid", "hybrid"],
        },
        ["ZambaMambaMixer"] + ["ZambaAttention", "ZambaMambaMixer"] * 2,
    ),
    "mamba2": (
        "mamba2_chunk_scan",
        {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 6, "chunk_size": 16},
        ["Mamba2Mixer"] * 2,
    ),
    "falcon_h1": (
        "mamba2_chunk_scan",
        {**GROUPED, **MAMBA2, "mamba_d_ssm": 64, "mamba_chunk_size": 16},
        ["FalconH1Mixer", "FalconH1Attention"] * 2,
    ),
    "bamba": (
        "mamba2_chunk_scan",
        {**MAMBA2, "num_key_value_heads": 2, "attn_layer_indices": [1], "mamba_chunk_size": 16},
        ["BambaMixer", "BambaAttention"],
    ),
    "nemotron_h": (
        "mamba2_chunk_scan",
        {
            **GROUPED,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 6,
            "n_groups": 1,
            "chunk_size": 16,
            "layers_block_type": ["mamba", "attention"],
        },
        ["NemotronHMamba2Mixer", "NemotronHAttention"],
    ),
    "zamba2": (
        "mamba2_chunk_scan",
        {
            "num_key_value_heads": 4,
            "mamba_d_state": 5,
            "mamba_ngroups": 1,
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "hybrid", "hybrid"],
            "num_mem_blocks": 1,
            "chunk_size": 16,
        },
        ["Zamba2MambaMixer"] + ["Zamba2Attention", "Zamba2MambaMixer"] * 2,
    ),
    "qwen3_5_text": (
        "torch_chunk_gated_delta_rule",
        {**GROUPED, **DELTA},
        ["Qwen3_5GatedDeltaNet", "Qwen3_5Attention"],
    ),
    "qwen3_next": (
        "torch_chunk_gated_delta_rule",
        {
            **GROUPED,
            **DELTA,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
        ["Qwen3NextGatedDeltaNet", "Qwen3NextAttention"],
    ),
    "olmo_hybrid": (
        "torch_chunk_gated_delta_rule",
        {**DELTA, "num_key_value_heads": 2},
        ["OlmoHybridGatedDeltaNet", "OlmoHybridAttention"],
    ),
}
LENGTH = 37
IDS = torch.randint(3, 64, (LENGTH,), generator=torch.Generator().manual_seed(1))


def foreign(kind: str, changes: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(COMMON | changes))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # attention that is not uniform
        for name, weight in model.named_parameters():
            if any(part in name for part in ("q_proj", "k_proj", "c_attn")) and weight.ndim == 2:
                weight.mul_(8)
    return model


def own(mixers: Any, **changes: Any) -> Any:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_heads": 3,
        "filter": {"type": "implicit", "frequency": 1.0},
        "max_position_embeddings": 63,
        "vocab_size": 64,
    }
    return GramianForCausalLM(GramianConfig(mixers=mixers, **(settings | changes))).eval()


def naive_ess(T: Tensor, positions: Any, horizon: int | None = None) -> Tensor:
    """Entropy-ESS of matrices (channels, L, L) by a decomposition of every block."""
    horizon = horizon or T.shape[-1]
    columns = []
    for i in positions:
        if i == 0:
            columns.append(torch.zeros(len(T), dtype=torch.float64))
            continue
        s = torch.linalg.svdvals(T[:, i:horizon, :i].double())
        p = s / s.sum(-1, keepdim=True)
        columns.append(torch.exp(torch.special.entr(p).sum(-1)))
    return torch.stack(columns, -1)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("kind", ATTENTION)
def test_attention_is_that_of_the_models_own_maps(kind: str) -> None:
    model = foreign(kind, ATTENTION[kind])
    before = model.config._attn_implementation
    logits = model(IDS[None]).logits
    report = gramian.analyze(model, IDS, every=3)
    assert model.config._attn_implementation == before
    torch.testing.assert_close(model(IDS[None]).logits, logits)
    model.set_attn_implementation("eager")
    maps = model(IDS[None], output_attentions=True).attentions
    assert len(report.layers) == len(maps) and not report.unread
    for layer, T in zip(report.layers, maps, strict=True):
        assert layer.kind == "attention" and layer.ess.shape == (4, 13)
        assert_close(layer.ess, naive_ess(T[0], range(0, LENGTH, 3)))
        read = T[0, 0] != 0
        kept = [int(read[i:, :i].any(0).sum()) for i in range(0, LENGTH, 3)]
        assert layer.tss[0].tolist() == kept
    assert float(report.layers[0].ess.max()) > 2  # the maps are not trivial


def test_half_precision_is_measured_in_single() -> None:
    model = foreign("llama", GROUPED).to(torch.bfloat16)
    report = gramian.analyze(model, IDS, every=5)
    single = gramian.analyze(model.float(), IDS, every=5)
    # the first layer sees the same hidden states up to their rounding
    torch.testing.assert_close(report.layers[0].ess, single.layers[0].ess, rtol=0.05, atol=0.05)


def columns_of(function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Tensor:
    """(channels, L, L) of a scan, linear in its values, by one impulse after the other."""
    name = function.__name__
    values = "value" if name == "torch_chunk_gated_delta_rule" else "hidden_states"
    bound = dict(kwargs)
    order = {
        "mamba_selective_scan": ["hidden_states", "dt", "A", "B", "C"],
        "mamba2_chunk_scan": ["hidden_states", "dt", "A", "B", "C"],
        "torch_chunk_gated_delta_rule": ["query", "key", "value"],
    }[name]
    bound.update(zip(order, args, strict=False))
    bound["z"] = None  # the output gate is no part of the operator
    time = 2 if name == "mamba_selective_scan" else 1
    columns = []
    for j in range(bound[values].shape[time]):
        impulse = torch.zeros_like(bound[values])
        impulse.select(time, j).fill_(1)
        y = function(**{**bound, values: impulse})
        y = (y[0] if isinstance(y, tuple) else y)[0]
        columns.append(y if time == 2 else y[..., 0].mT)  # (channels, L)
    return torch.stack(columns, -1)


@pytest.mark.parametrize("kind", SCANS)
def test_scans_are_the_matrices_that_their_functions_apply(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, changes, mixers = SCANS[kind]
    model = foreign(kind, changes)
    place = sys.modules[type(model).__module__]
    function = getattr(place, name)
    matrices: list[Tensor] = []
    watching = False

    def spy(*args: Any, **kwargs: Any) -> Any:
        if watching:
            matrices.append(columns_of(function, args, kwargs))
        return function(*args, **kwargs)

    monkeypatch.setattr(place, name, spy)
    report = gramian.analyze(model, IDS, every=4, max_channels=None)
    assert getattr(place, name) is spy
    watching = True
    with torch.no_grad():
        model(IDS[None], use_cache=False)
    own = [layer for layer in report.layers if layer.kind != "convolution"]
    assert [layer.mixer for layer in own] == mixers and not report.unread
    scans = [layer for layer in report.layers if layer.kind == "recurrence"]
    short = [layer for layer in report.layers if layer.kind == "convolution"]
    assert [layer.mixer for layer in short] == [layer.mixer for layer in scans]
    assert all(float(layer.tss.max()) == 3 for layer in short)
    calls = len(matrices) // len(scans)  # a layer may scan its heads one after the other
    whole = [torch.cat(matrices[i : i + calls]) for i in range(0, len(matrices), calls)]
    for layer, T in zip(scans, whole, strict=True):
        assert layer.count == len(T) == len(layer.channels)
        assert float(T.triu(1).abs().max()) < 1e-6 * float(T.abs().max())
        sizes = naive_ess(T, range(0, LENGTH, 4))
        torch.testing.assert_close(layer.ess.double(), sizes, atol=2e-3, rtol=2e-3)
        order = changes.get("state_size") or changes.get("mamba_d_state") or 6
        assert layer.tss.unique().tolist() == [order]


def test_our_own_mixers_are_measured_by_their_operators() -> None:
    model = own(
        ["hyena", "multi_hyena", "long_convolution", "softmax_attention"], num_hidden_layers=4
    )
    seen: list[Tensor] = []
    hooks = [
        block.mixer.register_forward_hook(lambda module, args, output: seen.append(args[0]))
        for block in model.model.layers
    ]
    report = gramian.analyze(model, IDS, every=4, max_channels=5)
    for hook in hooks:
        hook.remove()
    kinds = [Hyena, MultiHyena, LongConvolution, SoftmaxAttention]
    for layer, x, block, cls in zip(
        report.main.layers, seen[-4:], model.model.layers, kinds, strict=True
    ):
        assert layer.mixer == cls.__name__
        T = block.mixer.operator(x).matrix(LENGTH).detach()
        T = T if T.ndim == 3 else T[0]
        assert layer.count == len(T) and len(layer.channels) <= 5
        assert_close(layer.ess, naive_ess(T[list(layer.channels)], range(0, LENGTH, 4)))


def test_a_stack_of_mixers_without_a_model_around_it() -> None:
    stack = nn.Sequential(
        Hyena(8, {"type": "modal", "orders": 2}, max_length=40),
        MultiHyena(8, 2, {"type": "implicit", "hidden": 8}, max_length=40),
    )
    report = gramian.analyze(stack, torch.randn(20, 8))
    assert [layer.name for layer in report.layers] == ["0.short", "0", "1.short", "1"]
    assert report.layers[1].tss.unique().tolist() == [4] and report.horizon == 20


def test_a_horizon_ends_what_is_read_and_positions_may_be_few() -> None:
    model = foreign("llama", GROUPED)
    report = gramian.analyze(model, IDS, at=[2, 10, 7], horizon=24)
    model.set_attn_implementation("eager")
    T = model(IDS[None], output_attentions=True).attentions[1][0]
    assert report.positions == (2, 10, 7) and report.horizon == 24
    assert report.cap.tolist() == [2, 10, 7]
    assert_close(report.layers[1].ess, naive_ess(T, [2, 10, 7], 24))


def test_counts_with_a_tolerance() -> None:
    model = foreign("llama", GROUPED)
    report = gramian.analyze(model, IDS, at=[18], measure="tolerance", rtol=1e-2)
    model.set_attn_implementation("eager")
    T = model(IDS[None], output_attentions=True).attentions[0][0].double()
    s = torch.linalg.svdvals(T[:, 18:, :18])
    assert report.layers[0].ess[:, 0].tolist() == (s > 1e-2 * s[:, :1]).sum(-1).tolist()


def test_what_cannot_be_read_is_named() -> None:
    with pytest.raises(ValueError, match="Linear has no layer"):
        gramian.analyze(nn.Linear(3, 3), torch.randn(5, 3))


def test_progress_counts_layers() -> None:
    calls: list[tuple[int, int]] = []
    gramian.analyze(
        foreign("llama", GROUPED), IDS, every=9, progress=lambda *now: calls.append(now)
    )
    assert calls == [(1, 2), (2, 2)]


def test_a_report_survives_its_file(tmp_path: Path) -> None:
    report = gramian.analyze(foreign("llama", GROUPED), IDS, every=4)
    loaded = StateReport.load(report.save(tmp_path / "report.json"))
    assert loaded.to_dict() == report.to_dict() == json.loads(report.to_json())
    for one, other in zip(loaded.layers, report.layers, strict=True):
        assert torch.equal(one.ess, other.ess) and torch.equal(one.tss, other.tss)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="state report"):
        StateReport.load(tmp_path / "other.json")


def test_averages_and_totals() -> None:
    report = gramian.analyze(foreign("llama", GROUPED), IDS, every=4)
    sizes = torch.stack(report.ess)  # (layers, heads, P)
    torch.testing.assert_close(report.average(), sizes.mean())
    torch.testing.assert_close(report.total(), sizes.mean(-1).sum())
    torch.testing.assert_close(report.average(over_positions=False), sizes.mean((0, 1)))
    assert_close(report.layer_curves(), sizes.mean(1))


def test_modulation_compares_with_both_sides() -> None:
    from gramian.analysis import LayerState

    sizes = 10 + torch.arange(20.0).expand(2, -1).clone()
    sizes[1, 11] *= 0.5  # the position behind token 10
    layer = LayerState("0", "A", "attention", (0, 1), 2, sizes, torch.full((2, 20), 40.0))
    tokens = tuple("." if i == 10 else "a" for i in range(20))
    report = StateReport("m", (layer,), tuple(range(20)), tokens, "entropy", None, None, (), 0.0)
    found = report.modulation(["."])
    assert found["delimiters"] == 1
    torch.testing.assert_close(found["head_ratios"][0], torch.tensor([1.0, 0.5]).double())
    assert found["average_ratio"] == pytest.approx(0.75)
    with pytest.raises(ValueError, match="delimiter"):
        report.modulation(["!"])


class Characters:
    """A tokenizer of one token a character."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(c) % 60 for c in text], "attention_mask": [1] * len(text)}

    def decode(self, ids: list[int]) -> str:
        return chr(ids[0])


def test_a_text_goes_through_the_tokenizer() -> None:
    model = foreign("llama", GROUPED)
    text = gramian.analyze(model, "a few words.", tokenizer=Characters(), every=3)
    ids = Characters()("a few words.")["input_ids"]
    assert text.tokens == tuple(chr(i) for i in ids)
    assert torch.equal(text.layers[1].ess, gramian.analyze(model, ids, every=3).layers[1].ess)


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ("words", {}, "tokenizer"),
        (IDS.reshape(1, -1).repeat(2, 1), {}, "one sequence"),
        (torch.tensor([], dtype=torch.int64), {}, "no tokens"),
        ({"input_ids": IDS[None], "attention_mask": torch.zeros(1, LENGTH)}, {}, "padding"),
        (IDS + 60, {}, "0 … 63"),
        (IDS, {"horizon": 38}, "at most 37"),
        (IDS, {"at": [37]}, "0 … 36"),
        (IDS, {"every": 0}, "every"),
        (IDS, {"every": 2, "at": [1]}, "not several"),
        (IDS, {"measure": "rank"}, "rank"),
        (IDS, {"max_channels": 0}, "max_channels"),
    ],
)
def test_what_cannot_be_analysed_says_so(inputs: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gramian.analyze(foreign("llama", GROUPED), inputs, **options)


def test_values_that_are_not_finite_name_the_layer() -> None:
    model = foreign("llama", GROUPED)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn"):
        gramian.analyze(model, IDS)
    assert model.config._attn_implementation != "gramian_capture"
