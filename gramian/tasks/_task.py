"""Define the interface of tasks: their settings, their descriptions for models, and their rows."""

from __future__ import annotations

import dataclasses
import os
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from gramian._checks import check_integers
from gramian._extras import require
from gramian._nearest import unknown
from gramian.tasks.documents import find_files
from gramian.tasks.kinds import Column, find_kind

if TYPE_CHECKING:
    import datasets

__all__ = [
    "SPLITS",
    "Description",
    "GeneratedTask",
    "Row",
    "Task",
    "build",
    "choose_split",
    "load",
    "names",
    "register",
    "require_files",
    "require_patterns",
    "require_sizes",
    "settings",
]

SPLITS = ("train", "validation", "test")
"""The names of the splits. A task may have only some of them."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Description:
    """The inputs and outputs that a model for a task needs.

    Attributes:
        kind: name of the kind of task, a key of `KINDS`. The labels of `"tokens"` are a token id at
            every position; of `"classification"`, one class per sequence; of
            `"token_classification"`, one of `num_labels` classes at every position; of `"pairs"`,
            one class for two sequences, `input_ids` and `input_ids_2`; of `"signal"`, real numbers
            at every position; and of `"regression"`, real numbers per sequence. In
            `"reconstruction"`, the whole input is decoded from its last position. `register_kind`
            adds further kinds.
        length: number of positions of the longest sequence.
        vocab_size: number of token ids, or None if the inputs are `input_values`.
        num_labels: number of classes. For `"signal"` it is the number of real numbers per position,
            and for `"regression"` the number of real numbers per sequence. For `"tokens"` and
            `"reconstruction"`, whose classes are the token ids, it is None.
        input_size: number of features of `input_values` at each position, or None if the inputs are
            token ids.
        pad_token_id: id that pads `input_ids`. Padding is masked, so any id works.
        text: whether ids 0 to 255 are bytes of text, as in `gramian.models.ByteTokenizer`.
    """

    kind: str
    length: int
    vocab_size: int | None = None
    num_labels: int | None = None
    input_size: int | None = None
    pad_token_id: int = 0
    text: bool = False


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A task with its settings. The fields of a subclass are the settings of the task.

    Subclasses implement `description` and `rows`. `published` maps names to settings from the
    literature. The defaults of the fields also come from the literature.
    """

    splits: ClassVar[tuple[str, ...]] = SPLITS
    published: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @abstractmethod
    def description(self) -> Description:
        """Return the inputs and outputs that a model for the task needs."""

    @abstractmethod
    def rows(self, split: str, seed: int) -> Iterator[Row]:
        """Yield the rows of a split, which are dictionaries of arrays.

        A row has `labels`, and inputs as its kind of task requires: `input_ids` (length,) or
        `input_values` (length, input_size).
        """

    def tokens_of(self, tokenizer: Any) -> Task:
        """Return the same task with the token ids of a model's own tokenizer.

        A task whose ids do not encode text is returned unchanged.

        Args:
            tokenizer: a tokenizer of transformers.

        Raises:
            ValueError: if the task was built with another tokenizer.
        """
        return self

    def classes(self) -> list[str]:
        """Return the names of the classes in the order of their numbers, if they have names."""
        return []

    def with_classes(self, names: Sequence[str]) -> Task:
        """Return the same task with its classes numbered as in `names`.

        Tasks whose classes have no names are returned unchanged.

        Raises:
            ValueError: if a class of the task is not among the names.
        """
        return self

    def own_tokenizer(self) -> Any:
        """Return the tokenizer that made the ids, or None if the ids do not encode text."""
        return None

    def features(self) -> datasets.Features:
        """Return the column types of the dataset."""
        require("a dataset of a task", "train", "datasets")
        from datasets import Features

        description = self.description()
        columns = find_kind(description.kind).columns(description)
        return Features(
            {name: _feature(column, description.length) for name, column in columns.items()}
        )

    def dataset(
        self, split: str = "train", seed: int = 0, *, streaming: bool = False
    ) -> datasets.Dataset | datasets.IterableDataset:
        """Return a split as a dataset of torch tensors.

        Args:
            split: one of `splits`.
            seed: seed of the generated rows. Rows that are read from files do not depend on it.
            streaming: whether to return an `IterableDataset`. It makes the same rows when they are
                read, and does not store them.

        Raises:
            ImportError: if `datasets` is not installed.
            ValueError: if the task does not have the split, the split is empty, the seed is not an
                integer of at least 0, or `checked_rows` refuses a row.
        """
        require("a dataset of a task", "train", "datasets")
        from datasets import Dataset, IterableDataset, concatenate_datasets

        if split not in self.splits:
            raise ValueError(unknown("split", split, self.splits))
        check_integers(0, seed=seed)
        features = self.features()
        if streaming:
            stream = IterableDataset.from_generator(
                self.checked_rows, features=features, gen_kwargs={"split": split, "seed": seed}
            )
            return stream.with_format("torch")
        rows, parts = self.checked_rows(split, seed), []
        while chunk := list(islice(rows, 4096)):
            columns = {name: [row[name] for row in chunk] for name in features}
            parts.append(Dataset.from_dict(columns, features=features))
        if not parts:
            raise ValueError(f"the task has no {split} rows with these settings.")
        return concatenate_datasets(parts).with_format("torch")

    def checked_rows(self, split: str, seed: int) -> Iterator[Row]:
        """Yield the rows of a split, after checking each row against the description.

        `datasets` does not check values: an integer column would truncate real numbers, and a
        sequence in place of a label would raise an unrelated error.

        Raises:
            ValueError: if a row lacks inputs or labels, if these have the wrong type of number or
                the wrong shape, or if token ids lie outside of the vocabulary.
        """
        description = self.description()
        columns = find_kind(description.kind).columns(description).items()
        for row in self.rows(split, seed):
            length = None
            for name, (integers, shape) in columns:
                if name not in row:
                    raise ValueError(f"a row of the {split} split has no {name}.")
                values = np.asarray(row[name])
                kinds = "iu" if integers else "iufb"
                if name == "labels" and description.num_labels == 2:
                    kinds += "b"
                if values.size and values.dtype.kind not in kinds:
                    wanted = "integers" if integers else "real numbers"
                    raise ValueError(
                        f"{name} must be {wanted}; a row of the {split} split has {values.dtype}."
                    )
                if length is None and values.ndim:
                    length = len(values)
                due = shape
                if name == "labels" and shape[:1] == (None,):
                    due = (length, *shape[1:])
                if values.ndim != len(due) or any(
                    size not in (None, given) for size, given in zip(due, values.shape, strict=True)
                ):
                    wanted = ", ".join("length" if size is None else str(size) for size in due)
                    wanted += "," if len(due) == 1 else ""
                    raise ValueError(
                        f"{name} must be of shape ({wanted}); a row of the {split} split has "
                        f"{values.shape}."
                    )
                if name.startswith("input_ids") and values.size:
                    _check_ids(name, values, description.vocab_size, split)
            yield row

    def random(self, split: str, seed: int) -> np.random.Generator:
        """Return a generator whose random stream is unique to this split, seed and task class."""
        kind = zlib.crc32(type(self).__name__.encode())
        return np.random.default_rng([seed, SPLITS.index(split), kind])


