"""Import the user's own modules, which register tasks, filters, mixers and other parts.

A module is given as a file (`parts/my_task.py`) or by its dotted name (`my_lab.parts`). A file is
imported under the stem of its name. Training keeps a copy of each module beside the results. The
copy is imported if the original no longer exists.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from gramian._hashing import hash_file
from gramian._staging import staged_file

__all__ = ["copy_parts", "find_copy", "import_parts"]

_LOADED: dict[str, ModuleType] = {}
"""The imported modules by the hashes of their files. No file is imported twice, nor is its copy."""


def import_parts(names: Sequence[str], copies: str | Path | None = None) -> None:
    """Import modules that register parts. A module is imported only once.

    Args:
        names: paths of Python files, relative to the working directory, or dotted names of modules
            that are installed or are in the working directory.
        copies: folder of the copies that `copy_parts` made, or None. Copies are imported in place
            of modules that are not found.

    Raises:
        ValueError: if a module does not exist, differs from its copy, or fails while it is
            imported.
    """
    for name in names:
        source = _find(name)
        copy = None if copies is None else find_copy(name, copies)
        if source is not None and copy is not None and hash_file(source) != hash_file(copy):
            raise ValueError(f"{name} is not what it was when {copy} was made of it.")
        if copy is not None and source is None:
            _import_file(name, copy)
        elif not name.endswith(".py"):
            _import_module(name)
        elif source is not None:
            _import_file(name, source)
        else:
            raise ValueError(f"there is no file {name} to import.")


def find_copy(name: str, copies: str | Path) -> Path | None:
    """Return the copy of a module that `copy_parts` put into the folder `copies`, or None."""
    copy = Path(copies, _copy_name(name))
    return copy if copy.is_file() else None


def copy_parts(names: Sequence[str], folder: str | Path) -> dict[str, str]:
    """Copy the files of modules into a folder. Copies that the folder already has are kept.

    Args:
        names: files or names of modules, as for `import_parts`. Only the `__init__.py` of a package
            is copied.
        folder: folder of the copies. It is created if it does not exist.

    Returns:
        A mapping from the name of each module to the SHA-256 of its copy.
    """
    hashes = {}
    for name in names:
        source, copy = _find(name), Path(folder, _copy_name(name))
        if source is not None and not copy.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            with staged_file(copy) as stage:
                shutil.copyfile(source, stage)
        if copy.is_file():  # a module without a Python file has no copy
            hashes[name] = hash_file(copy)
    return hashes


def _find(name: str) -> Path | None:
    """Return the Python file of a module, or None if there is none."""
    if name.endswith(".py"):
        file = Path(name)
    else:
        with _working_directory_on_path():
            try:
                spec = importlib.util.find_spec(name)
            except (ImportError, ValueError):  # the package is missing, or a module has no spec
                spec = None
        file = Path((spec and spec.origin) or "")
    return file.resolve() if file.suffix == ".py" and file.is_file() else None


def _copy_name(name: str) -> str:
    return Path(name).name if name.endswith(".py") else f"{name}.py"


def _import_file(name: str, file: Path) -> None:
    digest = hash_file(file)
    if digest in _LOADED:
        return
    stem = file.stem
    if stem in sys.modules or _find(stem) not in (None, file):  # for example, json.py
        stem = f"{stem}_{digest[:8]}"
    spec = importlib.util.spec_from_file_location(stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[stem] = module  # as `import` does, before the module runs
    try:
        with _working_directory_on_path():
            spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[stem]
        raise _failure(name, error) from error
    _LOADED[digest] = module


def _import_module(name: str) -> None:
    try:
        with _working_directory_on_path():
            module = importlib.import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"there is no module {name} to import; a file's name ends in .py."
            ) from error
        raise _failure(name, error) from error
    file = _find(name)
    if file is not None:
        _LOADED[hash_file(file)] = module


def _failure(name: str, error: Exception) -> ValueError:
    message = " ".join(str(error).split())
    return ValueError(f"{name} cannot be imported: {type(error).__name__}: {message}")


@contextmanager
def _working_directory_on_path() -> Iterator[None]:
    """Add the working directory to the module search path within this context.

    `python -m` also searches the working directory.
    """
    here = os.getcwd()
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)
