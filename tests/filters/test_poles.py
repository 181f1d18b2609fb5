"""Every filter with poles says where they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gramian.filters import RTF, S4, S4D, Filter, ImplicitFilter, ModalFilter

FILTERS = {
    "rtf": lambda: RTF(4, 6, 40, stability="schur", initialization="schur"),
    "rtf_shared": lambda: RTF(4, 6, 40, initialization="montel", num_denominators=2),
    "s4d": lambda: S4D(4, 6, 40),
    "s4d_real": lambda: S4D(4, 6, 40, initialization="lin", discretization="bilinear"),
    "s4": lambda: S4(4, 6, 40),
    "modal": lambda: ModalFilter(4, 3, 40),
}


def sorted_poles(poles: np.ndarray) -> np.ndarray:
    return np.stack([row[np.lexsort((row.imag.round(9), row.real.round(9)))] for row in poles])


@pytest.mark.parametrize("name", FILTERS)
def test_poles_are_the_eigenvalues_of_the_state_matrix(name: str) -> None:
    torch.manual_seed(0)
    filter: Filter = FILTERS[name]()
    poles, radius = filter.poles(), filter.spectral_radius()
    with torch.no_grad():
        A = filter(40).state_space().A
    own = A[:: len(A) // len(poles)]  # one channel of those that share a denominator
    assert poles.dtype == torch.complex128 and radius.dtype == torch.float64
    assert not poles.requires_grad and poles.shape == (len(own), 6)
    if name != "s4d_real":  # whose real poles need no imaginary part
        expected = np.linalg.eigvals(own.numpy())
        np.testing.assert_allclose(sorted_poles(poles.numpy()), sorted_poles(expected), atol=1e-9)
    np.testing.assert_allclose(
        radius, np.abs(np.linalg.eigvals(own.numpy())).max(-1), rtol=0, atol=1e-9
    )
    assert bool((radius < 1).all())


def test_channels_of_fewer_modes_are_padded_with_zeros() -> None:
    filter = ModalFilter(2, (0, 2), 40)
    poles = filter.poles()
    assert poles.shape == (2, 4) and bool((poles[0] == 0).all())
    assert filter.spectral_radius()[0] == 0 and bool((poles[1] != 0).all())
    assert ModalFilter(2, 0, 40).spectral_radius().tolist() == [0, 0]


def test_only_a_filter_with_denominators_loads_and_reflects_them() -> None:
    """As the guide's table says."""
    for kind in (S4D, S4, ModalFilter, ImplicitFilter):
        assert not hasattr(kind, "load_denominator") and not hasattr(kind, "reflection")
    assert not hasattr(ImplicitFilter, "poles") and not hasattr(ImplicitFilter, "spectral_radius")
