"""Read the tensors and the configuration in a checkpoint's files, and nothing else.

safetensors files hold only tensors. Files that `torch.save` wrote are pickles, which name functions
and classes to call. They are read with `weights_only=True`: of these names, only those that tensors
need are looked up and called. Lightning stores objects of its own and of packages such as omegaconf
beside the weights. Each class of these packages is replaced by an empty placeholder class, which
accepts any arguments and keeps nothing. Transformer Engine stores the scales of its layers as byte
streams under names that end in `_extra_state`. These are kept as bytes. If a file refers to any
other function or class, reading fails before a single object is made.

A file that was split into `NAME.part0`, `NAME.part1` and so on is read as if it were joined.

`open_checkpoint` reads names, shapes and places. The values of a tensor are read when the tensor is
used, so that a checkpoint may be larger than the memory.
"""

from __future__ import annotations

import functools
import io
import json
import pickle
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gramian._hashing import hash_file
from gramian._safetensors import as_bytes, read_header

__all__ = [
    "Stored",
    "Weights",
    "find_config",
    "hash_weights",
    "open_checkpoint",
    "read_config",
    "read_inner_config",
    "read_tensors",
]

_WHOLE = ("model.safetensors", "pytorch_model.bin", "weights.ckpt")
_SHARDED = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")
_FIRST_PART, _PART = ".part0", ".part"
_BYTE_STREAM = "_io.BytesIO"
_EXTRA_STATE = "_extra_state"

_TRAINERS = ("optimizer", "random_states", "rng_state", "scaler", "scheduler", "training_args")
"""Trainers write files beside the weights; their names begin with these words."""

_CONFIGURED = ("d_model", "layer", "model")
"""If hyper-parameters have one of these entries, they are a model's configuration."""

_BOOKKEEPING_PACKAGES = (
    "argparse",
    "lightning",
    "lightning_fabric",
    "numpy",
    "omegaconf",
    "pathlib",
    "pytorch_lightning",
    "torchmetrics",
    "typing",
)
_BOOKKEEPING_TYPES = {
    "collections.defaultdict",
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "str", "tuple")),
}


class _Place(NamedTuple):
    """The place of a tensor in a file.

    Attributes:
        file: the file. If it was split into parts, its name without the suffix of the parts.
        offset: number of bytes before the first element.
        dtype: dtype of the tensor.
        shape: shape of the tensor.
        stride: strides of the tensor, in elements.
    """

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The number of bytes from the first element to the end of the last one."""
        if 0 in self.shape:
            return 0
        steps = ((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        return self.dtype.itemsize * (1 + sum(steps))

    def read(self) -> Tensor:
        """Return the tensor, in memory of its own.

        Raises:
            ValueError: if the file ends before the tensor does.
        """
        elements = torch.empty(self.nbytes, dtype=torch.uint8)
        with _opened(self.file) as stream:
            stream.seek(self.offset)
            if stream.readinto(as_bytes(elements)) != self.nbytes:
                raise ValueError(f"{self.file} cannot be read: it ends within a tensor.")
        return elements.view(self.dtype).as_strided(self.shape, self.stride).contiguous()

    def map(self, storage: torch.UntypedStorage) -> Tensor:
        """Return the tensor as a part of the whole file's bytes."""
        own = storage[self.offset : self.offset + self.nbytes]
        return torch.empty(0, dtype=self.dtype).set_(own, 0, self.shape, self.stride)


