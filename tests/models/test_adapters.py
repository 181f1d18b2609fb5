"""peft's adapters on our models: on, off, merged and reloaded, stepped as in parallel."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

pytest.importorskip("peft")

from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForTokenClassification,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from transformers import AutoConfig

from gramian import parameter_groups
from gramian.filters import Filter
from gramian.models import (
    GramianCache,
    GramianConfig,
    GramianForCausalLM,
    GramianForTokenClassification,
    load,
    load_any,
)
from gramian.models.cache import CACHE

MakeModel = Callable[..., GramianForCausalLM]
MakeTokens = Callable[[int, int], Tensor]
MAPS = ["in_proj", "out_proj", "gate_proj", "up_proj", "down_proj", "value_gate"]
RANK, ALPHA = 2, 3


def lora(targets: Any = "all-linear", **options: Any) -> LoraConfig:
    """An adapter that is not zero at the beginning."""
    settings: dict[str, Any] = {"r": RANK, "lora_alpha": ALPHA, "init_lora_weights": False}
    settings |= {"target_modules": targets, "task_type": "CAUSAL_LM"}
    return LoraConfig(**(settings | options))


def adapt(model: nn.Module, *arguments: Any, **options: Any) -> PeftModel:
    torch.manual_seed(4)
    adapted = get_peft_model(model, lora(*arguments, **options)).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data *= 0.3
    return adapted


def by_hand(adapted: PeftModel, make: Callable[[], nn.Module]) -> nn.Module:
    """A model without peft, to whose weights W the products s B A are added."""
    model, scale = make(), ALPHA / RANK
    weights = dict(model.named_parameters())
    tensors = dict(adapted.named_parameters())
    with torch.no_grad():
        for name, down in tensors.items():
            if name.endswith(".lora_A.default.weight"):
                up = tensors[name.replace("lora_A", "lora_B")]
                short = name.removeprefix("base_model.model.")
                weights[short.replace(".lora_A.default", "")].add_(scale * up @ down)
    return model


@torch.no_grad()
def whole(model: Any, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, use_cache=False).logits


@torch.no_grad()
def steps(model: Any, tokens: Tensor) -> Tensor:
    """The logits of a prompt of three tokens, and of a step for every other one."""
    outputs = model(input_ids=tokens[:, :3], use_cache=True)
    made, cache = [outputs.logits], getattr(outputs, CACHE)
    for t in range(3, tokens.shape[1]):
        made.append(
            model(input_ids=tokens[:, t : t + 1], past_key_values=cache, use_cache=True).logits
        )
    return torch.cat(made, 1)


def base(adapted: PeftModel) -> Any:
    return adapted.get_base_model()


def test_an_adapter_is_on_off_merged_and_unmerged(
    make_model: MakeModel, make_tokens: MakeTokens, every_kind: dict[str, Any]
) -> None:
    model, tokens = make_model(**every_kind), make_tokens(2, 7)
    without = whole(model, tokens)
    adapted = adapt(model)
    expected = whole(by_hand(adapted, lambda: make_model(**every_kind)), tokens)
    assert (expected - without).abs().max() > 1e-3

    def agrees(logits: Tensor) -> None:
        for found in (whole(adapted, tokens), steps(adapted, tokens)):
            assert_close(found, logits, rtol=1e-6, atol=1e-6)

    agrees(expected)
    with adapted.disable_adapter():
        agrees(without)
    agrees(expected)
    adapted.merge_adapter(safe_merge=True)
    agrees(expected)
    adapted.unmerge_adapter()
    agrees(expected)
    merged = adapted.merge_and_unload()
    assert type(merged) is GramianForCausalLM
    assert_close(steps(merged, tokens), expected, rtol=1e-6, atol=1e-6)


def test_generation_with_the_cache_is_that_without(
    make_model: MakeModel, make_tokens: MakeTokens, every_kind: dict[str, Any]
) -> None:
    adapted, tokens = adapt(make_model(**every_kind)), make_tokens(1, 7)
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = adapted.generate(input_ids=tokens, use_cache=False, **settings)
    assert torch.equal(adapted.generate(input_ids=tokens, **settings), expected)
    with adapted.disable_adapter():
        other = adapted.generate(input_ids=tokens, use_cache=False, **settings)
        assert torch.equal(adapted.generate(input_ids=tokens, **settings), other)


@pytest.mark.parametrize(
    ("mixers", "safe"),
    [("hyena", False), ("multi_hyena", True), ("softmax_attention", False), ("s6", True)],
)
def test_merging_while_compiled_decoding_is_on(
    make_model: MakeModel, make_tokens: MakeTokens, mixers: str, safe: bool
) -> None:
    """Packed copies of the weights follow a merge, its undoing, and the switch of an adapter."""
    options = {"mixers": mixers, "filter": {"type": "modal", "orders": 2}, "initializer_range": 0.2}
    model, tokens = make_model(**options).float(), make_tokens(2, 10)
    without = whole(model, tokens)
    adapted = adapt(model, MAPS)
    expected = whole(adapted, tokens)
    base(adapted).compile_decoding(backend="eager")

    def agrees(logits: Tensor, found: Any = adapted) -> None:
        assert_close(steps(found, tokens), logits, rtol=2e-4, atol=2e-4)

    agrees(expected)
    adapted.merge_adapter(safe_merge=safe)
    agrees(expected)
    adapted.unmerge_adapter()
    with adapted.disable_adapter():
        agrees(without)
    agrees(expected)
    merged = adapted.merge_and_unload(safe_merge=safe)
    agrees(expected, merged)
    assert merged.packing is not None
    merged.compile_decoding(False)
    agrees(expected, merged)


def test_gradients_reach_the_adapter_alone(
    make_model: MakeModel, make_tokens: MakeTokens, kind: dict[str, Any]
) -> None:
    adapted, tokens = adapt(make_model(**kind)).train(), make_tokens(2, 10)
    adapted(input_ids=tokens, labels=tokens).loss.backward()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None and not parameter.requires_grad, name
    groups = parameter_groups(adapted, lr=1e-3, weight_decay=0.1)
    trained = {id(p) for group in groups for p in group["params"]}
    assert trained == {id(p) for n, p in adapted.named_parameters() if "lora_" in n}


def test_filters_stay_in_single_precision(make_model: MakeModel, make_tokens: MakeTokens) -> None:
    model, tokens = make_model(mixers="hyena").to(torch.bfloat16), make_tokens(2, 10)
    adapted = adapt(model)
    filters = [part for part in adapted.modules() if isinstance(part, Filter)]
    names = [name for one in filters for name, _ in one.named_parameters()]
    assert any("lora_" in name for name in names)  # all-linear reaches the implicit filters too
    for moved in (adapted, adapted.to(torch.bfloat16)):
        for one in filters:
            assert {p.dtype for p in one.parameters()} == {torch.float32}
        # eight bits of precision, in another order of operations
        expected = whole(moved, tokens).float()
        assert (steps(moved, tokens).float() - expected).norm() < 0.1 * expected.norm()
    merged = adapted.merge_and_unload()
    assert {p.dtype for n, p in merged.named_parameters() if "filter" in n} == {torch.float32}
    assert merged.lm_head.weight.dtype == torch.bfloat16


@torch.no_grad()
def test_a_cache_notices_an_adapter_of_its_filters(
    make_model: MakeModel, make_tokens: MakeTokens, tmp_path: Path
) -> None:
    model, tokens = make_model(mixers="hyena"), make_tokens(2, 10)
    adapted = adapt(model)
    outputs = adapted(input_ids=tokens, use_cache=True)
    cache: GramianCache = getattr(outputs, CACHE)
    cache.save(tmp_path / "state", base(adapted))
    GramianCache.load(tmp_path / "state", base(adapted))
    with adapted.disable_adapter():
        with pytest.raises(ValueError, match="filters have changed since this cache was filled"):
            adapted(input_ids=tokens[:, :1], past_key_values=cache, use_cache=True)
        with pytest.raises(ValueError, match="is of another model, or other weights"):
            GramianCache.load(tmp_path / "state", base(adapted))
    adapted(input_ids=tokens[:, :1], past_key_values=cache, use_cache=True)


@pytest.fixture
def saved(make_config: Callable[..., GramianConfig], tmp_path: Path) -> Callable[..., Path]:
    """Saves a model in single precision and an adapter of it, and returns the adapter's folder."""

    def save(targets: Any = "all-linear", **options: Any) -> Path:
        torch.manual_seed(7)
        model = GramianForCausalLM(make_config(**({"initializer_range": 0.2} | options))).eval()
        model.save_pretrained(tmp_path / "base")
        adapted = adapt(GramianForCausalLM.from_pretrained(tmp_path / "base"), targets)
        adapted.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return save


