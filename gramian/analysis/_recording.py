r"""Record the causal operators of a model while it runs, one at a time.

A first run on a short sequence finds the modules that mix positions and plans how each is read
(`gramian.analysis._mixing`, `gramian.analysis._planning`). The second run, on the whole input, only
listens: when a planned call is made, its operator is read from its arguments and result, passed to
a visitor, and dropped. So a recording never holds the operators of more than one layer, and what
the model computes does not change.

There are four readers:

- `gramian.mixers.Mixer.operator` returns the operator of a Gramian mixer.
- Attention functions of transformers return their map (`gramian.analysis._attention`).
- The operators of scans are computed from their arguments (`gramian.analysis._scans`).
- The operators of all other calls are their responses to impulses (`gramian.analysis._general`).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gramian.analysis._attention import (
    attention_values,
    eager_attention,
    read_attention,
    takes_mask,
)
from gramian.analysis._composition import compose, compose_mixer
from gramian.analysis._far import far_mixers
from gramian.analysis._inputs import ModelInputs, run_model
from gramian.analysis._keeping import Buffers, kept
from gramian.analysis._mixing import Finder, NotFinite, short_lengths
from gramian.analysis._planning import (
    Plan,
    Planner,
    Site,
    read_scan,
    repeated_call,
    values_of,
)
from gramian.analysis._responses import Unreadable, measure_operators
from gramian.analysis._rows import AttentionRows
from gramian.analysis._single import single_call
from gramian.analysis._states import States, mixer_states, scan_states
from gramian.analysis._storage import Storage, mixer_orders, mixer_storage
from gramian.analysis._tracing import Call, Frame, Key, Operations, Tracer, own_methods
from gramian.analysis._values import copied, leaves_of
from gramian.ess import RowOperator
from gramian.mixers import LinearRecurrence, Mixer, ShortConvolution, SoftmaxAttention
from gramian.systems import FIR, DenseOperator, System

__all__ = ["RecordedOperator", "Recorder"]

_SHORT = Site(("module", "", 0), "mixer")
"""The site of the short convolution in a mixer of Gramian."""


@dataclass(frozen=True)
class RecordedOperator:
    """The operator of a layer, with a function that returns it for some heads or channels.

    Attributes:
        name: path of the module.
        mixer: name of the module's class.
        kind: "attention", "recurrence" or "convolution".
        count: number of heads or channels.
        system: function that maps a slice of the heads or channels to their system. For n heads or
            channels, the channels of the system are (*1, n). Attention over a long context is
            given by its rows.
        reader: how the operator was read, as in `LayerState`.
        storage: how the layer stores its past, as in `LayerState`; None if it is not known.
        orders: orders of the layer's own recurrences, (count), where the system is a matrix from
            which they cannot be read; None if the system says what its state is.
        states: what the states of a recurrence hold; None if the layer has no such states.
        auxiliary: whether this is a short convolution of a layer with another operator.
        values: function that returns the values to which attention applies its maps, (count, L, N),
            if its maps can be narrowed to a window by `window_attention`; otherwise None.
    """

    name: str
    mixer: str
    kind: str
    count: int
    system: Callable[[slice], System | RowOperator]
    reader: str
    storage: Storage | None = None
    orders: Tensor | None = None
    states: States | None = None
    auxiliary: bool = False
    values: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class _Operator:
    """The operator of one call; the fields are those of `RecordedOperator`."""

    count: int
    system: Callable[[slice], System | RowOperator]
    storage: Storage | None = None
    orders: Tensor | None = None
    states: States | None = None
    values: Callable[[], Tensor] | None = None


@dataclass
class _Running:
    """A planned module that is running.

    Attributes:
        plan: its plan.
        frame: its inputs, if it has to run again.
        counts: the number of calls so far, by kind and name.
        inside: whether a planned call of it is running.
        reached: keys of the planned calls that were made.
        convolutions: calls of convolutions that belong to later layers, by their keys.
        undo: what to close when it ends.
    """

    plan: Plan
    frame: Frame
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    inside: bool = False
    reached: set[Key] = field(default_factory=set)
    convolutions: dict[Key, Call] = field(default_factory=dict)
    undo: ExitStack = field(default_factory=ExitStack)


class Recorder:
    """A recorder that passes the operators of a model's layers to a visitor.

    Args:
        model: The model whose layers are recorded.
        visit: A function that is called with each operator during the forward pass.
        joins: Whether short convolutions are parts of the operators that they feed, instead of
            layers of their own.
        long: The length from which on the maps of attention are read by rows; None to read them
            whole at all lengths.

    Attributes:
        plans: the plan of every module that mixes positions by itself, by its path, as soon as they
            are known.
        visits: the number of operators that were passed to the visitor.
    """

    def __init__(
        self,
        model: nn.Module,
        visit: Callable[[RecordedOperator], None],
        joins: bool = False,
        long: int | None = None,
    ) -> None:
        self.model, self.joins, self.long = model, joins, long
        self.visit = visit
        self.visits = 0
        self.plans: dict[str, Plan] = {}
        self.ran: dict[str, int] = Counter()
        self.refused: dict[str, str] = {}
        self._tracer = Tracer(model)
        self._planner: Planner | None = None
        self._length = 0
        self._running: list[_Running] = []

    @property
    def expected(self) -> int:
        """Return the number of operators that one run of each module passes to the visitor."""
        return sum(len(plan.sites) for plan in self.plans.values())

    def record(self, inputs: ModelInputs) -> None:
        """Run the model on a sequence and record its operators.

        What a recording changes belongs to the process, so recordings must not overlap.
        """
        with torch.no_grad(), ExitStack() as stack:
            if "transformers" in sys.modules:
                stack.enter_context(eager_attention(self.model))
            with kept(self.model):
                self._find(inputs)
            with kept(self.model):
                assert self._planner is not None
                planned = {plan.module for plan in self.plans.values()}
                far = far_mixers(self._tracer, inputs, planned, self._planner.length)
                self.refused = far | self.refused
            self._length = inputs.length
            stack.callback(Buffers(self.model).put_back)
            with self._listening():
                run_model(self.model, inputs)

    def unread(self) -> tuple[tuple[str, str], ...]:
        """Return the path of every module that ran but could not be measured, and the reason."""
        name = type(self.model).__name__
        return tuple((path or name, reason) for path, reason in self.refused.items())

    def _find(self, inputs: ModelInputs) -> None:
        """Find what mixes positions, on the first tokens, repeated if there are few of them.

        If a model cannot read as many tokens, fewer are tried.
        """
        lengths = [*short_lengths(self.model, inputs.length), (inputs.length, 0)]
        while True:
            length, self._tracer.padding = lengths.pop(0)
            planner = Planner(self._tracer, length, self.joins)
            plan = partial(self._plan, planner)
            finder = Finder(self._tracer, length, plan, _is_mixer, planner.shares)
            try:
                with finder.finding():
                    run_model(self.model, inputs.repeated(length), last_logits_only=False)
                break
            except NotFinite:
                raise
            except (IndexError, RuntimeError, ValueError):
                lengths = [*(other for other in lengths[:-1] if other[0] < length), *lengths[-1:]]
                if not lengths:
                    raise
        self.plans, self._planner = planner.plans, planner
        self.refused |= {p: reason for p, reason in finder.notes.items() if p not in self.plans}
        self.refused |= {path: plan.refusal for path, plan in self.plans.items() if plan.refusal}

    def _plan(self, planner: Planner, frame: Frame, found: Any) -> None:
        if _is_mixer(frame.module):
            plan = Plan(frame.path, frame.module, [Site(("module", "", 0), "mixer")])
            planner.plans[frame.path] = plan
        else:
            planner.visit(frame, found)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Read the planned calls of the forward passes within this context."""
        tracer = self._tracer
        with ExitStack() as stack:
            stack.enter_context(tracer.installed(self._enter, self._leave))
            stack.callback(tracer.stack.clear)
            stack.callback(self._close)
            tracer.handler = self._handle
            stack.callback(setattr, tracer, "handler", None)
            yield

    def _close(self) -> None:
        while self._running:
            self._running.pop().undo.close()

    def _enter(self, path: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        plan = self.plans.get(path)
        if plan is None:
            return
        self.ran[path] += 1
        if _is_mixer(module):
            self._read_mixer(plan, args[0] if args else kwargs["x"])
        repeats = plan.repeats and not _is_mixer(module)
        inputs = copied((args, kwargs)) if repeats else ((), {})
        random = torch.get_rng_state() if repeats else torch.empty(0)
        buffers = Buffers(module) if repeats else None
        running = _Running(plan, Frame(path, module, inputs, random, buffers))
        self._running.append(running)
        if plan.methods:
            running.undo.enter_context(own_methods(self._tracer, module))
        if plan.operations and self._tracer.operations is None:
            running.undo.enter_context(Operations(self._tracer))

    def _leave(self, path: str, module: nn.Module, output: Any) -> None:
        if path not in self.plans:
            return
        running = self._running.pop()
        running.undo.close()
        if self._running and self._running[-1].plan.repeats:
            self._running[-1].frame.children.append((module, copied(output)))
        if _is_mixer(module):
            return
        for site in running.plan.sites:
            if site.repeats:
                call = partial(repeated_call, self._tracer, running.frame, self._length, site)
                self._read(running, site, call)
            elif site.key not in running.reached:
                self.refused[path] = "it computes the whole text in another way than its beginning."

    def _handle(
        self,
        kind: str,
        name: str,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        running = self._running[-1] if self._running else None
        if running is None or running.inside or running.frame.module is not self._tracer.stack[-1]:
            return function(*args, **kwargs)
        key = (kind, name, running.counts[kind, name])
        running.counts[kind, name] += 1
        site = next((site for site in running.plan.sites if site.key == key), None)
        if site is None:
            return function(*args, **kwargs)
        running.reached.add(key)
        alone = site.reader == "attention" and site.key not in running.plan.feeds
        if alone and self.long is not None and self._length >= self.long:
            found = self._attend_by_rows(running, site, function, args, kwargs)
            if found is not None:
                return found
        inputs = copied((args, kwargs)) if site.reader != "attention" else (args, kwargs)
        running.inside = True
        try:
            result = function(*args, **kwargs)
        finally:
            running.inside = False
        self._read(running, site, lambda: Call(key, function, inputs, result))
        return result

    def _attend_by_rows(
        self,
        running: _Running,
        site: Site,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call an attention function a few rows at a time and pass its operator to the visitor.

        Returns:
            What the function returns, or None if it has to be called as a whole.
        """
        before, self._tracer.handler = self._tracer.handler, None
        try:
            rows = AttentionRows(function, args, kwargs)
            if rows.length != self._length:
                return None
            operator = _Operator(rows.heads, rows.operator, rows.storage)
            self._record(running.plan, site, operator)
        except Unreadable:
            return None
        finally:
            self._tracer.handler = before
        return rows.result

    def _read(self, running: _Running, site: Site, call: Callable[[], Call]) -> None:
        """Pass the operator of a call to the visitor, or note why it cannot be read."""
        before, self._tracer.handler = self._tracer.handler, None
        outer, self._tracer.operations = self._tracer.operations, None
        try:
            with kept(running.plan.module):
                made = call()
                if any(site.key == feed.convolution for feed in running.plan.feeds.values()):
                    running.convolutions[site.key] = made
                else:
                    self._read_operator(running, site, made)
        except Unreadable as reason:
            self.refused[running.plan.path] = str(reason)
        finally:
            self._tracer.handler, self._tracer.operations = before, outer

    def _read_operator(self, running: _Running, site: Site, call: Call) -> None:
        """Pass the operator of a call to the visitor.

        If a fast reader fails, the general reader reads the call.
        """
        joins = site.key in running.plan.feeds
        try:
            operator = self._operator(site, call)
        except (Unreadable, RuntimeError, IndexError, TypeError) as error:
            if site.short is None or joins or self._planner is None:
                raise
            reason = f"it cannot be run again: {type(error).__name__}."
            reason = str(error) if isinstance(error, Unreadable) else reason
            try:
                site = self._planner.general(site)
                self._record(running.plan, site, self._operator(site, call))
            except Unreadable as other:
                raise Unreadable(f"{reason} From its responses: {other}") from other
            return
        if joins:
            operator = self._joined(running, site, call, operator)
        self._record(running.plan, site, operator)

    def _operator(self, site: Site, call: Call) -> _Operator:
        """Return the operator of a call."""
        if site.reader == "attention":
            maps, storage = read_attention(call)
            if maps.shape[-1] != self._length:
                raise Unreadable(
                    f"it maps {maps.shape[-1]} positions, and the text has {self._length}."
                )
            return _Operator(
                len(maps),
                lambda channels: DenseOperator(maps[channels]),
                storage,
                values=partial(attention_values, call) if takes_mask(call) else None,
            )
        if site.reader == "scan":
            reading = read_scan(call)
            sizes = [x.element_size() for x in leaves_of(call.result) if isinstance(x, Tensor)]
            storage = Storage(reading.values.shape[1], itemsize=sizes[0])
            return _Operator(reading.count, reading.system, storage, states=scan_states(reading))
        values = site.values
        assert values is not None
        responses = values.of(single_call(call), self._length)

        def system(channels: slice) -> System:
            chosen = range(values.count)[channels]
            measured = measure_operators(responses, values, chosen)
            return FIR(measured) if values.taps else DenseOperator(measured)

        return _Operator(values.count, system)

    def _joined(self, running: _Running, site: Site, call: Call, core: _Operator) -> _Operator:
        """Return the operator of a layer together with the convolution that feeds it."""
        feed = running.plan.feeds[site.key]
        short = running.convolutions[feed.convolution]
        values = values_of(site, call, self._length)
        heads = [v // (len(values) // core.count) for v in range(len(values))]
        if site.values is not None:
            heads = site.values.operator.tolist()

        def system_of(head: int) -> System:
            found = core.system(slice(head, head + 1))
            assert isinstance(found, System)  # operators with a convolution are read whole
            return found

        def matrices(chosen: list[int]) -> Tensor:
            systems = [system_of(head).matrix(self._length) for head in chosen]
            return torch.stack([m.reshape(m.shape[-2:]) for m in systems])

        short = single_call(short)
        responses = feed.values.of(short, self._length)
        system = compose(feed, responses, short.result, values, matrices, heads)
        orders = None
        if site.reader == "scan" and feed.values.taps:
            order = system_of(0).order + feed.values.taps - 1
            orders = torch.full((len(values),), order)
        return _Operator(len(values), system, None, orders)

    def _read_mixer(self, plan: Plan, x: Tensor) -> None:
        module: Any = plan.module
        try:
            module.operator(x[:, :1], slice(0, 1))  # a bidirectional mixer raises an error
        except ValueError as error:
            self.refused[plan.path] = str(error)
            return
        operator = _Operator(
            module.channels,
            partial(module.operator, x),
            mixer_storage(module, x.element_size()),
            mixer_orders(module, x.shape[1]),
            mixer_states(module, x),
            _mixer_values(module, x),
        )
        convolutions = [
            (name, child)
            for name, child in module.named_children()
            if isinstance(child, ShortConvolution) and child.taps > 1
        ]
        if self.joins and convolutions and isinstance(module, LinearRecurrence):
            count, system = compose_mixer(module, x)
            order = module.operator(x[:, :1]).order + module.short.taps - 1
            operator = _Operator(count, system, None, torch.full((count,), order))
            convolutions = []
        for name, child in convolutions:
            short = partial(_short_system, child.weight.detach())
            self._record(plan, _SHORT, _Operator(len(child.weight), short), name)
        self._record(plan, plan.sites[0], operator)

    def _record(self, plan: Plan, site: Site, operator: _Operator, child: str = "") -> None:
        mixer = type(plan.module.get_submodule(child)).__name__
        kind = site.kind if site.reader != "mixer" else str(plan.module.family)
        if child:
            kind = "convolution"
        name = ".".join(part for part in (plan.path, child) if part) or mixer
        if self.ran[plan.path] > 1:
            name = f"{name} (run {self.ran[plan.path]})"
        if site.reader != "mixer" and _is_secondary(plan, site):
            name = f"{name} ({site.key[1]})"
        self.visits += 1
        self.visit(
            RecordedOperator(
                name,
                mixer,
                kind,
                operator.count,
                operator.system,
                site.reader,
                operator.storage,
                operator.orders,
                operator.states,
                auxiliary=bool(child) or self._is_auxiliary(plan, site),
                values=operator.values,
            )
        )

    def _is_auxiliary(self, plan: Plan, site: Site) -> bool:
        """Return whether an operator is a short convolution of a layer with another operator."""
        around = (p for path, p in self.plans.items() if plan.path.startswith(f"{path}."))
        others = [other.kind for found in (plan, *around) for other in found.sites]
        return site.kind == "convolution" and any(kind != "convolution" for kind in others)


def _short_system(weight: Tensor, channels: slice) -> System:
    """Return some channels of a short convolution with the taps `weight`, (channels, K)."""
    return FIR(weight[channels])


def _is_secondary(plan: Plan, site: Site) -> bool:
    """Return whether a module has other operators than those of this kind, and they come first."""
    kinds = {other.kind for other in plan.sites}
    return site.kind == "convolution" and len(kinds) > 1


def _mixer_values(mixer: Mixer, x: Tensor) -> Callable[[], Tensor] | None:
    """Return a function that computes the values of attention, (heads, L, N), or None."""
    if not isinstance(mixer, SoftmaxAttention):
        return None

    def values() -> Tensor:
        _, _, v = mixer.project(x, torch.arange(x.shape[1], device=x.device)[None])
        group = mixer.heads // mixer.kv_heads
        return v[0].to(torch.promote_types(v.dtype, torch.float32)).repeat_interleave(group, 0)

    return values


def _is_mixer(module: nn.Module) -> bool:
    """Return whether a module is a Gramian mixer that has the state itself."""
    return isinstance(module, Mixer) and module.core is module
