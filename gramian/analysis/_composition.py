r"""Join the operator of a layer with that of the short convolution before it.

A value channel v of the layer is fed by one output channel of the convolution, through an
activation that treats every number alone. For the input at hand, this activation is the factor
`s_t = v_t / y_t` of the convolution's output y_t. So the operator from the convolution's input to
the layer's output is `T_layer diag(s) T_convolution`. The output channel that feeds each value
channel is found by changing some of them at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gramian.analysis._responses import Responses, Unreadable, ValueMap, measure_operators
from gramian.analysis._tracing import Call, Frame, Key, Replay, Tracer
from gramian.analysis._values import copied, leaves_of, window, with_leaf
from gramian.mixers import LinearRecurrence
from gramian.systems import DenseOperator, System

__all__ = ["Feed", "compose", "compose_mixer", "find_feed"]

_CHANGED = 1e-4  # the least relative change of a value that counts


@dataclass(frozen=True)
class Feed:
    """Which channels of a convolution feed the values of a layer.

    Attributes:
        convolution: the key of the convolution.
        values: where its values are.
        channels: for each value channel of the layer, the output channel of the convolution that
            feeds it, (V).
    """

    convolution: Key
    values: ValueMap
    channels: Tensor


def find_feed(
    tracer: Tracer,
    frame: Frame,
    length: int,
    convolution: tuple[Call, ValueMap],
    layer: Call,
    values_of: Callable[[Call], Tensor],
) -> Feed | None:
    """Return which channels of a convolution feed a layer, or None if it is not one for each value.

    Args:
        tracer: The tracer that is installed.
        frame: The run of the module that makes both calls.
        length: The number of positions.
        convolution: The call of the convolution, and where its values are.
        layer: The call of the layer.
        values_of: A function that maps a call of the layer to its values, (V, L).
    """
    call, found = convolution
    y: Tensor = leaves_of(call.result)[found.result]
    if found.classes or found.integers or max(found.streams) > 1:
        return None
    count = window(y, found.result_axis, length, found.padded_before)[0].numel()
    base = values_of(layer)

    def changed(channels: Tensor) -> Tensor:
        """Return which value channels change with some output channels of the convolution, (V)."""
        other = y.detach().clone()
        rows = window(other, found.result_axis, length, found.padded_before)
        noise = torch.randn(length, count, generator=torch.Generator().manual_seed(0))
        rows += (2 * float(y.std()) * noise * channels).reshape(rows.shape).to(rows)
        frozen = {call.key: with_leaf(call.result, found.result, other), layer.key: layer.result}
        replay = Replay(tracer, frame, length, frozen, operations=True).run()
        args = replay.watched[layer.key]
        values = values_of(Call(layer.key, layer.function, args, layer.result))
        return (values - base).norm(dim=-1) > _CHANGED * base.norm(dim=-1)

    source = _sources(changed, count, len(base))
    if source is None or not bool(torch.isin(source, found.outputs).all()):
        return None
    return Feed(call.key, found, source)


def _sources(changed: Callable[[Tensor], Tensor], count: int, size: int) -> Tensor | None:
    """Return which of `count` channels determines each of the values, (size).

    Args:
        changed: A function that maps a selection of the channels, (count), to which values change
            with them, (size).
        count: The number of channels.
        size: The number of values.

    Returns:
        The channels, or None if a value depends on several of them or on none.
    """
    index = torch.arange(count)
    source = torch.zeros(size, dtype=torch.int64)
    for bit in range(max(1, (count - 1).bit_length())):
        ones = (index >> bit) & 1 == 1
        one, zero = changed(ones).cpu(), changed(~ones).cpu()
        if not bool((one ^ zero).all()):
            return None
        source += one.long() << bit
    return source


def compose(
    feed: Feed,
    responses: Responses,
    result: Any,
    values: Tensor,
    core: Callable[[list[int]], Tensor],
    heads: list[int],
) -> Callable[[slice], System]:
    """Return the function that returns the joined operators of some value channels.

    Args:
        feed: Which channels of the convolution feed the values.
        responses: The responses of the convolution.
        result: What the convolution returned.
        values: The values of the layer, (V, L).
        core: A function that maps indices of the layer's operators to their matrices, (h, L, L).
        heads: For each value channel, the index of its operator of the layer.

    Returns:
        A function that maps a slice of the value channels to a dense operator.
    """
    length = responses.length
    y = responses.flat(copied(leaves_of(result)[feed.values.result])).double()  # (L, O)

    def system(chosen: slice) -> System:
        channels = feed.channels[chosen]
        pairs = [int((feed.values.outputs == c).nonzero()[0, 0]) for c in channels]
        operators = [int(feed.values.operator[k]) for k in pairs]
        distinct = sorted(set(operators))
        measured = measure_operators(responses, feed.values, distinct).double()
        first = _matrices(measured, length) if feed.values.taps else measured
        before = first[[distinct.index(g) for g in operators]]  # (v, L, L)
        wanted = list(range(len(heads)))[chosen]
        own = sorted({heads[v] for v in wanted})
        after = core(own).double()[[own.index(heads[v]) for v in wanted]]
        return _product(after, values[chosen], y[:, channels.to(y.device)].T, before)

    return system


def compose_mixer(mixer: LinearRecurrence, x: Tensor) -> tuple[int, Callable[[slice], System]]:
    """Return the number of value channels of a mixer, and the function of their joined operators.

    Args:
        mixer: The mixer.
        x: Its input, (1, L, width).

    Raises:
        Unreadable: if a value depends on several outputs of the short convolution.
    """
    length = x.shape[1]
    y, rest, _ = mixer.convolve(x)

    def values_from(mixed: Tensor) -> Tensor:
        return mixer.values(mixed, rest).transpose(-1, -2).reshape(-1, length)

    values = values_from(y)

    def changed(channels: Tensor) -> Tensor:
        noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)) * channels
        away = values_from(y + 2 * y.std() * noise.to(y)) - values
        return away.norm(dim=-1) > _CHANGED * values.norm(dim=-1)

    sources = _sources(changed, y.shape[-1], len(values))
    if sources is None:
        raise Unreadable("its values depend on several outputs of its short convolution.")
    operator = mixer.operator(x)
    taps = mixer.short.weight.detach().double()
    output = y[0].double().T  # (convolved, L)
    width = len(values) // mixer.heads

    def system(chosen: slice) -> System:
        wanted = range(len(values))[chosen]
        own = sorted({v // width for v in wanted})
        matrices = operator[:, torch.tensor(own)].matrix(length)[0].double()
        after = matrices[[own.index(v // width) for v in wanted]]
        channels = sources[chosen].to(y.device)
        return _product(after, values[chosen], output[channels], _matrices(taps[channels], length))

    return len(values), system


def _product(after: Tensor, values: Tensor, output: Tensor, before: Tensor) -> System:
    """Return `T_layer diag(s) T_convolution` for some value channels.

    Args:
        after: The operators of the layer, (v, L, L), float64.
        values: The values, (v, L).
        output: The outputs of the convolution that feed them, (v, L), float64.
        before: The operators of the convolution, (v, L, L), float64.
    """
    factors = torch.where(output == 0, 0, values.double() / output)
    return DenseOperator(after @ (factors[..., None] * before))


def _matrices(taps: Tensor, length: int) -> Tensor:
    """Return the matrices (n, L, L) of convolutions with taps (n, K)."""
    column = torch.nn.functional.pad(taps, (0, max(0, length - taps.shape[-1])))[:, :length]
    lag = torch.arange(length)[:, None] - torch.arange(length)
    return column[:, lag.clamp_min(0)] * (lag >= 0).to(column)
