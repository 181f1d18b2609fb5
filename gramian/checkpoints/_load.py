"""Load checkpoints: recognize the format, check names and shapes, translate, build the model.

Checkpoints are opened and translated here for `convert`, too, which builds no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gramian.checkpoints._format import FORMATS, Format, Progress, compare
from gramian.checkpoints.files import (
    Weights,
    find_config,
    open_checkpoint,
    read_config,
    read_inner_config,
)
from gramian.checkpoints.published import PUBLISHED, published_config
from gramian.models import GramianPreTrainedModel
from gramian.models.saving import check_range

__all__ = [
    "LoadedCheckpoint",
    "choose_dtype",
    "find_tokenizer",
    "load",
    "open_source",
    "translated",
]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class LoadedCheckpoint(NamedTuple):
    """The result of `load`.

    Attributes:
        model: the model, in evaluation mode. It is a `GramianForCausalLM`, or, for a fine-tuned
            HyenaDNA, a `GramianForSequenceClassification` or `GramianForTokenClassification`.
        tokenizer: the tokenizer of the model, or None if no tokenizer is known.
        format: the name of the checkpoint's format in `FORMATS`.
    """

    model: GramianPreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    format: str


def load(
    path: str | Path,
    *,
    config: Mapping[str, Any] | str | Path | None = None,
    format: str | None = None,
    dtype: torch.dtype | None = None,
    fp8: bool | None = None,
    progress: Progress | None = None,
) -> LoadedCheckpoint:
    """Load a published checkpoint as a Gramian model that computes the same outputs.

    Before a model is built, the names and shapes of the tensors are compared with the names and
    shapes that the format requires. So a checkpoint is never loaded in part. Reading a file of
    weights never runs code from the file (`gramian.checkpoints.files`).

    Args:
        path: a checkpoint file, or a folder that holds a checkpoint.
        config: the checkpoint's configuration, a JSON or YAML file that holds it, or the name of a
            published model (a key of `PUBLISHED`, such as `"evo2_7b"`) if the configuration is not
            published beside the weights. By default, the configuration is read from a file beside
            the checkpoint: `config.json`, or, for a checkpoint `NAME.ckpt`, `NAME.config.json` or
            `NAME.json`, or the same names with .yml or .yaml. If there is no such file, it is read
            from the hyper-parameters of a Lightning checkpoint. A configuration is required,
            because shapes do not determine a model completely.
        format: name of the format, a key of `FORMATS`; by default, the format is recognized by keys
            and configuration. Safari's Hyena and HyenaDNA have the same keys. By default, a
            checkpoint with HyenaDNA's vocabulary is loaded as a HyenaDNA.
        dtype: dtype of the weights; by default, the dtype of the embedding. Filters stay float32.
        fp8: whether projections that were trained in 8-bit floating point are computed in it, by
            emulation with the checkpoint's scales (`gramian.ops.fp8`). By default, this is done
            only for models that are useless otherwise. These are the models of Evo 2 with 1, 20 and
            40 billion parameters.
        progress: a function that is called as `progress(layers done, all layers)`.

    Returns:
        The model, its tokenizer or None, and the name of the format. If the format has no
        tokenizer, the tokenizer in the checkpoint's folder is used, provided that transformers can
        read it without running code from that folder.

    Raises:
        FileNotFoundError: if there is no checkpoint, or no configuration beside or inside it.
        ValueError: if a file cannot be read, or reading it would make other objects than tensors;
            if the keys belong to none of the formats; if the configuration lacks an entry or
            describes a model that Gramian models cannot express; if the dtype of the weights is
            none of float16, bfloat16, float32 and float64, or cannot hold a value; or if tensors
            are missing, unexpected or misshapen. In these cases, the message names the tensors.
    """
    path = Path(path)
    source, stored = open_source(path, config, format, fp8)
    weights = stored.mapped()
    dtype = choose_dtype(source, weights, dtype)
    model_config = source.model_config(weights)
    state: dict[str, Tensor] = {}
    for part in translated(source, weights, progress):
        state |= part
    model, info = source.model_class().from_pretrained(
        None, config=model_config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    if any(info.values()):  # the format has a bug; never return random weights
        raise RuntimeError(f"{source.name} was not translated whole: {info}")
    for name, tensor in model.state_dict().items():
        if name in state:
            check_range(name, state[name], tensor.dtype)
    model.eval()
    return LoadedCheckpoint(model, find_tokenizer(source, path, model), source.name)


def open_source(
    path: Path,
    config: Mapping[str, Any] | str | Path | None,
    format: str | None,
    fp8: bool | None,
) -> tuple[Format, Weights]:
    """Open a checkpoint, and check that it fits its configuration.

    The arguments and errors are those of `load`.

    Returns:
        The checkpoint's format, ready to translate, and its tensors by their stripped names.
    """
    if format is not None and format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(map(repr, FORMATS))}; got {format!r}.")
    stored, states = open_checkpoint(path)
    if not any(cls.strip(stored) for cls in FORMATS.values()):
        raise ValueError(
            f"{path} is no checkpoint of {', '.join(FORMATS)}: its keys are "
            f"{', '.join(sorted(stored)[:5])}{', …' if len(stored) > 5 else ''}."
        )
    settings = _settings(path, config)
    cls = _recognize(path, stored, settings, format)
    names = cls.strip(stored)
    assert names is not None
    if states and not cls.reads_states:
        raise ValueError(
            f"{path} must hold tensors by name; {next(iter(states))!r} is a byte stream, which "
            f"checkpoints of format {cls.name} do not have."
        )
    weights = stored.renamed(names)
    source = cls(weights.shapes, settings)
    what = f"{path}, taken for a checkpoint of format {cls.name},"
    compare(what, names, weights.shapes, source.expected())
    source.read_states(_strip_states(cls, states), fp8)
    return source, weights


def choose_dtype(
    source: Format, weights: Mapping[str, Tensor], dtype: torch.dtype | None
) -> torch.dtype:
    """Return the dtype of the model's weights: the given one, or by default the embedding's."""
    chosen = weights[source.embedding].dtype if dtype is None else dtype
    if chosen not in _DTYPES:
        names = ", ".join(str(one).removeprefix("torch.") for one in _DTYPES)
        what = f"{source.embedding} has the dtype" if dtype is None else "the dtype is"
        raise ValueError(f"{what} {chosen}; weights of a model must have one of {names}.")
    return chosen


def translated(
    source: Format, weights: Mapping[str, Tensor], progress: Progress | None
) -> Iterator[dict[str, Tensor]]:
    """Yield the parts of the Gramian model's state dict, and call `progress` after each layer."""
    done = 0
    for part in source.translate(weights):
        has_layer = any(name.startswith("model.layers.") for name in part)
        yield part
        if has_layer and progress is not None:
            done += 1
            progress(done, source.layers)


