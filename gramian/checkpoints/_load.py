"""Loading: recognise, compare, translate, and only then make a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gramian.checkpoints._format import FORMATS, Format, Progress, compare
from gramian.checkpoints.files import find_config, read_config, read_tensors
from gramian.models import GramianForCausalLM

__all__ = ["LoadedCheckpoint", "load"]


class LoadedCheckpoint(NamedTuple):
    """What `load` makes of a checkpoint.

    Attributes:
        model: in evaluation mode.
        tokenizer: the one that belongs to it, or None where none is known.
        format: which of `FORMATS` it was in.
    """

    model: GramianForCausalLM
    tokenizer: PreTrainedTokenizerBase | None
    format: str


def load(
    path: str | Path,
    *,
    config: Mapping[str, Any] | str | Path | None = None,
    format: str | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> LoadedCheckpoint:
    """The model in a published checkpoint, as one of ours that computes the same.

    Everything is compared with what the format asks for before a model is made, so nothing is ever
    loaded in part, and files are read as tensors and nothing else (`gramian.checkpoints.files`).

    Args:
        path: a checkpoint file, or a folder that holds one.
        config: the checkpoint's configuration, or a JSON or YAML file with it; by default the one
            that lies beside the checkpoint (`config.json`, `NAME.config.json`, `NAME.json`, and
            .yml likewise). It is needed: not all of what a model computes is in its shapes.
        format: one of `FORMATS`, in place of what keys and configuration say. Safari's Hyena and
            HyenaDNA have the same keys; without it, one with HyenaDNA's vocabulary is a HyenaDNA.
        dtype: of the weights; by default the embedding's. Filters are held in float32.
        progress: called as `progress(layers done, layers)`.

    Returns:
        The model, the tokenizer that belongs to it or None, and the name of the format. A tokenizer
        that lies in the checkpoint's folder is taken where transformers can read it without running
        code from there.

    Raises:
        FileNotFoundError: no checkpoint, or no configuration beside it.
        ValueError: a file that cannot be read or would make anything but tensors, keys of none of
            the formats, a configuration that lacks something or describes what Gramian's models do
            not express, missing, unexpected or misshapen tensors, which are named.
    """
    path = Path(path)
    if format is not None and format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(map(repr, FORMATS))}; got {format!r}.")
    weights = read_tensors(path)
    if not any(cls.strip(weights) for cls in FORMATS.values()):
        raise ValueError(
            f"{path} is no checkpoint of {', '.join(FORMATS)}: its keys are "
            f"{', '.join(sorted(weights)[:5])}{', …' if len(weights) > 5 else ''}."
        )
    settings = _settings(path, config)
    cls = _recognise(path, weights, settings, format)
    names = cls.strip(weights)
    assert names is not None
    weights = {stripped: weights[name] for name, stripped in names.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    source = cls(shapes, settings)
    compare(
        f"{path}, taken for a checkpoint of format {cls.name},", names, shapes, source.expected()
    )

    dtype = weights[cls.embedding].dtype if dtype is None else dtype
    model_config = source.model_config(weights)
    state = source.translate(weights, progress or (lambda done, total: None))
    model, info = GramianForCausalLM.from_pretrained(
        None, config=model_config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    if any(info.values()):  # a format's own mistake; never a model with weights at random
        raise RuntimeError(f"{cls.name} was not translated whole: {info}")
    model.eval()
    tokenizer = source.tokenizer() or _own_tokenizer(path)
    if tokenizer is not None:
        _never_write_what_has_no_text(model, len(tokenizer))
    return LoadedCheckpoint(model, tokenizer, cls.name)


def _settings(path: Path, config: Mapping[str, Any] | str | Path | None) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    file = find_config(path) if config is None else Path(config)
    if file is None:
        raise FileNotFoundError(
            f"{path} has no configuration beside it, such as config.json; it does not tell all of "
            "what the model computes by itself."
        )
    return read_config(file)


def _recognise(
    path: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any], format: str | None
) -> type[Format]:
    """The format that the keys, and the configuration where keys are shared, belong to."""
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
    """The tokenizer in a checkpoint's folder, if it is one of transformers' own."""
    if not (path / "tokenizer.json").is_file():
        return None
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError):  # a tokenizer with code of its own, or a broken one
        return None


def _never_write_what_has_no_text(model: GramianForCausalLM, tokens: int) -> None:
    """Rows that pad a vocabulary to a round size have no token: keep `generate` from them."""
    if model.generation_config is not None and tokens < model.config.vocab_size:
        rows = list(range(tokens, model.config.vocab_size))
        model.generation_config.suppress_tokens = rows
