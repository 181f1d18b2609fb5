"""Quantized weights: in memory, in folders, and where they cannot be used."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, QuantoConfig, TorchAoConfig

from gramian import distill
from gramian.checking import check
from gramian.export import export_model
from gramian.models import ByteTokenizer, GramianConfig, GramianForCausalLM, load, load_any
from gramian.ops.packed import Linear

MakeConfig = Callable[..., GramianConfig]
MakeTokens = Callable[[int, int], torch.Tensor]

MIXERS: list[list[str]] = [["hyena", "softmax_attention"], ["s6", "gated_delta_net"]]


@pytest.fixture
def base(make_config: MakeConfig, tmp_path: Path) -> Path:
    """The folder of a hybrid that is not quantized."""
    return save(make_config(mixers=MIXERS[0]), tmp_path / "base")


def save(config: GramianConfig, folder: Path) -> Path:
    torch.manual_seed(3)
    GramianForCausalLM(config).save_pretrained(folder)
    return folder


def torchao_config(dynamic: bool = False) -> TorchAoConfig:
    quantization = pytest.importorskip("torchao.quantization")
    name = "Int8DynamicActivationInt8WeightConfig" if dynamic else "Int8WeightOnlyConfig"
    return TorchAoConfig(getattr(quantization, name)())


def quantized(base: Path, folder: Path, dynamic: bool = False) -> GramianForCausalLM:
    """The model in `base`, whose weights torchao quantizes as they are read, and saved again."""
    config = torchao_config(dynamic)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config).eval()
    model.save_pretrained(folder)
    assert isinstance(model, GramianForCausalLM)
    return model


def by_quanto(base: Path, folder: Path, **options: Any) -> nn.Module:
    """The model in `base`, quantized and saved by optimum-quanto."""
    quanto = pytest.importorskip("optimum.quanto")
    pytest.importorskip("accelerate")
    wrapped = quanto.QuantizedModelForCausalLM.quantize(
        GramianForCausalLM.from_pretrained(base), weights=quanto.qint8, **options
    )
    wrapped.save_pretrained(folder)
    model: nn.Module = wrapped._wrapped
    return model.eval()


def linear_maps(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}


def expand(model: GramianForCausalLM) -> GramianForCausalLM:
    """A model of plain weights, which are those that the integers and scales stand for."""
    plain = GramianForCausalLM(model.config).eval()
    values = {}
    for name, tensor in model.state_dict().items():
        values[name] = tensor.dequantize() if hasattr(tensor, "qdata") else tensor
    plain.load_state_dict(values)
    return plain


@torch.no_grad()
def logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = model(tokens).logits
    return result


@pytest.mark.parametrize("mixers", MIXERS, ids="-".join)
def test_weights_of_eight_bits(
    make_config: MakeConfig, make_tokens: MakeTokens, tmp_path: Path, mixers: list[str]
) -> None:
    base = save(make_config(mixers=mixers, hidden_size=36), tmp_path / "base")
    model = quantized(base, tmp_path / "small")
    kept = {name for name, part in linear_maps(model).items() if type(part.weight) is nn.Parameter}
    assert all(name == "lm_head" or ".filter." in name for name in kept), kept
    tokens = make_tokens(2, 20)
    computed = logits(model, tokens)
    assert_close(computed, logits(expand(model), tokens), atol=1e-4, rtol=1e-4)
    exact = logits(load(base), tokens)
    assert 1e-5 < (computed - exact).norm() / exact.norm() < 0.1
    for again in (
        load(tmp_path / "small"),
        load_any(tmp_path / "small"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "small"),
    ):
        assert not again.training
        assert again.lm_head.weight is again.model.embed_tokens.weight
        assert torch.equal(logits(again, tokens), computed)
        again.save_pretrained(tmp_path / "again")  # as what was read, a second time
        assert torch.equal(logits(load(tmp_path / "again"), tokens), computed)


def test_activations_of_eight_bits(base: Path, make_tokens: MakeTokens, tmp_path: Path) -> None:
    model, tokens = quantized(base, tmp_path / "small", dynamic=True), make_tokens(2, 20)
    exact = logits(load(base), tokens)
    computed = logits(model, tokens)
    assert 1e-5 < (computed - exact).norm() / exact.norm() < 0.1
    assert torch.equal(logits(load(tmp_path / "small"), tokens), computed)


@pytest.mark.parametrize("packed", [False, True])
def test_generation_uses_the_quantized_weights(
    base: Path, make_tokens: MakeTokens, tmp_path: Path, packed: bool
) -> None:
    model, tokens = quantized(base, tmp_path / "small"), make_tokens(2, 9)
    model.compile_decoding(packed, **({"backend": "eager"} if packed else {}))
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found = model.generate(tokens, output_logits=True, return_dict_in_generate=True, **settings)
    computed = logits(model, found.sequences[:, :-1])[:, tokens.shape[1] - 1 :]
    assert_close(torch.stack(found.logits, 1), computed, atol=1e-4, rtol=1e-4)
    if packed:  # the head alone is not quantized
        assert model.packing is not None
        assert len(model.packing) == 1


def test_what_quantize_changes_in_place_is_not_saved(
    base: Path, make_tokens: MakeTokens, tmp_path: Path
) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model, tokens = load(base), make_tokens(2, 20)
    exact = logits(model, tokens)

    def chosen(part: nn.Module, name: str) -> bool:
        return isinstance(part, Linear) and name != "lm_head"

    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=chosen)
    assert 1e-5 < (logits(model, tokens) - exact).norm() / exact.norm() < 0.1
    with pytest.raises(ValueError, match="load it with quantization_config=TorchAoConfig"):
        model.save_pretrained(tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_a_folder_that_lacks_something_is_refused(base: Path, tmp_path: Path) -> None:
    quantized(base, tmp_path / "small")
    file = tmp_path / "small" / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    name = "model.layers.0.mixer.in_proj"
    integers = tensors[f"{name}._weight_qdata"]

    def refuses(changed: dict[str, torch.Tensor | None], message: str) -> None:
        values = {key: value for key, value in (tensors | changed).items() if value is not None}
        save_file(values, file, metadata=metadata)
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "small")

    refuses({f"{name}._weight_scale": None}, rf"1 missing \({name}.weight\)")
    refuses({f"{name}._weight_qdata": integers[:5].clone()}, rf"{name}.weight is \(5, 12\), and")
    refuses({"model.norm.weight": None}, r"1 missing \(model.norm.weight\)")
    refuses({"model.norm.weight": torch.ones(3)}, r"model.norm.weight is \(3,\), and \(12,\) is")
    refuses({"other.weight": torch.ones(3)}, r"1 not of this model \(other.weight\)")
    save_file(tensors, file, metadata=metadata)
    load(tmp_path / "small")
    save_file(tensors, file)  # without the names of the parts
    with pytest.raises(ValueError, match=rf"missing \({name}.weight"):
        load(tmp_path / "small")


def test_the_package_of_the_method_is_named(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = base / "config.json"
    values = json.loads(file.read_text(encoding="utf-8"))

    def describe(method: str) -> None:
        file.write_text(json.dumps(values | {"quantization_config": {"quant_method": method}}))

    describe("gptq")
    with pytest.raises(ValueError, match="quantized by gptq; torchao and quanto can be read"):
        load(base)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for method, package in (("torchao", "torchao"), ("quanto", "optimum-quanto")):
        describe(method)
        with pytest.raises(ImportError, match=f"base are quantized: pip install {package}"):
            load(base)
    describe("torchao")
    for config in (None, GramianConfig.from_pretrained(base)):  # an Auto class reads it before
        with pytest.raises(ImportError, match="base are quantized: pip install torchao"):
            GramianForCausalLM.from_pretrained(base, config=config)


def test_folders_of_quanto(base: Path, make_tokens: MakeTokens, tmp_path: Path) -> None:
    tokens, folder = make_tokens(2, 20), tmp_path / "small"
    model = by_quanto(base, folder, exclude=["lm_head", "*.filter.*"])
    computed, exact = logits(model, tokens), logits(load(base), tokens)
    assert 1e-5 < (computed - exact).norm() / exact.norm() < 0.1
    again = load(folder)
    assert torch.equal(logits(again, tokens), computed)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    again.compile_decoding(backend="eager")
    assert torch.equal(
        again.generate(tokens, **settings), again.generate(tokens, use_cache=False, **settings)
    )
    with pytest.raises(ValueError, match=r"load them with gramian\.models\.load or optimum"):
        AutoModelForCausalLM.from_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensors[name] for name in tensors if "0.mlp.up_proj" not in name}, file)
    with pytest.raises(ValueError, match=r"1 missing \(model.layers.0.mlp.up_proj.weight\)"):
        load(folder)
    (folder / "quanto_qmap.json").unlink()
    with pytest.raises(ValueError, match=r"its quanto_qmap\.json is missing: save the model with"):
        load(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_saving_what_quanto_quantizes_in_place(
    make_config: MakeConfig, make_tokens: MakeTokens, tmp_path: Path, tied: bool
) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    base = save(make_config(tie_word_embeddings=tied), tmp_path / "base")
    model, tokens = load(base), make_tokens(2, 20)
    quanto.quantize(model, weights=quanto.qint8)  # the head too, which is then a matrix of its own
    quanto.freeze(model)
    computed = logits(model, tokens)
    for number in range(2):
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        assert torch.equal(logits(load(folder), tokens), computed)
        model = load(folder)


def test_quanto_of_transformers(base: Path, make_tokens: MakeTokens) -> None:
    pytest.importorskip("optimum.quanto")
    pytest.importorskip("accelerate")
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=QuantoConfig(weights="int8")
    )
    kinds = {name: type(part).__name__ for name, part in linear_maps(model).items()}
    assert kinds.pop("lm_head") == "Linear"
    assert {name for name, kind in kinds.items() if kind != "QLinear"} == {
        name for name in kinds if ".filter." in name
    }
    tokens = make_tokens(2, 20)
    exact = logits(load(base), tokens)
    assert 1e-5 < (logits(model, tokens) - exact).norm() / exact.norm() < 0.1


def test_distilling_keeps_the_weights_quantized(
    base: Path, make_tokens: MakeTokens, tmp_path: Path
) -> None:
    model, tokens = quantized(base, tmp_path / "small"), make_tokens(2, 20)
    reduced, _ = distill(load(tmp_path / "small"), order=20)
    reduced.save_pretrained(tmp_path / "reduced")
    again = load(tmp_path / "reduced")
    assert (again.config.filter_of(0) or {}).get("type") == "modal"
    weight = again.get_parameter("model.layers.0.mixer.in_proj.weight")
    assert type(weight) is not nn.Parameter
    assert torch.equal(logits(again, tokens), logits(reduced, tokens))
    assert_close(logits(again, tokens), logits(model, tokens), atol=5e-2, rtol=5e-2)


def test_some_tools_need_weights_that_are_not_quantized(base: Path, tmp_path: Path) -> None:
    model = quantized(base, tmp_path / "small")
    with pytest.raises(ValueError, match="got a quantized model: check the model that was quant"):
        check(model)
    with pytest.raises(ValueError, match="got a quantized model: quantize the exported ONNX"):
        export_model(model, tmp_path / "exported")


def test_an_adapter_of_a_quantized_base_is_refused(base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    quantized(base, tmp_path / "small")
    lora = peft.LoraConfig(r=2, target_modules=["in_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(load(base), lora).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(values | {"base_model_name_or_path": str(tmp_path / "small")}))
    with pytest.raises(ValueError, match="weights of its base model are quantized, and would"):
        load(tmp_path / "adapter")


def test_a_quantized_model_is_not_trained(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    from gramian.training import parse_config, train
    from gramian.training.configuration import ConfigError

    quantized(base, tmp_path / "small")
    config = parse_config(
        {
            "output": str(tmp_path / "run"),
            "task": {"name": "mqar", "length": 16, "pairs": 2, "vocab_size": 32},
            "model": {"path": str(tmp_path / "small")},
            "optimization": {"steps": 1},
        }
    )
    with pytest.raises(ConfigError, match=r"that are not quantized; those in .*small are: train"):
        train(config)


def test_perplexity_before_and_after(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """What `gramian evaluate` prints is computed by the integers, and by nothing else."""
    pytest.importorskip("typer")
    pytest.importorskip("datasets")
    from gramian import cli

    base = save(make_config(vocab_size=259, pad_token_id=258), tmp_path / "base")
    model = quantized(base, tmp_path / "small")
    for folder in (base, tmp_path / "small"):
        ByteTokenizer().save_pretrained(folder)
    text = "The memory of a model is its state. " * 2
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    command = "gramian evaluate small --against base --text text.txt --window 128 --json"
    monkeypatch.setattr(sys, "argv", command.split())
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capfd.readouterr()
    assert ended.value.code == 0, err
    rows = json.loads(out)["comparisons"]
    (row,) = (row for row in rows if row["metric"] == "loss")
    ids = torch.tensor([list(text.encode())])
    with torch.no_grad():
        after, before = (float(one(ids, labels=ids).loss) for one in (expand(model), load(base)))
    assert row["after"] == pytest.approx(after, abs=1e-5)
    assert row["before"] == pytest.approx(before, abs=1e-5)
    assert after != pytest.approx(before, abs=1e-4)


def test_quantize_dynamic_of_torch_is_refused(base: Path) -> None:
    """It replaces layers whose class is `nn.Linear` itself, and would leave these as they are."""
    model = load(base)
    with (
        pytest.warns(DeprecationWarning, match="torch.ao.quantization is deprecated"),
        pytest.raises(TypeError, match=r"use torchao\.quantization\.quantize_"),
    ):
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not hasattr(Linear(2, 2), "qconfig")