def find_tokenizer(
    source: Format, path: Path, model: GramianPreTrainedModel
) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a checkpoint, or None if no tokenizer is known.

    If the model's vocabulary is larger than that of the tokenizer, as it is if it is padded to a
    round size, the model's `generation_config` is changed, so that `generate` does not choose ids
    that have no token.
    """
    tokenizer = source.tokenizer() or _own_tokenizer(path)
    size = model.config.vocab_size
    if tokenizer is not None and model.can_generate() and len(tokenizer) < size:
        model.generation_config.suppress_tokens = list(range(len(tokenizer), size))
    return tokenizer


def _strip_states(cls: type[Format], states: Mapping[str, bytes | None]) -> dict[str, bytes | None]:
    """Return a mapping from the stripped names of byte streams to the byte streams."""
    names = cls.strip([*states, cls.embedding]) or {}
    return {names[name]: state for name, state in states.items()}


def _settings(path: Path, config: Mapping[str, Any] | str | Path | None) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    published = None if config is None else published_config(str(config))
    if published is not None and not Path(str(config)).is_file():
        return published
    file = find_config(path) if config is None else Path(config)
    if file is None:
        inner = read_inner_config(path)
        if inner is not None:
            return inner
        raise FileNotFoundError(
            f"{path} has no configuration beside it, such as config.json, and none among "
            "hyper-parameters inside; its tensors alone do not tell all of what the model computes."
            " Give the configuration as a file, or for Evo 2 as a name such as evo2_7b "
            "(--config on the command line, config in Python)."
        )
    if config is not None and not file.suffix and not file.exists():
        raise FileNotFoundError(
            f"there is no configuration {config}: it must be a file or one of "
            f"{', '.join(PUBLISHED)}."
        )
    return read_config(file)


def _recognize(
    path: Path, weights: Weights, config: Mapping[str, Any], format: str | None
) -> type[Format]:
    """Return the format to which a checkpoint's keys belong.

    If the keys belong to several formats, the configuration decides.
    """
    fitting = [cls for cls in FORMATS.values() if cls.strip(weights)]
    if format is not None:
        if FORMATS[format] not in fitting:
            raise ValueError(
                f"{path} is no checkpoint of format {format}: its keys are those of "
                f"{' or '.join(cls.name for cls in fitting)}."
            )
        return FORMATS[format]
    return next((cls for cls in fitting if cls.meant_by(config)), fitting[0])


def _own_tokenizer(path: Path) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer in a checkpoint's folder if its class is part of transformers.

    If there is none, or it cannot be read without running code from the folder, return None.
    """
    if not (path / "tokenizer.json").is_file():
        return None
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError):  # a tokenizer with its own code, or a broken one
        return None
