"""Read and merge adapters of the package peft: low-rank changes of a model's linear maps.

peft can wrap any linear map of a Gramian model. peft's documentation says how to train, run and
merge the wrapped model. This module has the functions that the rest of the library needs. A folder
with an adapter names its base model. Such a folder is read as the base model with the adapter
merged into it. Caches notice when adapters are turned on or off, selected or scaled.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from gramian.models.quantization import is_quantized
from gramian.ops.fp8 import FP8Linear

__all__ = [
    "base_folder",
    "check_mergeable",
    "config_folder",
    "is_adapter",
    "merge_adapter",
    "require_peft",
    "switches",
    "task_type",
    "tokenizer_folder",
]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MODEL_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_PREFIX = "base_model.model."
_TASKS = {
    "GramianForCausalLM": "CAUSAL_LM",
    "GramianForSequenceClassification": "SEQ_CLS",
    "GramianForTokenClassification": "TOKEN_CLS",
}
"""peft's name for the task of each model class."""


def require_peft() -> None:
    """Raise an ImportError that says how to install peft, unless it is installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'adapters need peft: pip install "gramian[adapters]".', name="peft"
        ) from error
    if not hasattr(torch, "float8_e8m0fnu"):
        raise ImportError(
            f"adapters need PyTorch 2.7 or newer, whose dtypes peft uses; this is "
            f"{torch.__version__}.",
            name="torch",
        )


def task_type(kind: type[Any]) -> str | None:
    """Return peft's name for the task of a Gramian model class, or None if peft has no name."""
    return _TASKS.get(kind.__name__)


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter.

    Raises:
        ValueError: if it holds a whole model too; transformers would read the adapter.
    """
    if not (folder / CONFIG).is_file():
        return False
    if any((folder / name).is_file() for name in _MODEL_WEIGHTS):
        raise ValueError(
            f"{folder} must hold a model or an adapter; it holds both, so give each its own folder."
        )
    return True


def base_folder(folder: Path) -> Path:
    """Return the folder of the model that an adapter changes.

    Args:
        folder: the adapter's folder.

    Raises:
        ValueError: if the adapter's configuration cannot be read, or the adapter is not a LoRA.
        FileNotFoundError: if the configuration names no base model, or a folder that is missing.
    """
    file = folder / CONFIG
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} must hold JSON; it cannot be read.") from error
    kind = values.get("peft_type") if isinstance(values, dict) else None
    if kind != "LORA":
        raise ValueError(f"the adapter in {folder} must be one of LoRA; got {kind!r}.")
    base = Path(str(values.get("base_model_name_or_path") or ""))
    if base != Path() and base.resolve() == folder.resolve():
        raise ValueError(f"the adapter in {folder} must name another folder as its base model.")
    if base == Path() or not base.is_dir():
        named = "no base model" if base == Path() else f"the base model {base}, which is missing"
        raise FileNotFoundError(
            f"the adapter in {folder} must name the folder of its base model; it names {named}."
        )
    return base


def config_folder(folder: Path) -> Path:
    """Return the folder with a model's configuration: its own, or that of an adapter's base."""
    if not is_adapter(folder) or (folder / "config.json").is_file():
        return folder
    return config_folder(base_folder(folder))


def tokenizer_folder(folder: Path) -> Path:
    """Return the folder with a model's tokenizer.

    A folder with an adapter and no tokenizer has the tokenizer of its base model.
    """
    if (folder / "tokenizer_config.json").is_file() or not is_adapter(folder):
        return folder
    return tokenizer_folder(base_folder(folder))


def merge_adapter(model: nn.Module, folder: Path, new: Iterable[str] = ()) -> Any:
    """Return a model with an adapter merged into its weights.

    Args:
        model: the base model. Its weights are changed in place.
        folder: the adapter's folder.
        new: names of parameters that the base model's folder lacks. The adapter must hold them.

    Raises:
        ImportError: if peft is not installed.
        FileNotFoundError: if the folder has no weights.
        ValueError: if the adapter cannot be read, does not fit the model, lacks a parameter of
            `new`, or changes a weight that is both the embedding and the output map; or if the
            model is quantized.
    """
    require_peft()
    if is_quantized(model):
        raise ValueError(
            f"the adapter in {folder} cannot be merged: the weights of its base model are "
            "quantized, and would round it away."
        )
    from peft import PeftModel, get_peft_model_state_dict

    found = _read_names(folder)
    lacking = [name for name in new if f"{_PREFIX}{name}" not in found]
    if lacking:
        raise ValueError(
            f"the adapter in {folder} must hold {lacking[0]}, which its base model does not have."
        )
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # missing tensors are an error here
        try:
            adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=False)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"the adapter in {folder} must fit its base model; it does not: {_sentence(error)}"
            ) from error
    missing = sorted(get_peft_model_state_dict(adapted).keys() ^ found)
    if missing:
        raise ValueError(
            f"the adapter in {folder} must fit its base model; it does not in "
            f"{missing[0].removeprefix(_PREFIX)}."
        )
    try:
        check_mergeable(adapted)
        merged: Any = adapted.merge_and_unload(safe_merge=True)
    except (NotImplementedError, ValueError) as error:
        raise ValueError(f"the adapter in {folder} cannot be merged: {_sentence(error)}") from error
    for name, parameter in merged.named_parameters():
        parameter.requires_grad_(trained[name])
    return merged.eval()


def check_mergeable(adapted: Any) -> None:
    """Raise a ValueError unless an adapter can be merged without changing what it computes.

    A matrix that is embedding and output map at once would change in both places. A change of a map
    that is computed in 8-bit floating point would be rounded away.

    Args:
        adapted: a `PeftModel` around a Gramian model.
    """
    model = adapted.get_base_model()
    tied = getattr(model.config, "tie_word_embeddings", False) and model.can_generate()
    for name, module in (
        (("embed_tokens", model.model.embed_tokens), ("lm_head", model.lm_head)) if tied else ()
    ):
        if hasattr(module, "base_layer") or hasattr(module, "modules_to_save"):
            raise ValueError(
                f"{name} must stay as it is, since its weight is embedding and output map at once "
                "(tie_word_embeddings)."
            )
    for name, module in model.named_modules():
        inner = getattr(module, "base_layer", None)
        if isinstance(inner, FP8Linear):
            raise ValueError(
                f"{name} must stay as it is, since its weight is rounded to 8-bit floating point."
            )
        if hasattr(module, "parameter_name") and not isinstance(inner, nn.Linear):
            raise ValueError(
                f"target_parameters must be weights of linear maps; {name} is a "
                f"{type(inner).__name__}."
            )
        biased = any(getattr(module, "lora_bias", {}).values())
        if biased and getattr(inner, "bias", None) is None:
            raise ValueError(f"lora_bias must be off, since {name} has no bias.")


def switches(module: nn.Module) -> list[tuple[Any, ...]]:
    """Return the settings of peft's adapters inside a module, apart from their weights.

    The settings of a linear map with adapters say whether the adapters are turned off, which of
    them are selected, and how they are scaled. Merging an adapter changes neither the output of a
    module nor the settings.
    """
    return [
        (
            part.disable_adapters,
            tuple(part.active_adapters),
            tuple(sorted((getattr(part, "scaling", None) or {}).items())),
        )
        for part in _adapted(module)
    ]


def _adapted(module: nn.Module) -> list[Any]:
    """Return the parts of a module that peft has wrapped.

    `active_adapters` is a property of these parts, but a method of transformers' models.
    """
    properties = (getattr(type(part), "active_adapters", None) for part in module.modules())
    parts = zip(module.modules(), properties, strict=True)
    return [part for part, found in parts if isinstance(found, property)]


def _read_names(folder: Path) -> set[str]:
    """Return the names of the tensors in an adapter's file of weights."""
    file = folder / WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no weights of an adapter: it lacks {WEIGHTS}.")
    try:
        with safe_open(file, framework="pt") as tensors:
            return set(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {_sentence(error)}") from error


def _sentence(error: Exception) -> str:
    """Return an error's message on one line, ending in one period."""
    return (" ".join(str(error).split()) or type(error).__name__).rstrip(".") + "."
