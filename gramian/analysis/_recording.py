r"""Record the causal operators of a model while it runs, one at a time.

Operators are found in three ways, none of which depends on an architecture:

- `gramian.mixers.Mixer.operator` returns the operator of a Gramian mixer.
- Softmax attention of transformers calls an attention function that the recorder registers. This
  function calls the layer's own `eager_attention_forward` to compute the map from values to
  outputs. So the map contains the soft caps, sinks, position biases, grouped queries and masks
  (including those of sliding windows) of the model. The map is compared with the layer's output
  before it is recorded.
- The operators of selective scans (of Mamba, Mamba2 and related models) and of the gated delta rule
  are computed from the arguments of the functions that the modeling files of transformers call
  (`gramian.analysis._scans`).

Every operator is passed to a visitor and then dropped, so that a recording never holds the
operators of the whole model.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gramian.analysis._scans import places, read
from gramian.analysis._states import States, mixer_states, scan_states
from gramian.analysis._storage import Storage, mixer_orders, mixer_storage
from gramian.mixers import Mixer
from gramian.systems import DenseOperator, System

__all__ = ["RecordedOperator", "Recorder", "token_mixers"]

_IMPLEMENTATION = "gramian_capture"
_AGREEMENT = 1e-3  # the largest relative difference between map times values and layer's output

_MIXES = re.compile(
    "Attention|Mamba|DeltaNet|Mixer|SSM|Rwkv|RWKV|LSTM|Recurrent|ShortConv|Retention|Hyena"
)
_MIXES_NOT = re.compile("Norm|Rotary|Embedding|MLP|Mlp|FeedForward|Cache|Output$|Pooling|Function")


@dataclass(frozen=True)
class RecordedOperator:
    """The operator of a layer, with a function that returns it for some heads or channels.

    Attributes:
        name: path of the module.
        mixer: name of the module's class.
        kind: "attention", "recurrence" or "convolution".
        count: number of heads or channels.
        system: function that maps a slice of the heads or channels to their system. For n heads or
            channels, the channels of the system are (*1, n).
        reader: how the operator was read, as in `LayerState`.
        storage: how the layer stores its past, as in `LayerState`; None if it is not known.
        orders: orders of the layer's own recurrences, (count), where the system is a matrix from
            which they cannot be read; None if the system says what its state is.
        states: what the recurrence reads, from which its states follow; None if it has no states
            with several value channels.
    """

    name: str
    mixer: str
    kind: str
    count: int
    system: Callable[[slice], System]
    reader: str
    storage: Storage | None = None
    orders: Tensor | None = None
    states: States | None = None


def token_mixers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that mix tokens, by their paths.

    These modules are the Gramian mixers and, outside of Gramian mixers, the innermost modules whose
    class has the name of a token mixer.
    """
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        name = type(module).__name__
        if isinstance(module, Mixer):
            mixes = module.core is module
        else:
            mixes = bool(_MIXES.search(name)) and not _MIXES_NOT.search(name)
        if mixes and not isinstance(module, nn.ModuleList):
            found[path] = module
    hidden: set[str] = set()
    for path, module in found.items():
        inside = f"{path}." if path else ""
        within = {other for other in found if other != path and other.startswith(inside)}
        if isinstance(module, Mixer):
            hidden |= within
        elif within:
            hidden.add(path)
    return {path: module for path, module in found.items() if path not in hidden}


