"""Modal forms of transfer functions whose own recurrences do not reproduce their taps."""

from __future__ import annotations

import math

from torch import Tensor

from gramian.reduction._reduce import reduce
from gramian.systems import Modal

__all__ = ["find_modal_form"]


def find_modal_form(taps: Tensor, order: int) -> tuple[Modal, float]:
    """Find a stable modal system with nearly the given taps.

    This function is meant for the field `reducer` of a `TransferFunction`.

    Args:
        taps: (*C, K): the taps to approximate.
        order: The largest order that the system may have.

    Returns:
        The system, and the largest relative l2 error of a channel, which is infinite if the taps
        are not finite.
    """
    finite = bool(taps.isfinite().all())
    found = reduce(
        taps if finite else taps.nan_to_num(), order=max(1, min(order, taps.shape[-1] - 1))
    )
    return found.system, float(found.relative_error.max()) if finite else math.inf
