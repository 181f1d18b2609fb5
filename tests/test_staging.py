"""Outputs are complete or absent."""

from pathlib import Path

import pytest

from gramian._staging import staged_directory, staged_file


def listing(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def test_directory_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out"
    with staged_directory(target) as stage:
        (stage / "file").write_text("text")
        assert not target.exists()
    assert listing(tmp_path) == {"new": None, "new/out": None, "new/out/file": b"text"}


@pytest.mark.parametrize("name", ["a" * 255, "é" * 127, "a" * 200 + "." + "b" * 54, ".json" * 51])
def test_a_name_may_be_as_long_as_the_file_system_accepts(tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    for text in ("first", "second"):
        with staged_directory(target, replace=True) as stage:
            (stage / "file").write_text(text)
    assert (target / "file").read_text() == "second"
    other = tmp_path / "files" / name
    other.parent.mkdir()
    with staged_file(other) as stage:
        stage.write_text("text")
    assert listing(other.parent) == {name: b"text"}


def test_two_long_names_have_two_stages(tmp_path: Path) -> None:
    with (
        staged_file(tmp_path / ("a" * 90 + "1.csv")) as one,
        staged_file(tmp_path / ("a" * 90 + "2.csv")) as other,
    ):
        assert one != other and one.suffix == ".csv"
        one.write_text("1")
        other.write_text("2")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with staged_directory(tmp_path / "new" / "out") as stage:
            (stage / "file").write_text("text")
            raise error("halfway")

    with pytest.raises(error, match="halfway"):
        fail()
    assert listing(tmp_path) == {}


def test_existing_directory_is_refused_before_anything_happens(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    before = listing(tmp_path)
    with pytest.raises(FileExistsError, match="exists already"), staged_directory(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert listing(tmp_path) == before


def test_replacement_keeps_the_old_directory_until_the_end(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with (
        pytest.raises(ValueError, match="halfway"),
        staged_directory(target, replace=True),
    ):
        raise ValueError("halfway")
    assert listing(tmp_path) == {"out": None, "out/old": b"old"}
    with staged_directory(target, replace=True) as stage:
        (stage / "new").write_text("new")
    assert listing(tmp_path) == {"out": None, "out/new": b"new"}


def test_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")

    def fail() -> None:
        with staged_file(target) as stage:
            stage.write_text("half")
            raise ValueError("halfway")

    with pytest.raises(ValueError, match="halfway"):
        fail()
    assert listing(tmp_path) == {"file.txt": b"old"}
    with staged_file(target) as stage:
        stage.write_text("new")
    assert listing(tmp_path) == {"file.txt": b"new"}
