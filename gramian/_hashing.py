"""Hash files, of any size, by their contents."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

__all__ = ["hash_file", "hash_path"]


def hash_file(file: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's contents, in hexadecimal."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def hash_path(path: Path) -> str:
    """Return the SHA-256 of a file's contents, or of the names and contents of a folder's files."""
    if not path.is_dir():
        return hash_file(path)
    digest = hashlib.sha256()
    for file in sorted(one for one in path.rglob("*") if one.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{hash_file(file)}\0".encode())
    return digest.hexdigest()
