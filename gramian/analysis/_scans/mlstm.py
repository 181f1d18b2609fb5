r"""Read the mLSTM (Beck et al. 2024, eqs. 19 to 27) as the operator from its values to its outputs.

`S_t = f_t S_{t-1} + i_t k_t u_tᵀ`, `n_t = f_t n_{t-1} + i_t k_t` and
`y_t = S_tᵀ q_t / (max(|n_tᵀ q_t|, 1) + ε e^{m_t})`, with `f_t` the sigmoid of the forget gate, i_t
the exponential of the input gate, and q_t times n^(-1/2). The normalizer depends on queries, keys
and gates only. So the operator is linear in the values, and the normalizer is a factor of its rows.

The stabilizer `m_t = max(log f_t + m_{t-1}, log i_t)` changes nothing but ε: S and n are stored as
multiples of e^m, and the system here stores them so, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from gramian.analysis._scans._heads import first
from gramian.analysis._scans._reading import ScanReading, of_state, register
from gramian.systems import System


@register("_inference_fn", "_train_fn")
def mlstm(
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    igate: Tensor,
    fgate: Tensor,
    c_initial: Tensor | None = None,
    n_initial: Tensor | None = None,
    m_initial: Tensor | None = None,
    eps: float = 1e-6,
    **options: Any,
) -> ScanReading:
    """Return the reading of the mLSTM.

    Args:
        query: The queries, (batch, heads, L, n).
        key: The keys, (batch, heads, L, n).
        value: The values, (batch, heads, L, N).
        igate: Input gates before the exponential, (batch, heads, L).
        fgate: Forget gates before the sigmoid, (batch, heads, L).
        c_initial: The state, (batch, heads, n, N); None if it is zero.
        n_initial: The normalizer, (batch, heads, n); None if it is zero.
        m_initial: The stabilizer, (batch, heads, 1); None if it is zero.
        eps: What is added to the normalizer.
        **options: Options that do not change the recurrence.
    """
    forget, write = logsigmoid(fgate[0].double()), igate[0].double()  # (heads, L)
    heads, length = forget.shape
    top = forget.new_zeros(heads) if m_initial is None else m_initial[0].double().reshape(heads)
    n = key.new_zeros(heads, key.shape[-1], dtype=torch.float64)
    if n_initial is not None:
        n = n_initial[0].double()
    scaled = query[0].double() * query.shape[-1] ** -0.5  # (heads, L, n)
    keys = key[0].double()
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for t in range(length):
        following = torch.maximum(forget[:, t] + top, write[:, t])
        keep, take = torch.exp(forget[:, t] + top - following), torch.exp(write[:, t] - following)
        n = keep[:, None] * n + take[:, None] * keys[:, t]
        size = torch.maximum((scaled[:, t] * n).sum(-1).abs(), torch.exp(-following)) + eps
        rows.append((keep, take, size))
        top = following
    keeps, takes, sizes = (torch.stack(x, -1).unsqueeze(-1) for x in zip(*rows, strict=True))

    def system(channels: slice) -> System:
        return of_state(
            decay=keeps[channels],
            inputs=takes[channels] * keys[channels],
            outputs=scaled[channels] / sizes[channels],
        )

    return ScanReading(
        count=heads,
        system=system,
        values=value[0].mT,
        outputs=lambda result: first(result)[0].mT,
        initial=None if c_initial is None else c_initial[0].mT,
    )
