"""The recurrence of modal systems, and the groups of channels in which it keeps its state."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gramian.ops.devices import from_host
from gramian.systems._recurrence import Recurrence
from gramian.systems._state import State, broadcasts, define_state, joined_shape
from gramian.systems._system import working_dtype
from gramian.systems.blocks import BlockForm, RotationBlocks, ScalingBlocks

if TYPE_CHECKING:
    from gramian.systems.modal import Modal

__all__ = [
    "Group",
    "ModalRecurrence",
    "ModalState",
    "modes_fit",
    "pair_axis",
    "partition_channels",
]


_MAX_GROUPS = 4
_PADDING = 0.1  # while more than this fraction of the slots is padding, one more group is tried


@define_state
class ModalState(State):
    """The state x of `x_{t+1} = λ x_t + u_t` for every mode, as real and imaginary parts.

    If the system is real, the state holds the real parts only, and the dimension of size 2 in the
    shape below has size 1.

    Channels with similar numbers of modes share one tensor, so that a single channel with many
    modes does not enlarge the state of all others. The tensor of a group has the shape
    (*B, *C'[:-1], 2, m, C'[-1]). The last channel dimension comes last because a processor's
    vector instructions run along it.

    Attributes:
        modes: One tensor for each group, in the order of `Modal.groups`.
    """

    modes: tuple[Tensor, ...]


class Group(NamedTuple):
    """Channels that are stepped together, as indices along the first channel dimension."""

    channels: tuple[int, ...] | None  # None: all channels, in their order
    modes: int


@functools.lru_cache(maxsize=1024)
def partition_channels(counts: tuple[int, ...]) -> tuple[Group, ...]:
    """Divide channels with `counts` modes into few groups with little padding.

    A group pads every channel to the largest number of modes in it. The number of groups is the
    smallest with which the padding is at most a tenth of all modes, but no more than four. Among
    the partitions into this number of groups, dynamic programming over the distinct counts finds
    one with the least padding.
    """
    sizes = sorted(set(counts))
    many = [counts.count(size) for size in sizes]
    # least[g][j]: the smallest number of slots in which g groups hold the j smallest sizes, and the
    # index of the first size in the last of these groups.
    least: list[list[tuple[float, int]]] = [[(0.0, 0)] + [(torch.inf, 0)] * len(sizes)]
    groups = 0
    while groups < _MAX_GROUPS:
        groups += 1
        row = [(torch.inf, 0)]
        for j in range(1, len(sizes) + 1):
            costs = [least[-1][i][0] + sum(many[i:j]) * sizes[j - 1] for i in range(j)]
            best = min(range(j), key=costs.__getitem__)
            row.append((costs[best], best))
        least.append(row)
        if row[-1][0] <= (1 + _PADDING) * sum(counts):
            break
    if groups == 1:
        return (Group(None, sizes[-1]),)
    found, end = [], len(sizes)
    for g in range(groups, 0, -1):
        begin = least[g][end][1]
        inside = {*sizes[begin:end]}
        members = tuple(c for c, count in enumerate(counts) if count in inside)
        found.append(Group(members, sizes[end - 1]))
        end = begin
    return tuple(reversed(found))


def pair_axis(dims: int) -> int:
    """Return the axis of a state's tensors along which the real and imaginary parts lie.

    Args:
        dims: The number of channel dimensions of the system.
    """
    return -3 if dims else -2


def modes_fit(
    state: ModalState, groups: tuple[Group, ...], dims: int, shape: torch.Size, numbers: int = 2
) -> bool:
    """Return whether a state has the shapes that samples of `shape` need.

    Args:
        state: The state to check.
        groups: The groups of channels of the system.
        dims: The number of channel dimensions of the system.
        shape: The shape (*B, *C') of a sample.
        numbers: The number of real numbers that store a mode: 1 if the system is real, otherwise 2.
    """
    if len(state.modes) != len(groups):
        return False
    for (channels, modes), tensor in zip(groups, state.modes, strict=True):
        found = tensor.shape
        pair = len(found) + pair_axis(dims)
        if pair < 0 or found[pair : pair + 2] != (numbers, modes):
            return False
        lead = found[:pair] + found[pair + 2 :]
        wanted = shape
        if channels is not None:
            wanted = torch.Size((*shape[:-dims], len(channels), *shape[len(shape) - dims + 1 :]))
        if lead != wanted and not broadcasts(lead, wanted):
            return False
    return True


class _GroupStep(NamedTuple):
    """The coefficients that step one group, in shapes that broadcast against the group's state."""

    channels: Tensor | None
    real: Tensor  # real parts of the poles, (*C[:-1], m, C[-1])
    imaginary: Tensor
    read_real: Tensor  # of the residues r: Re (r x) = (Re r)(Re x) - (Im r)(Im x)
    read_imaginary: Tensor

    def widen(self, width: int) -> _GroupStep:
        """Repeat the coefficients `width` times along the last dimension.

        This is done for inputs that have `width` channels along that dimension, if all of these
        channels share one filter.
        """
        channels, *values = self
        assert all(value is not None for value in values)
        return _GroupStep(
            channels, *(value.expand(*value.shape[:-1], width).contiguous() for value in values)
        )


class ModalRecurrence(Recurrence[ModalState]):
    """`y_t = Re Σ_k residues_k x_k + d u_t`, `x ← λ x + u_t`, computed in real arithmetic."""

    form = "modal"
    state_type = ModalState

    def __init__(self, system: Modal) -> None:
        self.system: Modal = system.frozen()
        dtype = working_dtype(system.d)
        self._d = self._like = self.system.d.to(dtype)
        self._pair = pair_axis(self.system.d.ndim)
        self._numbers = 1 if self.system.real else 2
        self._widened: dict[int, list[_GroupStep]] = {}
        self._partition = self.system.groups
        self._groups = []
        for group in self._partition:
            part = self.system.part(group)
            poles = part.poles.movedim(-1, self._pair + 1)
            residues = part.residues.movedim(-1, self._pair + 1)
            channels = group.channels
            real, read = (value.real.to(dtype).contiguous() for value in (poles, residues))
            if self._numbers == 1:  # nothing reads the imaginary parts
                imaginary = read_imaginary = real.new_zeros(()).expand_as(real)
            else:
                imaginary = poles.imag.to(dtype).contiguous()
                read_imaginary = -residues.imag.to(dtype).contiguous()
            self._groups.append(
                _GroupStep(
                    None if channels is None else from_host(channels, poles.device),
                    real,
                    imaginary,
                    read,
                    read_imaginary,
                )
            )
        order = [group.channels for group in self._groups if group.channels is not None]
        self._place = torch.cat(order).argsort() if order else None

    def initial_state(
        self,
        batch_shape: tuple[int, ...],
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> ModalState:
        shape = joined_shape(tuple(batch_shape), self.system.channel_shape)
        split = len(shape) - self._d.ndim
        if self._d.ndim and self._d.shape[-1] == 1 and shape[-1] not in self._widened:
            self._widened[shape[-1]] = [group.widen(shape[-1]) for group in self._groups]
        states = []
        for group in self._partition:
            channels = list(shape[split:])
            if group.channels is not None:
                channels[0] = len(group.channels)
            size = (*shape[:split], *channels[:-1], self._numbers, group.modes, *channels[-1:])
            states.append(self._like.new_zeros(size, dtype=dtype, device=device))
        return ModalState(tuple(states))

    def _fits(self, state: ModalState, shape: torch.Size) -> bool:
        return modes_fit(state, self._partition, self._d.ndim, shape, self._numbers)

    def _prefill(self, u: Tensor, state: ModalState) -> tuple[Tensor, ModalState]:
        return self.system.apply_from(u, state)

    def _groups_for(self, sample: Tensor) -> list[_GroupStep]:
        return self._widened.get(sample.shape[-1] if self._d.ndim else 1, self._groups)

    def _select(self, sample: Tensor, group: _GroupStep) -> Tensor:
        """Return the channels of `sample` that belong to the group."""
        if group.channels is None:
            return sample
        return sample.index_select(-self._d.ndim, group.channels)

    def _read(self, outputs: list[Tensor], sample: Tensor, dtype: torch.dtype) -> Tensor:
        """Compute y from the sample and from the sum over the modes of each group."""
        y = outputs[0]
        if self._place is not None:
            dims = self._d.ndim
            y = torch.cat(outputs, dim=-dims).index_select(-dims, self._place)
        return torch.addcmul(y, self._d, sample).to(dtype)

    def _advance(self, u_t: Tensor, state: ModalState) -> tuple[Tensor, ModalState]:
        pair = self._pair
        sample = u_t.to(state.modes[0].dtype)
        outputs, states = [], []
        for group, modes in zip(self._groups_for(sample), state.modes, strict=True):
            entered = self._select(sample, group).unsqueeze(pair + 1)
            if self._numbers == 1:
                outputs.append((modes.squeeze(pair) * group.read_real).sum(pair + 1))
                decayed = modes.squeeze(pair) * group.real + entered
                states.append(decayed.unsqueeze(pair))
                continue
            re, im = modes.unbind(pair)
            outputs.append((re * group.read_real + im * group.read_imaginary).sum(pair + 1))
            turned = re * group.real - im * group.imaginary + entered
            states.append(torch.stack([turned, im * group.real + re * group.imaginary], dim=pair))
        return self._read(outputs, sample, u_t.dtype), ModalState(tuple(states))

    def _step(self, u_t: Tensor, state: ModalState) -> tuple[Tensor, ModalState]:
        if torch.compiler.is_compiling() and u_t.device.type == "cpu":
            # A compiler turns writes into views of a tensor into passes over the whole tensor.
            return self._advance(u_t, state)
        pair = self._pair
        sample = u_t.to(state.modes[0].dtype)
        outputs = []
        for group, modes in zip(self._groups_for(sample), state.modes, strict=True):
            entered = self._select(sample, group).unsqueeze(pair + 1)
            if self._numbers == 1:
                re = modes.squeeze(pair)
                outputs.append((re * group.read_real).sum(pair + 1))
                re.mul_(group.real).add_(entered)
                continue
            re, im = modes.unbind(pair)  # (*B, *C'[:-1], m, C'[-1])
            read = torch.addcmul(re * group.read_real, im, group.read_imaginary)
            outputs.append(read.sum(pair + 1))
            turned = im * group.imaginary
            im.mul_(group.real).addcmul_(re, group.imaginary)
            re.mul_(group.real).sub_(turned).add_(entered)
        return self._read(outputs, sample, u_t.dtype), state

    @functools.cached_property
    def planes(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return what a fused kernel steps with, or None if channels are in several groups.

        Returns:
            The poles (1 or 2, m, *C): their real and imaginary parts, the latter only if the
            system is not real. The residues in the same shape, as Re r and -Im r. The direct
            term (*C). The system must have one channel dimension.
        """
        if len(self._groups) != 1 or self._groups[0].channels is not None or self._d.ndim != 1:
            return None
        (group,) = self._groups
        poles = torch.stack([group.real, group.imaginary][: self._numbers])
        residues = torch.stack([group.read_real, group.read_imaginary][: self._numbers])
        return poles, residues, self._d

    def block_form(self, size: int, streams: int = 0) -> BlockForm[ModalState]:
        return ModalBlockForm(self.system, size, self._like.dtype, streams)


class ModalBlockForm(BlockForm[ModalState]):
    """The block form of a modal system, with one part for each group of channels.

    Args:
        system: The modal system.
        size: The number of samples in a block, c.
        dtype: The dtype of the state.
        streams: As in `BlockForm`.
    """

    def __init__(self, system: Modal, size: int, dtype: torch.dtype, streams: int = 0) -> None:
        parts = []
        for group in system.groups:
            part, channels = system.part(group), group.channels
            poles, residues = (
                value.reshape(part.d.numel(), value.shape[-1])
                for value in (part.poles, part.residues)
            )
            index = None if channels is None else from_host(channels, poles.device)
            d = part.d.flatten()
            kind = ScalingBlocks if system.real else RotationBlocks
            parts.append(kind.from_modes(poles, residues, d, size, dtype, index))
        super().__init__(parts, streams)
        self._channels = bool(system.channel_shape)

    def pack(self, state: ModalState) -> list[Tensor]:
        packed = []
        for part, modes in zip(self.parts, state.modes, strict=True):
            if part.is_static:
                packed.append(modes)
            elif self.streams:  # (batch, heads, N, 2, m, N)
                x = modes.permute(0, 1, 3, 4, 2, 5)
                packed.append(x.flatten(2, 3).flatten(3, 4))
            elif self._channels:  # (batch, *C[:-1], 2, m, C[-1])
                x = modes.movedim(-1, -3)
                packed.append(x.reshape(x.shape[0], part.inside.shape[0], -1, 1))
            else:
                packed.append(modes.reshape(modes.shape[0], 1, -1, 1))
        return packed

    def unpack(self, packed: Sequence[Tensor], like: ModalState) -> ModalState:
        states = []
        for part, x, old in zip(self.parts, packed, like.modes, strict=True):
            shape = old.shape
            if part.is_static:
                states.append(old.clone())
            elif self.streams:
                x = x.unflatten(3, (shape[2], shape[5])).unflatten(2, (shape[3], shape[4]))
                states.append(x.permute(0, 1, 4, 2, 3, 5))
            elif self._channels:
                inner = x.reshape(shape[0], *shape[1:-3], shape[-1], *shape[-3:-1])
                states.append(inner.movedim(-3, -1))
            else:
                states.append(x.reshape(shape))
        return ModalState(tuple(state.contiguous() for state in states))
