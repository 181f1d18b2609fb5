"""ListOps and Pathfinder by generator; Text, Retrieval and Image from files made here."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

import numpy as np
import pytest

from gramian import tasks
from gramian.tasks.listops import ListOps, evaluate
from gramian.tasks.pathfinder import Pathfinder

WORDS = {13: "[MIN", 14: "[MAX", 15: "[MED", 16: "[SM", 17: "]"}
WORDS |= {3 + digit: str(digit) for digit in range(10)}


def value(words: list[str]) -> int:
    """By recursive descent on the words, as one would by hand."""
    word = words.pop(0)
    if word.isdigit():
        return int(word)
    arguments = []
    while words[0] != "]":
        arguments.append(value(words))
    words.pop(0)
    if word == "[MED":
        return int(statistics.median(arguments))
    return {"[MIN": min, "[MAX": max, "[SM": lambda a: sum(a) % 10}[word](arguments)


def test_values_of_known_expressions() -> None:
    ids = {word: token for token, word in WORDS.items()}
    for text, expected in (
        ("[MAX 4 [MIN 2 3 ] 1 ]", 4),
        ("[SM 9 9 [MED 1 2 ] ]", 9),
        ("[MED 5 8 9 0 ]", 6),
        ("[MIN 7 7 ]", 7),
    ):
        assert evaluate([ids[word] for word in text.split()]) == expected


def test_listops() -> None:
    task = ListOps(train_examples=60, min_length=20, max_length=120, max_depth=4, max_arguments=5)
    labels, seen = [], set()
    for row in task.rows("train", 0):
        tokens = row["input_ids"].tolist()
        assert tokens[-1] == 2
        words = [WORDS[token] for token in tokens[:-1]]
        assert 20 < len(words) < 120
        depth = deepest = 0
        for word in words:
            depth += word.startswith("[") - (word == "]")
            deepest = max(deepest, depth)
        assert deepest <= 3  # digits stand at depth 4
        assert value(words) == row["labels"] and not words
        labels.append(row["labels"])
        seen.add(tuple(tokens))
    assert len(seen) == 60
    assert len(set(labels)) >= 8


def test_arguments_of_listops_are_drawn_as_published() -> None:
    """A quarter of the arguments below the last level are lists; lists have 2 to 5 arguments."""
    task = ListOps(
        train_examples=400, min_length=3, max_length=10_000, max_depth=3, max_arguments=5
    )
    nested = arguments = 0
    counts = set()
    for row in task.rows("train", 1):
        level, size, sizes = 0, 0, []
        for token in row["input_ids"].tolist()[:-1]:
            if level == 1 and token != 17:
                arguments += 1
                nested += token >= 13
            if 13 <= token < 17:
                sizes.append(size)
                size, level = 0, level + 1
            elif token == 17:
                counts.add(size)
                size, level = sizes.pop() + 1, level - 1
            else:
                size += 1
    assert counts == {2, 3, 4, 5}
    assert nested / arguments == pytest.approx(0.25, abs=0.06)


def test_pathfinder_images() -> None:
    task = Pathfinder(train_examples=12, path_length=6)
    labels = []
    for row in task.rows("train", 3):
        values = row["input_values"]
        assert values.shape == (1024, 1) and values.min() == -1 and values.max() == 1
        assert 0.05 < (values > 0).mean() < 0.6
        labels.append(row["labels"])
    assert set(labels) == {0, 1}


@pytest.mark.parametrize("label", [0, 1])
def test_the_discs_of_pathfinder_lie_where_the_label_says(label: int) -> None:
    """Without distractors, a disc is where the image is bright over 3 × 3 pixels; the ends that
    belong to one path (label 1) or to two (label 0) hold the two discs.
    """
    task = Pathfinder(path_length=6, distractors=0, path_contrast=0.25)
    random = np.random.default_rng(0)
    used = set()
    for _ in range(6):
        image, ends = task.picture(random, label)

        def disc(point: tuple[int, int], image: np.ndarray = image) -> bool:
            return bool(image[point] > 0.9)

        marked = [[disc(point) for point in path] for path in ends]
        if any(
            abs(one[0] - other[0]) + abs(one[1] - other[1]) < 4
            for one, other in [(ends[0][0], ends[1][1]), (ends[1][0], ends[0][1])]
            + [(path[0], path[1]) for path in ends]
            + [(ends[0][1], ends[1][1])]
        ):
            continue  # a disc that covers a neighbouring end tells nothing
        assert sum(map(sum, marked)) == 2
        together = marked[0] in ([True, True], [False, False])
        assert together == bool(label)
        assert sum(path[0] for path in marked) == sum(path[1] for path in marked) == 1
        used.add(marked[0][0])
        seeds = np.hypot(*(np.array(ends[0][0]) - np.array(ends[1][0])))
        assert seeds == pytest.approx(7, abs=1)
    assert used


def test_text(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name, text in (("neg", "Bäd"), ("pos", "A good one" * 9)):
            (tmp_path / part / name).mkdir(parents=True)
            (tmp_path / part / name / "0_1.txt").write_text(text, encoding="utf-8")
    data = tasks.load("lra/text", path=str(tmp_path), length=20)
    first, second = data[0], data[1]
    assert (first["labels"], second["labels"]) == (0, 1)
    assert first["input_ids"].tolist() == [byte + 1 for byte in "Bäd".encode()]
    assert len(second["input_ids"]) == 20
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        tasks.load("lra/text", path=str(tmp_path / "none"))


def test_retrieval(tmp_path: Path) -> None:
    for part in ("train", "eval", "test"):
        line = f'1.0\ta\tb\tone {part}\t"two"\n0.0\tc\td\tx\ty\n'
        (tmp_path / f"new_aan_pairs.{part}.tsv").write_text(line)
    row = tasks.load("lra/retrieval", "validation", path=str(tmp_path))[0]
    assert row["labels"] == 1
    assert bytes(row["input_ids"].sub(1).tolist()) == b"one eval"
    assert bytes(row["input_ids_2"].sub(1).tolist()) == b'"two"'
    (tmp_path / "new_aan_pairs.train.tsv").write_text("1.0\tx\n")
    with pytest.raises(ValueError, match=r"line 1: five cells are needed; got 2"):
        tasks.load("lra/retrieval", path=str(tmp_path))


def test_image(tmp_path: Path) -> None:
    from PIL import Image

    random = np.random.default_rng(0)
    records = random.integers(256, size=(60, 3073), dtype=np.uint8)
    records[:, 0] = np.arange(60) % 10
    for index in range(5):
        records[10 * index : 10 * index + 10].tofile(tmp_path / f"data_batch_{index + 1}.bin")
    records[50:].tofile(tmp_path / "test_batch.bin")
    test = tasks.load("lra/image", "test", path=str(tmp_path))
    for record, row in zip(records[50:], test, strict=True):
        pixels = record[1:].reshape(3, 32, 32).transpose(1, 2, 0)
        grey = np.asarray(Image.fromarray(pixels).convert("L"), dtype=np.float64).reshape(1024, 1)
        np.testing.assert_allclose(row["input_values"], (grey - 122.6) / 61, atol=1e-5)
        assert row["labels"] == record[0]
    train = tasks.load("lra/image", "train", path=str(tmp_path))
    held_out = tasks.load("lra/image", "validation", path=str(tmp_path))
    assert (len(train), len(held_out)) == (45, 5)
    both = {row["input_values"].numpy().tobytes() for part in (train, held_out) for row in part}
    assert len(both) == 50


@pytest.mark.parametrize(
    "settings", [{"dash": 20}, {"size": 29, "path_length": 40}, {"path_length": 80}]
)
def test_settings_without_a_picture_are_refused(
    settings: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gramian.tasks.pathfinder.ATTEMPTS", 400)
    monkeypatch.setattr("gramian.tasks.pathfinder.DASHES", 1_000)
    task = tasks.build("lra/pathfinder", **settings)
    with pytest.raises(ValueError, match=r"do not fit into \d+ × \d+ pixels: \d+ attempts"):
        next(iter(task.rows("train", 0)))


def test_reviews_of_one_kind_are_refused(tmp_path: Path) -> None:
    for name in ("neg", "pos"):
        (tmp_path / "train" / name).mkdir(parents=True)
    (tmp_path / "train" / "neg" / "a.txt").write_text("bad")
    with pytest.raises(FileNotFoundError, match="reviews"):
        next(iter(tasks.build("lra/text", path=str(tmp_path)).rows("train", 0)))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("2\ta\tb\tx\ty\n", "line 1: the label must be 0 or 1; got '2'"),
        ("0.5\ta\tb\tx\ty\n", "line 1: the label must be 0 or 1; got '0.5'"),
        ("1\ta\tb\t\ty\n", "line 1: one of the two texts is empty"),
    ],
)
def test_pairs_that_are_none_are_refused(line: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "new_aan_pairs.train.tsv").write_text(line)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        next(iter(tasks.build("lra/retrieval", path=str(tmp_path)).rows("train", 0)))


@pytest.mark.parametrize("count", [0, 1])
def test_images_of_other_labels_are_refused(count: int, tmp_path: Path) -> None:
    np.full((count, 3073), 200, dtype=np.uint8).tofile(tmp_path / "test_batch.bin")
    with pytest.raises(ValueError, match="it is empty, or a label is above 9"):
        next(iter(tasks.build("lra/image", path=str(tmp_path)).rows("test", 0)))
