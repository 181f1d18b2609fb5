"""English documents that ship with Python, and a small tokenizer of them.

The documents are the topics of `help()`, cut at paragraphs, and the long docstrings of the standard
library. Each is kept once. Lines of a paragraph are joined, so that a line feed ends something.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gramian.tasks.documentation import python_topics

END = "<|endoftext|>"
LEAST = 300  # characters of a document
MOST = 1200  # characters at which a topic is cut
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}


def documents() -> list[str]:
    """Return all documents in an order that depends on the texts alone."""
    found = dict.fromkeys(
        _joined(text) for text in (*_pieces(), *_docstrings()) if len(text) >= LEAST
    )
    texts = sorted(found)
    return [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]


def tokenizer_of(texts: list[str], size: int) -> Any:
    """Return a tokenizer of `size` tokens, trained on the texts by byte-pair encoding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def packed(texts: list[str], tokenizer: Any) -> Tensor:
    """Return the token ids (tokens,) of the texts, each of which ends with the token `END`."""
    rows = tokenizer([text + END for text in texts], add_special_tokens=False)["input_ids"]
    return torch.tensor([token for row in rows for token in row])


def _pieces() -> list[str]:
    """Return the topics of `help()`, cut between paragraphs into pieces of about `MOST`."""
    pieces = []
    for topic in python_topics():
        piece = ""
        for paragraph in topic.split("\n\n"):
            piece += ("\n\n" if piece else "") + paragraph
            if len(piece) >= MOST:
                pieces.append(piece)
                piece = ""
        pieces.append(piece)
    return pieces


def _docstrings() -> list[str]:
    """Return the docstrings of the standard library's modules, classes and functions."""
    library = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(library.rglob("*.py")):
        if _LEFT_OUT & set(path.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                found.append(ast.get_docstring(node) or "")
    return found


def _joined(text: str) -> str:
    """Return a text with the lines of each paragraph joined."""
    return re.sub(r"(?<=\S)[ \t]*\n(?=[^\s>])", " ", text.strip())
