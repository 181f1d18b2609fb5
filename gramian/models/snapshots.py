"""Save the state of a generation to disk, to continue it later or on another machine.

The file is a safetensors file. It holds the tensors of every layer's state, in the order of the
state's fields. It also holds a fingerprint of the model that filled the cache, because a state is
meaningless to another model.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from gramian._staging import staged_file
from gramian.models.adapters import switches

if TYPE_CHECKING:
    from gramian.models.cache import GramianCache
    from gramian.models.pretrained import GramianPreTrainedModel

FORMAT = "gramian-cache-1"
_ROWS = ("last_hidden_state", "padding")  # the tensors that a cache has besides its layers
_SAMPLES = 4096  # number of values of each tensor that enter a fingerprint


@torch.no_grad()
def fingerprint(model: GramianPreTrainedModel) -> str:
    """Return a hash of the names, shapes, dtypes and some values of a model's tensors.

    The positions of the values are evenly spaced in each tensor. Any training changes the hash.
    Casting the model to another dtype changes it, too.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.base_model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sample = flat[:: max(1, flat.numel() // _SAMPLES)].to("cpu", torch.float64)
        digest.update(sample.numpy().tobytes())
    if adapters := switches(model):
        digest.update(repr(adapters).encode())
    return digest.hexdigest()


def save_cache(cache: GramianCache, path: str | Path, model: GramianPreTrainedModel) -> None:
    """Write a cache that a model has filled to a file, completely or not at all.

    Raises:
        ValueError: if the cache is empty, or has another number of layers than the model.
    """
    if cache.batch_size < 0:
        raise ValueError("an empty cache has no state to save.")
    if len(cache.layers) != model.config.num_hidden_layers:
        raise ValueError(
            f"a cache of {len(cache.layers)} layers is not one of a model of "
            f"{model.config.num_hidden_layers}."
        )
    tensors = {
        f"layers.{layer}.{i}": leaf.detach().contiguous()
        for layer, memory in enumerate(cache.layers)
        for i, leaf in enumerate(tree_leaves(memory.state))
    }
    tensors |= {name: row for name in _ROWS if (row := getattr(cache, name)) is not None}
    tensors = {
        name: tensor.detach().clone() for name, tensor in tensors.items()
    }  # the tensors in a safetensors file must not share memory
    metadata = {
        "format": FORMAT,
        "fingerprint": fingerprint(model),
        "tokens": json.dumps([memory.tokens for memory in cache.layers]),
        "batch_size": str(cache.batch_size),
    }
    with staged_file(Path(path)) as stage:
        save_file(tensors, stage, metadata)


@torch.no_grad()
def load_cache(path: str | Path, model: GramianPreTrainedModel) -> GramianCache:
    """Return the cache that `save_cache` wrote, on the device of the model.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file cannot be read, holds no cache, or holds the cache of another model.
    """
    from gramian.models.cache import GramianCache

    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} holds no generation state of a Gramian model.")
    if metadata["fingerprint"] != fingerprint(model):
        raise ValueError(f"the generation state in {path} is of another model, or other weights.")

    cache = GramianCache(model.config)
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    model.base_model(input_ids=token, past_key_values=cache)  # makes recurrences and states
    tokens = json.loads(metadata["tokens"])
    for layer, memory in enumerate(cache.layers):
        state = _restored(memory.state, layer, tensors, path, model.device)
        memory.reset()
        memory.update_recurrent_state(
            state, batch_size=int(metadata["batch_size"]), tokens=tokens[layer]
        )
    for name in _ROWS:
        row = tensors.get(name)
        setattr(cache, name, None if row is None else row.to(model.device))
    return cache


def _restored(
    template: Any, layer: int, tensors: dict[str, torch.Tensor], path: Any, device: torch.device
) -> Any:
    leaves, spec = tree_flatten(template)
    read = []
    for i, leaf in enumerate(leaves):
        tensor = tensors.get(f"layers.{layer}.{i}")
        if tensor is None or (tensor.dtype, tensor.ndim) != (leaf.dtype, leaf.ndim):
            raise ValueError(f"the generation state in {path} does not fit layer {layer}.")
        read.append(tensor.to(device) if tensor.ndim else tensor)
    return tree_unflatten(read, spec)
