"""Read folders with quantized weights: those of torchao and those of optimum-quanto.

transformers writes the weights of a model that it loaded with a `TorchAoConfig`, and describes them
in `quantization_config` of config.json. optimum-quanto writes its own file beside the weights,
`quanto_qmap.json`. Both store a quantized parameter as several tensors, such as its integers and
its scales.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from gramian._json import to_json

if TYPE_CHECKING:
    from gramian.models.configuration import GramianConfig
    from gramian.models.pretrained import GramianPreTrainedModel

__all__ = [
    "check_described",
    "check_readable",
    "check_saveable",
    "is_quantized",
    "load_quanto",
    "method_of",
    "parts_of",
    "refuse_quantized",
    "require_quantizer",
    "save_quanto",
]

_MAP = "quanto_qmap.json"
_PACKAGES = {"torchao": ("torchao", "torchao"), "quanto": ("optimum.quanto", "optimum-quanto")}
"""The module and the package of each method."""


def method_of(folder: Path, values: dict[str, Any]) -> str | None:
    """Return the name of the method that quantized the weights in a folder, or None.

    Args:
        folder: the model's folder.
        values: the content of its config.json.
    """
    if (folder / _MAP).is_file():
        return "quanto"
    section = values.get("quantization_config")
    return str(section.get("quant_method")) if isinstance(section, dict) else None


def is_quantized(model: nn.Module) -> bool:
    """Return whether a model has weights that transformers, torchao or optimum-quanto quantized."""
    if getattr(model, "is_quantized", False):
        return True
    packages = {type(weight).__module__.partition(".")[0] for weight in model.parameters()}
    return not packages.isdisjoint({"torchao", "optimum"})


def refuse_quantized(model: nn.Module, verb: str, way: str) -> None:
    """Raise a ValueError if a model is quantized.

    Args:
        model: a model of Gramian or transformers.
        verb: what the caller does, for the message.
        way: what the user can do instead.
    """
    if is_quantized(model):
        raise ValueError(
            f"{verb} needs weights that are not quantized; got a quantized model: {way}."
        )


def check_described(folder: Path, names: Iterable[str]) -> None:
    """Raise a ValueError if tensors are optimum-quanto's, but the folder lacks their description.

    Args:
        folder: the model's folder, which `method_of` has found to be not quantized.
        names: the names of the tensors in its files.
    """
    if any(name.endswith(".weight._data") for name in names):
        raise ValueError(
            f"the weights in {folder} are quantized by optimum-quanto, and its {_MAP} is missing: "
            "save the model with optimum.quanto.QuantizedModelForCausalLM."
        )


def check_saveable(model: nn.Module) -> None:
    """Raise a ValueError if weights were quantized in place by torchao.

    transformers saves such weights only if it has quantized them itself.
    """
    if hasattr(model, "hf_quantizer"):
        return
    if any(type(weight).__module__.partition(".")[0] == "torchao" for weight in model.parameters()):
        raise ValueError(
            "weights that torchao's quantize_ has changed cannot be saved: save the model before "
            "that, load it with quantization_config=TorchAoConfig(...), and save it then."
        )


def check_readable(path: Path, config: Any) -> None:
    """Raise an error if transformers would misread quantized weights, or end without a sentence.

    Args:
        path: folder of the model, or its name on the Hub.
        config: configuration that transformers has read, or None.

    Raises:
        ValueError: if optimum-quanto has quantized the weights.
        ImportError: if torchao has quantized the weights, and is not installed.
    """
    if (path / _MAP).is_file():
        raise ValueError(
            f"the weights in {path} are quantized by optimum-quanto: load them with "
            "gramian.models.load or optimum.quanto.QuantizedModelForCausalLM."
        )
    section = getattr(config, "quantization_config", None)
    if config is None and (file := path / "config.json").is_file():
        with suppress(ValueError, AttributeError):  # transformers says that it is no JSON object
            section = json.loads(file.read_text(encoding="utf-8")).get("quantization_config")
    if method_of(path, {"quantization_config": section}) == "torchao":
        require_quantizer(path, "torchao")


def require_quantizer(folder: Path, method: str) -> None:
    """Raise an error unless weights of this method can be read.

    Raises:
        ValueError: if the method is neither torchao nor quanto.
        ImportError: if the method's package is not installed.
    """
    if method not in _PACKAGES:
        raise ValueError(
            f"the weights in {folder} are quantized by {method}; {' and '.join(_PACKAGES)} can be "
            "read."
        )
    module, package = _PACKAGES[method]
    parent = module.partition(".")[0]
    if importlib.util.find_spec(parent) is None or importlib.util.find_spec(module) is None:
        raise ImportError(
            f"the weights in {folder} are quantized: pip install {package}.", name=module
        )


def parts_of(folder: Path, method: str, files: list[Path]) -> dict[str, list[str]]:
    """Return the names of the tensors that store each quantized parameter, by its name.

    Args:
        folder: the model's folder.
        method: the method that quantized the weights.
        files: the files of weights.

    Raises:
        ValueError: if the description of the quantized parameters cannot be read.
    """
    parts: dict[str, list[str]] = {}
    try:
        if method == "quanto":
            for module, settings in _read_map(folder).items():
                if settings["weights"] != "none":
                    stored = ("weight._data", "weight._scale", "input_scale", "output_scale")
                    parts[f"{module}.weight"] = [f"{module}.{name}" for name in stored]
            return parts
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                described: dict[str, str] = tensors.metadata() or {}
            for parameter, text in described.items():
                if not text.startswith("{"):
                    continue
                module, _, own = parameter.rpartition(".")
                names = json.loads(text).get("_tensor_data_names", [])
                if names:
                    parts[parameter] = [f"{module}._{own}_{name}" for name in names]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"the description of the quantized weights in {folder} cannot be read."
        ) from error
    return parts


def load_quanto(
    folder: Path,
    kind: type[GramianPreTrainedModel],
    config: GramianConfig,
    files: list[Path],
    dtype: torch.dtype | None,
) -> GramianPreTrainedModel:
    """Return the model that `optimum.quanto.QuantizedModelForCausalLM` saved.

    Args:
        folder: the model's folder.
        kind: the class of the model.
        config: its configuration.
        files: the files of weights.
        dtype: dtype of the weights that are not quantized; by default, that of the configuration.
    """
    from optimum.quanto import requantize

    model = kind(config).to(dtype or config.dtype or torch.float32)
    tensors = {name: value for file in files for name, value in load_file(file).items()}
    requantize(model, tensors, _read_map(folder))
    model.tie_weights()
    return model


def save_quanto(model: GramianPreTrainedModel, folder: Path, save: Callable[[], None]) -> None:
    """Save a model, with the description of its weights if optimum-quanto has quantized them.

    A quantized head no longer shares the matrix of the embedding, which the configuration then
    says.

    Args:
        model: the model.
        folder: the folder that `save` writes.
        save: the function that saves the model as transformers does.
    """
    quantized = {
        name: part
        for name, part in model.named_modules()
        if type(part).__module__.startswith("optimum.quanto.")
    }
    if quantized and not hasattr(model, "hf_quantizer"):
        from optimum.quanto import quantization_map

        if {model.get_input_embeddings(), model.get_output_embeddings()} & {*quantized.values()}:
            model.config.tie_word_embeddings = False
        save()
        (folder / _MAP).write_text(to_json(quantization_map(model), indent=4), encoding="utf-8")
    else:
        save()


def _read_map(folder: Path) -> dict[str, dict[str, str]]:
    """Return the settings of each module that optimum-quanto has quantized."""
    values: dict[str, dict[str, str]] = json.loads((folder / _MAP).read_text(encoding="utf-8"))
    return values
