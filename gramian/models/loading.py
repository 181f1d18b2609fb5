"""Read a saved model completely, or raise an error that says in one sentence what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import logging

from gramian.models.adapters import (
    CONFIG,
    base_folder,
    config_folder,
    is_adapter,
    merge_adapter,
    task_type,
)
from gramian.models.backbone import GramianModel
from gramian.models.classification import GramianForSequenceClassification
from gramian.models.configuration import GramianConfig
from gramian.models.modeling import GramianForCausalLM
from gramian.models.pairs import GramianForPairClassification
from gramian.models.pretrained import GramianPreTrainedModel
from gramian.models.quantization import (
    check_described,
    load_quanto,
    method_of,
    parts_of,
    require_quantizer,
)
from gramian.models.reconstruction import GramianForReconstruction
from gramian.models.signal import GramianForSignalRegression
from gramian.models.token_classification import GramianForTokenClassification

__all__ = ["load", "load_any"]

CLASSES: dict[str, type[GramianPreTrainedModel]] = {
    kind.__name__: kind
    for kind in (
        GramianForCausalLM,
        GramianForSequenceClassification,
        GramianForTokenClassification,
        GramianForPairClassification,
        GramianForSignalRegression,
        GramianForReconstruction,
        GramianModel,
    )
}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def load(path: str | Path, *, dtype: torch.dtype | None = None) -> GramianForCausalLM:
    """Return the language model that `save_pretrained` wrote into a folder, in evaluation mode.

    Before any tensor is read, the names and shapes of the tensors in the files are compared with
    the names and shapes that the configuration requires. So a model is never loaded in part. A
    folder with an adapter of peft names a base model. In this case the base model is returned, with
    the adapter merged into it.

    Args:
        path: the folder.
        dtype: dtype of the weights; by default, the dtype in the files. Filters stay float32.

    Raises:
        FileNotFoundError: if the folder does not exist, if it lacks `config.json` or weights, or if
            the base model of an adapter is missing.
        ValueError: if the model has another class; if the configuration is invalid; if a file
            cannot be read; if weights are missing, superfluous or of other shapes; or if an adapter
            does not fit its base model.
        ImportError: if the folder has an adapter, and peft is not installed.
    """
    folder = Path(path)
    adapted = is_adapter(folder)
    values = _read_own_config(folder) if adapted else _read_config(folder)
    kind = _class(folder, values)
    if kind is not GramianForCausalLM:
        raise ValueError(
            f"{folder} holds a {kind.__name__}; a GramianForCausalLM is needed (`load_any` reads "
            "every class)."
        )
    model = _load_adapted(folder, dtype) if adapted else _load(folder, kind, values, dtype)
    assert isinstance(model, GramianForCausalLM)
    return model


def load_any(path: str | Path, *, dtype: torch.dtype | None = None) -> GramianPreTrainedModel:
    """Return the model in a folder, which may be of any Gramian class, in evaluation mode.

    The arguments and errors are the same as those of `load`, except that any class is accepted.
    """
    folder = Path(path)
    if is_adapter(folder):
        return _load_adapted(folder, dtype)
    values = _read_config(folder)
    return _load(folder, _class(folder, values), values, dtype)


def _load_adapted(folder: Path, dtype: torch.dtype | None) -> GramianPreTrainedModel:
    """Return the base model of an adapter, in the adapter's class, with the adapter merged."""
    base = base_folder(folder)
    values = _read_own_config(folder)
    kind, base_kind = _class(folder, values), _class(base, _read_own_config(base))
    new: list[str] = []
    if kind is base_kind:
        model = load_any(base, dtype=dtype)
    elif is_adapter(base):
        raise ValueError(
            f"{folder} holds an adapter for a {kind.__name__} of another adapter, {base}, which is "
            f"one for a {base_kind.__name__}; save that one merged first."
        )
    else:
        expected, _ = _expected_shapes(folder, kind, GramianConfig.from_dict(values))
        body = {name: shape for name, shape in expected.items() if name.startswith("model.")}
        found = _read_shapes(base)
        _compare(
            base, body, set(), {name: found[name] for name in found if name.startswith("model.")}
        )
        new = [name for name in expected if name not in body]
        shown = logging.get_verbosity()
        logging.set_verbosity_error()  # the adapter holds what the base model lacks
        try:
            model = kind.from_pretrained(
                base,
                config=GramianConfig.from_dict(values),
                dtype="auto" if dtype is None else dtype,
                local_files_only=True,
            )
        finally:
            logging.set_verbosity(shown)
    merged: GramianPreTrainedModel = merge_adapter(model, folder, new)
    merged.config.name_or_path = str(folder)
    return merged


