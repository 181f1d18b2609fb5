"""Load the saved model from which a run starts, give it a new head if needed, and adapt it."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.torch_version import TorchVersion

from gramian._nearest import unknown
from gramian.models import GramianConfig, GramianForCausalLM, load_any
from gramian.models.adapters import (
    check_mergeable,
    config_folder,
    is_adapter,
    require_peft,
    task_type,
)
from gramian.models.labels import label_names
from gramian.models.quantization import is_quantized
from gramian.tasks import Description, Kind
from gramian.training.configuration import ConfigError, TrainingConfig

__all__ = [
    "adapt",
    "base_of",
    "check_adapter",
    "check_fit",
    "load_saved",
    "name_labels",
    "save_description",
    "saved_names",
]

_OURS = (  # fields of peft's configuration that the run determines
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
    "task_type",
)


def load_saved(path: str, kind: Kind, description: Description) -> tuple[Any, list[str]]:
    """Load a saved model as the class that a task trains.

    If the saved model is of another class, only its body is loaded, and the head is new and as
    large as the task needs. An adapter is merged into its base model.

    Args:
        path: folder of the model.
        kind: kind of the task.
        description: description of the task.

    Returns:
        The model, and the names of its new parts.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ConfigError: if the model does not fit the task.
    """
    folder, wanted = Path(path), kind.model_class()
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no model folder {path}.")
    options = dict(kind.model_options())
    new: list[str] = []
    if is_adapter(folder):
        try:
            model: Any = load_any(folder)
        except ValueError as error:
            raise ConfigError(f"model.path: {error}") from error
        if not isinstance(model, wanted):
            raise ConfigError(
                f"model.path must hold a {wanted.__name__} for this task; it holds an adapter of a "
                f"{type(model).__name__}."
            )
    else:
        saved = GramianConfig.from_pretrained(folder, local_files_only=True)
        names = saved.architectures or [GramianForCausalLM.__name__]
        if wanted.__name__ in names:
            changes = {}
        else:
            changes = dict(options)
            if description.num_labels is not None:
                changes["num_labels"] = description.num_labels
        model, info = wanted.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **changes
        )
        missing = sorted(info["missing_keys"])
        lacking = [name for name in missing if name.startswith("model.")]
        if lacking:
            raise ConfigError(f"model.path must hold a whole model; {path} lacks {lacking[0]}.")
        new = sorted({name.partition(".")[0] for name in missing})
    if is_quantized(model):
        raise ConfigError(
            f"model.path must hold weights that are not quantized; those in {path} are: train the "
            "model that was quantized, and quantize the result."
        )
    for name, value in options.items():
        if getattr(model.config, name, None) is None:
            setattr(model.config, name, value)
    check_fit(model, "model.path", path, kind, description)
    return model, new


def check_fit(model: Any, key: str, path: str, kind: Kind, description: Description) -> None:
    """Check that a saved model fits a task.

    Args:
        model: the model.
        key: key of the configuration that names it, for the message of an error.
        path: folder of the model.
        kind: kind of the task.
        description: description of the task.

    Raises:
        ConfigError: if the model is of another class, or has other inputs or labels.
    """
    config = model.config
    wanted = kind.model_class()
    if not isinstance(model, wanted):
        raise ConfigError(
            f"{key} must hold a {wanted.__name__} for this task; {path} holds a "
            f"{type(model).__name__}."
        )
    if not kind.accepts_model(model):
        raise ConfigError(
            f"{key} must hold a model for tasks of the kind {description.kind!r}; {path} has "
            f"the problem_type {config.problem_type!r}."
        )
    if config.input_size != description.input_size:
        raise ConfigError(
            f"{key} must hold a model of the task's input_size, {description.input_size}; "
            f"{path} has {config.input_size}."
        )
    if description.vocab_size is not None and config.vocab_size < description.vocab_size:
        raise ConfigError(
            f"{key} must hold a model of at least the task's {description.vocab_size} tokens; "
            f"{path} has {config.vocab_size}."
        )
    if description.num_labels is not None:
        try:
            kind.check_size(config.num_labels, description)
        except ValueError as error:
            raise ConfigError(f"{key}: the task {error}") from error


def saved_names(path: str | None, kind: Kind) -> list[str] | None:
    """Return the names of a saved model's labels, if it is a classifier of the class of a task.

    Args:
        path: folder of the model, or None for a new one.
        kind: kind of the task.
    """
    if path is None or not Path(path).is_dir():
        return None
    try:
        folder = config_folder(Path(path))
    except ValueError as error:
        raise ConfigError(f"model.path: {error}") from error
    if not (folder / "config.json").is_file():
        return None
    config = GramianConfig.from_pretrained(folder, local_files_only=True)
    same = kind.model_class().__name__ in (config.architectures or [])
    return label_names(config) if same else None


def name_labels(model: Any, names: list[str]) -> None:
    """Give the labels of a model the names of a task's classes, unless they have names already."""
    config = base_of(model).config
    if len(names) == config.num_labels and label_names(config) is None:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}


