"""Open a model of Gramian or of transformers, with its tokenizer."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

__all__ = ["open_model"]


def open_model(name: str | Path) -> tuple[Any, Any]:
    """Return a model in evaluation mode, and its tokenizer.

    Args:
        name: A folder that `save_pretrained` wrote, a GGUF file, or any other name that
            `from_pretrained` accepts. A folder may hold any Gramian model, an adapter of a Gramian
            model, or a causal language model of transformers. The quantized weights of a GGUF file
            are expanded to float32.

    Returns:
        The model and the tokenizer. If a Gramian model was saved without a tokenizer, the byte
        tokenizer is returned, provided that the model reads tokens and its vocabulary has the size
        of the byte tokenizer's. Otherwise the tokenizer is None.

    Raises:
        OSError: if the model does not exist, or a model of transformers has no tokenizer.
        ValueError: if the model cannot be read.
        ImportError: if a package that is needed to read the model is missing: `gguf` for a GGUF
            file, or `peft` for an adapter.
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
    """Return the `model_type` in a folder's config.json, or None if it cannot be read.

    If the folder has an adapter without config.json, read config.json of the base model.
    """
    from gramian.models.adapters import config_folder

    try:
        file = config_folder(folder) / "config.json"
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):  # or an adapter of another library
        return None
    return values.get("model_type") if isinstance(values, dict) else None
