"""Every family: the cut layers compute what the model computes with coordinates held at zero."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import gramian
from gramian.models import GramianConfig, GramianForCausalLM
from gramian.shrinking._choosing import Choices
from gramian.shrinking._family import Layer, find_layers
from gramian.shrinking._folding import fold
from gramian.shrinking._passes import Importance, compare, measure_importance
from gramian.shrinking._texts import Windows

VOCABULARY = 97
HYBRID = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
MAMBA = {"mamba_d_state": 6, "mamba_d_conv": 3, "mamba_expand": 2}
MAMBA2 = {**MAMBA, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
    "linear_conv_kernel_dim": 3,
}
LAYERS = {"layer_types": ["linear_attention", "full_attention"]}
ZAMBA = {
    "num_hidden_layers": 3,
    "layers_block_type": ["mamba", "hybrid", "hybrid"],
    "num_key_value_heads": 4,
    "attention_hidden_size": 64,
    "attention_head_dim": 16,
}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("Mamba", {"state_size": 6, "time_step_rank": 3}),
    "falcon_mamba": ("FalconMamba", {"state_size": 6, "time_step_rank": 3}),
    "jamba": (
        "Jamba",
        {**MAMBA, "mamba_dt_rank": 3, "attn_layer_period": 2, "attn_layer_offset": 1, **EXPERTS},
    ),
    "zamba": ("Zamba", {**ZAMBA, **MAMBA, "mamba_dt_rank": 3, "n_mamba_heads": 2}),
    "mamba2": (
        "Mamba2",
        {"state_size": 6, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 16},
    ),
    "bamba": ("Bamba", {**MAMBA2, "attn_layer_indices": [1]}),
    "falcon_h1": ("FalconH1", {**MAMBA2, "mamba_d_ssm": 64, "head_dim": 8}),
    "granitemoehybrid": ("GraniteMoeHybrid", {**MAMBA2, **LAYERS, "shared_intermediate_size": 16}),
    "nemotron_h": (
        "NemotronH",
        {
            "layers_block_type": ["mamba", "attention", "mamba"],
            "num_hidden_layers": 3,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 2,
            "ssm_state_size": 6,
            "chunk_size": 16,
            "head_dim": 8,
        },
    ),
    "zamba2": (
        "Zamba2",
        {
            **ZAMBA,
            **MAMBA,
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "mamba_ngroups": 2,
            "chunk_size": 16,
            "num_mem_blocks": 1,
            "adapter_rank": 4,
        },
    ),
    "qwen3_next": ("Qwen3Next", {**DELTA, **LAYERS, **EXPERTS, "head_dim": 8}),
    "qwen3_5_text": ("Qwen3_5", {**DELTA, **LAYERS, "head_dim": 8}),
    "qwen3_5_moe_text": ("Qwen3_5Moe", {**DELTA, **LAYERS, **EXPERTS, "head_dim": 8}),
    "qwen4_exp_text": (
        "Qwen4Exp",
        {
            **DELTA,
            **EXPERTS,
            **LAYERS,
            "head_dim": 8,
            "hc_count": 2,
            "hc_lowrank": 4,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 64,
            "indexer_compress_ratio": 2,
        },
    ),
    "olmo_hybrid": ("OlmoHybrid", {**DELTA, **LAYERS}),
}
OURS = (
    "linear_attention",
    "weighted_linear_attention",
    "gated_linear_attention",
    "gla_s6",
    "gated_delta_net",
    "s6",
)
ALL = (*TRANSFORMERS, *OURS, "silu", "elu", "mapped")
DELTAS = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text", "olmo_hybrid")
INEXACT = ("falcon_mamba", "jamba", *DELTAS, "gated_delta_net")


def build(kind: str) -> Any:
    """A small model of a kind, with weights that make its layers matter."""
    torch.manual_seed(0)
    if kind in TRANSFORMERS:
        name, options = TRANSFORMERS[kind]
        config_name = f"{name}TextConfig" if kind.endswith("_text") else f"{name}Config"
        config = getattr(transformers, config_name)(**{**HYBRID, **options})
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    else:
        features = {"feature_map": kind} if kind in ("silu", "elu") else {}
        if kind == "mapped":
            features = {"feature_size": 9}
        model = GramianForCausalLM(
            GramianConfig(
                vocab_size=VOCABULARY,
                hidden_size=24,
                num_hidden_layers=2,
                num_heads=3,
                mixers="gated_linear_attention" if features else kind,
                linear_recurrence={"state_size": 6, **features},
            )
        )
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if name.endswith("A_log"):
                parameter.copy_(torch.rand_like(parameter) - 2)
            elif parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 1.2 * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def windows(count: int = 3, length: int = 41) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, VOCABULARY, (count, length), generator=generator)


def importance_of(model: Any) -> tuple[list[Layer], dict[str, Importance]]:
    layers = list(find_layers(model))
    assert layers
    return layers, measure_importance(model, layers, Windows.of(windows()))


def prepare(kind: str) -> tuple[Any, list[Layer], dict[str, Importance]]:
    model = build(kind)
    return (model, *importance_of(model))


prepared = cache(prepare)  # for tests that change nothing of it


def drawn(layers: list[Layer], size: int) -> dict[str, Tensor]:
    """Random coordinates to keep, other ones for every group."""
    generator = torch.Generator().manual_seed(3)
    return {
        layer.path: torch.stack(
            [
                torch.randperm(layer.shape.states, generator=generator)[:size].sort().values
                for _ in range(layer.shape.groups)
            ]
        )
        for layer in layers
    }


# The model with coordinates held at zero, written without the code of the package.


def held(x: Tensor, kept: Tensor) -> Tensor:
    """Zero what is not kept in keys or queries (…, groups, n)."""
    mask = torch.zeros(len(kept), x.shape[-1], dtype=x.dtype).scatter_(1, kept, 1.0)
    return x * mask


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def holding(kind: str, layers: list[Layer], kept: dict[str, Tensor]) -> Iterator[None]:
    """Hold coordinates at zero in every layer of a model of transformers."""
    file = sys.modules[type(layers[0].module).__module__]
    now: list[tuple[Layer, list[int]]] = []

    def enter(layer: Layer) -> Any:
        return lambda *_: now.append((layer, [0]))

    with ExitStack() as stack:
        for layer in layers:
            before = layer.module.register_forward_pre_hook(enter(layer))
            after = layer.module.register_forward_hook(lambda *_: now.pop() and None)
            stack.callback(before.remove)
            stack.callback(after.remove)
        if hasattr(file, "mamba2_chunk_scan"):
            scan = file.mamba2_chunk_scan

            def mamba2(x: Any, dt: Any, A: Any, B: Tensor, C: Tensor, **options: Any) -> Any:
                K = kept[now[-1][0].path]
                return scan(x, dt, A, held(B, K), held(C, K), **options)

            stack.enter_context(replaced(file, "mamba2_chunk_scan", mamba2))
        elif hasattr(file, "mamba_selective_scan"):
            scan = file.mamba_selective_scan

            def mamba(u: Any, dt: Any, A: Any, B: Tensor, C: Tensor, **options: Any) -> Any:
                layer, count = now[-1]
                K = kept[layer.path][count[0] : count[0] + 1]
                count[0] += 1
                B, C = (held(z.mT.unsqueeze(-2), K).squeeze(-2).mT for z in (B, C))
                return scan(u, dt, A, B, C, **options)

            stack.enter_context(replaced(file, "mamba_selective_scan", mamba))
        else:
            scan = file.torch_chunk_gated_delta_rule

            def delta(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
                K = kept[now[-1][0].path]
                y, state = scan(held(q, K), held(k, K), v, **options)
                return y * (q.shape[-1] / K.shape[1]) ** 0.5, state

            stack.enter_context(replaced(file, "torch_chunk_gated_delta_rule", delta))
        if kind in ("falcon_mamba", "jamba"):
            for layer in layers:
                for name in ("b_layernorm", "c_layernorm"):
                    norm = getattr(layer.module, name)
                    stack.enter_context(normalized(norm, kept[layer.path][0]))
        yield


@contextmanager
def normalized(norm: nn.Module, kept: Tensor) -> Iterator[None]:
    """Make a norm average over the kept coordinates alone."""

    def forward(x: Tensor) -> Tensor:
        squares = x[..., kept].square().mean(-1, keepdim=True)
        eps = getattr(norm, "eps", None) or norm.variance_epsilon
        return norm.weight * x * (squares + eps).rsqrt()

    with replaced(norm, "forward", forward):
        yield


@torch.no_grad()
def zeroed(model: Any, layers: list[Layer], kept: dict[str, Tensor]) -> Any:
    """A Gramian model whose layers read and write features of zero for what is not kept."""
    model = copy.deepcopy(model)
    for layer in find_layers(model):
        module: Any = layer.module
        n, K = layer.shape.states, kept[layer.path]
        gone = torch.ones(len(K), n, dtype=torch.bool).scatter_(1, K, False)
        if type(module).__name__ == "S6":
            rows = module.step_rank + torch.arange(2 * n).reshape(2, n)[:, gone[0]].flatten()
            module.x_proj.weight[rows] = 0
            continue
        if getattr(module, "key_map", None) is not None:
            hidden = gone.unsqueeze(1).expand_as(module.key_map)
            module.key_map[hidden], module.query_map[hidden] = 0, 0
            continue
        rows = torch.arange(2 * module.heads * n).reshape(2, module.heads, n)[:, gone].flatten()
        module.in_proj.weight[rows] = 0
        module.short.bias[rows] = 0
        if module.feature_map == "elu":
            module.short.bias[rows] = -1e4  # elu(-10000) + 1 = 0
        if type(module).__name__ == "GatedDeltaNet":  # which divides queries by another root
            norm, factor = module.norm.forward, (n / K.shape[1]) ** 0.5
            module.norm.forward = partial(_scaled, norm, factor)
    return model


def _scaled(norm: Any, factor: float, y: Tensor) -> Tensor:
    return norm(y * factor)


@pytest.mark.each
@torch.no_grad()
@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("kind", ALL)
def test_cut_models_compute_with_coordinates_held_at_zero(kind: str, size: int) -> None:
    model, layers, importance = prepare(kind) if kind == "jamba" else prepared(kind)
    kept = drawn(layers, size)
    if kind == "jamba":  # its weights take a constant; here none
        for layer in layers:
            for name in ("b_layernorm", "c_layernorm"):
                getattr(layer.module, name).weight.fill_(1.0)
            one = importance[layer.path]
            one.keys, one.queries = (torch.full_like(x, one.tokens) for x in one.energies)
    small, _ = fold(model, layers, kept, importance)
    ids = windows(2, 37)
    if kind in TRANSFORMERS:
        with holding(kind, layers, kept):
            expected = model(ids).logits
    else:
        expected = zeroed(model, layers, kept)(ids).logits
    unchanged = model(ids).logits
    assert float((unchanged - expected).norm() / unchanged.norm()) > 1e-3
    assert float((small(ids).logits - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("kind", ALL)
def test_the_predicted_error_is_the_measured_one(kind: str) -> None:
    model, layers, importance = prepared(kind)
    choices = Choices.of(layers, importance)
    kept = choices.candidates({layer.path: 4 for layer in layers})["error"]
    _, cut = fold(model, layers, kept, importance)
    for path, change in compare(model, layers, cut, windows()).items():
        predicted = choices.errors[path][4]
        if kind in INEXACT:
            assert change.scan_error != pytest.approx(predicted, rel=1e-4)
        else:
            assert change.scan_error == pytest.approx(predicted, rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ALL)
def test_keeping_all_states_changes_nothing(kind: str) -> None:
    model, layers, importance = prepared(kind)
    kept = drawn(layers, 6)
    small, _ = fold(model, layers, kept, importance)
    ids = windows(1, 20)
    difference = (small(ids).logits - model(ids).logits).norm() / model(ids).logits.norm()
    assert float(difference) < (0.5 if kind == "jamba" else 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ALL)
def test_cut_models_step_as_they_read(kind: str) -> None:
    model, layers, importance = prepared(kind)
    small, _ = fold(model, layers, drawn(layers, 3), importance)
    ids = windows(1, 9)
    written = small.generate(
        ids, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=[]
    )
    again = ids
    for _ in range(5):
        best = small(again, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        again = torch.cat([again, best], dim=1)
    assert torch.equal(written, again)


def test_the_model_and_the_random_numbers_stay_as_they_were() -> None:
    model = build("mamba2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers, importance = importance_of(model)
    state = torch.get_rng_state()
    small, _ = fold(model, layers, drawn(layers, 2), importance)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.state_size == 6 and small.config.state_size == 2
    theirs = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not theirs & {p.untyped_storage().data_ptr() for p in small.parameters()}


PROGRAM = """
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

