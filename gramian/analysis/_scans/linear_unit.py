r"""Read linear recurrent units whose channels have one number of state each.

`S_t = a_t S_{t-1} + u_t` and `y_t = S_t`, as in the RG-LRU (De et al. 2024, eq. 4) and in HGRN (Qin
et al. 2023). The values are the inputs after their gates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gramian.analysis._scans._heads import first
from gramian.analysis._scans._reading import ScanReading, of_state, register, single
from gramian.systems import System


@register("_rnn_scan")
def gated_linear_recurrent_unit(
    hidden_states: Tensor,
    recurrent_gate: Tensor,
    reset: Tensor,
    recurrent_states: Tensor | None = None,
    acc_dtype: torch.dtype = torch.float32,
) -> ScanReading:
    """Return the reading of the RG-LRU's recurrence.

    Args:
        hidden_states: The inputs after their gates, (batch, L, channels).
        recurrent_gate: The factors a, (batch, L, channels).
        reset: Where a sequence begins, so that a is zero, (batch, L, 1).
        recurrent_states: (batch, channels); None at the start.
        acc_dtype: Ignored: the precision of the scan.
    """
    decay = recurrent_gate[0].double() * ~reset[0]
    return _of_channels(hidden_states, decay, recurrent_states)


@register("chunk_hgrn", "fused_recurrent_hgrn")
def hgrn(
    x: Tensor,
    g: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> ScanReading:
    """Return the reading of HGRN's recurrence.

    Args:
        x: The inputs after their gates, (batch, L, channels).
        g: Logarithms of the factors a, (batch, L, channels).
        initial_state: (batch, channels); None if it is zero.
        output_final_state: Whether the scan also returns its last state.
        cu_seqlens: Boundaries of sequences; refused if there are several.
        **options: Options that do not change the recurrence.
    """
    single(x.shape[1], cu_seqlens=cu_seqlens, reverse=options.get("reverse"))
    return _of_channels(x, g[0].double().exp(), initial_state)


def _of_channels(x: Tensor, decay: Tensor, initial: Tensor | None) -> ScanReading:
    """Return the reading of a recurrence in every channel.

    Args:
        x: The inputs, (batch, L, channels).
        decay: The factors a of the first row, (L, channels).
        initial: (batch, channels), or None if it is zero.
    """

    def system(channels: slice) -> System:
        a = decay[:, channels].mT.unsqueeze(-1)  # (c, L, 1)
        return of_state(a, torch.ones_like(a), torch.ones_like(a))

    return ScanReading(
        count=x.shape[2],
        system=system,
        values=x[0].mT.unsqueeze(1),
        outputs=lambda result: first(result)[0].mT.unsqueeze(1),
        initial=None if initial is None else initial[0][:, None, None],
    )