@dataclass(frozen=True, kw_only=True)
class GeneratedTask(Task):
    """A task whose rows are drawn at random. Subclasses implement `row`.

    Args:
        train_examples: number of rows in the training split.
        eval_examples: number of rows in the validation split, and in the test split.
    """

    train_examples: int = 10_000
    eval_examples: int = 1_000

    def __post_init__(self) -> None:
        require_sizes(self, "train_examples", "eval_examples")

    @abstractmethod
    def row(self, random: np.random.Generator, split: str) -> Row:
        """Draw one row."""

    def rows(self, split: str, seed: int) -> Iterator[Row]:
        random = self.random(split, seed)
        for _ in range(self.train_examples if split == "train" else self.eval_examples):
            yield self.row(random, split)


_REGISTRY: dict[str, type[Task]] = {}
_T = TypeVar("_T", bound=type[Task])


def register(name: str) -> Callable[[_T], _T]:
    """Return a decorator that registers a subclass of `Task` under `name`.

    Raises:
        ValueError: if another task is registered under `name`.
    """

    def add(task: _T) -> _T:
        if name in _REGISTRY:
            raise ValueError(f"there is a task {name!r} already: {_REGISTRY[name].__name__}.")
        _REGISTRY[name] = task
        return task

    return add


def names() -> list[str]:
    """Return the names of all tasks, sorted."""
    return sorted(_REGISTRY)


def settings(name: str) -> dict[str, dict[str, Any]]:
    """Return the published settings of a task by their names.

    A setting is a dictionary of the fields that it changes. The setting `"default"` has every field
    with its default, or with None if the field must be given.

    Raises:
        ValueError: if the task is unknown.
    """
    kind = _lookup(name)
    defaults = {
        field.name: None if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(kind)
    }
    return {"default": defaults, **{key: dict(one) for key, one in kind.published.items()}}


def build(name: str, setting: str | None = None, **settings: Any) -> Task:
    """Build the task `name` with a published setting, whose fields `settings` may override.

    Args:
        name: one of `names()`.
        setting: name of a published setting, a key of `settings(name)`; by default `"default"`.
        settings: fields of the task's class. They override the fields of the published setting.

    Raises:
        ValueError: if the task, the published setting or a field is unknown; if a field that must
            be given is missing; or if a value is invalid.
    """
    kind = _lookup(name)
    chosen: dict[str, Any] = {}
    if setting is not None and setting != "default":
        if setting not in kind.published:
            raise ValueError(unknown(f"setting of {name}", setting, ["default", *kind.published]))
        chosen |= kind.published[setting]
    fields = {field.name for field in dataclasses.fields(kind)}
    for key in settings:
        if key not in fields:
            raise ValueError(unknown(f"setting of the task {name}", key, fields))
    chosen |= settings
    needed = [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.name not in chosen
    ]
    if needed:
        raise ValueError(f"the task {name} needs {' and '.join(needed)}.")
    return kind(**chosen)


