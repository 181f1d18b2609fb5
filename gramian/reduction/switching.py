"""Reduction in the service of transfer functions that need another recurrence."""

from __future__ import annotations

import math

from torch import Tensor

from gramian.reduction._reduce import reduce
from gramian.systems import Modal


def modal_form(taps: Tensor, order: int) -> tuple[Modal, float]:
    """A stable modal system of at most ``order`` with nearly the taps (*C, K), and the largest
    relative l2 error of all channels; an infinite one for taps that are not finite."""
    finite = bool(taps.isfinite().all())
    found = reduce(
        taps if finite else taps.nan_to_num(), order=max(1, min(order, taps.shape[-1] - 1))
    )
    return found.system, float(found.relative_error.max()) if finite else math.inf