ids = torch.load("ids.pt")
results = {}
for kind in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(kind).eval()
    with torch.no_grad():
        logits = model(ids).logits
        written = model.generate(
            ids[:1, :9], max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=[]
        )
    model.save_pretrained(Path("again") / kind)
    results[kind] = logits, written
assert not [name for name in sys.modules if name.split(".")[0] == "gramian"]
torch.save(results, "results.pt")
"""


@pytest.mark.slow
@torch.no_grad()
def test_every_result_is_a_model_of_transformers_alone(tmp_path: Path) -> None:
    ids = windows(2, 23)
    torch.save(ids, tmp_path / "ids.pt")
    expected = {}
    for kind in TRANSFORMERS:
        small, _ = gramian.shrink(build(kind), windows(), keep=0.5)
        small.save_pretrained(tmp_path / kind)
        written = small.generate(
            ids[:1, :9], max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=[]
        )
        expected[kind] = small(ids).logits, written
    subprocess.run([sys.executable, "-c", PROGRAM, *TRANSFORMERS], check=True, cwd=tmp_path)
    for kind, (logits, written) in torch.load(tmp_path / "results.pt").items():
        torch.testing.assert_close(logits, expected[kind][0], rtol=1e-5, atol=1e-5, msg=kind)
        assert torch.equal(written, expected[kind][1])
        assert (tmp_path / "again" / kind / "config.json").is_file()


def test_kimi_linear_is_refused_with_its_reason() -> None:
    config = transformers.KimiLinearConfig(
        **HYBRID,
        **LAYERS,
        linear_head_dim=8,
        linear_num_heads=2,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        num_experts=2,
        num_experts_per_token=1,
        moe_intermediate_size=8,
    )
    model = transformers.KimiLinearForCausalLM(config)
    with pytest.raises(ValueError, match="one size, linear_head_dim, for keys, values and gates"):
        gramian.shrink(model, windows(), keep=0.5)


def test_lightning_attention_is_refused_with_its_reason() -> None:
    config = transformers.MiniMaxConfig(**HYBRID, **LAYERS, head_dim=8, num_local_experts=2)
    with pytest.raises(ValueError, match="one size, head_dim, for keys, values and gates"):
        gramian.shrink(transformers.MiniMaxForCausalLM(config), windows(), keep=0.5)
