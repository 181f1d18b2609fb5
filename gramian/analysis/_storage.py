"""Say in numbers and bytes what a layer stores of its past.

An effective state-size counts numbers for each *value channel*. The operator of a head acts on
every one of its N value channels alike. So a head of ESS 2 needs 2 N numbers of the past, and a
head of attention that has read i tokens holds i values and i keys, i (N + N_k) numbers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from gramian.ess import theoretical_state_size
from gramian.mixers import (
    ConvolutionMixer,
    LinearRecurrence,
    Mixer,
    MultiHyena,
    SoftmaxAttention,
)

__all__ = ["Storage", "mixer_orders", "mixer_storage"]


@dataclass(frozen=True)
class Storage:
    """How a layer stores its past for one sequence.

    Attributes:
        width: number N of value channels to which the operator of a head is applied. It is 1 where
            each channel has an operator of its own.
        key_width: size of the key that attention stores beside each value; 0 for other layers.
        group: number of heads that share keys and values.
        itemsize: number of bytes of a number.
    """

    width: int = 1
    key_width: int = 0
    group: int = 1
    itemsize: int = 4

    def nbytes(self, size: float) -> int:
        """Return the bytes of a state-size: of tokens for attention, of states otherwise.

        Args:
            size: state-size for each value channel, of one head or one group of heads.
        """
        return round(size * (self.width + self.key_width) * self.itemsize)

    def to_dict(self) -> dict[str, int]:
        """Return all fields by name."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, int] | None) -> Storage | None:
        """Return the storage from which `to_dict` made `values`; None stays None."""
        return None if values is None else cls(**values)


def mixer_storage(mixer: Mixer, itemsize: int) -> Storage | None:
    """Return how a mixer of Gramian stores its past, or None for a class that is not known here."""
    if isinstance(mixer, SoftmaxAttention):
        width = mixer.head_width
        return Storage(width, width, mixer.heads // mixer.kv_heads, itemsize)
    if isinstance(mixer, LinearRecurrence):
        return Storage(mixer.value_width, itemsize=itemsize)
    if isinstance(mixer, MultiHyena):
        return Storage(mixer.head_width, itemsize=itemsize)
    return Storage(itemsize=itemsize) if isinstance(mixer, ConvolutionMixer) else None


def mixer_orders(mixer: Mixer, length: int) -> torch.Tensor | None:
    """Return the orders of a convolution mixer's own recurrences, or None for other mixers.

    The operator of the mixer may be recorded as a matrix, from which its order cannot be read. The
    order of a value channel is the sum of the orders of its long convolutions, times the number of
    copies of their states that the value channel has.

    Args:
        mixer: The mixer.
        length: Number of taps.

    Returns:
        (heads or channels), float64.
    """
    if not isinstance(mixer, ConvolutionMixer):
        return None
    copies = torch.Size(mixer.streams).numel() // mixer.width
    sizes = [
        theoretical_state_size(system, [length - 1], horizon=length).double().reshape(-1)
        for system in mixer.systems(length)
    ]
    return copies * torch.stack(sizes).sum(0)
