"""Initialize gates such that the effective state-size (ESS) reaches a target.

How fast a memory decays determines how much it holds. One number per layer, or per head, shifts all
gates of that layer or head. The shift is added to the logits of the gates of `GatedLinearAttention`
and `WeightedLinearAttention`. The rates of `S6`, `GLAS6` and `GatedDeltaNet` are divided by the
exponential of the shift. For `GLAS6`, this is the same as multiplying the normalization factor by
it. ESS is not always monotonic in the shift. So ESS is measured on a grid of shifts. Of the places
where it crosses the target, the nearest to a shift of zero is chosen, and bisection refines it
(arXiv 2504.19561, on initialization informed by ESS).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gramian._modules import in_mode
from gramian.ess import effective_state_size
from gramian.memory.observation import Observer
from gramian.memory.penalties import check_goal
from gramian.mixers import LinearRecurrence, Segments
from gramian.mixers.linear_recurrence import Dynamics

__all__ = ["GateInitialization", "InitializedGates", "initialize_gates"]

_REACH, _GRID = 24.0, 49  # the largest shift of the grid, and its number of shifts
_BISECTIONS = 16
_ABOUT = 0.01  # errors count as equal if they differ by less than this share of the target


@dataclasses.dataclass(frozen=True)
class InitializedGates:
    """The initialization of the gates of a layer, or of one of its heads.

    Attributes:
        name: path of the mixer in the model.
        head: index of the head, or None if all heads of the layer have the same shift.
        target: target state-size.
        before: mean state-size before initialization.
        reached: mean state-size after initialization.
        shift: number that was added to the logits of gates, or subtracted from the logarithms of
            rates.
        converged: whether the state-size reached the target to the tolerance.
    """

    name: str
    head: int | None
    target: float
    before: float
    reached: float
    shift: float
    converged: bool

    def __str__(self) -> str:
        place = self.name or "the mixer"
        if self.head is not None:
            place += f", head {self.head}"
        words = f"{place}: ESS {self.before:.2f} to {self.reached:.2f} of {self.target:.2f}"
        if self.converged:
            return f"{words}, shift {self.shift:+.3f}"
        end = "below" if self.reached < self.target else "above"
        return (
            f"{words}: the target cannot be reached with these gates, every shift up to "
            f"{_REACH:g} leaves it {end}; kept {self.shift:+.3f} (keys and values of larger "
            "initial weights hold more)"
        )


@dataclasses.dataclass(frozen=True)
class GateInitialization:
    """The result of `initialize_gates`. As a string, it has one line for each layer or head.

    Attributes:
        gates: one entry for each layer, or for each head.
        without: paths of the linear recurrences that have no gates.
    """

    gates: tuple[InitializedGates, ...]
    without: tuple[str, ...]

    @property
    def converged(self) -> bool:
        """Whether every target was reached."""
        return all(entry.converged for entry in self.gates)

    def __str__(self) -> str:
        lines = [str(entry) for entry in self.gates]
        return "\n".join([*lines, *(f"{path}: it has no gates" for path in self.without)])


def initialize_gates(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Any],
    target: float | None = None,
    *,
    share: float | None = None,
    per_head: bool = False,
    at: int | None = None,
    tolerance: float = 0.02,
) -> GateInitialization:
    """Shift the gates of a model's linear recurrences so that their ESS reaches a target.

    The effective state-size (ESS) is measured on a batch, and the gates are changed in place. The
    layers are processed in the order in which they run, since the input of a layer depends on the
    gates of earlier layers. The function is meant for a freshly initialized model. ESS is averaged
    over sequences, and, unless `per_head` is set, over heads.

    Args:
        model: A linear recurrence of `gramian.mixers`, or a module that contains linear
            recurrences.
        inputs: A batch with which the model is called: a tensor, or a mapping of arguments.
        target: The entropy-ESS that every head should have, positive.
        share: The target as a share of the state size n, above 0 and at most 1. It replaces
            `target`.
        per_head: Whether every head has its own shift.
        at: The position at which ESS is measured; by default, the middle of the input. The input
            should be long enough that min(at, length - at) does not limit ESS.
        tolerance: Relative error up to which a target counts as reached.

    Returns:
        The state-sizes of every layer or head before and after the change, and whether they reached
        the target. A target may be out of reach, because a memory whose gates forget nothing holds
        less, or because there are too few tokens. The layer or head then gets the shift that comes
        closest.

    Raises:
        ValueError: unless exactly one of `target` and `share` is given, within its bounds. Also if
            the model has no linear recurrences or runs none of them, or if the position is outside
            of the sequence.
    """
    check_goal(target, share)
    entries: list[InitializedGates] = []
    without: list[str] = []
    watched = Observer(model, LinearRecurrence)
    with in_mode(model, training=False), torch.no_grad(), watched as observer:
        _run(model, inputs)
        for path in list(observer.inputs()):
            mixer = observer.mixers[path]
            assert isinstance(mixer, LinearRecurrence)
            if not isinstance(getattr(mixer, "dynamics", None), Dynamics):
                without.append(path)
                continue
            _run(model, inputs)
            goal = float(target) if share is None else share * mixer.state_size  # type: ignore[arg-type]
            search = _Search(mixer, *observer.inputs()[path], at=at, per_head=per_head)
            entries += search.run(path, goal, tolerance)
        if not observer.inputs():
            raise ValueError("no linear recurrence ran on these inputs.")
    return GateInitialization(tuple(entries), tuple(without))


def _run(model: nn.Module, inputs: Tensor | Mapping[str, Any]) -> None:
    caches = getattr(getattr(model, "config", None), "use_cache", None) is not None
    arguments = {"use_cache": False} if caches else {}
    if isinstance(inputs, Tensor):
        model(inputs, **arguments)
    else:
        model(**{**inputs, **arguments})


class _Search:
    """A search for the shift of a mixer's gates at which its heads have a given state-size."""

    def __init__(
        self,
        mixer: LinearRecurrence,
        x: Tensor,
        mask: Segments | None,
        *,
        at: int | None,
        per_head: bool,
    ) -> None:
        self.mixer, self.x, self.mask = mixer, x, mask
        self.at = x.shape[1] // 2 if at is None else at
        if not 0 < self.at < x.shape[1]:
            raise ValueError(
                f"the position must lie in 1 … {x.shape[1] - 1} for {x.shape[1]} tokens; got "
                f"{self.at}."
            )
        self.per_head = per_head
        dynamics: Any = mixer.dynamics
        self.dynamics: Dynamics = dynamics
        self.start = {name: p.clone() for name, p in dynamics.named_parameters()}

    def set(self, shift: Tensor) -> None:
        """Set the gates to their original values plus a shift, (heads) or (1)."""
        for name, parameter in self.dynamics.named_parameters():
            parameter.copy_(self.start[name])
        like = next(self.dynamics.parameters())
        self.dynamics.slow(shift.to(like).expand(self.mixer.heads))

    def sizes(self, shift: Tensor) -> Tensor:
        """Return the state-size at a shift, a mean over the sequences: (heads) or (1), float64."""
        self.set(shift)
        sizes = effective_state_size(self.mixer.operator(self.x, mask=self.mask), self.at)
        of_heads = sizes.double().mean(0)
        return of_heads if self.per_head else of_heads.mean().unsqueeze(0)

    def run(self, path: str, target: float, tolerance: float) -> list[InitializedGates]:
        zero = torch.zeros(self.mixer.heads if self.per_head else 1, dtype=torch.float64)
        grid = torch.linspace(-_REACH, _REACH, _GRID, dtype=torch.float64)
        curve = torch.stack([self.sizes(zero + shift) for shift in grid.tolist()]).cpu()
        before = curve[_GRID // 2]
        low, high, rising = _crossing(grid, curve, target)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            beyond = (self.sizes(middle).cpu() > target) == rising
            low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
        shift = (low + high) / 2
        reached = self.sizes(shift).cpu()
        converged = (reached / target - 1).abs() <= tolerance
        return [
            InitializedGates(
                name=path,
                head=head if self.per_head else None,
                target=target,
                before=before[head].item(),
                reached=reached[head].item(),
                shift=shift[head].item(),
                converged=bool(converged[head]),
            )
            for head in range(len(zero))
        ]


def _crossing(grid: Tensor, curve: Tensor, target: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return where every column of a curve crosses the target.

    Args:
        grid: The shifts, (grid).
        curve: The state-sizes at these shifts, (grid, heads).
        target: The target state-size.

    Returns:
        Three tensors (heads): the two ends of an interval of the grid, and whether the curve rises
        in this interval. Of the intervals in which the curve crosses the target, this is the
        interval nearest to 0. If a curve does not cross the target, both ends are the shift that
        comes closest. If several shifts come about as close, both ends are the smallest of these,
        since a larger shift would only saturate the gates.
    """
    above = curve > target
    crosses = above[1:] != above[:-1]  # (grid - 1, heads)
    distance = (grid[1:] + grid[:-1]).abs().unsqueeze(-1).expand_as(curve[1:])
    place = torch.where(crosses, distance, torch.inf).argmin(0)
    off = (curve - target).abs()
    about = off <= off.amin(0) + _ABOUT * target
    closest = grid[torch.where(about, grid.abs().unsqueeze(-1), torch.inf).argmin(0)]
    found = crosses.any(0)
    low = torch.where(found, grid[place], closest)
    high = torch.where(found, grid[place + 1], closest)
    rising = above[place + 1, torch.arange(curve.shape[1])]
    return low, high, rising
