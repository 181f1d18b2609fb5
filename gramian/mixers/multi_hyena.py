r"""MultiHyena: Hyena with heads, `y_t = Σ_{s≤t} h_{t-s} (q_t · k_s) v_s` in every head.

The long convolution acts on the outer products `k_s v_sᵀ` of each head, and every head has one
filter for all entries of its products (Laughing Hyena, Massaroli et al. 2023, section 4).

The same map has two forms. `(Q Kᵀ ∘ T_h) V` is attention with a Toeplitz mask in place of the
softmax and takes O(L²) time. The convolution of the outer products by FFT takes O(N² L log L) time
for heads of width N. The form that is cheaper for the given sizes is used.

In half precision, intermediate results between the products are float32 where a state is carried.
With float16, they are float32 also where no state is carried, since scores and outer products may
exceed 65,504, the largest number of float16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gramian._checks import check_divides, check_probability
from gramian.filters import Filter, build
from gramian.mixers._recomputation import recomputed
from gramian.mixers.convolution_mixer import ConvolutionMixer, for_products, has_small_state
from gramian.mixers.mixer import apply_mask
from gramian.mixers.registry import register
from gramian.mixers.short_convolution import ShortConvolution
from gramian.ops import causal_convolution
from gramian.ops.lengths import is_symbol
from gramian.ops.packed import Linear
from gramian.systems import (
    DenseOperator,
    Recurrence,
    State,
    System,
    TimeVarying,
    to_time_varying,
    working_dtype,
)

__all__ = ["MultiHyena", "MultiHyenaState"]

_ROWS = 256  # the number of rows of the masked attention that are computed at once
_CHUNK_ELEMENTS = 2**24  # maximal size of the outer products (batch, heads, N, N, T) in a chunk
_SAVED_ELEMENTS = 2**26  # number of scores above which the backward pass recomputes them
_FFT_COST = 10.0
"""The cost of the FFT form's N L log2(2L) relative to the attention form's L².
benchmarks/multi_hyena_forms.py measured it on a CPU."""


class _Fields(NamedTuple):
    short: Tensor
    long: State


class MultiHyenaState(_Fields, State):
    """The past of the short convolution and the state of the long convolution.

    `short` has the last inputs of the short convolution, (batch, taps - 1, 3 width). `long` is
    the filter's state on the outer products, (batch, heads, N, N, …): it has width × N numbers for
    each number in the state of the filter of one head.
    """

    __slots__ = ()


@register("multi_hyena")
class MultiHyena(ConvolutionMixer):
    """The Hyena operator with heads, each of which has one filter.

    Args:
        width: Channels of input and output.
        heads: Number of heads, a divisor of the width.
        filter: A filter of `heads` channels, or its configuration.
        max_length: The filter's `max_length`, if its configuration does not give it.
        short_kernel: Taps of the short convolution.
        kernel_dropout: Probability of dropping a tap of the filters in training.

    Raises:
        ValueError: if the heads do not divide the width, or if the filter does not have one channel
            per head.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        filter: dict[str, Any] | Filter,
        max_length: int | None = None,
        short_kernel: int = 3,
        kernel_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_divides("heads", heads, width)
        defaults = {} if max_length is None else {"max_length": max_length}
        self.width = width
        self.heads = heads
        self.head_width = width // heads
        self.kernel_dropout = check_probability("kernel_dropout", kernel_dropout)
        self.in_proj = Linear(width, 3 * width)
        self.short = ShortConvolution(3 * width, short_kernel)
        self.filter = build(filter, channels=heads, **defaults)
        self.out_proj = Linear(width, width)

    @property
    def channels(self) -> int:
        return self.heads

    @classmethod
    def splits_width(cls, options: Mapping[str, Any]) -> bool:
        return True

    def config(self) -> dict[str, Any]:
        return super().config() | {"heads": self.heads, "short_kernel": self.short.taps}

    @property
    def streams(self) -> tuple[int, ...]:
        return (self.heads, self.head_width, self.head_width)

    def systems(self, length: int | None = None) -> tuple[System, ...]:
        return (self.filter(length)[:, None, None],)

    def project(
        self, x: Tensor, mask: Tensor | None, past: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Apply the input projection and the short convolution.

        Args:
            x: (batch, length, width).
            mask: (batch, length), false for padding. None if there is no padding.
            past: The short convolution's last inputs. None means zeros.

        Returns:
            Queries, keys and values, (batch, heads, length, N), and the short convolution's new
            past. Keys are zero at padding.
        """
        z, past = self.short(apply_mask(self.in_proj(x), mask), past, mask)
        q, k, v = z.unflatten(-1, (3, self.heads, self.head_width)).permute(2, 0, 3, 1, 4)
        if mask is not None:
            k = k.masked_fill((mask == 0)[:, None, :, None], 0)
        return q, k, v, past

    def merge(self, y: Tensor) -> Tensor:
        """Join the heads of y (batch, heads, length, N) and apply the output projection."""
        return self.out_proj(y.transpose(1, 2).flatten(-2))

    def convolve_whole(self, x: Tensor, mask: Tensor | None, systems: tuple[System, ...]) -> Tensor:
        length = x.shape[1]
        q, k, v, _ = self.project(x, mask, None)
        dtype = q.dtype
        q, k, v = (for_products(part) for part in (q, k, v))
        kernel = self.kernel(systems[0], x).flatten(0, 2)  # (heads, taps)
        form = (
            convolved_outer_products
            if is_symbol(length)  # the other form has a loop over the length
            or prefers_convolution(length, self.head_width)
            else toeplitz_masked_attention
        )
        with torch.autocast(x.device.type, enabled=False):
            y = form(q, k, v, kernel)
        return self.merge(y.to(dtype))

    def make_operator(self, x: Tensor, channels: slice, mask: Tensor | None) -> System:
        length = x.shape[1]
        q, k, _, _ = self.project(x, mask, None)
        dtype = working_dtype(q)
        q, k = q[:, channels].to(dtype), k[:, channels].to(dtype)  # (batch, heads, length, N)
        system = self.filter(length)[channels]
        if not has_small_state(system, length, self.head_width):
            with torch.autocast(x.device.type, enabled=False):
                return DenseOperator((q @ k.mT) * system.matrix(length).to(dtype))
        # Each value channel has N copies of the filter's state, one for each feature of the keys.
        one = to_time_varying(system, length)
        q, k = q.double(), k.double()
        B = (one.B.unsqueeze(-1) * k.unsqueeze(-2)).flatten(-2)  # (batch, heads, length, n N)
        C = (one.C.unsqueeze(-1) * q.unsqueeze(-2)).flatten(-2)
        A = one.A[:, 0]  # constant: (heads, n) or (heads, n, n)
        if one.A.ndim == one.B.ndim:
            A = A.repeat_interleave(self.head_width, dim=-1)
        else:
            A = torch.stack([torch.kron(a, torch.eye(self.head_width).to(a)) for a in A])
        A = A.unsqueeze(1).expand(len(q), -1, length, *A.shape[1:])
        return TimeVarying(A, B, C, one.D * (q * k).sum(-1))

    def join_state(
        self, batch: int, long: tuple[State, ...], dtype: torch.dtype, device: torch.device
    ) -> State:
        shape = (batch, self.short.taps - 1, 3 * self.width)
        return MultiHyenaState(torch.zeros(shape, dtype=dtype, device=device), *long)

    def convolve_chunk(
        self, x: Tensor, state: State, mask: Tensor | None, operators: tuple[Any, ...]
    ) -> tuple[Tensor, State]:
        assert isinstance(state, MultiHyenaState)
        q, k, v, past = self.project(x, mask, state.short)
        dtype = q.dtype
        q, k, v = (part.to(working_dtype(part)) for part in (q, k, v))
        long = state.long
        per_sample = q.shape[0] * self.width * self.head_width
        size = max(64, _CHUNK_ELEMENTS // per_sample)
        outputs = []
        for begin in range(0, x.shape[1], size):
            part = slice(begin, begin + size)
            keys, values = k[:, :, part].mT, v[:, :, part].mT  # (B, H, N, T)
            outer = keys.unsqueeze(3) * values.unsqueeze(2)  # (B, H, N, N, T)
            carried, long = operators[0](outer, long)
            with torch.autocast(x.device.type, enabled=False):
                outputs.append(torch.einsum("bhtn,bhnmt->bhtm", q[:, :, part], carried))
        y = torch.cat(outputs, dim=2).to(dtype)
        return self.merge(y), MultiHyenaState(past, long)

    def convolve_token(
        self, x_t: Tensor, state: State, long: tuple[Recurrence, ...]
    ) -> tuple[Tensor, State]:
        y, state = self.fused(self.in_proj(x_t), state, long)
        return self.out_proj(y), state

    def inner(self, z: Tensor, state: State, long: tuple[Recurrence, ...]) -> tuple[Tensor, State]:
        assert isinstance(state, MultiHyenaState)
        z, past = self.short.step(z, state.short)
        dtype = z.dtype
        z = z.to(working_dtype(z)).unflatten(-1, (3, self.heads, self.head_width))
        q, k, v = z.unbind(1)  # (B, H, N)
        carried, inner = long[0].step(k.unsqueeze(-1) * v.unsqueeze(-2), state.long)
        y = (q.unsqueeze(-1) * carried).sum(-2).flatten(1)
        return y.to(dtype), MultiHyenaState(past, inner)


def prefers_convolution(length: int, head_width: int) -> bool:
    """Return whether the FFT form is expected to be cheaper than the masked attention."""
    return head_width * _FFT_COST * math.log2(2 * length) < length


def toeplitz_masked_attention(q: Tensor, k: Tensor, v: Tensor, kernel: Tensor) -> Tensor:
    """Compute `(Q Kᵀ ∘ T_h) V` in blocks of rows, without the part above the diagonal.

    Args:
        q, k, v: (batch, heads, length, N).
        kernel: The taps h, (heads, K). Taps past the end are zero.

    Returns:
        (batch, heads, length, N).
    """
    length = q.shape[2]
    taps = nn.functional.pad(kernel.to(q.dtype), (0, max(0, length - kernel.shape[-1])))
    recompute = torch.is_grad_enabled() and math.prod(q.shape[:3]) * length > _SAVED_ELEMENTS

    def rows(q: Tensor, k: Tensor, v: Tensor, taps: Tensor) -> Tensor:
        count, end = q.shape[2], k.shape[2]
        reversed_taps = nn.functional.pad(taps[:, :end].flip(-1), (0, count - 1))
        mask = reversed_taps.unfold(-1, end, 1).flip(-2)  # (heads, count, end)
        return ((q @ k.mT) * mask) @ v

    outputs = []
    for begin in range(0, length, _ROWS):
        end = min(begin + _ROWS, length)
        part = (q[:, :, begin:end], k[:, :, :end], v[:, :, :end], taps)
        outputs.append(recomputed(rows, *part) if recompute else rows(*part))
    return torch.cat(outputs, dim=2)


def convolved_outer_products(q: Tensor, k: Tensor, v: Tensor, kernel: Tensor) -> Tensor:
    """Compute `(Q Kᵀ ∘ T_h) V` by FFT convolutions of `k_n v`, one key feature n after the other.

    The backward pass recomputes each convolution, so that N rather than N² sequences per head are
    in memory. Arguments and result are the same as in `toeplitz_masked_attention`.
    """

    def one(q_n: Tensor, k_n: Tensor, v: Tensor, kernel: Tensor) -> Tensor:
        carried = causal_convolution((k_n * v).mT, kernel.unsqueeze(1))  # (B, H, N, L)
        return q_n * carried.mT

    recompute = torch.is_grad_enabled()
    y = torch.zeros_like(v)
    for n in range(q.shape[-1]):
        part = (q[..., n : n + 1], k[..., n : n + 1], v, kernel)
        y = y + (recomputed(one, *part) if recompute else one(*part))
    return y
