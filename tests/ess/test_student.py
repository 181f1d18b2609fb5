"""Quantiles of Student's t distribution, against scipy's."""

from __future__ import annotations

import pytest
from scipy.special import stdtrit

from gramian.ess._student import student_quantile


@pytest.mark.parametrize("freedom", [*range(1, 12), 55, 99, 100, 101, 102, 1000, 10**6])
def test_quantiles_are_those_of_scipy(freedom: int) -> None:
    assert student_quantile(freedom) == pytest.approx(stdtrit(freedom, 0.975), rel=1e-9)
