"""Define Speech Commands (Warden, arXiv 1804.03209): recordings of 35 words, 1 second at 16 kHz.

The following is the same as in the experiments of S4 and RTF. The splits are the data set's own.
Short recordings are padded with zeros. The samples at each position are standardized with the
training set's mean and standard deviation at this position.
"""

from __future__ import annotations

import wave
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gramian.tasks._task import Description, Row, Task, register, require_sizes
from gramian.tasks.lra import require_folder

__all__ = ["SpeechCommands"]

SAMPLES = 16_000


@register("speech_commands")
@dataclass(frozen=True, kw_only=True)
class SpeechCommands(Task):
    """Recordings of words. The label of a recording is the number of its word in alphabetic order.

    Args:
        path: folder of the unpacked archive, with one folder per word, `validation_list.txt` and
            `testing_list.txt`.
        num_labels: number of words. It must equal the number of their folders.
        decimate: distance between the samples that are kept. With 1, all samples are kept; with 2,
            the rate is half, as in a published test.
        standardize: whether to standardize the samples. This requires one pass over the training
            set.
    """

    path: str
    num_labels: int = 35
    decimate: int = 1
    standardize: bool = True

    def __post_init__(self) -> None:
        require_sizes(self, "num_labels", "decimate")

    def description(self) -> Description:
        length = -(-SAMPLES // self.decimate)
        return Description("classification", length, input_size=1, num_labels=self.num_labels)

    def rows(self, split: str, seed: int) -> Iterator[Row]:
        files = self._files()
        mean, deviation = np.zeros(SAMPLES), np.ones(SAMPLES)
        if self.standardize:
            mean, deviation = _moments([file for file, _ in files["train"]])
        for file, label in files[split]:
            values = ((_read(file) - mean) / deviation)[:: self.decimate]
            yield {"input_values": values[:, None].astype(np.float32), "labels": label}

    def _files(self) -> dict[str, list[tuple[Path, int]]]:
        folder = require_folder(self.path, "it must be Speech Commands, unpacked")
        words = sorted(
            entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] not in "_."
        )
        if len(words) != self.num_labels:
            raise ValueError(
                f"{folder} holds {len(words)} words and num_labels is {self.num_labels}."
            )
        held_out = {
            name: split
            for split, list_ in (
                ("validation", "validation_list.txt"),
                ("test", "testing_list.txt"),
            )
            for name in (folder / list_).read_text(encoding="utf-8").split()
        }
        files: dict[str, list[tuple[Path, int]]] = {split: [] for split in self.splits}
        for label, word in enumerate(words):
            for file in sorted((folder / word).glob("*.wav")):
                files[held_out.get(f"{word}/{file.name}", "train")].append((file, label))
        return files


def _read(file: Path) -> np.ndarray:
    """Read a recording, (16000,) in [-1, 1)."""
    with wave.open(str(file)) as sound:
        if (sound.getnchannels(), sound.getsampwidth()) != (1, 2):
            raise ValueError(f"{file} must have one channel of 16 bits.")
        if sound.getframerate() != SAMPLES:
            raise ValueError(
                f"{file} must have {SAMPLES:,} samples a second; it has {sound.getframerate():,}."
            )
        samples = np.frombuffer(sound.readframes(SAMPLES), dtype="<i2")
    return np.pad(samples / 2.0**15, (0, SAMPLES - len(samples)))


def _moments(files: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    total, squares = np.zeros(SAMPLES), np.zeros(SAMPLES)
    for file in files:
        values = _read(file)
        total += values
        squares += values**2
    count = max(1, len(files))
    mean = total / count
    variance = (squares - count * mean**2) / max(1, count - 1)
    return mean, np.sqrt(np.maximum(variance, 0)) + 1e-5
