"""Attention that sees a window computes what an explicit softmax over that window computes."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import transformers
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from gramian.analysis import (
    RecordedOperator,
    analyze,
    record_operators,
    window_attention,
    window_maps,
)
from gramian.analysis._operators import _one_at_a_time
from gramian.mixers import SoftmaxAttention
from gramian.models import GramianConfig, GramianForCausalLM
from tests.analysis.test_side_effects import compiles

LENGTH, WINDOW, SINKS = 23, 5, 2
IDS = torch.randint(3, 64, (1, LENGTH), generator=torch.Generator().manual_seed(1))
COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "llama": (GROUPED, "model.layers.1.self_attn"),
    "gpt2": ({"attn_pdrop": 0.0}, "transformer.h.1.attn"),
    "jamba": (
        {
            "num_key_value_heads": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 5,
            "mamba_dt_rank": 4,
            "num_experts": 2,
            "use_mamba_kernels": False,
        },
        "model.layers.1.self_attn",
    ),
}


def model_of(kind: str, **changes: Any) -> Any:
    config = transformers.AutoConfig.for_model(kind, **(COMMON | changes))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                random = torch.randn(weight.shape, generator=generator)
                weight.copy_(random * 2 * weight.shape[-1] ** -0.5)
    return model


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(IDS, use_cache=False).logits
    return logits


def heads_of(x: Tensor, count: int) -> Tensor:
    return x[0].unflatten(-1, (count, -1)).transpose(0, 1)


def explicit(kind: str, module: Any, x: Tensor, windowed: Sequence[int], rotary: Any) -> Tensor:
    """The output of an attention module, one query at a time, with a window for some heads."""
    if kind == "gpt2":
        q, k, v = (heads_of(part, 4) for part in module.c_attn(x).split(32, -1))
    else:
        q = heads_of(module.q_proj(x), 4)
        k, v = (heads_of(f(x), 2) for f in (module.k_proj, module.v_proj))
        if kind == "llama":
            q, k = (part[0] for part in apply_rotary_pos_emb(q[None], k[None], *rotary))
        k, v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
    y = torch.zeros_like(q)
    for head in range(4):
        for t in range(LENGTH):
            seen = list(range(t + 1))
            if head in windowed:
                seen = [s for s in seen if s < SINKS or t - s < WINDOW]
            weights = (k[head, seen] @ q[head, t] / math.sqrt(8)).softmax(0)
            y[head, t] = weights @ v[head, seen]
    joined = y.transpose(0, 1).flatten(1)[None]
    out: Tensor = module.c_proj(joined) if kind == "gpt2" else module.o_proj(joined)
    return out


@pytest.mark.parametrize("heads", [[0, 3], [1], [], None], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_windowed_heads_are_those_of_an_explicit_softmax(
    kind: str, heads: list[int] | None
) -> None:
    changes, path = KINDS[kind]
    model = model_of(kind, **changes)
    module = model.get_submodule(path)
    seen: list[tuple[Tensor, Tensor, Any]] = []

    def keep(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        seen.append((x, output[0], kwargs.get("position_embeddings")))

    before = logits_of(model)
    hook = module.register_forward_hook(keep, with_kwargs=True)
    with window_attention(model, {path: heads}, WINDOW, SINKS):
        narrow = logits_of(model)
    hook.remove()
    ((x, output, rotary),) = seen
    with torch.no_grad():
        expected = explicit(kind, module, x, range(4) if heads is None else heads, rotary)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    changed = not torch.allclose(narrow, before, atol=1e-4)
    assert changed == (heads != [])
    torch.testing.assert_close(logits_of(model), before, rtol=0, atol=0)


def test_all_layers_with_a_window_are_a_model_with_a_sliding_window() -> None:
    llama = model_of("llama", **GROUPED)
    sliding = model_of("mistral", **GROUPED, sliding_window=WINDOW)
    sliding.load_state_dict(llama.state_dict())
    paths = [f"model.layers.{k}.self_attn" for k in range(2)]
    with window_attention(llama, dict.fromkeys(paths), WINDOW):
        narrow = logits_of(llama)
    torch.testing.assert_close(narrow, logits_of(sliding), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(narrow, logits_of(llama), atol=1e-2)


def gramian_model(**changes: Any) -> GramianForCausalLM:
    torch.manual_seed(3)
    config = GramianConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_heads=4,
        mixers=["softmax_attention", "linear_attention"],
        **changes,
    )
    return GramianForCausalLM(config).eval()


@pytest.mark.parametrize("own", [None, 9])
def test_mixers_of_gramian_have_windows(own: int | None) -> None:
    torch.manual_seed(0)
    mixer = SoftmaxAttention(16, heads=4, kv_heads=2, window=own)
    x = torch.randn(1, LENGTH, 16)
    model = torch.nn.Sequential(mixer)
    with torch.no_grad():
        maps = mixer.operator(x).matrix(LENGTH)  # (1, 4, L, L)
        narrow = maps.clone()
        narrow[:, [1, 2]] = window_maps(maps, WINDOW, SINKS)[:, [1, 2]]
        _, _, v = mixer.project(x, torch.arange(LENGTH)[None])
        expected = mixer.merge(narrow @ v.repeat_interleave(2, 1))
        before = model(x)
        with window_attention(model, {"0": [1, 2]}, WINDOW, SINKS):
            torch.testing.assert_close(model(x), expected)
        with window_attention(model, {"0": None}, LENGTH):
            torch.testing.assert_close(model(x), before)
        torch.testing.assert_close(model(x), before, rtol=0, atol=0)
        same = SoftmaxAttention(16, heads=4, kv_heads=2, window=WINDOW)
        same.load_state_dict(mixer.state_dict())
        with window_attention(model, {"0": None}, WINDOW):
            torch.testing.assert_close(model(x), same(x))


def test_values_of_mixers_are_those_that_the_maps_mix() -> None:
    torch.manual_seed(0)
    mixer = SoftmaxAttention(16, heads=4, kv_heads=2)
    x = torch.randn(LENGTH, 16)
    found: list[Tensor] = []

    def visit(recorded: RecordedOperator) -> None:
        assert recorded.values is not None
        maps = recorded.system(slice(None)).matrix(LENGTH)  # type: ignore[union-attr]
        found.append(mixer.merge(maps.reshape(1, 4, LENGTH, LENGTH) @ recorded.values()[None]))

    with torch.no_grad():
        record_operators(torch.nn.Sequential(mixer), x, visit)
        torch.testing.assert_close(found, [mixer(x[None])])


class Multihead(torch.nn.Module):
    """Attention of torch, whose maps are read, but whose mask is not within reach."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        ahead = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        return self.attention(x, x, x, attn_mask=ahead, need_weights=False)[0]  # type: ignore[no-any-return]