class Recorder:
    """A recorder that passes the operators of a model's layers to a visitor.

    Args:
        model: The model whose layers are recorded.
        visit: A function that is called with each operator during the forward pass.
    """

    def __init__(self, model: nn.Module, visit: Callable[[RecordedOperator], None]) -> None:
        self.model = model
        self.visit = visit
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.mixers = token_mixers(model)
        self.ran: dict[str, int] = Counter()
        self.read: set[str] = set()
        self.refused: dict[str, str] = {}
        self._current: list[tuple[str, nn.Module]] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the forward passes of the model within this context."""
        with ExitStack() as stack:
            for path, module in self.mixers.items():
                before = module.register_forward_pre_hook(
                    partial(self._enter, path), with_kwargs=True
                )
                after = module.register_forward_hook(self._leave, always_call=True)
                stack.callback(before.remove)
                stack.callback(after.remove)
            if "transformers" in sys.modules:
                stack.enter_context(self._attention())
                stack.enter_context(self._scans())
            yield

    def unread(self) -> tuple[tuple[str, str], ...]:
        """Return the path of every module that ran but could not be measured, and the reason."""
        reasons = dict(self.refused)
        for path, module in self.mixers.items():
            near = [r for r in self.read if r == path or r.startswith(f"{path}.")]
            if self.ran[path] and not near and path not in reasons:
                reasons[path] = f"there is no reader for {type(module).__name__}."
        return tuple(reasons.items())

    def _enter(self, path: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.ran[path] += 1
        self._current.append((path, module))
        if not isinstance(module, Mixer):
            return
        x = args[0] if args else kwargs["x"]
        try:
            module.operator(x[:, :1], slice(0, 1))  # a bidirectional mixer raises an error
        except ValueError as error:
            self.refused[path] = str(error)
            return
        operator = partial(module.operator, x)
        self._record(
            path,
            module,
            module.family,
            module.channels,
            operator,
            "mixer",
            mixer_storage(module, x.element_size()),
            mixer_orders(module, x.shape[1]),
            mixer_states(module, x),
        )

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._current.pop()

    def _record(
        self,
        path: str,
        module: nn.Module,
        kind: str,
        count: int,
        system: Callable[[slice], System],
        reader: str,
        storage: Storage | None = None,
        orders: Tensor | None = None,
        states: States | None = None,
    ) -> None:
        runs = self.ran[path]
        name = path if runs <= 1 else f"{path} (run {runs})"
        self.read.add(path)
        mixer = type(module).__name__
        self.visit(
            RecordedOperator(
                name or mixer, mixer, kind, count, system, reader, storage, orders, states
            )
        )

    # Attention

    @contextmanager
    def _attention(self) -> Iterator[None]:
        """Make attention layers that use transformers' interface call `_attend` in this context."""
        from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
        from transformers.masking_utils import eager_mask

        configs: dict[int, Any] = {}
        for module in self.model.modules():
            if isinstance(module, PreTrainedModel) and _takes_functions(module):
                todo = [module.config]
                while todo:
                    config = todo.pop()
                    configs[id(config)] = config
                    inner = (getattr(config, key, None) for key in config.sub_configs)
                    todo += [c for c in inner if c is not None and id(c) not in configs]
        before = {key: _implementation(config) for key, config in configs.items()}
        AttentionInterface.register(_IMPLEMENTATION, self._attend)
        AttentionMaskInterface.register(_IMPLEMENTATION, eager_mask)
        try:
            for config in configs.values():
                _set_implementation(config, _IMPLEMENTATION)
            yield
        finally:
            for key, config in configs.items():
                _set_implementation(config, before[key])
            for interface in (AttentionInterface, AttentionMaskInterface):
                registered = interface._global_mapping  # noqa: SLF001 (nothing public unregisters)
                registered.pop(_IMPLEMENTATION, None)

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute a layer's own eager attention, in at least single precision, and record it.

        The function has the signature of transformers' attention functions. Queries, keys and
        values are (batch, heads, length, N).

        Returns:
            The layer's output in the dtype of the queries, and None in place of the weights.
        """
        path = self.paths.get(id(module), type(module).__name__)
        if not self._current or self._current[-1][1] is not module:
            self.ran[path] += 1
        eager = _eager(module)
        if eager is None:
            raise ValueError(
                f"{path}: {type(module).__name__} takes an attention function of transformers and "
                "has none of its own to read."
            )
        dtype = torch.promote_types(query.dtype, torch.float32)
        wide = [x.to(dtype) for x in (query, key, value)]
        output, weights = eager(module, *wide, attention_mask, **kwargs)
        refusal = _not_a_causal_map(weights, wide[2], output)
        if refusal is None:
            maps = weights[0]  # (heads, length, length)
            group = len(maps) // value.shape[1]
            storage = Storage(value.shape[-1], key.shape[-1], group, value.element_size())
            self._record(
                path,
                module,
                "attention",
                len(maps),
                lambda s: DenseOperator(maps[s]),
                "attention",
                storage,
            )
        else:
            self.refused[path] = refusal
        return output.to(query.dtype), None

    # Scans

    @contextmanager
    def _scans(self) -> Iterator[None]:
        """Make the scans that the mixers call pass through `_scan` in this context."""
        found = {p.key: p for module in self.mixers.values() for p in places(module)}
        with ExitStack() as stack:
            for place in found.values():
                stack.enter_context(place.holding(partial(self._scan, place.name, place.function)))
            yield

    def _scan(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a scan, and record what it applies if this is what it returned."""
        if not self._current:
            return function(*args, **kwargs)
        path, module = self._current[-1]
        try:
            reading = read(name, args, kwargs, function)
        except ValueError as error:
            self.refused[path] = str(error)
            return function(*args, **kwargs)
        result = function(*args, **kwargs)
        if reading.disagreement(result) > _AGREEMENT:
            self.refused[path] = f"{name} did not return its recurrence applied to its values."
        else:  # a number that is not finite makes the measurement raise an error
            self._record(
                path,
                module,
                "recurrence",
                reading.count,
                reading.system,
                "scan",
                states=scan_states(reading),
            )
        return result


def _takes_functions(model: Any) -> bool:
    """Return whether the attention function of a transformers model can be chosen by name."""
    return bool(model._can_set_attn_implementation())  # noqa: SLF001 (there is no public test)


def _implementation(config: Any) -> str | None:
    """Return the name of the attention function in a configuration of transformers."""
    return config._attn_implementation_internal  # noqa: SLF001 (there is no public field)


def _set_implementation(config: Any, name: str | None) -> None:
    """Set the name of the attention function in one configuration, and in no other."""
    config._attn_implementation_internal = name  # noqa: SLF001 (public setters change others, too)


def _eager(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """Return the eager attention function in the file that defines a layer's class, or None."""
    for cls in type(module).__mro__:
        place = sys.modules.get(cls.__module__)
        function = getattr(place, "eager_attention_forward", None)
        if function is not None:
            return function
    return None


def _not_a_causal_map(weights: Tensor | None, value: Tensor, output: Tensor) -> str | None:
    """Return why the weights are not a causal map from values to output, or None if they are.

    Args:
        weights: (batch, heads, L, L).
        value: (batch, kv_heads, L, N).
        output: (batch, L, heads, N).
    """
    if weights is None or weights.ndim != 4:
        return "its attention function returns no map."
    if weights.shape[-1] != weights.shape[-2]:
        rows, columns = weights.shape[-2:]
        return f"it maps {columns} positions to {rows}: not those of one sequence."
    if not bool(weights.isfinite().all()):
        return None  # the measurement raises an error about such numbers
    if bool(weights[0].triu(1).any()):
        return "it is not causal: it looks ahead."
    value = value.repeat_interleave(weights.shape[1] // value.shape[1], dim=1)
    expected = weights.to(value.dtype) @ value
    error = (expected - output.transpose(1, 2)).norm()
    if not bool(error <= _AGREEMENT * expected.norm()):
        return "its output is not its map applied to its values."
    return None