def test_saved_and_loaded_in_every_way(
    saved: Callable[..., Path], make_tokens: MakeTokens, some_kind: dict[str, Any]
) -> None:
    folder, tokens = saved(**some_kind), make_tokens(2, 10)
    model = GramianForCausalLM.from_pretrained(folder.parent / "base").eval()
    without = whole(model, tokens)
    unmerged = [
        PeftModel.from_pretrained(model, folder).eval(),
        AutoPeftModelForCausalLM.from_pretrained(folder).eval(),
        GramianForCausalLM.from_pretrained(folder).eval(),  # transformers reads adapters itself
    ]
    expected = whole(unmerged[0], tokens)
    assert (expected - without).abs().max() > 1e-2
    for found in (*unmerged, load(folder), load_any(folder)):
        assert_close(whole(found, tokens), expected, rtol=2e-3, atol=2e-3)
        assert_close(steps(found, tokens), expected, rtol=2e-3, atol=2e-3)
    merged = load(folder)
    assert type(merged) is GramianForCausalLM and not merged.training
    reference = GramianForCausalLM.from_pretrained(folder.parent / "base")
    trained = {name for name, p in reference.named_parameters() if p.requires_grad}
    assert {name for name, p in merged.named_parameters() if p.requires_grad} == trained
    merged.save_pretrained(folder.parent / "merged")
    assert_close(whole(load(folder.parent / "merged"), tokens), whole(merged, tokens))
    half = load(folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_a_classifier_on_the_body_of_a_language_model(
    saved: Callable[..., Path], make_tokens: MakeTokens, tmp_path: Path
) -> None:
    """Its new head is a part of the adapter; config.json tells the classes."""
    saved()
    torch.manual_seed(1)
    model = GramianForTokenClassification.from_pretrained(tmp_path / "base", num_labels=3)
    adapted = adapt(model, MAPS, task_type="TOKEN_CLS")
    adapted.save_pretrained(tmp_path / "tagger")
    with pytest.raises(ValueError, match="is for TOKEN_CLS and its base model is a GramianForCaus"):
        load_any(tmp_path / "tagger")
    model.config.architectures = ["GramianForTokenClassification"]
    model.config.save_pretrained(tmp_path / "tagger")
    tokens = make_tokens(2, 10)
    expected = whole(adapted, tokens)
    found = load_any(tmp_path / "tagger")
    assert type(found) is GramianForTokenClassification and found.config.num_labels == 3
    assert_close(whole(found, tokens), expected, rtol=2e-3, atol=2e-3)
    assert AutoConfig.from_pretrained(tmp_path / "tagger").num_labels == 3
    again = AutoPeftModelForTokenClassification.from_pretrained(tmp_path / "tagger", num_labels=3)
    assert_close(whole(again.eval(), tokens), expected)
    with pytest.raises(ValueError, match="holds a GramianForTokenClassification; a GramianForCaus"):
        load(tmp_path / "tagger")
    tensors = load_file(tmp_path / "tagger/adapter_model.safetensors")
    kept = {name: value for name, value in tensors.items() if "score" not in name}
    save_file(kept, tmp_path / "tagger/adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"must hold score\.(weight|bias), which its base model"):
        load_any(tmp_path / "tagger")


def change(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values), encoding="utf-8")


def test_an_adapter_that_does_not_fit_is_refused(saved: Callable[..., Path]) -> None:
    folder = saved(MAPS)
    tensors = load_file(folder / "adapter_model.safetensors")
    first = min(tensors)
    wrong: list[tuple[dict[str, Tensor], str]] = [
        ({name: value for name, value in tensors.items() if name != first}, "does not in model"),
        (tensors | {"base_model.model.other.lora_A.weight": torch.ones(2, 3)}, "in other.lora_A"),
        (tensors | {first: torch.ones(1, 2)}, "must fit its base model; it does not: .*size mism"),
    ]
    for changed, message in wrong:
        save_file(changed, folder / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=message) as caught:
            load(folder)
        assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    save_file(tensors, folder / "adapter_model.safetensors")
    change(folder, target_modules=["absent"])
    with pytest.raises(ValueError, match="must fit its base model; it does not: Target modules"):
        load(folder)
    change(folder, peft_type="IA3")
    with pytest.raises(ValueError, match=r"must be one of LoRA; got 'IA3'\."):
        load(folder)
    change(folder, peft_type="LORA", base_model_name_or_path="/absent")
    with pytest.raises(FileNotFoundError, match="it names the base model /absent, which is miss"):
        load_any(folder)
    change(folder, base_model_name_or_path=str(folder))
    with pytest.raises(ValueError, match="must name another folder as its base model"):
        load_any(folder)
    shutil.copy(folder.parent / "base" / "model.safetensors", folder)
    with pytest.raises(ValueError, match="must hold a model or an adapter; it holds both"):
        load(folder)
    (folder / "model.safetensors").unlink()
    (folder / "adapter_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="must hold JSON"):
        load(folder)


def test_a_tied_embedding_is_not_merged(
    saved: Callable[..., Path], make_tokens: MakeTokens
) -> None:
    folder = saved(["lm_head"], tie_word_embeddings=True)
    with pytest.raises(ValueError, match="cannot be merged: lm_head must stay as it is"):
        load(folder)
    folder, tokens = saved(["lm_head"], tie_word_embeddings=False), make_tokens(2, 9)
    expected = whole(AutoPeftModelForCausalLM.from_pretrained(folder).eval(), tokens)
    assert_close(whole(load(folder), tokens), expected, rtol=1e-3, atol=1e-3)
