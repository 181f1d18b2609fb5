"""Name the extra that a package of this library needs, where it is not installed."""

from __future__ import annotations

import importlib.util

__all__ = ["require"]


def require(name: str, extra: str, *packages: str) -> None:
    """Raise an ImportError that says what to install, unless packages are installed.

    Args:
        name: name of the package of this library that needs them.
        extra: the extra that installs them.
        packages: names of modules.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(
            f'{name} needs {" and ".join(missing)}: pip install "gramian[{extra}]".',
            name=missing[0],
        )
