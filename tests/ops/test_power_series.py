"""The reciprocal of a power series against scipy's recursion."""

import numpy as np
import pytest
import scipy.signal
import torch

from gramian.ops.power_series import power_series_reciprocal


@pytest.mark.parametrize("length", [1, 2, 3, 8, 9, 63, 257, 1000])
@pytest.mark.parametrize("order", [0, 1, 2, 7, 32])
def test_is_the_impulse_response_of_an_all_pole_filter(order, length):
    rng = np.random.default_rng(order)
    a = rng.standard_normal((3, order)) / max(order, 1)
    impulse = np.eye(1, length)[0]
    expected = np.stack([scipy.signal.lfilter([1.0], np.r_[1.0, row], impulse) for row in a])
    actual = power_series_reciprocal(torch.from_numpy(a), length)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-13 * np.abs(expected).max())


def test_needs_no_stability():
    a = torch.tensor([[-1.05]], dtype=torch.float64)
    expected = 1.05 ** torch.arange(400, dtype=torch.float64)
    torch.testing.assert_close(power_series_reciprocal(a, 400)[0], expected, rtol=1e-10, atol=0)


def test_gradient():
    a = (0.3 * torch.randn(2, 3, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: power_series_reciprocal(a, 21), a)