def _read_own_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of a model or of an adapter.

    If an adapter has no configuration, return the configuration of its base model.

    Raises:
        FileNotFoundError: if there is no configuration.
        ValueError: if the configuration cannot be read, or if an adapter without a configuration is
            for another class than its base model.
    """
    own = config_folder(folder)
    values = _read_config(own)
    if own == folder:
        return values
    task = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("task_type")
    kind = _class(folder, values)
    if task not in (None, task_type(kind)):
        raise ValueError(
            f"the adapter in {folder} is for {task} and its base model is a {kind.__name__}: its "
            "config.json is needed beside it."
        )
    return values


def _load(
    folder: Path,
    kind: type[GramianPreTrainedModel],
    values: dict[str, Any],
    dtype: torch.dtype | None,
) -> GramianPreTrainedModel:
    try:
        config = GramianConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        file = folder / "config.json"
        raise ValueError(f"{file} is not a valid configuration: {_sentence(error)}") from error
    expected, tied = _expected_shapes(folder, kind, config)
    method = method_of(folder, values)
    if method is not None:
        return _load_quantized(folder, kind, config, dtype, method, expected, tied)
    found = _read_shapes(folder)
    check_described(folder, found)
    _compare(folder, expected, tied, found)
    model = kind.from_pretrained(
        folder, config=config, dtype="auto" if dtype is None else dtype, local_files_only=True
    )
    return model.eval()


def _load_quantized(
    folder: Path,
    kind: type[GramianPreTrainedModel],
    config: GramianConfig,
    dtype: torch.dtype | None,
    method: str,
    expected: dict[str, tuple[int, ...]],
    tied: set[str],
) -> GramianPreTrainedModel:
    """Return the model in a folder whose weights were quantized by torchao or optimum-quanto."""
    require_quantizer(folder, method)
    files = _weight_files(folder)
    found = _read_shapes(folder)
    for parameter, parts in parts_of(folder, method, files).items():
        if all(part in found for part in parts):
            for part in parts:
                del found[part]
            found[parameter] = expected.get(parameter, ())  # compared below, once it is read
    _compare(folder, expected, tied, found)
    try:
        if method == "quanto":
            model = load_quanto(folder, kind, config, files, dtype)
        else:
            model = kind.from_pretrained(
                folder,
                config=config,
                dtype="auto" if dtype is None else dtype,
                local_files_only=True,
            )
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"the quantized weights in {folder} cannot be read: {_sentence(error)}"
        ) from error
    read = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    _compare(folder, {name: shape for name, shape in expected.items() if name in read}, tied, read)
    return model.eval()


def _class(folder: Path, values: dict[str, Any]) -> type[GramianPreTrainedModel]:
    """Return the class that a configuration names; by default, the class of language models."""
    names = values.get("architectures") or [GramianForCausalLM.__name__]
    known = [CLASSES[name] for name in names if name in CLASSES]
    if not known:
        raise ValueError(
            f"{folder} holds a {', '.join(map(str, names))}; known are {', '.join(CLASSES)}."
        )
    return known[0]


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no model folder {folder}.")
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(describe_missing(folder))
    values = _read_json(file)
    kind = values.get("model_type")
    if kind != GramianConfig.model_type:
        raise ValueError(
            f"{folder} holds a model of type {kind!r}; {GramianConfig.model_type!r} is needed."
        )
    return values


def describe_missing(folder: Path) -> str:
    """Return a sentence that says why a folder without config.json does not hold a model."""
    inside = [folder / name for name in ("best", "last")]
    models = [str(path) for path in inside if (path / "config.json").is_file() or is_adapter(path)]
    if models:
        return f"{folder} is the folder of a training run; its models are {' and '.join(models)}."
    return f"{folder} is not a model folder: it has no config.json."


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {_sentence(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold a JSON object; it holds a {type(values).__name__}.")
    return values


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder} has no weights: neither {WEIGHTS} nor {INDEX}.")
    shards = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict):
        raise ValueError(f"{folder / INDEX} has no weight_map.")
    files = [folder / name for name in sorted(set(shards.values()))]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{folder} lacks the weights file {file.name}.")
    return files


def _read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return a mapping from the names of all tensors in the safetensors files to their shapes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (a file, not a dict)
                    shapes[name] = tuple(tensors.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} cannot be read: {_sentence(error)}") from error
        except RuntimeError as error:  # Linux maps no file that is larger than the memory
            raise ValueError(
                f"{file} cannot be mapped into memory ({_sentence(error)[:-1]}); save the model in "
                'smaller files, for example with max_shard_size="5GB".'
            ) from error
    return shapes


def _expected_shapes(
    folder: Path, kind: type[GramianPreTrainedModel], config: GramianConfig
) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Return the shapes of the required tensors by name, and the names of tensors tied to them."""
    try:
        with torch.device("meta"):
            model = kind(config)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / 'config.json'} describes no model: {_sentence(error)}"
        ) from error
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = set(model.all_tied_weights_keys)
    return {name: shape for name, shape in shapes.items() if name not in tied}, tied


def _compare(
    folder: Path,
    expected: dict[str, tuple[int, ...]],
    tied: set[str],
    found: dict[str, tuple[int, ...]],
) -> None:
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys() - tied)
    if missing or unexpected:
        kinds = (("missing", missing), ("not of this model", unexpected))
        parts = [f"{len(names)} {kind} ({_some(names)})" for kind, names in kinds if names]
        raise ValueError(f"the weights in {folder} do not fit its config.json: {', '.join(parts)}.")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(
                f"the weights in {folder} do not fit its config.json: {name} is {found[name]}, and "
                f"{shape} is needed."
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _sentence(error: Exception) -> str:
    """Return the first line of an error's message, with one period at its end."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".") + "."
