"""A scan, a loop that defines it, and arguments; what the loops of several families share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

HEADS, GROUPS, N, P = 4, 2, 8, 5  # heads of the values, of the keys; size of state and of values

Arguments = dict[str, Any]
Loop = Callable[..., Any]


class Case:
    """A scan with a loop that defines it, arguments of some length, and the name of its values."""

    def __init__(self, scan: str, loop: Loop, arguments: Loop, values: str = "v", **options: Any):
        self.scan, self.loop, self.values = scan, loop, values
        self._arguments, self._options = arguments, options

    def arguments(self, length: int) -> Arguments:
        """The scan's arguments, fresh for every length, with the options of the case."""
        generator = torch.Generator().manual_seed(length)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        given = self._arguments(normal, length)
        made = {k: v(normal, length) if callable(v) else v for k, v in self._options.items()}
        return {**given, **made}


def over_time(
    v: Tensor, step: Callable[[Tensor, int], tuple[Tensor, Tensor]], state: Tensor
) -> Tensor:
    """Outputs (1, L, heads, N) of steps that map a state (heads, n, N) to the next and outputs."""
    rows = []
    for t in range(v.shape[1]):
        state, y = step(state, t)
        rows.append(y)
    return torch.stack(rows)[None]


def start(v: Tensor, n: int, initial: Tensor | None) -> Tensor:
    return v.new_zeros(v.shape[2], n, v.shape[3]) if initial is None else initial[0]


def spread(x: Tensor, heads: int) -> Tensor:
    return torch.stack([x[:, :, h // (heads // x.shape[2])] for h in range(heads)], 2)


def matrices(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    M: Callable[[int], Tensor],
    write: Callable[[int], Tensor],
    scale: float | None,
    initial_state: Tensor | None,
) -> Tensor:
    """`S_t = M_t S_{t-1} + w_t u_tᵀ`, `y_t = scale S_tᵀ q_t`, with dense matrices M_t (h, n, n)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def step(S: Tensor, t: int) -> tuple[Tensor, Tensor]:
        S = M(t) @ S + write(t).unsqueeze(-1) @ v[0, t].unsqueeze(-2)
        return S, scale * (S.mT @ q[0, t].unsqueeze(-1)).squeeze(-1)

    return over_time(v, step, start(v, k.shape[-1], initial_state))


def attention_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
) -> Any:
    """Gates (1, L, heads, n)."""
    M = lambda t: torch.diag_embed(log[0, t].exp())  # noqa: E731 (one line says it)
    return matrices(q, k, v, M, lambda t: k[0, t], scale, initial_state), None


def simple_loop(
    q: Any,
    k: Any,
    v: Any,
    g: Any = None,
    g_gamma: Any = None,
    scale: Any = None,
    initial_state: Any = None,
) -> Any:
    log = torch.zeros_like(k)
    log = log if g is None else log + g[..., None]
    log = log if g_gamma is None else log + g_gamma[:, None]
    return attention_loop(q, k, v, log, scale, initial_state)


def qkv(normal: Any, L: int, groups: int = HEADS) -> Arguments:
    return {
        "q": normal(1, L, groups, N),
        "k": normal(1, L, groups, N),
        "v": normal(1, L, HEADS, P),
    }


def some(*shape: int | None) -> Callable[[Any, int], Tensor]:
    """An option that is drawn anew for every length, which replaces None in the shape."""
    return lambda normal, L: normal(*(L if x is None else x for x in shape))


STATE = some(1, HEADS, N, P)
