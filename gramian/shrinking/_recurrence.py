r"""Split the outputs of a recurrence into what each coordinate of its state contributes.

The state of a head is a matrix S (n × N), read after its update:

    S_t = diag(a_t) S_{t-1} + k_t w_tᵀ,   y_t = S_tᵀ q_t = Σ_i z_ti,   z_ti = q_ti S_t[i, :].

For a recurrence with diagonal gates, `w_t = r_t u_t`, with the values u and the rates r. For the
delta rule, `S_t = (I - r_t k_t k_tᵀ) a_t S_{t-1} + r_t k_t u_tᵀ`, which has the same form with
`w_t = r_t (u_t - a_t S_{t-1}ᵀ k_t)`. Within a chunk, the w_t solve a triangular system.

If the coordinates J are dropped from keys and queries, and the gates are diagonal, the other
coordinates do not change. So the outputs change by exactly `Σ_{i ∈ J} z_ti`, and the squared error
over a text is `Σ_{i,j ∈ J} M_ij`, with the Gram matrix `M_ij = Σ_t z_ti · z_tj`, that is,
`M = Σ_t (q_t q_tᵀ) ∘ (S_t S_tᵀ)`.

A norm of every head, if one follows, divides the outputs of each token by their root mean square.
Then the z_ti are divided by it, too, so that the errors of all tokens count relative to their size.

A sequence is processed in chunks. Nothing is divided by a product of gates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gramian.ops.diagonal_scan import diagonal_scan

__all__ = ["Heads", "Recurrence", "gram", "heads_of"]

_CHUNK = 16
_SCALAR_CHUNK = 32  # longer, because the product of a state with itself is taken once a chunk
_ELEMENTS = 2**20  # numbers of one kind that are held at once: they stay in a processor's cache


@dataclass(frozen=True)
class Recurrence:
    """The arguments of one call of a scan.

    Consecutive heads share a group, that is, keys and queries.

    Attributes:
        keys: (batch, groups, L, n).
        queries: (batch, groups, L, n), with all factors of the outputs.
        values: (batch, heads, L, N).
        log_decays: logarithms of the gates, which broadcast to (batch, heads, L, n).
        decay_rates: factors of `log_decays`, (heads, n), or None if they are 1.
        rates: factors of the values, (batch, heads, L), or None if they are 1.
        delta: whether the recurrence is the delta rule. Its gates are then equal for all n.
        epsilon: the number that a norm of every head behind the scan adds to the mean square of the
            outputs; None if there is no such norm.
    """

    keys: Tensor
    queries: Tensor
    values: Tensor
    log_decays: Tensor
    decay_rates: Tensor | None = None
    rates: Tensor | None = None
    delta: bool = False
    epsilon: float | None = None

    @property
    def scalar(self) -> bool:
        """Whether one gate per head and step multiplies the whole state, and nothing else does."""
        single = self.decay_rates is None and self.log_decays.shape[-1] == 1
        return single and not self.delta

    def weights(self, y: Tensor) -> Tensor:
        """Return the factors with which errors of outputs (…, N) count, (…, 1)."""
        return _weights(y, self.epsilon)

    def head(self, row: int, heads: slice) -> Heads:
        """Return some heads of one group and one row, in at least single precision."""
        per = self.values.shape[1] // self.keys.shape[1]
        group = heads.start // per
        dtype = torch.promote_types(self.values.dtype, torch.float32)
        count, length = len(range(self.values.shape[1])[heads]), self.values.shape[2]
        logs = self.log_decays.expand(
            self.values.shape[0], self.values.shape[1], length, self.log_decays.shape[-1]
        )[row, heads].to(dtype)
        if self.decay_rates is not None:
            logs = logs * self.decay_rates[heads, None].to(dtype)
        keys, queries = (x[row, group].to(dtype) for x in (self.keys, self.queries))
        values = self.values[row, heads].to(dtype)
        rates = values.new_ones(()).expand(count, length)
        if self.rates is not None:
            rates = self.rates[row, heads].to(dtype)
        return Heads(keys, queries, values, logs, rates.unsqueeze(-1), self.delta, self.epsilon)


@dataclass(frozen=True)
class Heads:
    """Some heads of one group.

    Attributes:
        keys: (L, n).
        queries: (L, n).
        values: (h, L, N).
        logs: (h, L, n) or (h, L, 1).
        rates: (h, L, 1).
        delta: as in `Recurrence`.
        epsilon: as in `Recurrence`.
    """

    keys: Tensor
    queries: Tensor
    values: Tensor
    logs: Tensor
    rates: Tensor
    delta: bool
    epsilon: float | None

    def gram(self) -> Tensor:
        """Return the sum of the heads' Gram matrices, (n, n)."""
        if self.values.shape[-1] == 1 and not self.delta and self.epsilon is None:
            return self._of_channels()
        if self.logs.shape[-1] == 1 and not self.delta:
            return self._of_scalar_gates()
        n = self.keys.shape[-1]
        total = self.values.new_zeros(n, n, dtype=torch.float64)
        for queries, states in self.states():
            z = states.mul_(queries.mT.unsqueeze(-1))
            if self.epsilon is not None:
                z *= _weights(z.sum(1, keepdim=True), self.epsilon)
            z = z.flatten(2)
            total += (z @ z.mT).sum(0)  # (h, n, n) before the sum
        return total

    def states(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the queries (T, n) and the states (h, n, T, N) of every chunk of T steps."""
        heads, length, width = self.values.shape
        n = self.keys.shape[-1]
        state = self.values.new_zeros(heads, n, width)
        for start in range(0, length, _CHUNK):
            part = slice(start, min(start + _CHUNK, length))
            keys = self.keys[part]
            along = self.logs[:, part].cumsum(1)  # (h, T, n) or (h, T, 1)
            between = _between(along.mT)  # (h, n, T, T) or (h, 1, T, T)
            writes = self._writes(part, along, between, state)  # (h, T, N)
            weights = between * keys.mT[:, None]  # (h, n, T, T)
            carried = along.exp().mT.unsqueeze(-1)  # (h, n, T, 1) or (h, 1, T, 1)
            inside = weights.flatten(1, 2) @ writes  # (h, n T, N): one product is faster than n
            yield (
                self.queries[part],
                inside.unflatten(1, (n, -1)).addcmul_(carried, state.unsqueeze(2)),
            )
            fading = (along[:, -1:] - along).exp() * keys  # (h, T, n)
            state = along[:, -1].exp().unsqueeze(-1) * state + fading.mT @ writes

    def _of_scalar_gates(self) -> Tensor:
        """Return the sum of the Gram matrices of heads whose gates are equal for all n, (n, n).

        Within a chunk with the initial state S, `S_t = α_t S + Σ_s β_ts k_s w_sᵀ`. So `S_t S_tᵀ` is
        a sum of three products, and their sums over t and over the heads need no z: the first is
        `(Σ_t α_t² q_t q_tᵀ) ∘ (S Sᵀ)`, and the others have the rank of the pairs (t, s).
        """
        heads, length, width = self.values.shape
        n = self.keys.shape[-1]
        state = self.values.new_zeros(heads, n, width)
        total = self.values.new_zeros(n, n, dtype=torch.float64)
        for start in range(0, length, _SCALAR_CHUNK):
            part = slice(start, min(start + _SCALAR_CHUNK, length))
            keys, queries = self.keys[part], self.queries[part]
            along = self.logs[:, part, 0].cumsum(1)
            between = _between(along)  # (h, T, T): t, s
            writes = self.rates[:, part] * self.values[:, part]  # (h, T, N)
            decays = along.exp()  # (h, T)
            left, weighted = decays, between
            if self.epsilon is not None:
                y = (between * (queries @ keys.mT)) @ writes
                y += decays.unsqueeze(-1) * (queries @ state)
                squares = _weights(y, self.epsilon).square()  # (h, T, 1)
                left, weighted = squares[..., 0] * decays, squares * between
            outer = (queries.mT * (left * decays).unsqueeze(1)) @ queries  # (h, n, n)
            total += (outer * (state @ state.mT)).sum(0)
            pairs = queries.unsqueeze(1) * keys  # (T, T, n): t, s
            mixed = torch.einsum("hts,hsn->tsn", left.unsqueeze(-1) * between, writes @ state.mT)
            own = weighted.unsqueeze(-1) * between.unsqueeze(2)  # (h, T, T, T): t, s, r
            own = (own * (writes @ writes.mT).unsqueeze(1)).sum(0)  # (T, T, T)
            half = queries.unsqueeze(1) * mixed + 0.5 * (own @ pairs)  # (T, T, n)
            both = pairs.flatten(0, 1).mT @ half.flatten(0, 1)
            total += both + both.mT
            fading = between[:, -1].unsqueeze(-1) * keys  # (h, T, n)
            state = decays[:, -1, None, None] * state + fading.mT @ writes
        return total

    def _writes(self, part: slice, along: Tensor, between: Tensor, state: Tensor) -> Tensor:
        """Return the w_t of a chunk, (h, T, N)."""
        rates, values = self.rates[:, part], self.values[:, part]
        if not self.delta:
            return rates * values
        keys = self.keys[part]
        known = rates * (values - along.exp() * (keys @ state))
        erased = (rates * between[:, 0] * (keys @ keys.mT)).tril(-1)
        return torch.linalg.solve_triangular(erased, known, upper=False, unitriangular=True)

    def _of_channels(self) -> Tensor:
        """Return the sum of the Gram matrices of heads with one value each, (n, n)."""
        n = self.keys.shape[-1]
        gates = self.logs.exp().expand(*self.logs.shape[:2], n)
        inputs = (self.rates * self.values) * self.keys  # (h, L, n)
        states, end = diagonal_scan(gates.contiguous(), inputs, inputs.new_zeros(len(inputs), n))
        after = torch.cat([states[:, 1:], end.unsqueeze(1)], dim=1)
        z = (after * self.queries).flatten(0, 1)  # (h L, n)
        return (z.mT @ z).double()


def gram(recurrence: Recurrence) -> Tensor:
    """Return the Gram matrix M of every group, summed over rows, heads and time.

    Returns:
        (groups, n, n), in double precision. Products are computed in the dtype of the arguments, at
        least single precision, and chunks are added in double precision.
    """
    groups, n = recurrence.keys.shape[1], recurrence.keys.shape[-1]
    total = recurrence.values.new_zeros(groups, n, n, dtype=torch.float64)
    for group, heads in heads_of(recurrence):
        total[group] += heads.gram()
    return total


def heads_of(recurrence: Recurrence, states: bool = False) -> Iterator[tuple[int, Heads]]:
    """Yield the heads of every row, a few of one group at a time, each with its group.

    Args:
        recurrence: the recurrence.
        states: whether `Heads.states` will be called, and not `Heads.gram`.
    """
    batch, heads, length, width = recurrence.values.shape
    groups, n = recurrence.keys.shape[1], recurrence.keys.shape[-1]
    per = heads // groups
    scalar = recurrence.log_decays.shape[-1] == 1 and recurrence.decay_rates is None
    if states or recurrence.delta:
        held = n * _CHUNK * width
    elif width == 1:
        held = n * length
    elif scalar:
        held = n * max(n, width)
    else:
        held = n * _CHUNK * width
    size = max(1, min(per, _ELEMENTS // held))
    for row in range(batch):
        for group in range(groups):
            end = (group + 1) * per
            for start in range(group * per, end, size):
                yield group, recurrence.head(row, slice(start, min(start + size, end)))


def _weights(y: Tensor, epsilon: float | None) -> Tensor:
    if epsilon is None:
        return y.new_ones(())
    return (y.square().mean(-1, keepdim=True) + epsilon).rsqrt()


def _between(along: Tensor) -> Tensor:
    """Return the products of the gates after s up to t, (…, T, T), which are 0 for s > t.

    Args:
        along: sums of the logarithms of the gates, (…, T).
    """
    difference = along.unsqueeze(-1) - along.unsqueeze(-2)
    later = torch.ones(difference.shape[-2:], dtype=torch.bool, device=along.device).triu(1)
    return difference.masked_fill_(later, -torch.inf).exp_()
