r"""The part of an operator that is measured: its channels, at some positions, up to a horizon."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from gramian.ess import dense, recurrent
from gramian.ess.measures import Measure
from gramian.ops.derivatives import is_differentiated
from gramian.ops.threads import work
from gramian.systems import (
    FIR,
    DenseOperator,
    Modal,
    System,
    TimeInvariantSystem,
    TimeVarying,
    to_time_varying,
)

__all__ = ["Places", "Positions", "Reading"]

Positions = int | Sequence[int] | range | Tensor | None

_TRUSTED = 1e-10
"""Factors are used if they give singular values whose rounding errors are below this, relative to
the largest singular value."""

_TRUSTED_VARYING = 1e-8
"""The limit `_TRUSTED` for time-varying systems, whose blocks take much more work than the blocks
of a convolution."""

_LARGEST = 1e140
"""Largest norm of an operator whose blocks have Gram matrices in double precision."""

_FACTORS = 2**28
"""Largest number of bytes that the factors of a block of channels may take."""


class Places:
    """The positions at which an operator is measured, and where its blocks end.

    Args:
        at: The positions. None means the first `length` positions.
        length: The number of positions if `at` is None.
        horizon: The position at which the blocks `T[i:horizon, :i]` end.
        own: The number of steps of the operator, or None if it has no end.
        kind: What the operator is.

    Raises:
        ValueError: if the positions, length or horizon do not fit the operator.
    """

    def __init__(
        self, at: Positions, length: int | None, horizon: int | None, own: int | None, kind: str
    ) -> None:
        for name, value in (("length", length), ("horizon", horizon)):
            if value is not None and (value < 1 or (own is not None and value > own)):
                limit = "" if own is None else f" and at most {own}, the steps there are"
                raise ValueError(f"{name} must be at least 1{limit}; got {value}.")
        self.scalar = isinstance(at, int)
        if at is not None:
            if length is not None:
                raise ValueError(
                    "give `length` for the first positions or `at` for some, not both."
                )
            positions = [at] if isinstance(at, int) else [int(i) for i in at]
        else:
            bounds = [bound for bound in (length, horizon, own) if bound is not None]
            if own is None and length is None:
                raise ValueError(f"a {kind} has no end: give `length`, or positions `at`.")
            positions = list(range(min(bounds)))
        last = max(positions, default=0)
        self.horizon = horizon or own or 2 * (last + 1)
        if min(positions, default=0) < 0 or last >= self.horizon:
            raise ValueError(
                f"positions must lie in 0 … {self.horizon - 1}; got {min(positions)} … {last}."
            )
        self.positions = positions
        self.inside = sorted({i for i in positions if i > 0})

    def spread(self, values: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Expand values (G, len(inside), …) to all requested positions, with 0 at position 0.

        The result is (*shape, P, …), or (*shape, …) for a single position, in a dtype that can hold
        counts.
        """
        column = {i: c for c, i in enumerate(self.inside)}
        columns = [column.get(i, len(column)) for i in self.positions]
        padded = torch.cat([values, values.new_zeros(len(values), 1, *values.shape[2:])], dim=1)
        picked = padded[:, torch.tensor(columns, dtype=torch.int64, device=values.device)]
        dtype = dtype if dtype in (torch.float32, torch.float64) else torch.float32
        picked = picked.reshape(*shape, *picked.shape[1:]).to(dtype)
        return picked.squeeze(len(shape)) if self.scalar else picked