def load(
    name: str,
    split: str = "train",
    seed: int = 0,
    *,
    setting: str | None = None,
    streaming: bool = False,
    **settings: Any,
) -> datasets.Dataset | datasets.IterableDataset:
    """Load a split of a task as a `datasets.Dataset` of torch tensors.

    Equal arguments give equal rows. Different splits and different seeds use independent random
    streams.

    Args:
        name: one of `names()`.
        split: name of the split: `"train"`, `"validation"` or `"test"`.
        seed: seed of the generated rows.
        setting: name of a published setting; by default `"default"`.
        streaming: whether to return an `IterableDataset`. It makes the same rows when they are
            read, and does not store them.
        settings: fields of the task's class. They override the fields of the published setting.

    Raises:
        ImportError: if `datasets` is not installed.
        ValueError: if the task, a setting or the split is unknown, or if a value is invalid.
        FileNotFoundError: if a file that the task reads is missing.
    """
    return build(name, setting, **settings).dataset(split, seed, streaming=streaming)


def _lookup(name: str) -> type[Task]:
    if name not in _REGISTRY:
        raise ValueError(unknown("task", name, _REGISTRY))
    return _REGISTRY[name]


def _check_ids(name: str, ids: np.ndarray, vocabulary: int | None, split: str) -> None:
    low, high = int(ids.min()), int(ids.max())
    if vocabulary is not None and (low < 0 or high >= vocabulary):
        raise ValueError(
            f"{name} must lie from 0 to {vocabulary - 1}; a row of the {split} split has "
            f"{low if low < 0 else high}."
        )


def _feature(column: Column, length: int) -> Any:
    """Return the `datasets` type of a column: a number, a list or an array."""
    from datasets import Array2D, List, Value

    dtype = "int32" if column.integers else "float32"
    if not column.shape:
        return Value("int64" if column.integers else dtype)
    sizes = [length if size is None else size for size in column.shape]
    if len(sizes) == 1:
        return List(Value(dtype))
    return Array2D((sizes[0], sizes[1]), dtype)


def choose_split(task: Task, name: str, split: str | None) -> str:
    """Return the requested split; by default, the test split, or else the validation split.

    Args:
        task: the task.
        name: name of the task, for the error message.
        split: the requested split, or None for the default.

    Raises:
        ValueError: if the task does not have the split.
    """
    split = split or ("test" if has_rows(task, "test") else "validation")
    if split not in task.splits:
        raise ValueError(unknown(f"split of {name}", split, task.splits))
    return split


def has_rows(task: Task, split: str) -> bool:
    """Return whether a task has rows for a split.

    A task that reads files has rows for a split if the settings give the split files, records,
    intervals or a share.
    """
    if split not in task.splits:
        return False
    endings = ("", "_records", "_intervals", "_share")
    named = [f"{split}{end}" for end in endings if hasattr(task, f"{split}{end}")]
    return not named or any(getattr(task, name) for name in named)


def require_files(task: Task, name: str, split: str) -> list[str]:
    """Return the files of a split, for a task with patterns in `train`, `validation` and `test`.

    If files of the training split also belong to another split, a warning is given.

    Raises:
        ValueError: if no pattern was given for the split.
        FileNotFoundError: if a pattern matches no file.
    """
    patterns = getattr(task, split)
    if patterns is None:
        raise ValueError(f"the task {name} has no {split} files; give {split}: PATH.")
    files = find_files(patterns)
    if split == "train":
        for other in SPLITS[1:]:
            held_out = getattr(task, other)
            shared = {*map(os.path.realpath, files)}
            shared &= {*map(os.path.realpath, find_files(held_out) if held_out else [])}
            if shared:
                warnings.warn(
                    f"{len(shared)} of the {other} files are training files too, such as "
                    f"{min(shared)}: what is measured on them was seen.",
                    stacklevel=3,
                )
    return files


def require_patterns(task: Task) -> None:
    """Check that the settings `train`, `validation` and `test` are paths, patterns or None.

    Raises:
        ValueError: if a setting is not a path, a pattern, a list of these, or None.
    """
    for split in SPLITS:
        given = getattr(task, split)
        patterns = given if isinstance(given, list | tuple) else [given]
        if given is not None and not (
            patterns and all(isinstance(one, str | os.PathLike) and str(one) for one in patterns)
        ):
            raise ValueError(
                f"{split} must be a path or pattern, or a list of them; got {given!r}."
            )


def require_sizes(task: Task, *names: str, least: int = 1) -> None:
    """Check that the settings `names` are integers of at least `least`.

    Raises:
        ValueError: if a setting is not an integer, or is below `least`.
    """
    for name in names:
        check_integers(least, **{name: getattr(task, name)})
