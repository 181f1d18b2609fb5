"""Write outputs completely or not at all: write them beside their target, then rename them.

A rename within one folder is atomic. So a reader of the target always sees either the old content
or the finished output, even if writing the output fails.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["staged_directory", "staged_file"]

_SHOWN = 32  # characters of a target's name that the name of its stage shows


@contextmanager
def staged_directory(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `target`. It becomes `target` when the block succeeds.

    If the block raises an exception, the folder and the parent folders that were created for it are
    removed, and `target` is unchanged.

    Args:
        target: folder to write.
        replace: whether an existing `target` is replaced at the end. If not, an existing `target`
            is an error.

    Raises:
        FileExistsError: at the start, if `target` exists and `replace` is False.
    """
    target = Path(os.path.abspath(target))
    if not replace and (target.exists() or target.is_symlink()):
        raise FileExistsError(f"{target} exists already.")
    made = [parent for parent in target.parents if not parent.exists()]  # innermost first
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{_short(target.name)}-"
    stage = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        stage.chmod(0o777 & ~_umask())  # mkdtemp makes folders that only their owner may read
        yield stage
        if replace and target.exists():
            old = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
            target.rename(old / target.name)
            stage.rename(target)
            shutil.rmtree(old)
        else:
            stage.rename(target)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        with suppress(OSError):  # a parent folder that is no longer empty stays
            for parent in made:
                parent.rmdir()
        raise


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """Yield the path of a file beside `target`. It replaces `target` when the block succeeds."""
    target = Path(os.path.abspath(target))
    stage = target.with_name(f".{_short(target.stem)}-{os.getpid()}{_short(target.suffix)}")
    try:
        yield stage
        stage.replace(target)
    except BaseException:
        stage.unlink(missing_ok=True)
        raise


def _short(name: str) -> str:
    """Return a name with its end replaced by a hash if it is long.

    A file system that accepts the name of a target may refuse a longer one.
    """
    if len(name) <= _SHOWN:
        return name
    return (
        f"{name[:_SHOWN]}-{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
