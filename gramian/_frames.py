"""Write frames of pandas as CSV or Parquet, and say what is missing for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gramian._staging import staged_file

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["check_frame_file", "import_pandas", "save_frame", "write_frame"]

_INSTALL = 'pip install "gramian[train]".'
_SUFFIXES = (".csv", ".parquet")


def check_frame_file(path: str | Path) -> None:
    """Raise an error if a frame could not be written to a path.

    Raises:
        ImportError: if a package that writes this format is not installed.
        ValueError: if the path ends in neither .csv nor .parquet.
    """
    path = Path(path)
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"a table must end in .csv or .parquet; got {path.name}.")
    import_pandas()
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise ImportError(f"tables in Parquet need pyarrow: {_INSTALL}", name="pyarrow") from (
                error
            )


def save_frame(frame: DataFrame, path: str | Path) -> Path:
    """Write a frame without its index, completely or not at all, and return the path.

    Args:
        frame: The frame.
        path: A file that ends in .csv or .parquet. The suffix determines the format.

    Raises:
        ImportError: if a package that writes this format is not installed.
        ValueError: if the path ends in neither of these.
    """
    path = Path(path)
    check_frame_file(path)
    with staged_file(path) as stage:
        if path.suffix == ".csv":
            frame.to_csv(stage, index=False)
        else:
            frame.to_parquet(stage, engine="pyarrow", index=False)
    return path


def import_pandas() -> Any:
    """Return the package pandas, or raise an `ImportError` that says how to install it."""
    try:
        import pandas
    except ImportError as error:
        raise ImportError(f"tables of reports need pandas: {_INSTALL}", name="pandas") from error
    return pandas


def write_frame(make: Callable[[], DataFrame], path: str | Path, suffix: str) -> Path:
    """Make a frame and write it to a file that must have a suffix, and return the path.

    Raises:
        ImportError: if a package that the file needs is not installed.
        ValueError: if the path does not end in the suffix.
    """
    if Path(path).suffix != suffix:
        raise ValueError(f"the file must end in {suffix}; got {Path(path).name}.")
    check_frame_file(path)
    return save_frame(make(), path)
