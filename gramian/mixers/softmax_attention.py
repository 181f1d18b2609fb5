r"""Softmax attention: `y_t = Σ_{s≤t} softmax_s(q_t · k_s / √N) v_s` in every head.

Attention is the baseline for other mixers. Hybrid models such as StripedHyena and Evo combine it
with long convolutions. Several heads may share keys and values (grouped queries, Ainslie et al.
2023). Positions enter by rotation (RoFormer, Su et al. 2021, equation 34, in the half-split layout
of GPT-NeoX and Llama). A window may limit how far back a query sees.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from gramian._checks import check_divides, check_probability, check_sizes
from gramian.mixers.mixer import Mixer
from gramian.mixers.registry import register
from gramian.ops.devices import from_host
from gramian.ops.lengths import is_symbol
from gramian.ops.packed import Linear
from gramian.systems import DenseOperator, State, System, working_dtype

__all__ = ["SoftmaxAttention", "SoftmaxAttentionState"]

_ROOM = 64  # the number of tokens for which the smallest cache has room
_MASK_ELEMENTS = 2**25  # the maximal number of entries (batch, rows, keys) of a mask


class _Fields(NamedTuple):
    keys: Tensor
    values: Tensor
    real: Tensor
    seen: Tensor


class SoftmaxAttentionState(_Fields, State):
    """The rotated keys and the values of the real tokens so far.

    `keys` and `values` are (batch, kv_heads, room, N), where room is the number of slots for
    tokens. Token p of a sequence is in slot `p % room`. Padding has no slot and no effect. `real`,
    (batch), int64, is the number of real tokens of each sequence. `seen`, (), int64 on the CPU, is
    the number of all tokens, padding included.

    When the slots are full, their number doubles. If there is a window, the number never exceeds
    the window.
    """

    __slots__ = ()


@register("softmax_attention")
class SoftmaxAttention(Mixer):
    """Causal multi-head attention with grouped queries, rotary positions and an optional window.

    The input projection is one matrix, whose rows belong to all queries, then to all keys, then to
    all values, with the heads in order. So the separate projections of another library can be
    concatenated, and a fused projection can be used unchanged. A token's position is the number of
    real tokens before it.

    Args:
        width: Channels of input and output.
        heads: Number of query heads.
        kv_heads: Number of heads of keys and values, a divisor of `heads`; by default `heads`.
        head_width: N, the number of features of a head; by default `width / heads`.
        window: Number of last tokens to which a query attends, including its own token. None means
            all tokens.
        rotary_base: Base θ of the rotations' periods, or None for attention without positions.
        rotary_scaling: Divisor of positions (linear interpolation, Chen et al. 2023).
        rotary_width: Number of leading features of a head that are rotated. By default, all are
            rotated.
        rotary_frequencies: Angles of the rotations in radians per position, `rotary_width / 2`
            numbers. They replace the angles that follow from `rotary_base`, and `rotary_scaling`
            divides them too. A model that was published with rounded frequencies needs these
            frequencies as stored.
        bias: Whether the input projection has a bias.
        out_bias: Whether the output projection has a bias; by default equal to `bias`.
        dropout: Probability of dropping an attention weight in training, where whole sequences are
            read. The other weights are scaled up.

    Raises:
        ValueError: if a number is out of range, or if `kv_heads` does not divide `heads`. Also if
            `head_width` is not given and the heads do not divide the width.
    """

    family = "attention"

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        head_width: int | None = None,
        window: int | None = None,
        rotary_base: float | None = 10_000.0,
        rotary_scaling: float = 1.0,
        rotary_width: int | None = None,
        rotary_frequencies: Sequence[float] | None = None,
        bias: bool = False,
        out_bias: bool | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if head_width is None:
            check_divides("heads", heads, width)
            head_width = width // heads
        kv_heads = heads if kv_heads is None else kv_heads
        rotary_width = head_width if rotary_width is None else rotary_width
        sizes = {"heads": heads, "kv_heads": kv_heads, "head_width": head_width}
        sizes |= {} if window is None else {"window": window}
        check_sizes(**sizes)
        if heads % kv_heads:
            raise ValueError(f"kv_heads must divide the {heads} heads; got {kv_heads}.")
        if rotary_base is not None:
            if not rotary_base > 0 or not rotary_scaling > 0:
                raise ValueError(
                    "rotary_base and rotary_scaling must be positive; got "
                    f"{rotary_base!r} and {rotary_scaling!r}."
                )
            if rotary_width % 2 or not 0 < rotary_width <= head_width:
                raise ValueError(
                    "rotary_width must be even, at least 2 and at most the head's width "
                    f"{head_width}; got {rotary_width}."
                )
        self.width = width
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_width = head_width
        self.window = window
        self.dropout = check_probability("dropout", dropout)
        self.rotary_base = rotary_base
        self.rotary_scaling = rotary_scaling
        self.rotary_width = rotary_width
        self.rotary_frequencies = self._read_frequencies(rotary_frequencies)
        self.in_proj = Linear(width, (heads + 2 * kv_heads) * head_width, bias=bias)
        self.out_proj = Linear(
            heads * head_width, width, bias=bias if out_bias is None else out_bias
        )

    def _read_frequencies(self, given: Sequence[float] | None) -> tuple[float, ...] | None:
        if given is None:
            return None
        if self.rotary_base is None:
            raise ValueError("rotary_frequencies need a rotary_base; got None for it.")
        found = tuple(float(frequency) for frequency in given)
        if len(found) != self.rotary_width // 2 or not all(map(math.isfinite, found)):
            raise ValueError(
                f"rotary_frequencies must be {self.rotary_width // 2} finite numbers, half of the "
                f"rotated features; got {len(found)}."
            )
        return found

    @property
    def channels(self) -> int:
        return self.heads

    @classmethod
    def splits_width(cls, options: Mapping[str, Any]) -> bool:
        return "head_width" not in options

    def config(self) -> dict[str, Any]:
        return super().config() | {
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_width": self.head_width,
            "window": self.window,
            "rotary_base": self.rotary_base,
            "rotary_scaling": self.rotary_scaling,
            "rotary_width": self.rotary_width,
            "rotary_frequencies": self.rotary_frequencies and list(self.rotary_frequencies),
            "bias": self.in_proj.bias is not None,
            "out_bias": self.out_proj.bias is not None,
            "dropout": self.dropout,
        }

    def room(self, tokens: int) -> int:
        """Return the number of slots that the state has after `tokens` tokens."""
        room = max(_ROOM, 1 << max(tokens - 1, 0).bit_length())
        return room if self.window is None else min(room, self.window)

    def make_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> State:
        shape = (batch, self.kv_heads, self.room(0), self.head_width)
        return SoftmaxAttentionState(
            torch.zeros(shape, dtype=dtype, device=device),
            torch.zeros(shape, dtype=dtype, device=device),
            torch.zeros(batch, dtype=torch.int64, device=device),
            torch.zeros((), dtype=torch.int64),
        )

    def reserve(self, state: State, tokens: int) -> State:
        assert isinstance(state, SoftmaxAttentionState)
        more = self.room(int(state.seen) + tokens) - state.keys.shape[2]
        if more <= 0:
            return state
        grow = (0, 0, 0, more)
        keys, values = (nn.functional.pad(x, grow) for x in (state.keys, state.values))
        return state._replace(keys=keys, values=values)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project x to queries, keys and values, and rotate the queries and keys.

        Args:
            x: (batch, length, width).
            positions: The positions of the tokens, (batch, length) or (1, length).

        Returns:
            The queries (batch, heads, length, N), the keys (batch, kv_heads, length, N) and the
            values, in the shape of the keys.
        """
        z = self.in_proj(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
        rotated, v = z.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        if self.rotary_base is not None:
            rotated = self._rotate(rotated, positions)
        q, k = rotated.split((self.heads, self.kv_heads), dim=1)
        return q, k, v

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate features i and i + half by position × θ^(-i/half); half is rotary_width / 2."""
        assert self.rotary_base is not None
        half = self.rotary_width // 2
        dtype = torch.promote_types(x.dtype, torch.float32)
        if self.rotary_frequencies is None:
            exponents = torch.arange(half, device=x.device, dtype=dtype) * (-1 / half)
            frequencies = torch.pow(self.rotary_base, exponents)
        else:
            frequencies = from_host(self.rotary_frequencies, x.device, dtype)
        frequencies = frequencies / self.rotary_scaling
        angles = positions.to(dtype)[:, None, :, None] * frequencies  # (batch, 1, length, half)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        first, second = x[..., :half], x[..., half : 2 * half]
        turned = [first * cos - second * sin, second * cos + first * sin]
        return torch.cat([*turned, x[..., 2 * half :]], dim=-1)

    def merge(self, y: Tensor) -> Tensor:
        """Join the heads of y (batch, heads, length, N) and apply the output projection."""
        return self.out_proj(y.transpose(1, 2).flatten(-2))

    def _positions(self, length: int, mask: Tensor | None, device: torch.device) -> Tensor:
        """Return the number of real tokens before each token.

        The result is (batch, length), or (1, length) without a mask.
        """
        if mask is None:
            return torch.arange(length, device=device)[None]
        real = (mask != 0).to(device, torch.int64)
        return real.cumsum(1) - real

    def mix_whole(self, x: Tensor, mask: Tensor | None) -> Tensor:
        positions = self._positions(x.shape[1], mask, x.device)
        q, k, v = self.project(x, positions)
        dropout = self.dropout if self.training else 0.0
        return self.merge(self._attend(q, k, v, positions, mask, dropout=dropout))

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        past: SoftmaxAttentionState | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        """Let each query attend to the past and to the keys up to and including its own.

        A query at padding sees its own key. So its output is finite, although it is never read.

        Args:
            q: (batch, heads, length, N), rotated.
            k: (batch, kv_heads, length, N), rotated.
            v: (batch, kv_heads, length, N).
            positions: (batch, length) or (1, length).
            mask: (batch, length), zero for padding. None if there is no padding.
            past: The state before these tokens. None if there were no tokens.
            dropout: The probability of dropping a weight.

        Returns:
            (batch, heads, length, N).
        """
        batch, _, length, _ = q.shape
        grouped = self.heads != self.kv_heads
        traced = is_symbol(length)  # a graph for every length attends to all keys at once
        short = self.window is None or (not traced and length <= self.window)
        if mask is None and past is None and short:
            return scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=grouped
            )
        before = 0
        if past is not None:
            before = past.keys.shape[2]
            k = torch.cat([past.keys.to(k.dtype), k], dim=2)
            v = torch.cat([past.values.to(v.dtype), v], dim=2)
        index = torch.arange(length, device=q.device)
        rows = max(1, _MASK_ELEMENTS // (batch * (before + length)))
        local = past is None and mask is None and self.window is not None and not traced
        if local:
            rows = min(rows, max(64, self.window or 0))
        outputs = []
        for begin in (0,) if traced else range(0, length, rows):
            end = length if traced else min(begin + rows, length)
            at, now = index[begin:end, None], positions[:, begin:end, None]
            first = max(0, begin - (self.window or 0) + 1) if local else 0
            seen = index[first:end] <= at  # (rows, keys)
            if self.window is not None:
                seen = seen & (now - positions[:, None, first:end] < self.window)
            if mask is not None:
                seen = seen & (mask[:, None, first:end] != 0).to(q.device)
            seen = seen | (index[first:end] == at)
            if past is not None:
                seen = seen.expand(batch, -1, -1)
                seen = torch.cat([self.remembered(past, now), seen], dim=2)
            elif seen.ndim == 2:
                seen = seen[None]
            part = slice(first, before + end)
            outputs.append(
                scaled_dot_product_attention(
                    q[:, :, begin:end],
                    k[:, :, part],
                    v[:, :, part],
                    attn_mask=seen[:, None],
                    dropout_p=dropout,
                    enable_gqa=grouped,
                )
            )
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def remembered(self, past: SoftmaxAttentionState, now: Tensor) -> Tensor:
        """Return which slots of a state each query sees.

        Args:
            past: The state before the queries.
            now: The positions of the queries, (batch, rows, 1).

        Returns:
            (batch, rows, room), boolean.
        """
        room = past.keys.shape[2]
        slots = torch.arange(room, device=now.device)
        last = past.real[:, None] - 1
        held = (last - (last - slots) % room)[
            :, None
        ]  # the position in each slot, (batch, 1, room)
        seen = held >= 0
        if self.window is not None:
            seen = seen & (now - held < self.window)
        return seen.expand(-1, now.shape[1], -1)

    def make_operator(self, x: Tensor, channels: slice, mask: Tensor | None) -> System:
        positions = self._positions(x.shape[1], mask, x.device)
        q, k, _ = self.project(x, positions)
        k = k.repeat_interleave(self.heads // self.kv_heads, dim=1)
        q, k = (part[:, channels].to(working_dtype(part)) for part in (q, k))
        with torch.autocast(x.device.type, enabled=False):
            scores = q @ k.mT / math.sqrt(self.head_width)
        index = torch.arange(x.shape[1], device=x.device)
        hidden = (index > index[:, None]).unsqueeze(0)  # (1 or batch, length, length)
        if self.window is not None:
            hidden = hidden | (positions[:, :, None] - positions[:, None] >= self.window)
        if mask is not None:
            own = index == index[:, None]
            hidden = hidden | ((mask == 0).to(x.device)[:, None] & ~own)
        hidden = hidden.unsqueeze(1)
        return DenseOperator(scores.masked_fill(hidden, -math.inf).softmax(-1))

    def mix_chunk(self, x: Tensor, state: State, mask: Tensor | None) -> tuple[Tensor, State]:
        assert isinstance(state, SoftmaxAttentionState)
        length = x.shape[1]
        positions = state.real[:, None] + self._positions(length, mask, x.device)
        q, k, v = self.project(x, positions)
        past = None if int(state.seen) == 0 else state
        y = self.merge(self._attend(q, k, v, positions, mask, past))
        return y, self.remember(self.reserve(state, length), k, v, mask)

    def remember(
        self, state: State, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> SoftmaxAttentionState:
        """Return the state after more tokens, whose k and v are (batch, kv_heads, length, N).

        The mask (batch, length) is false for padding, which comes before the tokens of a row.
        """
        assert isinstance(state, SoftmaxAttentionState)
        keys, values, count, seen = state
        length, room = k.shape[2], keys.shape[2]
        total = count + (length if mask is None else (mask != 0).to(k.device).sum(1))
        slots = torch.arange(room, device=k.device)
        last = total[:, None] - 1
        held = last - (last - slots) % room  # the position that each slot will hold
        new = (
            held - count[:, None]
        )  # the index among the new real tokens, negative for an old token
        source = new.clamp_min(0)
        if mask is not None:
            source = source + (length - (total - count))[:, None]  # padding comes first
        source = torch.where(
            new >= 0, room + source, slots
        )  # (batch, room): the index among old slots and new tokens
        index = source[:, None, :, None].expand(-1, self.kv_heads, -1, self.head_width)
        keys = torch.cat([keys, k.to(keys.dtype)], dim=2).gather(2, index)
        values = torch.cat([values, v.to(values.dtype)], dim=2).gather(2, index)
        return SoftmaxAttentionState(keys, values, total, seen + length)

    def mix_token(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        assert isinstance(state, SoftmaxAttentionState)
        keys, values, count, seen = state
        room = keys.shape[2]
        q, k, v = self.project(x_t[:, None], count[:, None])
        index = (count % room)[:, None, None, None].expand_as(k)
        keys.scatter_(2, index, k.to(keys.dtype))
        values.scatter_(2, index, v.to(values.dtype))
        held = (
            torch.arange(room, device=x_t.device) <= count[:, None]
        )  # all slots, once they are full
        q = q.reshape(-1, self.kv_heads, self.heads // self.kv_heads, self.head_width)
        y = scaled_dot_product_attention(
            q, keys.to(q.dtype), values.to(q.dtype), attn_mask=held[:, None, None]
        )
        state = SoftmaxAttentionState(keys, values, count + 1, seen + 1)
        return self.out_proj(y.flatten(1)), state

    def extra_repr(self) -> str:
        return (
            f"heads={self.heads}, kv_heads={self.kv_heads}, head_width={self.head_width}, "
            f"window={self.window}, rotary_base={self.rotary_base}"
        )