class Weights(Mapping[str, Tensor]):
    """The tensors of a checkpoint by their names, on the CPU.

    A tensor is read from its file each time that it is looked up. Names, shapes and membership are
    known without reading.
    """

    def __init__(self, places: Mapping[str, _Place | Tensor]) -> None:
        self._places = places

    def __getitem__(self, name: str) -> Tensor:
        place = self._places[name]
        return place if isinstance(place, Tensor) else place.read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """A mapping from names to shapes."""
        return {name: tuple(place.shape) for name, place in self._places.items()}

    def renamed(self, names: Mapping[str, str]) -> Weights:
        """Return the tensors that `names` maps to their new names, under these."""
        return Weights({new: self._places[old] for old, new in names.items()})

    def joined(self, others: Weights) -> Weights:
        """Return these tensors and others. If both have a name, the other tensor is returned."""
        return Weights({**self._places, **others._places})

    def mapped(self) -> dict[str, Tensor]:
        """Return all tensors, mapped from their files where that is possible.

        The system reads the pages of a mapped tensor when they are used, and may drop them again.
        A file that was split into parts cannot be mapped.

        Raises:
            ValueError: if the system refuses to map a file. Linux does if the file is larger than
                the memory.
        """
        storages: dict[Path, torch.UntypedStorage] = {}
        found = {}
        for name, place in self._places.items():
            if (
                isinstance(place, Tensor)
                or place.offset % place.dtype.itemsize
                or _parts(place.file)
            ):
                found[name] = self[name]
                continue
            if place.file not in storages:
                storages[place.file] = _map(place.file, "gramian convert")
            found[name] = place.map(storages[place.file])
        return found


def _map(file: Path, instead: str) -> torch.UntypedStorage:
    """Map a file into memory; changes of the memory do not change the file.

    Args:
        file: the file.
        instead: what reads the file without mapping it, for the message of an error.
    """
    size = file.stat().st_size
    try:
        storage: Any = torch.UntypedStorage.from_file(str(file), False, size)
    except RuntimeError as error:
        raise ValueError(
            f"{file} cannot be mapped into memory ({first_line(error)[:-1]}); {instead} reads it "
            "layer by layer."
        ) from error
    return storage


class Stored(NamedTuple):
    """The content of a checkpoint.

    Attributes:
        tensors: all tensors by their names.
        states: the byte streams of entries whose names end in `_extra_state`, by these names. An
            entry without content is None.
    """

    tensors: Weights
    states: dict[str, bytes | None]


def open_checkpoint(path: Path) -> Stored:
    """Return the content of a checkpoint, whose tensors are read when they are used.

    Args:
        path: a file or a folder. A folder must have `model.safetensors`, `pytorch_model.bin`,
            `weights.ckpt`, or exactly one other file whose name ends in .safetensors, .ckpt, .bin,
            .pt or .pth. The first two may be sharded. If a file was split into parts, give its name
            without the suffix of the parts, or the name of the first part. Files that a trainer
            writes beside the weights, such as `optimizer.pt`, are ignored.

    Raises:
        FileNotFoundError: if the file does not exist, or the folder holds no checkpoint.
        ValueError: if several files in a folder could be the checkpoint; if a file cannot be read;
            if a file holds or refers to anything but tensors, extra states and the objects that
            Lightning stores; or if a part is missing.
    """
    stored = Stored(Weights({}), {})
    for file in _weight_files(path):
        found = _open_safetensors(file) if file.suffix == ".safetensors" else _open_pickle(file)
        twice = sorted(found.tensors.keys() & stored.tensors.keys())
        if twice:
            raise ValueError(f"{file} has tensors that another part has too, such as {twice[0]}.")
        states = stored.states | found.states
        stored = Stored(stored.tensors.joined(found.tensors), states)
    if not stored.tensors:
        raise ValueError(f"{path} holds no tensors.")
    return stored


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint by their names, on the CPU.

    Args:
        path: a file or a folder, as for `open_checkpoint`.

    Raises:
        FileNotFoundError, ValueError: in the same cases as `open_checkpoint`.
    """
    return open_checkpoint(path).tensors.mapped()


def hash_weights(path: Path) -> dict[str, str]:
    """Return a mapping from the names of the files that `read_tensors` reads to their SHA-256.

    Args:
        path: a file or a folder, as for `read_tensors`.

    Raises:
        FileNotFoundError: if the file does not exist, or the folder holds no checkpoint.
        ValueError: if several files in a folder could be the checkpoint, or a part is missing.
    """
    hashes = {}
    for file in _weight_files(path):
        for part in _parts(file) or [file]:
            hashes[part.name] = hash_file(part)
    return hashes


def find_config(path: Path) -> Path | None:
    """Return the configuration file beside a checkpoint, or None.

    In a folder, it is `config.json`, `config.yml` or `config.yaml`. Beside a file `NAME.ckpt`, two
    other names are tried before `config`, with the same suffixes: `NAME.config`, and then `NAME`.
    """
    folder = path if path.is_dir() else path.parent
    names = ["config"] if path.is_dir() else [f"{path.stem}.config", path.stem, "config"]
    for name in names:
        for suffix in (".json", ".yml", ".yaml"):
            if (folder / f"{name}{suffix}").is_file():
                return folder / f"{name}{suffix}"
    return None


def read_config(file: Path) -> dict[str, Any]:
    """Return the mapping in a JSON or YAML file.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file cannot be read or does not hold a mapping.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no configuration {file}.")
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            values = json.loads(text)
        else:
            import yaml

            try:
                values = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ValueError(first_line(error)) from error
    except ValueError as error:  # errors of JSON and Unicode are ValueErrors
        raise ValueError(f"{file} cannot be read: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold a mapping; it holds a {type(values).__name__}.")
    return values


