"""Open a model in a GGUF file, and parse the file once.

transformers parses a file for the configuration, for the tokenizer and for the weights, and looks
up the names of all tensors anew for each module. It finds the parser, the lookup and the function
that expands quantized weights in the package `gguf` whenever it needs them. While a file is opened,
that package returns the same reader and the same names again, and counts the expanded tensors. The
bar of transformers is hidden where the caller has its own.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gramian._extras import require

__all__ = ["open_gguf"]

_LOCK = threading.Lock()  # the functions of a package are replaced by one thread at a time


def open_gguf(path: Path, progress: Callable[[int, int], None] | None = None) -> tuple[Any, Any]:
    """Return the model in a GGUF file, with weights in float32 and in evaluation mode.

    Args:
        path: the file.
        progress: function called as `progress(done, total)` with numbers of tensors, or None.

    Returns:
        The model and its tokenizer.

    Raises:
        ImportError: if gguf is not installed.
        ValueError: if the file cannot be read.
    """
    require("a GGUF file", "gguf", "gguf", "transformers")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, file = path.resolve().parent, path.name
    with _LOCK, _parsed_once(progress):
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file, local_files_only=True, dtype=torch.float32
        )
    return model.eval(), tokenizer


@contextmanager
def _parsed_once(progress: Callable[[int, int], None] | None) -> Iterator[None]:
    """Make `gguf` return the same reader for the same file within the block."""
    import gguf
    from transformers import modeling_gguf_pytorch_utils

    readers: dict[str, Any] = {}
    replaced: list[tuple[Any, str, Any, Any]]
    done = 0

    def reader(path: Any, mode: Any = "r") -> Any:
        key = str(path)
        if key not in readers:
            readers[key] = parse(path, mode)
        return readers[key]

    def counted(data: Any, kind: Any) -> Any:
        nonlocal done
        values = expand(data, kind)
        done += 1
        if progress is not None:
            progress(done, max(done, *(len(one.tensors) for one in readers.values())))
        return values

    parse, expand, names = gguf.GGUFReader, gguf.dequantize, gguf.get_tensor_name_map
    replaced = [
        (gguf, "GGUFReader", parse, reader),
        (gguf, "dequantize", expand, counted),
        (gguf, "get_tensor_name_map", names, functools.cache(names)),
    ]
    bar = getattr(modeling_gguf_pytorch_utils, "tqdm", None)
    if progress is not None and bar is not None:
        replaced.append((modeling_gguf_pytorch_utils, "tqdm", bar, _unchanged))
    try:
        for place, name, _, new in replaced:
            setattr(place, name, new)
        yield
    finally:
        for place, name, old, _ in replaced:
            setattr(place, name, old)


def _unchanged(values: Any, **options: Any) -> Any:
    """Return an iterable as it is, in place of a bar."""
    return values
