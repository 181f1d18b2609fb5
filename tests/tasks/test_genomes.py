"""FASTA has one reading, whatever its line ends, case, comments and compression are."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import tracemalloc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gramian import tasks
from gramian.tasks import genomes, read_documents


def parsed(data: bytes) -> list[tuple[str, str]]:
    """Line by line: the definition that the reader must equal."""
    found: list[tuple[str, str]] = []
    for line in re.split(r"\r\n|\r|\n", data.decode().removeprefix("\ufeff")):
        if line.startswith(">"):
            found.append(((line[1:].split() or [""])[0], ""))
        elif not line.startswith(";") and line.strip():
            name, sequence = found[-1]
            letters = re.sub(r"[\s\d]", "", line).upper().replace("U", "T")
            found[-1] = (name, sequence + letters)
    return found


def read(data: bytes, size: int = 2**20) -> list[tuple[str, str]]:
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    return [
        (name, b"".join(sequence).decode()) for name, sequence in genomes.records(pieces, "x.fa")
    ]


def drawn(random: np.random.Generator) -> bytes:
    """A file of a few records in which everything that is allowed may happen."""
    end = str(random.choice(["\n", "\r\n", "\r"]))
    lines = [""] * int(random.integers(2))
    for index in range(int(random.integers(1, 6))):
        lines.append(">" + str(random.choice(["", f"r{index}", f" chr{index} of > some; kind"])))
        for _ in range(int(random.integers(5))):
            kind = random.integers(8)
            letters = "".join(random.choice([*"ACGTNacgtnUu"], size=random.integers(0, 9)))
            if kind == 0:
                letters = ";" + letters
            elif kind == 1:
                letters = f"  {index}1 {letters}\t{letters} "
            lines.append(letters)
    lines.append(">last")
    lines.append("ACGT")
    return (end.join(lines) + end * int(random.integers(3))).encode()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 2**20])
def test_any_file_cut_anywhere_is_what_its_lines_say(size: int) -> None:
    random = np.random.default_rng(size)
    for _ in range(200):
        data = drawn(random)
        assert read(data, size) == parsed(data), data
        assert list(genomes.names([data], "x.fa")) == [name for name, _ in parsed(data)]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\xef\xbb\xbf>a\nACGT\n", [("a", "ACGT")]),
        (b"\n\n \n>a\nACGT\n", [("a", "ACGT")]),
        (b"; comment\n>a\n;more\nAC\n;\nGT", [("a", "ACGT")]),
        (b">a\r\nACGT\r\nAC\r\n>b\r\nGG\r\n", [("a", "ACGTAC"), ("b", "GG")]),
        (b">a\rACGT\rAC\r>b\rGGTT\r", [("a", "ACGTAC"), ("b", "GGTT")]),
        (b">\nACGT\n", [("", "ACGT")]),
        (b">a\n>b\nACGT\n", [("b", "ACGT")]),
        (b">a\n1 acgt acgu 8\n9 nn\n", [("a", "ACGTACGTNN")]),
        (b">a ACGT\nA\n>a ACGT\nC", [("a", "A"), ("a", "C")]),
        (b">a\nT0123\n", None),
        (b">a\nACGT>\n", None),
        (b">a\nAC>GT\n", None),
        (b"#c\n>a\nACGT\n", None),
        (b"ACGT\n", None),
        (b"", None),
        (b"\n \n", None),
        (b";only a comment\n", None),
        (b">a\n\n>b\n", None),
        (b">a", None),
        (b"@a\nACGT\n+\nIIII\n", None),
        (b">p\nMKVLAAGIVGLCAKAYLEEQPF\n", None),
        (b">p\nACGT\xc3\xa9\n", None),
        (b">p\nAC\0GT\n", None),
        (b"\xff\xfe>\0a\0\n\0A\0\n\0", None),
        (b"PK\x03\x04 zip", None),
    ],
)
def test_odd_files(data: bytes, expected: list[tuple[str, str]] | None, tmp_path: Path) -> None:
    file = tmp_path / "x.fa"
    file.write_bytes(data)
    if expected is not None:
        documents = list(read_documents(file))
        assert [(document.name, document.text) for document in documents] == expected
        assert all(document.genome for document in documents)
        return
    with pytest.raises(ValueError, match=re.escape(str(file))) as caught:
        list(read_documents(file))
    with pytest.raises(ValueError, match=re.escape(str(file))):
        list(tasks.build("fasta", train=str(file)).rows("train", 0))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"@a\nACGT\n+\nIIII\n", "is FASTQ, not FASTA"),
        (b">p1\nMKVLE\n", "record 'p1': 'L', 'E' are no codes of nucleotides but of amino acids"),
        (b">a\nAC>GT\n", "record 'a': '>' is no code of nucleotides"),
        (b">a\nT0123\n", "record 'a': a digit follows a letter in 'T0'"),
        (b">a\n12 ACG ACGL\n", "record 'a': 'L' is no code of nucleotides but of amino acids"),
        (b"LOCUS  X\n", "is not FASTA: it begins with 'LOCUS  X'"),
        (b">a\n", "holds no bases"),
    ],
)
def test_refusals_say_what_was_found(data: bytes, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        read(data)
    with pytest.raises(ValueError, match=r"FASTA|nucleotides|bases"):  # blocks of one byte
        read(data, 1)


@pytest.mark.parametrize(
    ("data", "codes", "sentence"),
    [
        (b">a\nAC-GT*\n", "AC-GT*", "x.fa has 1 '*', 1 '-' among 6 letters"),
        (b">a\nACRYSWKMBDHVX\n", "ACRYSWKMBDHVX", "11 ambiguous codes among 13 letters"),
        (b">a\n" + b"ACGT" * 20 + b"RY\n", "ACGT" * 20 + "RY", None),
    ],
)
def test_what_is_unknown_keeps_its_place(data: bytes, codes: str, sentence: str | None) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert read(data) == [("a", codes)]
    assert [sentence] * (sentence is not None) == [
        sentence for one in caught if sentence is not None and sentence in str(one.message)
    ]
    assert len(caught) == (sentence is not None)


@pytest.mark.parametrize(
    "pack",
    [
        lambda data: data,
        gzip.compress,
        lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:]),
        bz2.compress,
        lambda data: bz2.compress(data[:9]) + bz2.compress(data[9:]),
        lzma.compress,
        lambda data: gzip.compress(b"\xef\xbb\xbf" + data),
    ],
)
@pytest.mark.parametrize("name", ["x.fa", "x.FNA.gz", "x.fasta.bgz", "x.txt", "x"])
def test_compression_is_told_by_content(pack: Any, name: str, tmp_path: Path) -> None:
    data = b">a\nACGT\nacg\n>b\nGG\n"
    (tmp_path / name).write_bytes(pack(data))
    documents = list(read_documents(tmp_path / name))
    assert [(one.name, one.text) for one in documents] == [("a", "ACGTACG"), ("b", "GG")]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_file_cut_short_is_refused(pack: Any, tmp_path: Path) -> None:
    letters = np.random.default_rng(0).choice([*b"ACGT"], size=5000).astype(np.uint8).tobytes()
    (tmp_path / "x.fa.gz").write_bytes(pack(b">a\n" + letters)[:-20])
    with pytest.raises(ValueError, match="is damaged or cut short"):
        list(read_documents(tmp_path / "x.fa.gz"))


def test_memory_does_not_grow_with_a_record(tmp_path: Path) -> None:
    with (tmp_path / "x.fa").open("wb") as file:
        file.write(b">chromosome\n")
        for _ in range(320):
            file.write(b"ACGTacgtnn" * 10_000 + b"\n")
    task = tasks.build("fasta", train=str(tmp_path / "x.fa"), length=100_000)
    tracemalloc.start()
    try:
        rows = sum(1 for _ in task.rows("train", 0))
        assert rows == 320
        assert tracemalloc.get_traced_memory()[1] < 48e6  # a block in ids of 8 bytes, a few times
    finally:
        tracemalloc.stop()


@pytest.fixture
def genome(tmp_path: Path) -> Path:
    file = tmp_path / "genome.fa"
    file.write_text(">chr1\nACGTACG\n>chr2 x\nTTTT\n>chr3\nGGG\n>7\nCCCC\n")
    return file


def lengths(task: Any) -> dict[str, list[int]]:
    def of(split: str) -> Iterator[int]:
        for row in task.rows(split, 0):
            yield len(row["input_ids"]) + 1

    return {split: list(of(split)) for split in ("train", "validation", "test")}


def test_records_are_held_out_by_name(genome: Path) -> None:
    task = tasks.build("fasta", train=str(genome), validation_records="chr2", test_records=[7])
    assert lengths(task) == {"train": [7, 3], "validation": [4], "test": [4]}


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("key", ["validation_records", "test_records"])
def test_a_misspelt_record_does_not_stay_in_training(genome: Path, key: str, split: str) -> None:
    other = "test_records" if key == "validation_records" else "validation_records"
    task = tasks.build("fasta", train=str(genome), **{key: ["chr2", "chr22"], other: "chr1"})
    with pytest.raises(ValueError, match=r"called 'chr22'\. Did you mean 'chr2'") as caught:
        next(iter(task.rows(split, 0)))
    assert "There are 4 names: 'chr1', 'chr2', 'chr3', '7'." in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "give train, validation or test"),
        ({"test": "x", "validation_records": ["a"]}, "records of train; give train too"),
        ({"train": "x", "validation": "y", "validation_records": "a"}, "not both"),
        ({"train": "x", "validation_records": "a", "test_records": ["b", "a"]}, "'a' is named in"),
        ({"train": "x", "validation_records": [1.5]}, "must be names of records"),
        ({"train": "x", "validation_records": True}, "must be names of records"),
    ],
)
def test_settings_that_contradict(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        tasks.build("fasta", **settings)


def test_records_of_one_name_are_held_out_together(tmp_path: Path) -> None:
    (tmp_path / "x.fa").write_text(">a x\nACGT\n>b\nGGGGG\n>a y\nTTT\n")
    task = tasks.build("fasta", train=str(tmp_path / "x.fa"), validation_records="a")
    with pytest.warns(UserWarning, match="2 records of the training files are called 'a'"):
        assert [len(row["labels"]) for row in task.rows("train", 0)] == [4]
    with pytest.warns(UserWarning, match="all of them are held out"):
        assert [len(row["labels"]) for row in task.rows("validation", 0)] == [3, 2]


def test_a_file_of_two_patterns_is_read_once(genome: Path) -> None:
    patterns = [str(genome), str(genome.parent / "*.fa")]
    task = tasks.build("fasta", train=patterns)
    assert [len(row["labels"]) for row in task.rows("train", 0)] == [6, 3, 2, 3]


@pytest.mark.parametrize("name", ["fasta", "text"])
def test_files_of_training_and_of_a_test_are_told(genome: Path, name: str) -> None:
    task = tasks.build(name, train=str(genome), test=str(genome.parent / "*"))
    with pytest.warns(UserWarning, match="1 of the test files are training files too"):
        next(iter(task.rows("train", 0)))
