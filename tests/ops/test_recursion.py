"""All-pole filters against scipy's recursion."""

import numpy as np
import pytest
import scipy.signal
import torch

from gramian.ops.recursion import all_pole_filter


@pytest.mark.parametrize("length", [1, 2, 3, 63, 128, 129, 257, 1000])
@pytest.mark.parametrize("order", [0, 1, 2, 7, 32, 200])
def test_is_scipys_recursion(order, length):
    rng = np.random.default_rng(order)
    a = rng.standard_normal((3, order)) / max(order, 1)
    u = rng.standard_normal((2, 3, length))
    expected = np.stack([scipy.signal.lfilter([1.0], np.r_[1.0, a[c]], u[:, c]) for c in range(3)])
    actual = all_pole_filter(torch.from_numpy(a), torch.from_numpy(u))
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(actual, expected.swapaxes(0, 1), rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("cut", [1, 5, 130])
def test_continues_from_the_past(cut):
    torch.manual_seed(0)
    a, u = torch.randn(3, 1, 6).double() / 6, torch.randn(2, 3, 4, 300).double()
    whole = all_pole_filter(a, u)
    first = all_pole_filter(a, u[..., :cut])
    past = torch.nn.functional.pad(first, (6, 0))[..., -6:].flip(-1)
    rest = all_pole_filter(a, u[..., cut:], past)
    torch.testing.assert_close(torch.cat([first, rest], -1), whole)


@pytest.mark.parametrize(("order", "edge"), [(4, 0.1), (4, 0.01), (6, 0.05), (8, 0.1)])
def test_poles_that_crowd_near_the_circle(order, edge):
    _, a = scipy.signal.butter(order, edge)
    impulse = np.eye(1, 2000)[0]
    expected = scipy.signal.lfilter([1.0], a, impulse)
    actual = all_pole_filter(torch.from_numpy(a[1:]), torch.from_numpy(impulse))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_needs_no_stability():
    a = torch.tensor([[-1.05]], dtype=torch.float64)
    expected = 1.05 ** torch.arange(400, dtype=torch.float64)
    impulse = torch.eye(1, 400, dtype=torch.float64)
    torch.testing.assert_close(all_pole_filter(a, impulse)[0], expected[:], rtol=1e-10, atol=0)


def test_gradient():
    torch.manual_seed(0)
    a = (0.3 * torch.randn(2, 3, dtype=torch.float64)).requires_grad_()
    u = torch.randn(2, 150, dtype=torch.float64, requires_grad=True)
    past = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(all_pole_filter, (a, u, past), fast_mode=True)
