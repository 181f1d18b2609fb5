"""Few of many combinations that hold every pair of options: a covering array of strength two."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import combinations


def covering(rows: Sequence[Sequence[Hashable]]) -> list[int]:
    """Return which of the rows to keep so that every pair of options that a row holds is kept.

    An option is an entry at its place. Greedily: the row with most pairs that are still missing,
    the first of them if there are several.
    """
    bits: dict[Hashable, int] = {}
    held = [
        sum(1 << bits.setdefault(pair, len(bits)) for pair in combinations(enumerate(row), 2))
        for row in rows
    ]
    missing, kept = (1 << len(bits)) - 1, []
    while missing:
        best = max(range(len(rows)), key=lambda i: (held[i] & missing).bit_count())
        kept.append(best)
        missing &= ~held[best]
    return sorted(kept)
