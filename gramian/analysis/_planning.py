"""Plan how the operators of one module are read, on a short sequence.

The calls that mix positions are tried one after the other: depthwise convolutions, attention
functions and scans that have readers of their own, other functions of the modeling file and methods
of the module, the module itself, segments between the modules inside it, and operations of torch.
After each call that can be read, its result is frozen. The plan is complete when nothing mixes
positions any more, neither in the module's result nor in the arguments of the calls that are read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gramian.analysis._attention import ATTENTION, read_attention
from gramian.analysis._composition import Feed, find_feed
from gramian.analysis._general import find_moves, find_pairs, find_values
from gramian.analysis._mixing import Leftover, mixing_of
from gramian.analysis._multihead import is_multihead, multihead_call
from gramian.analysis._responses import TOLERANCE, Unreadable, ValueMap, measure_operators
from gramian.analysis._scans import SCANS, ScanReading, read
from gramian.analysis._segments import segment_call, segments_of
from gramian.analysis._single import single_call, single_frame
from gramian.analysis._tracing import Call, Frame, Key, Replay, Tracer
from gramian.analysis._values import copied, leaves_of

__all__ = ["Plan", "Planner", "Site", "read_scan", "repeated_call", "values_of"]

_AHEAD = "it is not causal: it looks ahead."
_CONVOLUTIONS = ("conv1d",)
_COPIES = ("clone", "detach", "size", "to", "float")
_CALLS = 200  # the largest number of calls of one module that are tried
_SEGMENTS = 100  # the largest number of its segments that are tried
_FAILURES = 2  # after as many failures, modules of the same class are not searched again
_GENERAL = 16  # the largest number of blocks of channels that are tried in other calls
_OPERATION = 4  # the same in an operation of torch, whose values may be of several streams
_BLOCKS = 128  # the largest number of blocks of channels that are tried in a segment


@dataclass(frozen=True)
class Site:
    """A call whose operators are read.

    Attributes:
        key: kind, name and number of the call.
        reader: "attention", "scan" or "general".
        values: where the call's values are, if the reader is "general".
        short: the call on the short sequence, if the reader is another one. If that reader fails on
            the whole input, it shows where the values are.
    """

    key: Key
    reader: str
    values: ValueMap | None = None
    short: Call | None = field(default=None, compare=False, repr=False)

    @property
    def repeats(self) -> bool:
        """Return whether the module has to run again for this call."""
        return self.key[0] in ("module", "segment")

    @property
    def kind(self) -> str:
        """Return the kind of the layer: "attention", "recurrence" or "convolution"."""
        if self.values is None:
            return "attention" if self.reader == "attention" else "recurrence"
        if self.values.taps:
            return "convolution"
        return "attention" if self.values.stochastic else "recurrence"


@dataclass
class Plan:
    """How a module is read.

    Attributes:
        path: path of the module.
        module: the module.
        sites: the calls whose operators are read.
        refusal: why the module, or a part of it, cannot be read; empty if all of it is read.
        feeds: for calls whose values a short convolution of the module feeds, by their keys: which
            channels feed them. It is empty unless convolutions belong to the layers they feed.
    """

    path: str
    module: nn.Module
    sites: list[Site] = field(default_factory=list)
    refusal: str = ""
    feeds: dict[Key, Feed] = field(default_factory=dict)

    @property
    def read(self) -> dict[Key, ValueMap]:
        """Return where the values are of the calls that the general reader reads."""
        return {site.key: site.values for site in self.sites if site.values is not None}

    @property
    def repeats(self) -> bool:
        """Return whether the module has to run again to be read."""
        return any(site.repeats for site in self.sites)

    @property
    def operations(self) -> set[str]:
        """Return the names of the operations of torch that are read."""
        return {site.key[1] for site in self.sites if site.key[0] == "operation"}

    @property
    def methods(self) -> bool:
        """Return whether methods of the module are read."""
        return any(site.key[0] == "method" for site in self.sites)


class Planner:
    """The planner of all modules of a model.

    Args:
        tracer: The tracer of the model.
        length: The number of positions of the short sequence.
        joins: Whether short convolutions belong to the layers that they feed.

    Attributes:
        plans: the plan of every module that mixes positions by itself, by its path.
    """

    def __init__(self, tracer: Tracer, length: int, joins: bool = False) -> None:
        self.tracer, self.length, self.joins = tracer, length, joins
        self.plans: dict[str, Plan] = {}
        self._known: dict[type, list[Plan]] = {}

    def visit(self, frame: Frame, found: Leftover) -> None:
        """Plan how a module is read that mixes positions by itself."""
        plan = Plan(frame.path, frame.module)
        self.plans[frame.path] = plan
        if found.earlier:
            plan.refusal = _AHEAD
            return
        self._complete(plan, frame, self._search)

    def _complete(self, plan: Plan, frame: Frame, step: Callable[[Plan, Frame], None]) -> None:
        """Complete a plan by a step and keep it, with the reason if it fails."""
        self.plans[frame.path] = plan
        try:
            step(plan, frame)
            if self.joins:
                self._join(plan, frame)
        except Unreadable as reason:
            plan.sites, plan.refusal = [], str(reason)
        except (RuntimeError, TypeError, IndexError, KeyError, AttributeError) as error:
            plan.sites, plan.refusal = [], f"it cannot be run alone: {type(error).__name__}."
        self._known.setdefault(type(frame.module), []).append(plan)

    def shares(self, frame: Frame) -> bool:
        """Plan a module like one before it of the same class and sizes, if this works."""
        plan = Plan(frame.path, frame.module)
        if not self._as_before(plan, frame):
            return False
        self._complete(plan, frame, lambda *_: None)
        return True

    def _as_before(self, plan: Plan, frame: Frame) -> bool:
        """Read a module like one of the same class and the same sizes, if this works."""
        for known in self._known.get(type(frame.module), []):
            if known.refusal or not known.sites or _sizes(known.module) != _sizes(frame.module):
                continue
            names = {site.key[:2] for site in known.sites}
            try:
                calls = {call.key: call for call in self._calls(frame, {}, names)}
                made = {site.key: self._call(frame, calls, site) for site in known.sites}
                for site in known.sites:
                    self._check(site, made[site.key])
                if not self._left(frame, made, known.read):
                    plan.sites = list(known.sites)
                    return True
            except (Unreadable, RuntimeError, IndexError, ValueError, TypeError, KeyError):
                continue
        return False

    def _left(self, frame: Frame, made: dict[Key, Call], read: dict[Key, ValueMap]) -> bool:
        """Return whether a module mixes positions outside of some calls."""
        if ("module", "", 0) in made:
            return False
        frozen = {key: call.result for key, call in made.items()}
        if not any(key[0] == "segment" for key in made):
            known = frame.answers() | {key: call.inputs for key, call in made.items()}
            if not mixing_of(self.tracer, frame, self.length, frozen, known, read).mixes:
                return False
        return mixing_of(self.tracer, frame, self.length, frozen, read=read).mixes

    def _call(self, frame: Frame, calls: dict[Key, Call], site: Site) -> Call:
        """Return the call of a site in another module of the class."""
        if site.repeats:
            return repeated_call(self.tracer, frame, self.length, site)
        return calls[site.key]

    def _check(self, site: Site, call: Call) -> None:
        if site.reader == "attention":
            read_attention(call)
        elif site.reader == "scan":
            read_scan(call)
        elif site.values is not None:
            chosen = range(0, site.values.count, max(1, site.values.count // 4))
            responses = site.values.of(single_call(call), self.length)
            measure_operators(responses, site.values, chosen)

    def _search(self, plan: Plan, frame: Frame) -> None:
        frozen = self._known_kinds(plan, frame)
        tried: set[tuple[str, Key]] = {("general", key) for key in frozen}
        while True:
            left = mixing_of(self.tracer, frame, self.length, frozen, read=plan.read)
            if left.earlier and plan.sites:  # the positions of the last result are others
                del frozen[plan.sites.pop().key]
            elif left.earlier:
                raise Unreadable(_AHEAD)
            elif not left.later or ("module", "", 0) in frozen:
                return
            known = self._known.get(type(frame.module), [])
            failed = sum(bool(other.refusal) for other in known) >= _FAILURES
            ways = () if failed else ("general", "others")
            tries = (self._next(frame, frozen, tried, way) for way in ways)
            found = next((one for one in tries if one is not None), None)
            if found is None:
                name = type(frame.module).__name__
                what = "a part of it" if plan.sites else "it"
                plan.refusal = (
                    f"{what} mixes tokens in a way that is not linear in values of their own "
                    f"({name})."
                )
                return
            site, call = found
            plan.sites.append(site)
            frozen[site.key] = call.result

    def _known_kinds(self, plan: Plan, frame: Frame) -> dict[Key, Any]:
        """Plan the convolutions, attention functions and scans, and return their results."""
        if is_multihead(frame.module):
            with suppress(Unreadable):
                call = multihead_call(frame)
                site = self._site(call, "attention", 0)
                if site is not None:
                    plan.sites.append(site)
                    return {site.key: call.result}
        names = {("operation", name) for name in _CONVOLUTIONS}
        names |= {(kind, name) for kind in ("function", "method") for name in (ATTENTION, *SCANS)}
        calls = self._calls(frame, {}, names)
        maps = [call for call in calls if call.key[1] == ATTENTION]
        if len(maps) > 1:  # their outputs may be combined
            for call in self._segments(frame):
                site = self._site(call, "general", _BLOCKS)
                if site is not None:
                    plan.sites.append(site)
                    return {site.key: call.result}
        chosen: list[Call] = []
        for call in calls:
            if any(call.key in other.within for other in chosen):
                continue
            if call.key[0] == "operation":
                site = self._site(call, "general", 1)
            else:
                site = self._site(call, "attention" if call.key[1] == ATTENTION else "scan", 0)
            if site is not None:
                plan.sites.append(site)
                chosen.append(call)
        return {call.key: call.result for call in chosen}

    def _site(self, call: Call, reader: str, budget: int) -> Site | None:
        """Return the site of a call, or None if it cannot be read by a reader.

        The reader "others" is the general one for values of other kinds.
        """
        try:
            if reader == "attention":
                read_attention(call)
            elif reader == "scan":
                read_scan(call)
            elif reader == "others":
                return Site(call.key, "general", self._others(single_call(call)))
            else:
                call = single_call(call)
                found = find_values(call, self.length, self.tracer.padding, budget)
                return Site(call.key, reader, found)
        except Unreadable as reason:
            if str(reason) == _AHEAD and reader == "attention":
                raise
            return None
        return Site(call.key, reader, short=call)

    def _others(self, call: Call) -> ValueMap:
        """Return where a call has integers that it moves, or channels with common answers."""
        try:
            return find_moves(call, self.length, self.tracer.padding)
        except Unreadable:
            return find_pairs(call, self.length, self.tracer.padding)

    def general(self, site: Site) -> Site:
        """Return a site with the general reader in place of another one.

        Raises:
            Unreadable: if the general reader does not read the call on the short sequence.
        """
        if site.short is None:
            raise Unreadable("there is no other reader.")
        call = single_call(site.short)
        return Site(
            site.key, "general", find_values(call, self.length, self.tracer.padding, _GENERAL)
        )

    def _next(
        self, frame: Frame, frozen: dict[Key, Any], tried: set[tuple[str, Key]], way: str
    ) -> tuple[Site, Call] | None:
        """Return the first call that the general reader reads and that has not been tried."""
        for call, budget in self._candidates(frame, frozen, way):
            if (way, call.key) not in tried and call.key not in frozen:
                tried.add((way, call.key))
                site = self._site(call, way, budget)
                if site is not None:
                    return site, call
        return None

    def _candidates(
        self, frame: Frame, frozen: dict[Key, Any], way: str
    ) -> Iterator[tuple[Call, int]]:
        """Yield calls, and the number of blocks of channels to try in each."""
        calls = self._calls(frame, frozen, {("function", ""), ("method", "")})
        for kind in ("function", "method"):
            for call in calls[:_CALLS]:
                if call.key[0] == kind:
                    yield call, _GENERAL
        if not frozen and way == "general":
            yield module_call(self.tracer, frame, self.length), _BLOCKS
        for call in self._segments(frame):
            yield call, _BLOCKS
        for call in self._calls(frame, frozen, {("operation", "")})[:_CALLS]:
            yield call, _OPERATION
        if not frozen and way != "general":  # projections would make pairs of all channels
            yield module_call(self.tracer, frame, self.length), _BLOCKS

    def _join(self, plan: Plan, frame: Frame) -> None:
        """Find which layers the short convolutions of a module feed."""
        names = {site.key[:2] for site in plan.sites}
        calls = {call.key: call for call in self._calls(frame, {}, names)}
        short = [site for site in plan.sites if site.kind == "convolution"]
        for layer in plan.sites:
            for site in short:
                if layer in short or layer.key not in calls or site.key not in calls:
                    continue
                assert site.values is not None
                feed = find_feed(
                    self.tracer,
                    frame,
                    self.length,
                    (calls[site.key], site.values),
                    calls[layer.key],
                    partial(values_of, layer, length=self.length),
                )
                if feed is not None:
                    plan.feeds[layer.key] = feed

    def _segments(self, frame: Frame) -> Iterator[Call]:
        for key in itertools.islice(segments_of(self.tracer, frame, self.length), _SEGMENTS):
            try:
                yield segment_call(self.tracer, frame, self.length, key)
            except (RuntimeError, ValueError, TypeError, KeyError, IndexError):
                continue

    def _calls(
        self, frame: Frame, frozen: dict[Key, Any], names: set[tuple[str, str]]
    ) -> list[Call]:
        """Return the calls that a module makes, by kinds and names; an empty name is any name."""
        kinds = {kind for kind, _ in names}
        replay = Replay(
            self.tracer,
            frame,
            self.length,
            frozen,
            keep=lambda kind, name: (
                (kind, name) in names or ((kind, "") in names and name not in _COPIES)
            ),
            operations="operation" in kinds or any(key[0] == "operation" for key in frozen),
        )
        return replay.run().calls


def _sizes(module: nn.Module) -> list[torch.Size]:
    """Return the shapes of the parameters of a module."""
    return [parameter.shape for parameter in module.parameters()]


def repeated_call(tracer: Tracer, frame: Frame, length: int, site: Site) -> Call:
    """Return the call of a site for which a module runs again.

    Raises:
        Unreadable: if the maps of a module of attention are not those of its output.
    """
    if site.key[0] == "segment":
        return segment_call(tracer, frame, length, site.key)
    if site.reader == "attention":
        return multihead_call(frame)
    return module_call(tracer, frame, length)


def module_call(tracer: Tracer, frame: Frame, length: int) -> Call:
    """Return a module as a call of its own arguments, in at least single precision."""
    frame = single_frame(frame)

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        return Replay(tracer, frame, length).run((args, kwargs)).output

    return Call(
        ("module", "", 0),
        evaluate,
        copied(frame.inputs),
        evaluate(*frame.inputs[0], **frame.inputs[1]),
    )


def read_scan(call: Call) -> ScanReading:
    """Return the recurrence of a call of a scan.

    Raises:
        Unreadable: if the scan did not return this recurrence applied to its values.
    """
    name, (args, kwargs) = call.key[1], call.inputs
    try:
        reading = read(name, args, kwargs, call.function)
    except ValueError as error:
        raise Unreadable(str(error)) from error
    leaf = next(x for x in leaves_of(call.inputs) if isinstance(x, Tensor))
    if reading.disagreement(call.result) > max(TOLERANCE, 8 * torch.finfo(leaf.dtype).eps):
        raise Unreadable(f"{name} did not return its recurrence applied to its values.")
    return reading


def values_of(site: Site, call: Call, length: int) -> Tensor:
    """Return the values of a call, (V, L), channel by channel and head by head."""
    if site.values is not None:
        return site.values.of(call, length).values.T[site.values.inputs]
    if site.reader == "scan":
        args, kwargs = call.inputs
        return read(call.key[1], args, kwargs, call.function).values.flatten(0, 1)
    raise Unreadable("a convolution before a map of attention is a layer of its own.")
