"""Rank the layers of a report by the share of their state in use, and suggest what to do.

Suggestions depend on the kind of a layer. `_SUGGESTIONS` has a function for each kind.

- *Attention* stores keys and values of all tokens that it can read. A head whose ESS stays small
  needs few of these numbers.
- A *recurrence* has a state of fixed size, which may be too large or full.
- A *convolution* stores its inputs, or the states of recurrences of fixed order.

An ESS says how many numbers carry the memory, but not which. So a suggestion is a hypothesis, and
only the loss of the changed model shows whether it holds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from gramian.analysis._report import LayerState, StateReport

__all__ = ["LayerRanking", "RankedLayer", "rank_layers"]

_SMALL = 1 / 8
"""A head is small if its largest ESS is at most this share of its largest usable state."""

_FULL = 0.8
"""A state is full if this share of it is in use."""

_SPARE = 0.75
"""A smaller state is suggested if its size is at most this share of the present size."""

_LISTED = 6
"""The largest number of heads that a suggestion lists."""

_SHRINKS = frozenset(
    {
        "BambaMixer",
        "FalconH1Mixer",
        "FalconMambaMixer",
        "GLAS6",
        "GatedDeltaNet",
        "GatedLinearAttention",
        "GraniteMoeHybridMambaLayer",
        "JambaMambaMixer",
        "LinearAttention",
        "Mamba2Mixer",
        "MambaMixer",
        "NemotronHMamba2Mixer",
        "OlmoHybridGatedDeltaNet",
        "Qwen3NextGatedDeltaNet",
        "Qwen3_5GatedDeltaNet",
        "Qwen3_5MoeGatedDeltaNet",
        "Qwen4ExpTextGatedDeltaNet",
        "S6",
        "WeightedLinearAttention",
        "Zamba2MambaMixer",
        "ZambaMambaMixer",
    }
)
"""Classes of layers whose states `gramian shrink` makes smaller.

`gramian.shrinking` defines them, which lies above this package; a test compares both.
"""

_NOTE = (
    "An ESS says about how many numbers for each value channel carry the memory, not which. "
    "Measure the loss of a changed model before you keep it."
)


@dataclass(frozen=True)
class RankedLayer:
    """A layer in the order of the share of its usable state that is in use.

    Attributes:
        name: path of the module in the model.
        label: the path without what the paths of all layers share.
        mixer: name of the module's class.
        kind: "attention", "recurrence" or "convolution".
        in_use: share of the usable state that is in use; None if no state is usable.
        suggestion: what could be done about it, in whole sentences.
        channels: measured heads or channels that the suggestion is about.
        held_bytes: bytes that the layer stores of these heads or channels at the last measured
            position, for one sequence; None if they are not known, or nothing can be saved.
        needed_bytes: bytes that the suggestion would store instead; None in the same cases.
    """

    name: str
    label: str
    mixer: str
    kind: str
    in_use: float | None
    suggestion: str
    channels: tuple[int, ...] = ()
    held_bytes: int | None = None
    needed_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as values that JSON can hold."""
        return dataclasses.asdict(self) | {"channels": list(self.channels)}


