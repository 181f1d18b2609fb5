r"""Describe what a scan does to its values, and register functions that read scans by name.

A scan is a function that layers call to mix the positions of a sequence. It computes
`S_t = M_t S_{t-1} + b_t u_tᵀ` and `y_t = S_tᵀ c_t + d_t u_t` for the values u_t, with `M_t` a
diagonal matrix plus, for delta rules, `p_t q_tᵀ`. This state S_t includes the present input. The
state of the systems here does not: `x_t = S_{t-1}`, so that `A_t = M_t`, `B_t = b_t`,
`C_t = M_tᵀ c_t` and `D_t = c_t · b_t + d_t`. All value channels of a head share one operator.

Output gates and projections are left out. Every scan is read in double precision, and of a batch,
the first row is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from gramian.systems import System, TimeVarying, TimeVaryingState

__all__ = ["SCANS", "ScanReading", "heads_first", "of_state", "read", "register", "single"]

_COMPARED = 64  # heads or channels whose outputs are compared
_COMBINATIONS = 4  # of value channels, which are compared in place of the channels
_ELEMENTS = 2**22  # of one coefficient of the systems that are compared at once
_SMALL = 1e-3  # outputs of a head below this part of the others' are compared at that size


@dataclass(frozen=True)
class ScanReading:
    """The recurrence that one call of a scan applies to its values.

    The scan returns `gate · (system(values) from the state initial)`.

    Attributes:
        count: number of heads or channels.
        system: function that maps a slice of the heads or channels to their system, whose channels
            are (h,).
        values: (count, N, L): the values that the scan mixes; N is 1 for a scan of channels.
        outputs: function that maps what the scan returned to (count, N, L), the layout of the
            values.
        initial: (count, N, n): the state before the first value; None if it is zero.
        gate: (count, N, L): factors of the outputs that are no part of the operator; None if there
            are none.
    """

    count: int
    system: Callable[[slice], System]
    values: Tensor
    outputs: Callable[[Any], Tensor]
    initial: Tensor | None = None
    gate: Tensor | None = None

    def disagreement(self, result: Any) -> float:
        """Return how far the recurrence is from what the scan returned.

        At most 64 heads or channels are compared, evenly spaced, and of many value channels, a few
        random combinations, since all value channels of a head share one operator.

        Args:
            result: What the scan returned for the arguments of this reading.

        Returns:
            The largest relative difference of a head or channel. It is infinite if the shapes
            differ, and NaN if the outputs or the recurrence are not finite.
        """
        outputs = self.outputs(result)
        if outputs.shape != self.values.shape:
            return float("inf")
        length = self.values.shape[-1]
        stride = -(-self.count // _COMPARED)
        chosen = range(0, self.count, stride)
        few = max(1, _ELEMENTS // (64 * length))  # heads or channels at once
        errors, sizes = [], []
        for first in chosen[::few]:
            part = slice(first, min(first + few * stride, self.count), stride)
            expected, actual = self._compared(part, outputs[part].double())
            errors.append((expected - actual).square().mean((1, 2)).sqrt())
            sizes.append(actual.square().mean((1, 2)).sqrt())
        error, size = torch.cat(errors), torch.cat(sizes)  # (heads or channels)
        size = size.maximum(_SMALL * size.square().mean().sqrt())
        return float(torch.where(error == 0, error, error / size).max())

    def _compared(self, channels: slice, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the recurrence predicts, and what is to be equal to it, (h, R, L) both."""
        u = self.values[channels].double()
        start = None if self.initial is None else self.initial[channels].double()
        if self.gate is None and u.shape[1] > _COMBINATIONS:
            generator = torch.Generator().manual_seed(0)  # leaves the user's random numbers alone
            mix = torch.randn(_COMBINATIONS, u.shape[1], generator=generator, dtype=u.dtype)
            mix = mix.to(u.device)
            u, outputs = mix @ u, mix @ outputs
            start = None if start is None else mix @ start
        system = self.system(channels)
        u = u.transpose(0, 1)  # (R, h, L), since the channels of the system are (h,)
        if start is None:
            y = system(u)
        else:
            zero = torch.zeros((), dtype=torch.int64)
            y, _ = system(u, TimeVaryingState(start.transpose(0, 1), zero))
        y = y.transpose(0, 1)
        return (y if self.gate is None else y * self.gate[channels].double()), outputs


