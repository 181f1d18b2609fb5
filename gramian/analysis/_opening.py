"""Open a model of Gramian or of transformers, with its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gramian._extras import require
from gramian._hub import check_model_exists
from gramian.analysis._gguf import open_gguf

__all__ = ["open_model"]

_TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")
"""Patterns of files of which a folder with a tokenizer has one. Without them, transformers makes an
empty one for some classes of models.
"""


def open_model(
    name: str | Path, *, progress: Callable[[int, int], None] | None = None
) -> tuple[Any, Any]:
    """Return a model in evaluation mode, and its tokenizer.

    Args:
        name: A folder that `save_pretrained` wrote, a GGUF file, or any other name that
            `from_pretrained` accepts. A folder may hold any Gramian model, an adapter of a Gramian
            model, or a causal language model of transformers. The quantized weights of a GGUF file
            are expanded to float32.
        progress: A function that is called while a GGUF file is read, with the number of tensors
            read so far and the number of all tensors.

    Returns:
        The model and the tokenizer. If a Gramian model was saved without a tokenizer, the byte
        tokenizer is returned, provided that the model reads tokens and its vocabulary has the size
        of the byte tokenizer's. Otherwise the tokenizer is None.

    Raises:
        OSError: if there is no model of the name, or a model of transformers has no tokenizer.
        ValueError: if the model cannot be read, or is no causal language model.
        ImportError: if a package that is needed to read the model is missing: `gguf` for a GGUF
            file, `peft` for an adapter, or the package of the method that quantized the weights.
    """
    require("a saved language model", "models", "transformers")
    from transformers import AutoTokenizer

    from gramian.models import ByteTokenizer, load_any
    from gramian.models.adapters import tokenizer_folder
    from gramian.models.loading import describe_missing

    check_model_exists(name)
    path = Path(name)
    if path.suffix == ".gguf" and path.is_file():
        return open_gguf(path, progress)
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
    model = _open_foreign(name, local)
    missing = OSError(
        f"{name} has no tokenizer that can be read; save it there by its save_pretrained."
    )
    if local and not any(any(path.glob(pattern)) for pattern in _TOKENIZERS):
        raise missing
    try:
        return model, AutoTokenizer.from_pretrained(name, local_files_only=local)
    except ValueError as error:  # its message lists formats that tokenizers are converted from
        raise missing from error


def _open_foreign(name: str | Path, local: bool) -> Any:
    """Return a causal language model of transformers in evaluation mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(name, local_files_only=local)
    _check_causal(name, config)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype="auto", local_files_only=local
        )
    except (ImportError, RuntimeError, ValueError) as error:
        raise _of_quantized(name, config, error) from error
    return model.eval()


def _check_causal(name: str | Path, config: Any) -> None:
    """Check that transformers has a causal language model for a configuration."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    classes = list(getattr(config, "architectures", None) or [])
    held = f"a {classes[0]}" if classes else f"a model of type {config.model_type!r}"
    decodes = any(one.endswith("ForCausalLM") for one in classes)
    if getattr(config, "is_encoder_decoder", False) and not decodes:
        raise ValueError(
            f"{name} holds {held}, an encoder-decoder model; a causal language model is needed."
        )
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not own_code:
        raise ValueError(
            f"{name} holds {held}; a causal language model is needed, and transformers has none "
            f"of the type {config.model_type!r}."
        )


def _of_quantized(name: str | Path, config: Any, error: Exception) -> Exception:
    """Return an error that says why quantized weights cannot be read, or the error itself."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return error
    values = settings if isinstance(settings, dict) else settings.to_dict()
    method = str(values.get("quant_method", "an unknown method")).rpartition(".")[2].lower()
    reason = " ".join(str(error).split()).rstrip(".")
    kind = ImportError if isinstance(error, ImportError) else ValueError
    return kind(f"the weights of {name} are quantized by {method} and cannot be read: {reason}.")


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