def read_inner_config(path: Path) -> dict[str, Any] | None:
    """Return the model's configuration among the hyper-parameters of a Lightning checkpoint.

    The configuration is the entry `config` of the hyper-parameters, as in regLM's checkpoints, or
    else all hyper-parameters, if they describe a model. A value that is not a number, text, list or
    mapping becomes None.

    Args:
        path: a file or a folder, as for `read_tensors`.

    Returns:
        The configuration, or None if there is none.

    Raises:
        FileNotFoundError: if the file does not exist, or the folder holds no checkpoint.
        ValueError: if several files in a folder could be the checkpoint, or a file cannot be read.
    """
    files = _weight_files(path)
    if len(files) != 1 or files[0].suffix == ".safetensors":
        return None
    loaded = _load_pickle(files[0])
    given = loaded.get("hyper_parameters") if isinstance(loaded, Mapping) else None
    found = _plain(given)
    for candidate in (found.get("config"), found) if isinstance(found, dict) else ():
        if isinstance(candidate, dict) and any(name in candidate for name in _CONFIGURED):
            return candidate
    return None


def _plain(value: Any) -> Any:
    """Return a copy made of numbers, texts, lists and mappings. Other values become None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, bool | int | float | str) else None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, with one period at its end."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".") + "."


def _weight_files(path: Path) -> list[Path]:
    if path.name.endswith(_FIRST_PART):
        path = path.with_name(path.name.removesuffix(_FIRST_PART))
    if path.is_file() or _parts(path):
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"there is no checkpoint {path}.")
    for name in _SHARDED:
        if (path / name).is_file():
            return _shards(path, path / name)
    for name in _WHOLE:
        if (path / name).is_file():
            return [path / name]
    return [_only_file(path)]


def _only_file(folder: Path) -> Path:
    """Return the only file of weights in a folder, without counting the files of a trainer."""
    whole = {file.with_name(file.name.removesuffix(_FIRST_PART)) for file in folder.iterdir()}
    files = sorted(
        file for file in whole if file.suffix in _SUFFIXES and not file.name.startswith(_TRAINERS)
    )
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no checkpoint: no {', '.join(_WHOLE)} or the like."
        )
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:4])
        raise ValueError(f"{folder} holds several checkpoints ({names}): name the file.")
    return files[0]


def _shards(folder: Path, index: Path) -> list[Path]:
    """Return the files of a sharded checkpoint that its index names."""
    shards = read_config(index).get("weight_map")
    if not isinstance(shards, Mapping):
        raise ValueError(f"{index} has no weight_map.")
    files = [folder / str(shard) for shard in sorted(set(shards.values()))]
    for file in files:
        if not file.is_file() or file.parent != folder:
            raise FileNotFoundError(f"{folder} lacks the weights file {file.name}.")
    return files


def _parts(file: Path) -> list[Path]:
    """Return the parts of a file that was split, in order, or an empty list if it was not split.

    Raises:
        ValueError: if the joined file also exists, or if a part between other parts is missing.
    """
    if not file.with_name(file.name + _FIRST_PART).is_file():
        return []
    if file.is_file():
        raise ValueError(f"{file} is there whole and in parts; remove one of them.")
    begin = file.name + _PART
    found = [other for other in file.parent.iterdir() if other.name.startswith(begin)]
    names = [other.name.removeprefix(begin) for other in found if other.is_file()]
    decimal = [name for name in names if name.isascii() and name.isdecimal()]
    numbers = sorted(int(name) for name in decimal if str(int(name)) == name)
    for expected, number in enumerate(numbers):
        if number != expected:
            raise ValueError(f"{file} lacks its part {expected}, {file.name}{_PART}{expected}.")
    return [file.with_name(f"{file.name}{_PART}{number}") for number in numbers]


class _JoinedFiles(io.RawIOBase):
    """A stream of bytes over several files, which are never joined on the disk or in memory."""

    def __init__(self, files: list[Path]) -> None:
        self._files = [file.open("rb") for file in files]
        self._ends = [0]
        for file in files:
            self._ends.append(self._ends[-1] + file.stat().st_size)
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._ends[-1]}[whence]
        self._place = max(0, start + offset)
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        for file, begin, end in zip(self._files, self._ends, self._ends[1:], strict=False):
            if begin <= self._place < end:
                file.seek(self._place - begin)
                count = file.readinto(view[: end - self._place])
                self._place += count
                return count
        return 0

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Yield a stream of the bytes of a file, or of the parts into which it was split."""
    with io.BufferedReader(_JoinedFiles(_parts(file) or [file]), 2**20) as stream:
        yield stream


