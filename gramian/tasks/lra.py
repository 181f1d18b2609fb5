"""Define Text, Retrieval and Image of the Long Range Arena (arXiv 2011.04006), from local files.

Text and Retrieval are read as bytes, as in the character-level tasks of the Arena. The id of a byte
is its value plus 1, and the id 0 is padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gramian.tasks._task import Description, Row, Task, register, require_sizes

__all__ = ["Image", "Retrieval", "Text"]

BYTES = 257
_LABELS = {b"0": 0, b"1": 1, b"0.0": 0, b"1.0": 1}


def byte_ids(text: bytes, length: int) -> np.ndarray:
    """Return the ids of the first `length` bytes of a text."""
    return np.frombuffer(text[:length], dtype=np.uint8).astype(np.int64) + 1


def require_folder(path: str | Path, what: str) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; {what}.")
    return folder


@register("lra/text")
@dataclass(frozen=True, kw_only=True)
class Text(Task):
    """The task of telling positive (1) from negative (0) IMDb reviews.

    As published, the validation split is the test set.

    Args:
        path: the folder `aclImdb` of the data set's archive, with `train/pos/*.txt` and so on.
        length: number of bytes to read of each review.
    """

    path: str
    length: int = 4096

    def __post_init__(self) -> None:
        require_sizes(self, "length")

    def description(self) -> Description:
        return Description("classification", self.length, vocab_size=BYTES, num_labels=2)

    def rows(self, split: str, seed: int) -> Iterator[Row]:
        folder = require_folder(self.path, "it must be aclImdb, unpacked")
        part = "train" if split == "train" else "test"
        kinds = [sorted((folder / part / name).glob("*.txt")) for name in ("neg", "pos")]
        if not all(kinds):
            raise FileNotFoundError(
                f"there must be reviews *.txt in neg and pos of {folder / part}."
            )
        for label, files in enumerate(kinds):
            for file in files:
                text = file.read_bytes()
                if text:
                    yield {"input_ids": byte_ids(text, self.length), "labels": label}


@register("lra/retrieval")
@dataclass(frozen=True, kw_only=True)
class Retrieval(Task):
    """The task of saying whether one of two ACL papers cites the other (1) or does not (0).

    The papers are from the ACL Anthology Network.

    Args:
        path: folder of the Arena's release with the files `new_aan_pairs.train.tsv`,
            `new_aan_pairs.eval.tsv` and `new_aan_pairs.test.tsv`. Their tab-separated columns are a
            label, two names and two texts.
        length: number of bytes to read of each paper.
    """

    path: str
    length: int = 4000

    def __post_init__(self) -> None:
        require_sizes(self, "length")

    def description(self) -> Description:
        return Description("pairs", self.length, vocab_size=BYTES, num_labels=2)

    def rows(self, split: str, seed: int) -> Iterator[Row]:
        folder = require_folder(self.path, "it must hold new_aan_pairs.train.tsv and its kin")
        part = "eval" if split == "validation" else split
        file = folder / f"new_aan_pairs.{part}.tsv"
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                cells = line.rstrip(b"\r\n").split(b"\t")
                if len(cells) != 5:
                    raise ValueError(
                        f"{file}, line {number}: five cells are needed; got {len(cells)}."
                    )
                if cells[0] not in _LABELS:
                    raise ValueError(
                        f"{file}, line {number}: the label must be 0 or 1; got "
                        f"{cells[0].decode(errors='replace')!r}."
                    )
                if not (cells[3] and cells[4]):
                    raise ValueError(f"{file}, line {number}: one of the two texts is empty.")
                yield {
                    "input_ids": byte_ids(cells[3], self.length),
                    "input_ids_2": byte_ids(cells[4], self.length),
                    "labels": _LABELS[cells[0]],
                }


@register("lra/image")
@dataclass(frozen=True, kw_only=True)
class Image(Task):
    """The task of classifying CIFAR-10 images in gray, read pixel by pixel.

    The gray values are standardized with the published mean and standard deviation.

    Args:
        path: the folder `cifar-10-batches-bin` of the data set's binary version.
        validation: share of the training images that form the validation split, between 0 and 1.
        split_seed: seed of the random choice of the validation images.
    """

    path: str
    validation: float = 0.1
    split_seed: int = 42

    def __post_init__(self) -> None:
        if not 0 < self.validation < 1:
            raise ValueError(f"validation must be a share between 0 and 1; got {self.validation}.")

    def description(self) -> Description:
        return Description("classification", 1024, input_size=1, num_labels=10)

    def rows(self, split: str, seed: int) -> Iterator[Row]:
        folder = require_folder(self.path, "it must be CIFAR-10's binary version, unpacked")
        if split == "test":
            records = self._read(folder / "test_batch.bin")
        else:
            files = [folder / f"data_batch_{index}.bin" for index in range(1, 6)]
            records = np.concatenate([self._read(file) for file in files])
            order = np.random.default_rng(self.split_seed).permutation(len(records))
            held_out = round(self.validation * len(records))
            chosen = order[:held_out] if split == "validation" else order[held_out:]
            records = records[chosen]
        for record in records:
            red, green, blue = record[1:].astype(np.int64).reshape(3, 1024)
            # This conversion to gray and its rounding are those of image libraries (ITU-R 601).
            gray = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
            values = (gray / 255 - 122.6 / 255) / (61.0 / 255)
            yield {"input_values": values[:, None].astype(np.float32), "labels": int(record[0])}

    @staticmethod
    def _read(file: Path) -> np.ndarray:
        data = np.fromfile(file, dtype=np.uint8)
        if len(data) % 3073:
            raise ValueError(f"{file} is not made of records of 3,073 bytes.")
        records = data.reshape(-1, 3073)
        if len(records) == 0 or records[:, 0].max() > 9:
            raise ValueError(f"{file} is not CIFAR-10's: it is empty, or a label is above 9.")
        return records
