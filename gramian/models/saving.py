"""Save a model whose weights come layer by layer, so that they are never in memory together."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from gramian._json import to_json
from gramian._safetensors import Entry, as_bytes, create_file
from gramian.models.configuration import GramianConfig
from gramian.models.loading import INDEX, WEIGHTS
from gramian.models.pretrained import GramianPreTrainedModel

__all__ = ["check_range", "empty_model", "save_parts"]


def empty_model(
    kind: type[GramianPreTrainedModel], config: GramianConfig, dtype: torch.dtype
) -> GramianPreTrainedModel:
    """Return a model on the meta device, whose tensors have shapes and dtypes but no values.

    Args:
        kind: class of the model.
        config: configuration of the model.
        dtype: dtype of the weights. Filters stay float32.
    """
    with torch.device("meta"):
        return kind(config).to(dtype)


def save_parts(
    model: GramianPreTrainedModel,
    parts: Iterable[dict[str, Tensor]],
    folder: Path,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write the files that `save_pretrained` would write, with one part of the weights in memory.

    Args:
        model: the model on the meta device (see `empty_model`).
        parts: parts of the model's state dict, for example one for each layer, in any order. A
            tensor is converted to the dtype that it has in `model`. Tensors that are tied to
            others are not written. The parts are emptied.
        folder: the folder to write. If an error is raised, it is left incomplete.
        max_shard_size: largest size of a file of weights, in bytes or as text such as "5GB". A
            larger tensor gets a file of its own.

    Raises:
        RuntimeError: if the parts lack a tensor of the model, or if a tensor is not one of the
            model, is given twice, or has another shape.
        ValueError: if a tensor has values that its dtype in `model` cannot hold.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    tied = model.all_tied_weights_keys
    expected = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    stem, dot, suffix = WEIGHTS.rpartition(".")
    split = split_torch_state_dict_into_shards(
        expected, filename_pattern=f"{stem}{{suffix}}{dot}{suffix}", max_shard_size=max_shard_size
    )
    left: dict[str, tuple[Path, Entry]] = {}
    for file, names in split.filename_to_tensors.items():
        entries = create_file(folder / file, {name: expected[name] for name in names})
        left |= {name: (folder / file, entry) for name, entry in entries.items()}
    for part in parts:
        while part:
            name, tensor = part.popitem()
            if name in tied:
                continue
            if name not in left:
                reason = "is given twice" if name in expected else "is not one of the model"
                raise RuntimeError(f"{name} {reason}.")
            _write(name, tensor, *left.pop(name))
            del tensor  # before the next part is made
    if left:
        names = sorted(left)
        some = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        raise RuntimeError(f"{len(names)} tensors of the model are missing: {some}.")
    if split.is_sharded:
        metadata = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        text = to_json(index, indent=2, sort_keys=True) + "\n"
        (folder / INDEX).write_text(text, encoding="utf-8")


def check_range(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raise a ValueError if a tensor has values that a dtype cannot hold.

    Such values would become infinite, or lose their imaginary parts. Rounding is not an error.

    Args:
        name: name of the tensor, for the message.
        tensor: the tensor.
        dtype: the dtype.
    """
    if tensor.is_complex() and not dtype.is_complex:
        raise ValueError(f"{name} is complex, and {dtype} has no imaginary parts.")
    if not tensor.is_floating_point() or not dtype.is_floating_point or tensor.is_meta:
        return
    if torch.finfo(dtype).max >= torch.finfo(tensor.dtype).max:
        return
    lost = tensor.to(dtype).isinf() & tensor.isfinite()
    if bool(lost.any()):
        largest = float(tensor[lost].abs().max())
        wider = "bfloat16" if dtype == torch.float16 else "float64"
        raise ValueError(
            f"{name} has values up to {largest:.3g}, and the largest of {dtype} is "
            f"{torch.finfo(dtype).max:.3g}: choose torch.{wider}."
        )


def _write(name: str, tensor: Tensor, file: Path, entry: Entry) -> None:
    if tuple(tensor.shape) != entry.shape:
        raise RuntimeError(f"{name} is {tuple(tensor.shape)}, and {entry.shape} is needed.")
    check_range(name, tensor, entry.dtype)
    tensor = tensor.detach().to("cpu", entry.dtype).contiguous()
    with file.open("r+b") as stream:
        stream.seek(entry.offset)
        stream.write(as_bytes(tensor))
