"""Language modelling: windows hold one document, every token is asked for once."""

from __future__ import annotations

import gzip
import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("datasets")

from gramian import tasks
from gramian.tasks.tokenized import windows

LENGTHS = [1, 2, 3, 7, 8, 9, 63, 64, 65]


def documents() -> list[np.ndarray]:
    """Documents whose tokens say which document they are from and where in it."""
    return [1000 * (index + 1) + np.arange(length) for index, length in enumerate(LENGTHS)]


@pytest.mark.pairs
@pytest.mark.parametrize("length", [1, 2, 8, 63])
@pytest.mark.parametrize("end", [None, 7])
@pytest.mark.parametrize("pieces", [None, 1, 5])
def test_windows_of_documents(length: int, end: int | None, pieces: int | None) -> None:
    def stream() -> Any:
        for document in documents():
            if pieces is None:
                yield document
            else:
                yield iter([document[i : i + pieces] for i in range(0, len(document), pieces)])

    asked: dict[int, list[int]] = {index + 1: [] for index in range(len(LENGTHS))}
    for row in windows(stream(), length, "document", end):
        ids, labels = row["input_ids"].tolist(), row["labels"].tolist()
        assert 1 <= len(ids) == len(labels) <= length
        (owner,) = {token // 1000 for token in ids}
        assert ids[1:] == labels[:-1]
        for token, label in zip(ids, labels, strict=True):
            assert label in (token + 1, end)
        asked[owner] += labels
    for index, document in enumerate(documents(), 1):
        expected = document[1:].tolist() + ([] if end is None else [end])
        assert asked[index] == expected  # each once, in order, but for the first


@pytest.mark.parametrize("length", [1, 8, 63])
def test_concatenated_documents(length: int) -> None:
    stream = np.concatenate([np.append(document, 7) for document in documents()])
    rows = list(windows(iter(documents()), length, "concatenate", 7))
    assert all(len(row["input_ids"]) == length for row in rows)
    ids = np.concatenate([row["input_ids"] for row in rows])
    labels = np.concatenate([row["labels"] for row in rows])
    assert np.array_equal(ids, stream[: len(ids)])
    assert np.array_equal(labels, stream[1 : len(ids) + 1])
    assert len(stream) - 1 - len(ids) < length


def test_files_are_read_as_bytes(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes("naïve".encode())
    (tmp_path / "a.txt").write_bytes(b"one<|>two<|>")
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "three"}) + "\n\n")
    pattern = [str(tmp_path / "*.txt"), str(tmp_path / "c.jsonl")]
    data = tasks.load("text", train=pattern, separator="<|>", length=64)
    texts = [bytes(row["input_ids"].tolist()).decode() for row in data]
    assert texts == ["one", "two", "naïve", "three"]
    assert all(row["labels"][-1] == 257 for row in data)
    with pytest.raises(ValueError, match="has no test files"):
        tasks.load("text", "test", train=pattern)
    with pytest.raises(FileNotFoundError, match="no file matches"):
        tasks.load("text", train=str(tmp_path / "*.md"))
    stream = tasks.load("text", train=pattern, separator="<|>", length=64, streaming=True)
    assert [row["input_ids"].tolist() for row in stream] == [
        row["input_ids"].tolist() for row in data
    ]