class Reading(Places):
    """The part of an operator to measure, with its channels in one dimension.

    Args:
        source: A system or matrices.
        at: The positions. None means the first `length` positions.
        length: The number of positions if `at` is None.
        horizon: The position at which the blocks `T[i:horizon, :i]` end.

    Raises:
        TypeError: if the source is neither a system nor a tensor.
        ValueError: if the positions, length or horizon do not fit the source, or if a value is NaN
            or infinite. The message then names the channel.
    """

    def __init__(
        self, source: System | Tensor, at: Positions, length: int | None, horizon: int | None
    ) -> None:
        if isinstance(source, Tensor):
            source = DenseOperator(source)
        if not isinstance(source, DenseOperator | TimeVarying | TimeInvariantSystem):
            raise TypeError(
                "a system, or a tensor of lower-triangular matrices (*channels, L, L), is needed; "
                f"got {type(source).__name__}."
            )
        own = None if isinstance(source, TimeInvariantSystem) else source.length
        super().__init__(at, length, horizon, own, type(source).__name__)
        self.shape, self.dtype, self.device = source.channel_shape, source.dtype, source.device
        self.system: System = source.reshape_channels(self.shape.numel())
        self.needs_gradient = any(map(is_differentiated, self._leaves()))
        self._check_finite()

    def _leaves(self) -> list[Tensor]:
        if isinstance(self.system, DenseOperator):
            return [self.matrices()]
        return [leaf for leaf in pytree.tree_leaves(self.system) if isinstance(leaf, Tensor)]

    def _check_finite(self) -> None:
        for leaf in self._leaves():
            if bool(leaf.detach().sum().isfinite()):
                continue  # so is every value, and a sum is faster than a test of each
            bad = ~leaf.isfinite()
            if isinstance(self.system, DenseOperator) and bool(bad.any()):
                bad = bad.tril()
            if bool(bad.any()):
                first = bad.nonzero()[0, 0].cpu()
                index = tuple(int(i) for i in torch.unravel_index(first, self.shape))
                named = f"channel {index[0] if len(index) == 1 else index}" if index else "it"
                raise ValueError(
                    f"an operator to be measured must be finite, but {named} has NaN or infinite "
                    "values."
                )

    def result(self, values: Tensor) -> Tensor:
        """Expand values (G, len(inside), …) to all requested positions and channels."""
        return self.spread(values, self.shape, self.dtype)

    def matrices(self) -> Tensor:
        """Return the matrices (G, horizon, horizon); entries above the diagonal are undefined."""
        if isinstance(self.system, DenseOperator):
            return self.system.entries[:, : self.horizon, : self.horizon]
        return self.system.to(dtype=torch.float64).matrix(self.horizon)

    def taps(self) -> Tensor:
        """Return h_1 … h_K of a time-invariant system up to the horizon, (G, K), float64."""
        assert isinstance(self.system, TimeInvariantSystem)
        finite = isinstance(self.system, FIR)
        count = min(self.horizon, self.system.order + 1) if finite else self.horizon
        return self.system.to(dtype=torch.float64).impulse_response(count)[:, 1:]

    @torch.no_grad()
    def floor(self) -> Tensor:
        """Return the norm up to which a block counts as zero, `eps ‖T‖_F`, (G), float64."""
        system = self.system
        if not self.shape.numel():
            return torch.zeros(0, dtype=torch.float64, device=self.device)
        if isinstance(system, TimeInvariantSystem):
            taps = system.to(dtype=torch.float64).impulse_response(self.horizon)
            count = torch.arange(self.horizon, 0, -1, device=self.device)
            norm = (taps.square() * count).sum(-1).sqrt()
        elif isinstance(system, TimeVarying):
            norm = recurrent.time_varying_norm(system.steps(0, self.horizon))
        else:
            norm = self.matrices().new_zeros(self.shape.numel(), dtype=torch.float64)
            for g, matrix in enumerate(self.matrices()):
                norm[g] = torch.linalg.matrix_norm(matrix.tril().double())
        self._check_range(norm)
        return (
            norm * torch.finfo(torch.float64 if self.dtype == torch.float64 else torch.float32).eps
        )

    def _check_range(self, norm: Tensor) -> None:
        """Raise an error if squares of an operator with the norms (G) overflow or underflow."""
        small = norm < 1 / _LARGEST
        if isinstance(self.system, DenseOperator):
            small[small.clone()] = self.matrices()[small].tril().flatten(1).any(-1)
        else:
            small &= norm > 0
        if bool((~(norm < _LARGEST) | small).any()):
            raise ValueError(
                f"the norm of an operator to be measured must be between {1 / _LARGEST:.0e} and "
                f"{_LARGEST:.0e}; scale the operator, which does not change its entropy-ESS."
            )

    @property
    def _has_small_state(self) -> bool:
        """Return whether factors, whose size is the order, are cheaper than blocks."""
        return not isinstance(self.system, DenseOperator | FIR) and (
            0 < 2 * self.system.order < self.horizon
        )

    @torch.no_grad()
    def measured(self, measure: Measure) -> Tensor:
        """Compute the measure at every position in `inside`, (G, len(inside)), float64."""
        floor = self.floor()
        if not self.inside or not len(floor):
            return floor.new_zeros(len(floor), len(self.inside))
        system = self.system
        if self._has_small_state:

            def from_blocks(rows: Tensor) -> Tensor:
                if isinstance(system, TimeInvariantSystem):
                    return dense.measure_hankel_blocks(
                        self.taps()[rows], self.inside, self.horizon, measure, floor[rows]
                    )
                return dense.measure_blocks(
                    self.matrices()[rows], self.inside, measure, floor[rows]
                )

            return self._through_factors(
                lambda rows, values: measure(values, floor[rows]), from_blocks
            )
        if isinstance(system, TimeInvariantSystem):
            return dense.measure_hankel_blocks(
                self.taps(), self.inside, self.horizon, measure, floor
            )
        return dense.measure_blocks(self.matrices(), self.inside, measure, floor)

    @torch.no_grad()
    def spectra(self) -> Tensor:
        """Compute the singular values (G, len(inside), k), float64, descending, then zeros."""
        rank = max((min(i, self.horizon - i) for i in self.inside), default=0)
        count = self.shape.numel()
        if not self.inside or not count:
            return torch.zeros(count, len(self.inside), rank, dtype=torch.float64)
        if self._has_small_state:
            self.floor()  # checks the range
            order = self._factor_order
            caps = torch.tensor([min(i, self.horizon - i) for i in self.inside])
            known = torch.arange(order) < caps.unsqueeze(-1)  # (P, n)
            values = self._through_factors(
                lambda rows, values: _padded(values, order),
                lambda rows: _padded(self._block_spectra(rows), order),
            )
            return (values * known.to(values.device))[..., : min(rank, order)]
        return self._block_spectra(torch.arange(count))

    def _block_spectra(self, rows: Tensor) -> Tensor:
        """Compute the spectra (R, len(inside), k) of the channels `rows` from the blocks."""
        matrices = self.matrices()[rows.to(self.device)]
        rank = max(min(i, self.horizon - i) for i in self.inside)
        spectra = matrices.new_zeros(len(rows), len(self.inside), rank, dtype=torch.float64)

        def run(task: tuple[int, int]) -> None:
            g, c = task
            values = dense.singular_values(matrices[g], self.inside[c])
            spectra[g, c, : len(values)] = values

        tasks = [(g, c) for g in range(len(rows)) for c in range(len(self.inside))]
        work(run, tasks, matrices)
        return spectra

    @property
    def _factor_order(self) -> int:
        if isinstance(self.system, Modal):
            return 2 * self.system.poles.shape[-1]
        return self.system.order

    def _through_factors(
        self,
        measure: Callable[[Tensor, Tensor], Tensor],
        from_blocks: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Evaluate a function of channels and their singular values (P, G, n): (G, len(inside), …).

        Channels are processed in parts. If rounding errors of the factors would affect the result,
        the taps are used instead, since the impulse response of a time-invariant system is more
        accurate than powers of its state matrix.
        """
        order = self._factor_order
        kept = min(len(self.inside), 64) * order * order * 8
        groups = torch.arange(self.shape.numel(), device=self.device)
        results = []
        for rows in groups.split(max(1, _FACTORS // kept)):
            values: list[Tensor] = []
            errors: list[Tensor] = []
            for _, left, right in self._factors(rows):
                of_rows = partial(measure, rows)
                value, error = recurrent.factor_spectra(of_rows, left, right)
                values.append(value)
                errors.append(error)
            result = torch.cat(values).transpose(0, 1)  # (R, P, …)
            varies = not isinstance(self.system, TimeInvariantSystem)
            trusted = _TRUSTED_VARYING if varies else _TRUSTED
            doubtful = (~(torch.cat(errors) <= trusted)).any(0)
            if bool(doubtful.any()):
                result = result.clone()
                result[doubtful] = from_blocks(rows[doubtful])
            results.append(result)
        return torch.cat(results)

    def _factors(self, rows: Tensor) -> Iterator[recurrent.Factors]:
        part = self.system[rows]
        if isinstance(part, TimeVarying):
            return recurrent.time_varying_factors(part.steps(0, self.horizon), self.inside)
        assert isinstance(part, TimeInvariantSystem)
        held = 2 * len(self.inside) * len(rows) * self._factor_order**2 * 8
        if isinstance(part, Modal) and held <= _FACTORS:
            return recurrent.modal_factors(part, self.inside, self.horizon)
        return recurrent.time_varying_factors(to_time_varying(part, self.horizon), self.inside)

    def differentiable(self, measure: Measure) -> Tensor:
        """Compute the measure with gradients, (G, len(inside)), float64."""
        floor = self.floor()
        if not len(floor):
            return floor.new_zeros(0, len(self.inside))
        sizes = []
        factored = isinstance(self.system, TimeVarying) and self._has_small_state
        matrices = None if factored else self.matrices().double()
        for i in self.inside:
            if matrices is not None:
                values = dense.singular_values(matrices, i)
            else:
                assert isinstance(self.system, TimeVarying)
                reach, observe = self.system.factors(i, self.horizon)
                values = recurrent.factored_singular_values(observe, reach)
            sizes.append(measure(values, floor))
        return torch.stack(sizes, -1) if sizes else floor.new_zeros(len(floor), 0)


def _padded(values: Tensor, size: int) -> Tensor:
    """Pad the last dimension with zeros to `size`, or cut it to `size`."""
    return torch.nn.functional.pad(values, (0, size - values.shape[-1]))