def _size(file: Path) -> int:
    return sum(part.stat().st_size for part in _parts(file) or [file])


def _open_safetensors(file: Path) -> Stored:
    try:
        with _opened(file) as stream:
            entries = read_header(stream, _size(file))
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {first_line(error)}") from error
    places = {
        name: _Place(file, entry.offset, entry.dtype, entry.shape, _strides(entry.shape))
        for name, entry in entries.items()
    }
    return Stored(Weights(places), {})


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _load_pickle(file: Path) -> Any:
    """Read a file that `torch.save` wrote: tensors, plain values and placeholders.

    The tensors are on the meta device if their values can be read later, from the places that their
    storages name. Otherwise their values are read now. They are mapped into memory where that is
    possible.

    Args:
        file: the file. If it was split into parts, its name without the suffix of the parts.
    """
    with _opened(file) as stream:
        try:
            # Files that PyTorch wrote before 1.6 are not archives, and read without placeholders.
            archive = zipfile.is_zipfile(stream)
            plain = archive and _is_plain(stream)
            stream.seek(0)
            names = torch.serialization.get_unsafe_globals_in_checkpoint(stream) if archive else []
        except Exception as error:  # a damaged file can cause any error here
            raise ValueError(f"{file} is no checkpoint, or a damaged one: {_why(error)}") from error
        foreign = sorted(name for name in names if not _is_bookkeeping(name))
        if foreign:
            raise ValueError(
                f"{file} is refused: reading it would call {', '.join(foreign[:4])}, which no "
                "tensor needs. Save its state_dict alone, or as safetensors, where you trust it."
            )
        places = plain and _tells_places()
        mmap = plain and not places and not _parts(file)
        if mmap:
            _map(file, "a newer PyTorch")  # so that too little memory is not taken for damage
        with torch.serialization.safe_globals([_placeholder(name) for name in names]):
            try:
                stream.seek(0)
                if places:
                    return torch.load(stream, map_location="meta", weights_only=True)
                source = file if mmap else stream
                return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
            except pickle.UnpicklingError as error:
                raise ValueError(
                    f"{file} is refused: it is damaged, or reading it would make more than tensors."
                ) from error
            except Exception as error:  # a damaged pickle can cause any error; none of it has run
                raise ValueError(
                    f"{file} is no checkpoint, or a damaged one: {_why(error)}"
                ) from error


