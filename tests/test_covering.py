"""What `pairs` and `each` leave in the quick tests holds every pair of options, or every option."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from tests.covering import covering


def pairs(rows: list[tuple[int, ...]]) -> set[tuple[int, int, int, int]]:
    return {(i, j, row[i], row[j]) for row in rows for i, j in combinations(range(len(rows[0])), 2)}


@pytest.mark.parametrize(
    ("sizes", "largest"), [((2, 2, 2), 4), ((7, 7, 5), 60), ((6, 5, 5, 2, 2), 40), ((3, 1, 4), 12)]
)
def test_every_pair_is_kept(sizes: tuple[int, ...], largest: int) -> None:
    rows = list(product(*map(range, sizes)))
    kept = [rows[i] for i in covering(rows)]
    assert pairs(kept) == pairs(rows)
    assert len(kept) == len(set(kept)) <= largest


def test_what_no_row_holds_is_not_asked_for() -> None:
    rows = [(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0), (0, 0, 1)]
    assert covering(rows) == [0, 1, 2, 3]  # the first four hold what the last one holds
    assert covering(rows[::2]) == [0, 1, 2]  # of rows that are left out, nothing is missing


def test_two_options_are_their_product() -> None:
    rows = list(product(range(3), range(4)))
    assert covering(rows) == list(range(12))


@pytest.mark.parametrize("sizes", [(5,), (2, 2, 2), (7, 3), (3, 1, 4)])
def test_every_option_is_kept_once_or_as_often_as_the_longest_axis_needs(
    sizes: tuple[int, ...],
) -> None:
    rows = list(product(*map(range, sizes)))
    kept = [rows[i] for i in covering(rows, 1)]
    assert [len(set(axis)) for axis in zip(*kept, strict=True)] == list(sizes)
    assert len(kept) == max(sizes)


def test_options_of_a_short_axis_are_taken_in_turn() -> None:
    rows = list(product(range(7), range(3)))
    assert [rows[i][1] for i in covering(rows, 1)] == [0, 1, 2, 0, 1, 2, 0]
