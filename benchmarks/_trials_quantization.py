"""Trials of weights of 8 bits, made by torchao, optimum-quanto and onnxruntime."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from benchmarks._trials import Models, compare, refused, trial

TEXT = "The import statement finds a module, and binds its name. Names are bound to objects."
TOLERANCE = 0.1  # of the largest logit


def _logits(models: Models, model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**models.tokenizer()(TEXT, return_tensors="pt")).logits
    return found


def _perplexities(models: Models, folder: Path) -> str:
    from gramian.evaluation import perplexity
    from gramian.models import load

    before, after = (
        perplexity(model, models.tokenizer(), TEXT * 4, window=128).perplexity
        for model in (models.load("distilled"), load(folder))
    )
    return f"perplexity {before:.3f} before and {after:.3f} after"


def _of_torchao(models: Models, settings: str) -> str:
    import torchao.quantization
    from transformers import AutoModelForCausalLM, TorchAoConfig

    from gramian.models import load

    config = TorchAoConfig(getattr(torchao.quantization, settings)())
    folder = models.scratch / "small"
    model = AutoModelForCausalLM.from_pretrained(
        models.path("distilled"), quantization_config=config
    )
    model.save_pretrained(folder)
    found = _logits(models, model)
    error = compare(found, _logits(models, models.load("distilled")), TOLERANCE)
    for again in (load(folder), AutoModelForCausalLM.from_pretrained(folder)):
        assert torch.equal(_logits(models, again), found)
    sizes = [
        (path / "model.safetensors").stat().st_size for path in (models.path("distilled"), folder)
    ]
    return (
        f"Relative difference of logits {error:.0e}, {_perplexities(models, folder)}, a file of "
        f"{sizes[1] / sizes[0]:.0%} of the size; it loads again in both ways."
    )


@trial("torchao", "weights of 8 bits by a TorchAoConfig, saved and loaded", needs=("torchao",))
def weights(models: Models) -> str:
    return _of_torchao(models, "Int8WeightOnlyConfig")


@trial("torchao", "weights and activations of 8 bits by a TorchAoConfig", needs=("torchao",))
def activations(models: Models) -> str:
    return _of_torchao(models, "Int8DynamicActivationInt8WeightConfig")


@trial("torchao", "saving what quantize_ has changed in memory", needs=("torchao",))
def in_place(models: Models) -> str:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = models.load("distilled")
    quantize_(model, Int8WeightOnlyConfig())
    return refused(
        lambda: model.save_pretrained(models.scratch / "small"), ValueError, names="TorchAoConfig"
    )


@trial("optimum-quanto", "weights of 8 bits, saved and loaded", needs=("optimum-quanto",))
def quanto(models: Models) -> str:
    from optimum.quanto import freeze, qint8, quantize

    from gramian.models import load

    model = models.load("distilled")
    quantize(model, weights=qint8, exclude=["lm_head", "*.filter.*"])
    freeze(model)
    found = _logits(models, model)
    error = compare(found, _logits(models, models.load("distilled")), TOLERANCE)
    model.save_pretrained(models.scratch / "small")
    assert torch.equal(_logits(models, load(models.scratch / "small")), found)
    perplexities = _perplexities(models, models.scratch / "small")
    return f"Relative difference of logits {error:.0e}, {perplexities}; it loads again."


@trial("onnxruntime", "quantize_dynamic on exported programs", needs=("onnxruntime", "onnxscript"))
def programs(models: Models) -> str:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from gramian.export import ExportedModel, export_model

    model, scratch = models.load("distilled"), models.scratch
    export_model(model, scratch / "exported", verify=2)
    shutil.copytree(scratch / "exported", scratch / "small")
    for name in ("step.onnx", "prefill.onnx"):
        quantize_dynamic(
            scratch / "exported" / name, scratch / "small" / name, weight_type=QuantType.QInt8
        )
    ids = models.tokenizer()(TEXT, return_tensors="pt")["input_ids"]
    logits, _ = ExportedModel(scratch / "small").prefill(ids.numpy())
    error = compare(torch.from_numpy(logits), _logits(models, model)[:, -1], TOLERANCE)
    return f"Relative difference of logits {error:.0e}."


@trial("torch.ao.quantization", "quantize_dynamic on a model", needs=("torch",))
def eager(models: Models) -> str:
    return refused(
        lambda: torch.ao.quantization.quantize_dynamic(models.load("distilled")), TypeError
    )