def test_a_corpus_and_a_tokenizer_from_folders(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    from gramian.models import ByteTokenizer

    corpus = DatasetDict(
        {
            "train": Dataset.from_dict({"text": ["abc", "", "de"]}),
            "validation": Dataset.from_dict({"text": ["fg"]}),
        }
    )
    corpus.save_to_disk(str(tmp_path / "corpus"))
    ByteTokenizer().save_pretrained(tmp_path / "tokenizer")
    folders = {"corpus": str(tmp_path / "corpus"), "tokenizer": str(tmp_path / "tokenizer")}
    data = tasks.load("text", **folders)
    assert [row["input_ids"].tolist() for row in data] == [list(b"abc"), list(b"de")]
    assert [row["labels"].tolist() for row in data] == [[*b"bc", 257], [*b"e", 257]]
    assert tasks.load("text", "validation", **folders)[0]["input_ids"].tolist() == list(b"fg")
    description = tasks.build("text", **folders).description()
    assert (description.vocab_size, description.pad_token_id) == (259, 258)


def test_python_documentation_is_split_by_topics() -> None:
    pytest.importorskip("pydoc_data.topics")
    task = tasks.build("python_documentation")
    parts = {
        split: [document.text for document in task.documents(split)]  # type: ignore[attr-defined]
        for split in task.splits
    }
    sizes = {split: sum(map(len, part)) for split, part in parts.items()}
    total = sum(sizes.values())
    assert 0.85 < sizes["train"] / total < 0.95
    assert min(sizes.values()) > 0.02 * total
    everything = [text for part in parts.values() for text in part]
    assert len(set(everything)) == len(everything)


@pytest.mark.filterwarnings("ignore:.*ambiguous codes")
@pytest.mark.parametrize("zipped", [False, True])
def test_fasta(tmp_path: Path, zipped: bool) -> None:
    text = b">chr1 first\nACGTN\nacgt\n>chr2\nRY\nA\n>chr3\n\n>chr4\nGG\n"
    file = tmp_path / ("genome.fa.gz" if zipped else "genome.fa")
    file.write_bytes(gzip.compress(text) if zipped else text)
    settings = {"train": str(file), "validation_records": ["chr2"], "length": 4}
    train = tasks.load("fasta", **settings)
    assert [row["input_ids"].tolist() for row in train] == [
        [7, 8, 9, 10],
        [11, 7, 8, 9],
        [9],
    ]
    assert [row["labels"].tolist() for row in train] == [[8, 9, 10, 11], [7, 8, 9, 10], [9]]
    held_out = tasks.load("fasta", "validation", **settings)
    assert [row["input_ids"].tolist() for row in held_out] == [[6, 6]]
    with pytest.raises(ValueError, match="has no test files"):
        tasks.load("fasta", "test", **settings)
    broken = tmp_path / "broken.fa"
    broken.write_text("ACGT\n")
    with pytest.raises(ValueError, match="is not FASTA"):
        tasks.load("fasta", train=str(broken))


def test_digits_are_all_there_once() -> None:
    from sklearn.datasets import load_digits

    parts = [tasks.load("digits", split) for split in tasks.SPLITS]
    assert [len(part) for part in parts] == [1257, 180, 360]
    rows = [row for part in parts for row in part]
    got = sorted((row["input_values"].numpy().tobytes(), int(row["labels"])) for row in rows)
    data = load_digits()
    images = (data.images.reshape(-1, 64, 1) / 8 - 1).astype(np.float32)
    wanted = sorted(
        (image.tobytes(), int(label)) for image, label in zip(images, data.target, strict=True)
    )
    assert got == wanted


def test_speech_commands(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    sounds = {}
    for word in ("no", "yes"):
        (tmp_path / word).mkdir()
        for index in range(4):
            samples = random.integers(-(2**15), 2**15, size=16_000 - 100 * index, dtype=np.int16)
            sounds[f"{word}/{index}.wav"] = np.pad(samples, (0, 100 * index)) / 2**15
            with wave.open(str(tmp_path / word / f"{index}.wav"), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(16_000)
                file.writeframes(samples.tobytes())
    (tmp_path / "_background_noise_").mkdir()
    (tmp_path / "validation_list.txt").write_text("no/0.wav\n")
    (tmp_path / "testing_list.txt").write_text("yes/1.wav\n")
    settings = {"path": str(tmp_path), "num_labels": 2}
    train = [name for name in sounds if name not in ("no/0.wav", "yes/1.wav")]
    known = np.stack([sounds[name] for name in train])
    data = tasks.load("speech_commands", "train", **settings)
    assert [int(row["labels"]) for row in data] == [0, 0, 0, 1, 1, 1]
    values = np.stack([row["input_values"].numpy()[:, 0] for row in data])
    expected = (known - known.mean(0)) / (known.std(0, ddof=1) + 1e-5)
    np.testing.assert_allclose(values, expected, atol=1e-4)
    row = tasks.load("speech_commands", "test", decimate=2, standardize=False, **settings)[0]
    assert row["labels"] == 1
    np.testing.assert_allclose(row["input_values"][:, 0], sounds["yes/1.wav"][::2], atol=1e-7)
    with pytest.raises(ValueError, match="holds 2 words and num_labels is 35"):
        tasks.load("speech_commands", path=str(tmp_path))


def test_the_split_that_is_measured_is_one_with_files() -> None:
    from gramian.tasks import choose_split

    assert choose_split(tasks.build("text", train="a", test="b"), "text", None) == "test"
    assert choose_split(tasks.build("text", train="a", validation="b"), "text", None) == (
        "validation"
    )
    named = tasks.build("fasta", train="a", validation_records="one", test_records="two")
    assert choose_split(named, "fasta", None) == "test"
    named = tasks.build("fasta", train="a", validation_records="one")
    assert choose_split(named, "fasta", None) == "validation"
    assert choose_split(named, "fasta", "test") == "test"