def test_attention_that_cannot_have_a_window_has_no_values() -> None:
    torch.manual_seed(0)
    found: list[RecordedOperator] = []
    record_operators(Multihead(), torch.randn(LENGTH, 16), found.append)
    assert [(x.kind, x.values) for x in found] == [("attention", None)]


def test_compiled_models_have_windows_and_analyses_wait() -> None:
    model = model_of("llama", **GROUPED)
    paths = dict.fromkeys(f"model.layers.{k}.self_attn" for k in range(2))
    with window_attention(model, paths, WINDOW):
        expected = logits_of(model)
    compiled = torch.compile(model, backend="eager")
    before = logits_of(compiled)
    entered: list[bool] = []

    def enter() -> None:
        entered.append(_one_at_a_time.acquire(blocking=False))
        if entered[-1]:
            _one_at_a_time.release()

    assert compiles()
    with window_attention(model, paths, WINDOW):
        assert not compiles()
        torch.testing.assert_close(logits_of(compiled), expected)
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    enter()
    assert entered == [False, True]
    assert compiles()
    torch.testing.assert_close(logits_of(compiled), before)


def test_maps_of_a_window_are_a_softmax_over_it() -> None:
    torch.manual_seed(0)
    scores = 4 * torch.randn(3, LENGTH, LENGTH)
    index = torch.arange(LENGTH)
    ahead = index > index[:, None]
    outside = ahead | ((index[:, None] - index >= WINDOW) & (index >= SINKS))
    maps = scores.masked_fill(ahead, -torch.inf).softmax(-1)
    expected = scores.masked_fill(outside, -torch.inf).softmax(-1)
    torch.testing.assert_close(window_maps(maps, WINDOW, SINKS), expected)
    # a logit of no token, as in attention with a sink parameter
    scores, bias = scores.double(), torch.randn(3, LENGTH, 1).double()
    maps, expected = (
        torch.cat([scores.masked_fill(hidden, -torch.inf), bias], -1).softmax(-1)[..., :-1]
        for hidden in (ahead, outside)
    )
    torch.testing.assert_close(window_maps(maps, WINDOW, SINKS), expected)
    torch.testing.assert_close(window_maps(maps, LENGTH), maps)


def state_of(model: Any) -> Any:
    place = __import__(type(model).__module__, fromlist=[""])
    modules = {
        name: (
            module.training,
            sorted(vars(module)),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
        )
        for name, module in model.named_modules()
    }
    config = getattr(model, "config", None)
    chosen = getattr(config, "_attn_implementation", None), getattr(config, "use_cache", None)
    return modules, dict(vars(place)), chosen


