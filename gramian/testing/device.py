"""Test that parts run on a device that is not the CPU, and do not wait for it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from gramian.filters import Filter
from gramian.mixers import Mixer, Segments
from gramian.systems import System
from gramian.testing.comparison import require, require_close
from gramian.testing.simulated import Wait, recorded_waits, simulated_device

__all__ = ["check_device"]

_WAITLESS = ("whole", "gradients", "prefill", "chunk", "step")

_Stage = tuple[str, Callable[[], Any]]


def check_device(
    part: System[Any] | Filter | Mixer,
    *,
    length: int = 33,
    accepted: Collection[str] = (),
    tolerance: float | None = None,
    seed: int = 0,
) -> dict[str, list[Wait]]:
    """Check that a system, filter or mixer computes the same on a device that is not the CPU.

    The device is simulated (`gramian.testing.simulated_device`), so that the check needs no GPU. A
    tensor that the part leaves on the CPU is an error there, as it is on a GPU. The part runs in
    the following stages, each of which must give what it gives on the CPU:

    - "whole": the output of a whole sequence; of a filter, also the taps;
    - "gradients": the gradients with respect to the input and to every parameter;
    - "padded" and "packed", of a mixer: the output with padding on the left, and that of rows of
      several sequences;
    - "recurrence": the recurrence, which is made once before generation;
    - "prefill": the output of a prefill, and the state after it;
    - "chunk": the output of a chunk that continues from this state;
    - "step": the outputs of three steps from there.

    In "whole", "gradients", "prefill", "chunk" and "step", the host must not wait for the device.

    Args:
        part: the part, on the CPU. It is not modified.
        length: number of samples or tokens of the longest input, at least 8.
        accepted: places that may wait in these stages, as `Wait.place` names them.
        tolerance: largest relative error accepted between the devices; by default 1e-10 in double
            precision and 1e-5 in others.
        seed: seed of the random inputs.

    Returns:
        The waits of every stage, by its name, in order.

    Raises:
        AssertionError: if results differ, or the host waits where it must not. The message names
            the stage, the operation and the place that asked for it.
        TypeError: if `part` is neither a system nor a filter nor a mixer.
        ValueError: if `length` is below 8.
        RuntimeError: if this PyTorch cannot simulate a device, or a tensor was left on the CPU.
    """
    if not isinstance(part, System | Filter | Mixer):
        raise TypeError(
            f"check_device takes a System, a Filter or a Mixer; got {type(part).__name__}."
        )
    if length < 8:
        raise ValueError(f"length must be at least 8; got {length}.")
    device = simulated_device()
    name = f"the {_kind(part)} {type(part).__name__}"
    here: Any = part.detach() if isinstance(part, System) else copy.deepcopy(part).eval()
    there: Any = copy.deepcopy(here).to(device=device)
    waits: dict[str, list[Wait]] = {}
    pairs = zip(_stages(here, length, seed), _stages(there, length, seed), strict=True)
    for (stage, known), (_, run) in pairs:
        expected = known()
        with recorded_waits() as found:
            actual = run()
        waits[stage] = found
        claim = f"{name}: the stage {stage!r} on another device"
        _require_same(claim, actual, expected, tolerance)
        refused = {f"{one.operation} in {one.place}" for one in found if one.place not in accepted}
        require(
            stage not in _WAITLESS or not refused,
            f"{claim} must not wait for it; got {', '.join(sorted(refused))}.",
        )
    return waits


def _kind(part: Any) -> str:
    return next(k.__name__.lower() for k in (System, Filter, Mixer) if isinstance(part, k))


def _require_same(claim: str, actual: Any, expected: Any, tolerance: float | None) -> None:
    """Raise an AssertionError unless all tensors agree, and those of `actual` are on the device.

    Counts, which the host keeps, may stay there.
    """
    device = simulated_device()
    pairs = zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True)
    for number, (one, other) in enumerate(pairs):
        if not isinstance(other, Tensor):
            require(one == other, f"{claim} must give {other!r} as on the CPU; got {one!r}.")
            continue
        is_count = other.ndim == 0 and not other.is_floating_point()
        require(
            one.device == device or is_count,
            f"{claim} must leave its results there; tensor {number} is on {one.device}.",
        )
        limit = tolerance
        if limit is None:
            limit = 1e-10 if other.dtype in (torch.float64, torch.complex128) else 1e-5
        require_close(f"{claim}: tensor {number} must be that of the CPU", one.cpu(), other, limit)


def _stages(part: Any, length: int, seed: int) -> Iterator[_Stage]:
    random = torch.Generator().manual_seed(seed)
    if isinstance(part, Mixer):
        return _stages_of_mixer(part, length, random)
    if isinstance(part, Filter):
        return _stages_of_filter(part, length, random)
    return _stages_of_system(part, length, random)


def _stages_of_system(
    system: System[Any], length: int, random: torch.Generator
) -> Iterator[_Stage]:
    shape = (2, *system.channel_shape, length)
    u = torch.randn(shape, dtype=torch.float64, generator=random).to(system.device, system.dtype)
    leaves, spec = pytree.tree_flatten(system)
    moving = [
        leaf.detach().clone().requires_grad_()
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())
        else leaf
        for leaf in leaves
    ]

    def differentiate() -> Any:
        x = u.clone().requires_grad_()
        made = pytree.tree_unflatten(moving, spec)
        trained = [leaf for leaf in moving if isinstance(leaf, Tensor) and leaf.requires_grad]
        return _gradients(made(x), [x, *trained])

    yield "whole", lambda: system(u)
    yield "gradients", differentiate
    yield from _stages_of_recurrence(system, system.recurrence, u, -1)


def _stages_of_filter(filter: Filter, length: int, random: torch.Generator) -> Iterator[_Stage]:
    parameters = [one for one in filter.parameters() if one.requires_grad]
    like = next(iter([*filter.parameters(), *filter.buffers()]))
    length = min(length, filter.max_length)
    u = torch.randn(2, filter.channels, length, generator=random, dtype=torch.float64).to(like)

    def whole() -> Any:
        with torch.no_grad():
            system = filter(length)
            return system(u), system.impulse_response(length)

    def differentiate() -> Any:
        x = u.clone().requires_grad_()
        return _gradients(filter(length)(x), [x, *parameters])

    yield "whole", whole
    yield "gradients", differentiate
    if length >= 8:
        with torch.no_grad():
            system = filter()
        yield from _stages_of_recurrence(system, system.recurrence, u, -1)


def _stages_of_mixer(mixer: Mixer, length: int, random: torch.Generator) -> Iterator[_Stage]:
    parameters = [one for one in mixer.parameters() if one.requires_grad]
    x = torch.randn(2, length, mixer.width, generator=random, dtype=torch.float64)
    x = x.to(next(mixer.parameters()))
    real = (torch.arange(length) >= torch.tensor([[0], [length // 3]])).to(x.device)
    numbers = (torch.arange(length) >= length // 2).long().expand(2, -1).to(x.device)

    def differentiate() -> Any:
        u = x.clone().requires_grad_()
        return _gradients(mixer(u), [u, *parameters])

    def without_padding(y: Tensor) -> Tensor:
        return y.masked_fill(~real.unsqueeze(-1), 0)

    yield "whole", torch.no_grad()(lambda: mixer(x))
    yield "gradients", differentiate
    yield "padded", torch.no_grad()(lambda: without_padding(mixer(x, mask=real)))
    yield "packed", torch.no_grad()(lambda: mixer(x, mask=Segments(torch.ones_like(real), numbers)))
    if mixer.causal:
        yield from _stages_of_recurrence(mixer, mixer.recurrence, x, 1)


def _stages_of_recurrence(
    part: Any, make: Callable[[], Any], u: Tensor, time: int
) -> Iterator[_Stage]:
    """Yield the stages of generation, for inputs whose samples are along the axis `time`."""
    half = u.shape[time] // 2
    first, second = u.narrow(time, 0, half), u.narrow(time, half, u.shape[time] - half - 3)
    last = u.narrow(time, u.shape[time] - 3, 3).unbind(time)
    kept: dict[str, Any] = {}

    def freeze() -> Any:
        kept["recurrence"] = make()

    def prefill() -> Any:
        y, kept["state"] = kept["recurrence"].prefill(first)
        return y, kept["state"]

    def go_on() -> Any:
        y, kept["state"] = part(second, kept["state"])
        return y, kept["state"]

    def step() -> Any:
        outputs = []
        for sample in last:
            y, kept["state"] = kept["recurrence"].step(sample, kept["state"])
            outputs.append(y)
        return outputs, kept["state"]

    yield "recurrence", torch.no_grad()(freeze)
    yield "prefill", torch.no_grad()(prefill)
    yield "chunk", torch.no_grad()(go_on)
    yield "step", torch.no_grad()(step)


def _gradients(y: Tensor, of: list[Tensor]) -> Any:
    weight = torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype, device=y.device)
    return torch.autograd.grad((y * weight).sum(), of, allow_unused=True, materialize_grads=True)
