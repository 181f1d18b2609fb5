"""The tokenizer of a model, where none is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gramian.checkpoints import DNATokenizer, EvoTokenizer
from gramian.models import ByteTokenizer
from gramian.tasks.encoding import load_tokenizer

__all__ = ["tokenizer_of"]


def tokenizer_of(model: Any) -> Any:
    """Return the tokenizer in a model's folder, or the one that its configuration belongs to.

    The configuration of a converted HyenaDNA or Evo has the ids of its tokenizer's end-of-sequence
    and padding tokens, and a model of bytes has the vocabulary of `ByteTokenizer`.

    Raises:
        ValueError: if the tokenizer is not known.
        OSError: if the one in the folder cannot be read.
    """
    config = model.config
    folder = Path(str(getattr(config, "_name_or_path", "") or "."))
    if folder != Path() and (folder / "tokenizer_config.json").is_file():
        return load_tokenizer(str(folder))
    for known in (DNATokenizer(), EvoTokenizer()):
        ids = (known.eos_token_id, known.pad_token_id)
        if (config.eos_token_id, config.pad_token_id) == ids and config.vocab_size >= len(known):
            return known
    if config.vocab_size == len(ByteTokenizer()):
        return ByteTokenizer()
    raise ValueError("tokenizer must be given, since the model's folder has none; got None.")