@pytest.mark.parametrize("kind", [*KINDS, "gramian"])
def test_the_model_is_as_before_also_after_an_exception(kind: str) -> None:
    path = KINDS[kind][1] if kind in KINDS else "model.layers.0.mixer"
    model: Any = model_of(kind, **KINDS[kind][0]) if kind in KINDS else gramian_model()
    if kind == "gramian":
        (path,) = [n for n, m in model.named_modules() if isinstance(m, SoftmaxAttention)]
    model.train()
    before = state_of(model)
    with window_attention(model, {path: None}, WINDOW):
        assert state_of(model) != before
        logits_of(model)
    assert state_of(model) == before
    model.get_submodule(path).register_forward_hook(stop)
    with pytest.raises(RuntimeError, match="middle"), window_attention(model, {path: [0]}, WINDOW):
        logits_of(model)
    model.get_submodule(path)._forward_hooks.clear()
    assert state_of(model) == before


def stop(*_: Any) -> None:
    raise RuntimeError("in the middle")


def test_what_cannot_have_a_window_is_refused_in_a_sentence() -> None:
    model = model_of("llama", **GROUPED)
    path = "model.layers.0.self_attn"
    cases: list[tuple[dict[str, Any], int, int, str]] = [
        ({path: None}, 0, 0, "window must be at least 1 token; got 0."),
        ({path: None}, 3, -1, "sinks must be at least 0 tokens; got -1."),
        ({"model.layers.7": None}, 3, 0, "LlamaForCausalLM has no module model.layers.7."),
        ({path: [4]}, 3, 0, f"{path} has 4 heads; got the number 4."),
        ({"model.layers.0.mlp": None}, 3, 0, "LlamaMLP calls no attention function"),
    ]
    for heads, window, sinks, message in cases:
        with (
            pytest.raises(ValueError, match=message) as caught,
            window_attention(model, heads, window, sinks),
        ):
            logits_of(model)
        assert "\n" not in str(caught.value)
    with pytest.raises(TypeError), window_attention("model", {}, 3):  # type: ignore[arg-type]
        pass
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS[:, :4], past_key_values=cache, use_cache=True)
    with (
        pytest.raises(ValueError, match="whole sequences, without a cache; got 2 queries and 6"),
        window_attention(model, {path: None}, 3),
        torch.no_grad(),
    ):
        model(IDS[:, 4:6], past_key_values=cache, use_cache=True)
    own = gramian_model()
    (path,) = [n for n, m in own.named_modules() if isinstance(m, SoftmaxAttention)]
    mask = torch.ones_like(IDS)
    mask[:, 0] = 0
    with (
        pytest.raises(ValueError, match="without padding"),
        window_attention(own, {path: None}, 3),
        torch.no_grad(),
    ):
        own(IDS, attention_mask=mask)


@pytest.mark.parametrize("kind", [*KINDS, "gramian"])
def test_operators_are_those_that_are_analyzed_with_their_values(kind: str) -> None:
    model: Any = model_of(kind, **KINDS[kind][0]) if kind in KINDS else gramian_model()
    report = analyze(model, IDS, positions=4)
    sizes: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}

    def visit(recorded: RecordedOperator) -> None:
        from gramian import effective_state_size

        system = recorded.system(slice(None))
        found = effective_state_size(system, list(report.positions), horizon=LENGTH)  # type: ignore[arg-type]
        sizes[recorded.name] = found.reshape(-1, 4)
        if recorded.values is not None:
            values[recorded.name] = recorded.values()

    unread = record_operators(model, IDS, visit)
    assert unread == report.unread
    assert [*sizes] == [layer.name for layer in report.layers]
    for layer in report.layers:
        torch.testing.assert_close(sizes[layer.name].float(), layer.ess, rtol=1e-4, atol=1e-4)
    attention = [layer.name for layer in report.layers if layer.kind == "attention"]
    assert [*values] == attention
    assert all(v.shape[:2] == (4, LENGTH) for v in values.values())


def test_values_are_those_that_the_maps_mix() -> None:
    model = model_of("llama", **GROUPED)
    joined: list[Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: joined.append(args[0]))
    outputs: list[Tensor] = []

    def visit(recorded: RecordedOperator) -> None:
        assert recorded.values is not None
        maps = recorded.system(slice(None)).matrix(LENGTH)  # type: ignore[union-attr]
        outputs.append((maps @ recorded.values()).transpose(0, 1).flatten(1)[None])

    record_operators(model, IDS, visit)
    torch.testing.assert_close(outputs, joined[-2:])
    with pytest.raises(ValueError, match="needs a tokenizer"):
        record_operators(model, "text", visit)
    with pytest.raises(ValueError, match="no layer that is known to mix tokens"):
        record_operators(torch.nn.Linear(3, 3), torch.randn(4, 3), visit)