def check_compiling(config: TrainingConfig) -> None:
    """Check that this PyTorch can compile whole models, if `hardware.compile` is set.

    Raises:
        ConfigError: if PyTorch is older than 2.9.
    """
    if config.hardware.compile and TorchVersion(torch.__version__) < "2.9":
        raise ConfigError(
            f"hardware.compile needs PyTorch 2.9 or newer; this is {torch.__version__}."
        )


def check_adapter(config: TrainingConfig) -> None:
    """Check the key `adapter`, before the model is loaded.

    Raises:
        ConfigError: if a key of the adapter is unknown, or conflicts with other keys.
    """
    values = config.adapter
    if values is None:
        return
    if "path" not in config.model:
        raise ConfigError("adapter needs model.path, the folder of the model that it adapts.")
    for name in ("fsdp", "compile"):
        if getattr(config.hardware, name):
            raise ConfigError(f"adapter cannot be trained with hardware.{name}.")
    kind = values.get("type", "lora")
    if kind != "lora":
        raise ConfigError(f"adapter.type must be 'lora'; got {kind!r}.")
    _require_peft()
    from peft import LoraConfig

    known = [field.name for field in dataclasses.fields(LoraConfig)]
    known = ["type", *(name for name in known if name not in _OURS)]
    for key in values:
        if key not in known:
            raise ConfigError(unknown("key of adapter", key, known))
    if is_adapter(Path(config.model["path"])):
        raise ConfigError(
            f"model.path must hold a whole model to adapt; {config.model['path']} is itself an "
            "adapter: save it merged first."
        )


def adapt(model: Any, values: Mapping[str, Any], path: str, new: list[str]) -> Any:
    """Wrap a model in an adapter of peft, so that only the adapter and new parts are trained.

    Args:
        model: a model from `load_saved`.
        values: the key `adapter` of a configuration.
        path: folder of the model.
        new: names of the model's parts that are new. They are trained and saved with the adapter.

    Raises:
        ConfigError: if peft refuses the values, or the adapter changes a tied embedding.
    """
    from peft import LoraConfig, get_peft_model

    settings = {key: value for key, value in values.items() if key != "type"}
    if new:
        given = settings.get("modules_to_save") or []
        settings["modules_to_save"] = [*given, *(name for name in new if name not in given)]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings")  # refused below
            adapted = get_peft_model(
                model, LoraConfig(task_type=task_type(type(model)), **settings)
            )
        check_mergeable(adapted)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"adapter: {' '.join(str(error).split())}") from error
    adapted.peft_config["default"].base_model_name_or_path = str(Path(path).resolve())
    return adapted


def base_of(model: Any) -> Any:
    """Return the model inside an adapter, or the model itself if it has no adapter."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def save_description(model: Any, folder: Path) -> None:
    """Write the configuration of the model inside an adapter, unless that of its base is the same.

    It contains the class and the labels, which the configuration of the adapter lacks.
    transformers' Auto classes look for whole weights beside it, so it is written only if needed.
    """
    base = base_of(model)
    config = copy.deepcopy(base.config)
    config.architectures = [type(base).__name__]
    told = config_folder(Path(model.peft_config["default"].base_model_name_or_path))
    saved = GramianConfig.from_pretrained(told, local_files_only=True)
    names = ("architectures", "id2label", "problem_type", "pooling")
    if any(getattr(saved, name) != getattr(config, name) for name in names):
        config.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's template, whose fields are empty


def _require_peft() -> None:
    try:
        require_peft()
    except ImportError as error:
        raise ConfigError(str(error)) from error
