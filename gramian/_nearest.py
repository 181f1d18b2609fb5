"""Make error messages for unknown names. The messages suggest the nearest known name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["unknown"]


def unknown(what: str, name: object, accepted: Iterable[str]) -> str:
    """Return a message that a name is unknown, with the nearest name and all accepted names.

    Args:
        what: the kind of thing that has the name, such as "task".
        name: the unknown name.
        accepted: the accepted names.
    """
    names = sorted(accepted)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    meant = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {what} {name!r}.{meant} Accepted: {', '.join(names) or 'none'}."
