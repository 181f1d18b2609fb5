"""Gates initialised for an effective state-size: how fast a memory fades decides how much is in it.

One number a layer, or a head, moves all of its gates: it is added to the logits of the gates of
`GatedLinearAttention` and `WeightedLinearAttention`, and `exp` of it divides the rates of `S6`,
`GLAS6` (whose normalisation factor it multiplies) and `GatedDeltaNet`. ESS need not rise with it
all the way, so it is looked for where ESS crosses the target on a grid, nearest to what there was,
and found there by bisection (arXiv 2504.19561, on initialisation informed by ESS).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gramian.ess import effective_state_size
from gramian.memory.observation import Observer
from gramian.memory.penalties import check_goal
from gramian.mixers import LinearRecurrence, Segments
from gramian.mixers.linear_recurrence import Dynamics

__all__ = ["GateInitialization", "InitializedGates", "initialize_gates"]

_REACH, _GRID = 24.0, 49
_BISECTIONS = 16
_ABOUT = 0.01


@dataclasses.dataclass(frozen=True)
class InitializedGates:
    """A layer, or one head of it, whose gates were initialised.

    Attributes:
        name: path of the mixer in the model.
        head: which head; None for all of the layer's together.
        target: state-size that was asked for.
        before: mean state-size that there was.
        reached: mean state-size that there is.
        shift: what was added to the logits of gates, or taken off the logarithms of rates.
        converged: whether the target is reached, to the tolerance.
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
    """What `initialize_gates` reached. Printing it gives a line for each.

    Attributes:
        gates: one entry for each layer, or each head.
        without: paths of linear recurrences that have no gates to move.
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
    """Move the gates of a model's linear recurrences, in place, so that their effective state-size
    on a batch reaches a target.

    Layer after layer, in the order in which they run: what a layer reads depends on the gates of
    those before it. Meant for a model as it was initialised; ESS is the mean over sequences, and
    over heads unless `per_head`.

    Args:
        model: Contains linear recurrences of ours, or is one.
        inputs: What the model is called with, a batch: a tensor, or a mapping of arguments.
        target: Entropy-ESS of every head, positive.
        share: Instead, share of the state size n, above 0 and at most 1.
        per_head: Whether every head gets a shift of its own.
        at: Position; by default the middle. Read far enough that min(at, length - at) does not
            limit ESS.
        tolerance: Relative error up to which a target counts as reached.

    Returns:
        What was reached where, and which targets could not be: gates that forget nothing may hold
        less than the target, and so do too few tokens. Those layers get the closest shift.

    Raises:
        ValueError: unless just one of target and share is given, within these bounds; for a model
            without linear recurrences, or one whose recurrences did not run; for a position
            outside of the sequence.
    """
    check_goal(target, share)
    entries: list[InitializedGates] = []
    without: list[str] = []
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), Observer(model, LinearRecurrence) as observer:
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
    finally:
        model.train(training)
    return GateInitialization(tuple(entries), tuple(without))


def _run(model: nn.Module, inputs: Tensor | Mapping[str, Any]) -> None:
    caches = getattr(getattr(model, "config", None), "use_cache", None) is not None
    arguments = {"use_cache": False} if caches else {}
    if isinstance(inputs, Tensor):
        model(inputs, **arguments)
    else:
        model(**{**inputs, **arguments})


class _Search:
    """The state-size of a mixer's heads on an input, as a function of the shift of its gates."""

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
                f"the position must lie in 1 … {x.shape[1] - 1} for {x.shape[1]} tokens, got "
                f"{self.at}."
            )
        self.per_head = per_head
        dynamics: Any = mixer.dynamics
        self.dynamics: Dynamics = dynamics
        self.start = {name: p.clone() for name, p in dynamics.named_parameters()}

    def set(self, shift: Tensor) -> None:
        """Gates moved by `shift`, (heads) or (1), from where they were."""
        for name, parameter in self.dynamics.named_parameters():
            parameter.copy_(self.start[name])
        like = next(self.dynamics.parameters())
        self.dynamics.slow(shift.to(like).expand(self.mixer.heads))

    def sizes(self, shift: Tensor) -> Tensor:
        """Mean state-size, (heads) or (1), float64."""
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
    """Of every column of a curve (grid, heads), the interval nearest to 0 in which it crosses the
    target, and whether it rises there. Where it does not cross, both ends are the smallest shift
    that is about as close to the target as any: larger ones would only saturate the gates."""
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