@functools.cache
def _tells_places() -> bool:
    """Return whether this version of PyTorch tells where in a file the values of a tensor are."""
    stream = io.BytesIO()
    torch.save(torch.zeros(1), stream)
    stream.seek(0)
    return _offset(torch.load(stream, map_location="meta", weights_only=True)) is not None


def _offset(tensor: Tensor) -> int | None:
    """Return the number of bytes before a tensor's first element in its file, if it is known."""
    begin = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    return None if begin is None else begin + tensor.storage_offset() * tensor.itemsize


def _is_plain(stream: Any) -> bool:
    """Return whether the values in an archive are not compressed, and in this machine's order."""
    stream.seek(0)
    with zipfile.ZipFile(stream) as archive:
        files = archive.infolist()
        orders = [one for one in files if one.filename.endswith("/byteorder") and one.file_size < 9]
        native = all(archive.read(one).decode() == sys.byteorder for one in orders)
        return native and all(one.compress_type == zipfile.ZIP_STORED for one in files)


def _open_pickle(file: Path) -> Stored:
    loaded = _load_pickle(file)
    state = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else loaded
    if not isinstance(state, Mapping):
        raise ValueError(f"{file} must hold tensors by name; it holds a {type(state).__name__}.")
    states = {
        str(name): getattr(value, "content", None)
        for name, value in state.items()
        if str(name).rpartition(".")[2] == _EXTRA_STATE
        and (value is None or isinstance(value, _ByteStream))
    }
    held = {str(name): value for name, value in state.items() if str(name) not in states}
    others = [name for name, value in held.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(
            f"{file} must hold tensors by name, in itself or under 'state_dict'; {others[0]!r} is "
            f"a {type(held[others[0]]).__name__}."
        )
    size = _size(file)
    return Stored(
        Weights({name: _find(name, value, file, size) for name, value in held.items()}), states
    )


def _find(name: str, tensor: Tensor, file: Path, size: int) -> _Place | Tensor:
    """Return the place of a tensor, or the tensor itself if its values have been read.

    Args:
        name: name of the tensor, for the message of an error.
        tensor: the tensor, which may be on the meta device.
        file: the file.
        size: number of bytes of the file.
    """
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        raise ValueError(f"{file} holds {name} in another form than as plain values.")
    tensor = tensor.detach()
    if tensor.device.type != "meta":
        # A view of something larger is copied, so that the larger tensor is not kept.
        larger = tensor.untyped_storage().nbytes() > tensor.nbytes
        return tensor.clone() if larger else tensor
    offset = _offset(tensor)
    place = _Place(file, offset or 0, tensor.dtype, tuple(tensor.shape), tensor.stride())
    if offset is None or offset + place.nbytes > size:
        raise ValueError(f"{file} does not hold the values of {name}.")
    return place


def _why(error: Exception) -> str:
    line, kind = first_line(error), type(error).__name__
    return line if line.startswith(kind) else f"{kind}, {line}"


def _is_bookkeeping(name: str) -> bool:
    known = name in _BOOKKEEPING_TYPES or name == _BYTE_STREAM
    return known or name.split(".")[0] in _BOOKKEEPING_PACKAGES


class _Placeholder:
    """A placeholder for a class of another package. It accepts any arguments and keeps none."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Placeholder:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _ByteStream(_Placeholder):
    """A placeholder for a byte stream. It keeps the content of the stream."""

    content: bytes | None = None

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and state and isinstance(state[0], bytes):
            self.content = state[0]


def _placeholder(name: str) -> type[_Placeholder]:
    """Return a placeholder class that replaces the class called `name`."""
    module, _, own = name.rpartition(".")
    base = _ByteStream if name == _BYTE_STREAM else _Placeholder
    return type(own, (base,), {"__module__": module, "__qualname__": own})