@dataclass(frozen=True)
class LayerRanking:
    """The layers of a report, the one with the smallest share in use first. It prints as a table.

    Attributes:
        model: name of the model.
        layers: the layers. Those without a usable state come last.
    """

    model: str
    layers: tuple[RankedLayer, ...]

    def __iter__(self) -> Iterator[RankedLayer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        rows = [f"{one.label}\t{_share(one)}\t{one.suggestion}" for one in self.layers]
        return "\n".join(["layer\tin use\tsuggestion", *rows, _NOTE])

    def __rich__(self) -> Table:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(
            title=f"{self.model}: layers by the share of their state in use",
            caption=_NOTE,
            caption_justify="left",
            box=SIMPLE_HEAD,
            pad_edge=False,
        )
        table.add_column("layer", overflow="fold")
        table.add_column("in use", justify="right", no_wrap=True)
        table.add_column("suggestion", overflow="fold", ratio=1)
        for one in self.layers:
            table.add_row(one.label, _share(one), one.suggestion)
        return table


def rank_layers(report: StateReport) -> LayerRanking:
    """Return the layers of a report by the share in use, each with a suggestion."""
    report = report.main
    ranked = []
    last = max(report.positions, default=0)
    for layer, label in zip(report.layers, report.labels, strict=True):
        share = layer.in_use
        if share is None:
            found = _Suggestion("No measured position has a usable state.")
        else:
            found = _SUGGESTIONS.get(layer.kind, _of_another_kind)(_Measured(layer, last), share)
        ranked.append(
            RankedLayer(
                name=layer.name,
                label=label,
                mixer=layer.mixer,
                kind=layer.kind,
                in_use=share,
                suggestion=found.text,
                channels=found.channels,
                held_bytes=found.held_bytes,
                needed_bytes=found.needed_bytes,
            )
        )
    ranked.sort(key=lambda one: math.inf if one.in_use is None else one.in_use)
    return LayerRanking(report.model, tuple(ranked))


@dataclass(frozen=True)
class _Suggestion:
    """What could be done about a layer. The fields are those of `RankedLayer`."""

    text: str
    channels: tuple[int, ...] = ()
    held_bytes: int | None = None
    needed_bytes: int | None = None


class _Measured:
    """A layer, with the numbers on which suggestions depend.

    Attributes:
        layer: the layer.
        peaks: largest ESS of each measured head or channel.
        usable: largest usable state of each.
        states: TSS of each at its largest.
        last: last measured position.
    """

    def __init__(self, layer: LayerState, last: int) -> None:
        self.layer = layer
        self.peaks: list[float] = layer.ess.amax(1).tolist()
        self.usable: list[float] = layer.usable.amax(1).tolist()
        self.states: list[float] = layer.tss.amax(1).tolist()
        self.last = last

    @property
    def state(self) -> int:
        """The largest state of a head or channel."""
        return round(max(self.states))

    @property
    def keeps_inputs(self) -> bool:
        """Whether the state grows with the text up to its end."""
        return self.state >= self.last


def _attention(measured: _Measured, share: float) -> _Suggestion:
    """Suggest a short window for heads that need few numbers, or a longer one if it is full."""
    if measured.keeps_inputs and max(measured.usable) < 2 / _SMALL:
        return _Suggestion(
            f"The text is too short to tell: at most {max(measured.usable):.0f} states are usable."
        )
    small = [
        row
        for row, (peak, usable) in enumerate(zip(measured.peaks, measured.usable, strict=True))
        if _enough(peak) <= _SMALL * usable
    ]
    if small:
        return _small_heads(measured, small)
    if share >= _FULL and not measured.keeps_inputs:
        return _Suggestion("Its window is full. A longer window may help.")
    return _Suggestion(
        f"Every head reaches an ESS of {min(measured.peaks):.1f} or more, so a short window would "
        "take memory from all of them."
    )


def _small_heads(measured: _Measured, small: list[int]) -> _Suggestion:
    layer, storage = measured.layer, measured.layer.storage
    channels = tuple(layer.channels[row] for row in small)
    peak = max(measured.peaks[row] for row in small)
    size, count = _enough(peak), len(layer.channels)
    text = (
        f"{_some(channels, count)} an ESS above {_above(peak):.1f}, of {measured.state:,} tokens."
    )
    window = f"A window of {_count(size, 'token')} may do"
    if storage is None:
        return _Suggestion(f"{text} {window}.", channels)
    alone = [
        group
        for group in dict.fromkeys(channel // storage.group for channel in channels)
        if all(group * storage.group + k in channels for k in range(storage.group))
    ]
    if not alone:
        return _Suggestion(f"{text} Other heads read the same keys and values.", channels)
    held, needed = (len(alone) * storage.nbytes(tokens) for tokens in (measured.state, size))
    text += f" {window}: {_bytes(needed)} of keys and values instead of {_bytes(held)}"
    if len(channels) > len(alone) * storage.group:
        text += f", for {_count(len(alone), 'KV head')} that no other head reads"
    return _Suggestion(f"{text}.", channels, held, needed)


def _recurrence(measured: _Measured, share: float) -> _Suggestion:
    """Suggest a smaller state, or a larger one if it is full."""
    peak, state = max(measured.peaks), measured.state
    if max(measured.usable) < state:
        return _Suggestion(
            f"The text is too short to fill its state of {state:,}: read at least {2 * state:,} "
            "tokens."
        )
    if share >= _FULL:
        return _Suggestion(
            f"Its state of {state:,} is full. A larger state or gates that forget faster may help."
        )
    if _enough(peak) > _SPARE * state:
        return _Suggestion(
            f"Its ESS reaches {peak:.1f} of {state:,} states. Keep the size of its state."
        )
    text = f"Its ESS reaches only {peak:.1f} of {state:,} states."
    if share < _SMALL:
        text += " Gates that forget too fast are the usual reason."
    what = "Fewer states may do"
    if measured.layer.mixer in _SHRINKS:
        what += ", and `gramian shrink` chooses them"
    return _smaller_states(measured, f"{text} {what}")


def _convolution(measured: _Measured, share: float) -> _Suggestion:
    """Suggest distillation, or fewer states or taps."""
    peak, state = max(measured.peaks), measured.state
    ours = measured.layer.reader == "mixer"
    if _enough(peak) > _SPARE * state:
        return _Suggestion(f"Its ESS reaches {peak:.1f} of {state:,} numbers. Keep its size.")
    if measured.keeps_inputs:
        what = "`gramian distill` makes recurrences" if ours else "A recurrence may do"
        return _smaller_states(
            measured,
            f"It keeps its inputs, {state:,} for each value channel, and its ESS reaches "
            f"{peak:.1f}. {what}",
        )
    what = "`gramian distill` makes fewer states" if ours else "Fewer taps may do"
    return _smaller_states(measured, f"Its ESS reaches only {peak:.1f} of {state:,}. {what}")


def _smaller_states(measured: _Measured, text: str) -> _Suggestion:
    """Return a suggestion with the bytes of the present states and of smaller ones."""
    layer, size = measured.layer, _enough(max(measured.peaks))
    if layer.storage is None:
        return _Suggestion(f"{text}.", layer.channels)
    held = layer.storage.nbytes(sum(measured.states))
    needed = layer.storage.nbytes(sum(min(size, state) for state in measured.states))
    number = _count(len(layer.channels), "measured head or channel", "measured heads or channels")
    text += (
        f" (about {size} numbers each: {_bytes(needed)} instead of {_bytes(held)} for {number})."
    )
    return _Suggestion(text, layer.channels, held, needed)


def _of_another_kind(measured: _Measured, share: float) -> _Suggestion:
    return _Suggestion(
        f"Its ESS reaches {max(measured.peaks):.1f} of {measured.state:,} numbers for each value "
        "channel."
    )


_SUGGESTIONS: dict[str, Callable[[_Measured, float], _Suggestion]] = {
    "attention": _attention,
    "recurrence": _recurrence,
    "convolution": _convolution,
}


def _enough(peak: float) -> int:
    """Return a whole number of states for an ESS. An ESS a hair above a whole number is that."""
    return max(1, math.ceil(peak - 1e-3))


def _above(peak: float) -> float:
    """Return a number of one decimal that is not below an ESS."""
    return math.ceil(10 * peak - 1e-3) / 10


def _share(one: RankedLayer) -> str:
    return "" if one.in_use is None else f"{100 * one.in_use:.1f} %"


def _some(channels: tuple[int, ...], measured: int) -> str:
    """Return the beginning of a sentence such as "2 of 9 heads (0, 4) never reach"."""
    if len(channels) == measured:
        return "None of its heads reaches" if measured > 1 else "Its head never reaches"
    listed = ", ".join(map(str, channels[:_LISTED])) + (", …" if len(channels) > _LISTED else "")
    verb = "reaches" if len(channels) == 1 else "reach"
    return f"{len(channels)} of {_count(measured, 'head')} ({listed}) never {verb}"


def _count(number: int, noun: str, plural: str = "") -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {plural or noun + 's'}"


def _bytes(number: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if number < 1024:
            return f"{number:,.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:,.1f} GiB"
