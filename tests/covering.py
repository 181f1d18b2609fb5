"""Few of many combinations that hold every option, or every pair of them: a covering array."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import combinations


def covering(rows: Sequence[Sequence[Hashable]], strength: int = 2) -> list[int]:
    """Return which of the rows to keep so that every pair of options that a row holds is kept.

    An option is an entry at its place. A `strength` of 1 keeps every option instead of every pair,
    a strength of 3 every triple. Greedily: the row with most pairs that are still missing, the
    first of them if there are several. Of single options, the row whose options were taken least
    often comes first, so that a short axis does not end with many of its first option.
    """
    bits: dict[Hashable, int] = {}
    held = [
        sum(
            1 << bits.setdefault(some, len(bits)) for some in combinations(enumerate(row), strength)
        )
        for row in rows
    ]
    missing, kept = (1 << len(bits)) - 1, []
    taken: Counter[tuple[int, Hashable]] = Counter()
    while missing:
        best = max(
            range(len(rows)),
            key=lambda i: (
                (held[i] & missing).bit_count(),
                -sum(taken[option] for option in enumerate(rows[i])) if strength == 1 else 0,
            ),
        )
        kept.append(best)
        taken.update(enumerate(rows[best]))
        missing &= ~held[best]
    return sorted(kept)