Scan = Callable[..., ScanReading]
"""A function that maps the arguments of a scan to its reading. It raises a `ValueError` with one
sentence about arguments that it does not read."""

_Scan = TypeVar("_Scan", bound=Scan)

SCANS: dict[str, Scan] = {}
"""A mapping from the names of the functions that layers call to the functions that read them."""


def register(*names: str) -> Callable[[_Scan], _Scan]:
    """Return a decorator that registers a function as the reader of scans with these names.

    Args:
        *names: The names that the scan has where layers find it: in the namespace of a module, as
            an attribute of a layer, or as a method.

    Raises:
        ValueError: from the decorator, if another function is registered under one of the names.
    """

    def add(scan: _Scan) -> _Scan:
        for name in names:
            if SCANS.setdefault(name, scan) is not scan:
                raise ValueError(f"the scan {name!r} is already registered.")
        return scan

    return add


def read(
    name: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    function: Callable[..., Any] | None = None,
) -> ScanReading:
    """Return the reading of one call of a scan.

    Args:
        name: A name in `SCANS`.
        args: The positional arguments of the call.
        kwargs: The keyword arguments of the call.
        function: The scan, of which a `functools.partial` holds further arguments.

    Returns:
        The reading. Only `ScanReading.disagreement` tells whether it describes the scan: another
        function may have the same name.

    Raises:
        ValueError: if the arguments do not fit the scan, or if they ask for what is not read.
    """
    scan = SCANS[name]
    while isinstance(function, partial):
        args, kwargs = (*function.args, *args), {**function.keywords, **kwargs}
        function = function.func
    try:
        reading = scan(*args, **kwargs)
        reading.system(slice(0, 1))  # arguments of other shapes raise an error here
        return reading
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"the arguments of {name} must be those of the scan of this name; got the error "
            f"{str(error).rstrip('.')!r}."
        ) from error


# What the readers of several families use.


def of_state(
    decay: Tensor,
    inputs: Tensor,
    outputs: Tensor,
    skip: Tensor | float = 0.0,
    p: Tensor | None = None,
    q: Tensor | None = None,
) -> TimeVarying:
    """Return the system of a scan whose outputs are read from the state after its update.

    The scan is `S_t = (diag(decay_t) + p_t q_tᵀ) S_{t-1} + inputs_t u_t`,
    `y_t = outputs_t · S_t + skip_t u_t`.

    Args:
        decay: (h, L, n) or (h, L, 1).
        inputs: (h, L, n).
        outputs: (h, L, n).
        skip: (h, L) or what can be expanded to it.
        p: (h, L, n), or None.
        q: (h, L, n), or None: see p.
    """
    read = decay * outputs
    if p is not None and q is not None:
        read = read + (p * outputs).sum(-1, keepdim=True) * q
    direct = (inputs * outputs).sum(-1) + skip
    return TimeVarying(decay.expand_as(inputs), inputs, read, direct, p, q)


def heads_first(x: Tensor, heads: int, channels: slice) -> Tensor:
    """Return some heads of the first row, in double precision and with the heads first.

    Args:
        x: (batch, L, groups, …), where consecutive heads share a group.
        heads: The number of heads, a multiple of the number of groups.
        channels: The heads to return.

    Returns:
        (h, L, …).
    """
    groups = x.shape[2]
    index = torch.arange(heads, device=x.device)[channels] // max(heads // groups, 1)
    return x[0][:, index].double().transpose(0, 1)


def single(length: int, **options: Any) -> None:
    """Refuse options that split a row into several sequences or read it backwards.

    Args:
        length: L, the length of the row.
        **options: Options of the scan. `None`, `False`, boundaries 0 and L, and one index for all
            positions change nothing.

    Raises:
        ValueError: if an option changes the recurrence.
    """
    for name, value in options.items():
        if value is None or value is False:
            continue
        if isinstance(value, Tensor):
            if name == "seq_idx" and bool((value == value.reshape(-1)[:1]).all()):
                continue
            if name != "seq_idx" and value.tolist() == [0, length]:
                continue
        shown = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(
            f"a scan is read from one sequence in the order of time, without {name}; got {shown}."
        )
