"""Opening a model of any kind, with its tokenizer."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

__all__ = ["open_model"]


def open_model(name: str | Path) -> tuple[Any, Any]:
    """Return a model in evaluation mode, and its tokenizer.

    Args:
        name: A folder that `save_pretrained` wrote, with any model of ours, an adapter of one, or a
            causal language model of transformers; a GGUF file, whose weights are expanded; or any
            other name that `from_pretrained` accepts.

    Returns:
        The model and the tokenizer. A model of ours without a tokenizer gets the byte tokenizer if
        it reads tokens and its vocabulary is large enough, and None otherwise.

    Raises:
        OSError: if there is no such model, or it has no tokenizer.
        ValueError: if it cannot be read.
        ImportError: for a GGUF file, without `gguf`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gramian.models import ByteTokenizer, load_any
    from gramian.models.adapters import tokenizer_folder
    from gramian.models.loading import describe_missing

    path = Path(name)
    if path.suffix == ".gguf" and path.is_file():
        import torch

        if importlib.util.find_spec("gguf") is None:
            raise ImportError('GGUF files need gguf: pip install "gramian[gguf]".', name="gguf")
        folder, file = path.resolve().parent, path.name
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file, local_files_only=True, dtype=torch.float32
        )
        return model.eval(), tokenizer
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file, but neither a model folder nor a GGUF file.")
    if path.is_dir() and _kind(path) == "gramian":
        model, folder = load_any(path), tokenizer_folder(path)
        if (folder / "tokenizer_config.json").is_file():
            return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)
        config = model.config
        fits = config.input_size is None and config.vocab_size == len(ByteTokenizer())
        return model, ByteTokenizer() if fits else None
    local = path.is_dir()
    if local and not (path / "config.json").is_file():
        raise ValueError(describe_missing(path))
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", local_files_only=local)
    return model.eval(), AutoTokenizer.from_pretrained(name, local_files_only=local)


def _kind(folder: Path) -> str | None:
    """Return the model type in a folder's configuration, or in that of an adapter's base model."""
    from gramian.models.adapters import base_folder, is_adapter

    if is_adapter(folder) and not (folder / "config.json").is_file():
        try:
            return _kind(base_folder(folder))
        except (OSError, ValueError):  # of another library, perhaps
            return None
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return values.get("model_type") if isinstance(values, dict) else None
