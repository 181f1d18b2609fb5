"""Write embeddings into files while they are computed, completely or not at all."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from gramian._json import to_json
from gramian._staging import staged_file
from gramian.genomics._embed import Embedder
from gramian.genomics._hidden_states import Layer
from gramian.models import GramianPreTrainedModel

__all__ = ["SUFFIXES", "write_embeddings"]

SUFFIXES = (".safetensors", ".npy", ".parquet")
_ROWS = 1024  # smallest number of rows in a group of a Parquet file, except the last


def write_embeddings(
    output: str | Path,
    model: GramianPreTrainedModel,
    records: str | Path,
    *,
    layer: Layer = -1,
    tokenizer: Any = None,
    pool: str = "mean",
    **options: Any,
) -> tuple[int, int]:
    """Write the embeddings of records into a file, with memory for a few chunks only.

    The suffix of the file determines the format:

    - `.safetensors`: the tensor `embeddings` is (records, width), or (bases of all records, width)
      without pooling. The tensor `lengths`, (records), contains the number of bases of each record.
      The metadata contain `layer`, `pool`, and `names`, a JSON list of the records' names.
    - `.npy`: the file contains the embeddings only. A table beside it, `NAME.tsv`, contains the
      name and length of each record, and the range `start` to `end` of its rows in the array.
    - `.parquet`: the file has one row for each record, with `name`, `length` and `embedding`.
      Without pooling, it has one row for each base, with `name`, `position` (from 0) and
      `embedding`.

    Args:
        output: the file, which must not exist yet.
        model: a Gramian model that reads tokens.
        records: a FASTA file, or other records as for `embed`.
        layer: number or name of a layer.
        tokenizer: the model's tokenizer, as for `embed`.
        pool: `"mean"`, `"last"` or `"none"`.
        options: the other arguments of `embed`.

    Returns:
        The number of vectors and their width.

    Raises:
        FileExistsError: if the file, or the table beside it, exists.
        ImportError: if the format is Parquet and pyarrow is not installed, or if `embed` needs a
            package that is missing.
        ValueError: if the file has another suffix, or if `embed` raises this error.
    """
    target = Path(output)
    write = {".safetensors": _safetensors, ".npy": _npy, ".parquet": _parquet}.get(target.suffix)
    if write is None:
        raise ValueError(
            f"the file of embeddings must end in .safetensors, .npy or .parquet; got {target.name}."
        )
    beside = target.with_suffix(".tsv")
    for file in (target, beside) if target.suffix == ".npy" else (target,):
        if file.exists():
            raise FileExistsError(f"{file} exists already; name a file that does not.")
    if target.suffix == ".parquet":
        _require_pyarrow()
    embedder = Embedder(model, records, tokenizer=tokenizer, layer=layer, pool=pool, **options)
    lengths = embedder.source.lengths
    rows = sum(lengths) if pool == "none" else len(lengths)
    target.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if target.suffix == ".npy":
            table = stack.enter_context(staged_file(beside))
            _write_table(table, embedder)
        write(stack.enter_context(staged_file(target)), embedder, rows, str(layer))
    return rows, embedder.width


def _write_table(table: Path, embedder: Embedder) -> None:
    lengths = embedder.source.lengths
    counts = lengths if embedder.pool == "none" else [1] * len(lengths)
    ends = list(itertools.accumulate(counts))
    with table.open("w", encoding="utf-8", newline="\n") as file:
        file.write("name\tlength\tstart\tend\n")
        for name, length, count, end in zip(
            embedder.source.names, lengths, counts, ends, strict=True
        ):
            file.write(f"{' '.join(name.split(chr(9)))}\t{length}\t{end - count}\t{end}\n")


def _npy(stage: Path, embedder: Embedder, rows: int, layer: str) -> None:
    with stage.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file,
            {
                "shape": (rows, embedder.width),
                "fortran_order": False,
                "descr": np.lib.format.dtype_to_descr(embedder.dtype),
            },
        )
        for _, values in embedder.pieces():
            file.write(np.ascontiguousarray(values).tobytes())


def _safetensors(stage: Path, embedder: Embedder, rows: int, layer: str) -> None:
    lengths = np.array(embedder.source.lengths, dtype="<i8")
    size = rows * embedder.width * embedder.dtype.itemsize
    head = {
        "__metadata__": {
            "names": to_json(embedder.source.names),
            "layer": layer,
            "pool": embedder.pool,
        },
        "embeddings": {
            "dtype": "F64" if embedder.dtype.itemsize == 8 else "F32",
            "shape": [rows, embedder.width],
            "data_offsets": [0, size],
        },
        "lengths": {
            "dtype": "I64",
            "shape": [len(lengths)],
            "data_offsets": [size, size + lengths.nbytes],
        },
    }
    text = to_json(head).encode()
    text += b" " * (-len(text) % 8)
    with stage.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, values in embedder.pieces():
            file.write(np.ascontiguousarray(values).tobytes())
        file.write(lengths.tobytes())


def _require_pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            'embeddings in Parquet need pyarrow: pip install "gramian[genomics]".', name="pyarrow"
        ) from error
    return pyarrow


def _parquet(stage: Path, embedder: Embedder, rows: int, layer: str) -> None:
    arrow = _require_pyarrow()
    number = arrow.float64() if embedder.dtype.itemsize == 8 else arrow.float32()
    counted = "position" if embedder.pool == "none" else "length"
    schema = arrow.schema(
        [
            ("name", arrow.string()),
            (counted, arrow.int64()),
            ("embedding", arrow.list_(number, embedder.width)),
        ],
        metadata={"layer": layer, "pool": embedder.pool},
    )
    with arrow.parquet.ParquetWriter(stage, schema) as writer:
        for names, numbers, values in _row_groups(embedder):
            flat = arrow.array(values.reshape(-1), type=number)
            vectors = arrow.FixedSizeListArray.from_arrays(flat, embedder.width)
            columns = [arrow.array(names), arrow.array(numbers, type=arrow.int64()), vectors]
            writer.write_table(arrow.Table.from_arrays(columns, schema=schema))


def _row_groups(embedder: Embedder) -> Iterator[tuple[list[str], list[int], np.ndarray]]:
    """Yield the columns of many rows at once: names, positions or lengths, and vectors."""
    names: list[str] = []
    numbers: list[int] = []
    kept: list[np.ndarray] = []
    last, position = -1, 0
    for index, values in embedder.pieces():
        position = position if index == last else 0
        names += [embedder.source.names[index]] * len(values)
        if embedder.pool == "none":
            numbers += range(position, position + len(values))
        else:
            numbers.append(embedder.source.lengths[index])
        kept.append(values)
        last, position = index, position + len(values)
        if len(names) >= _ROWS:
            yield names, numbers, np.concatenate(kept)
            names, numbers, kept = [], [], []
    if names:
        yield names, numbers, np.concatenate(kept)
