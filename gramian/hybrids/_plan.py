"""Define the plan of a hybrid: what was measured of every head, and which heads are replaced."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gramian._extras import require
from gramian._json import to_json
from gramian._staging import staged_file
from gramian._tables import rich_table, text_table
from gramian.hybrids._replacement import Replacement, kind_of

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["CRITERIA", "HybridPlan", "PlannedLayer", "check_choice"]

CRITERIA = (
    *("output", "window", "realization", "recurrence", "state", "loss", "magnitude", "random"),
)
"""What layers or heads can be chosen by; those with the smallest value are replaced first.

- "output": relative error of what a head returns for its own values if it sees a window.
- "window": relative error of the head's maps if it sees a window.
- "realization": relative error of the recurrence of n states that `gramian.ess.realize` finds.
- "recurrence": relative error of what a head returns if it has the recurrence that was fitted.
- "state": effective state-size.
- "loss": increase of the loss if the layer or head alone is replaced. It is a mean over the tokens
  that were measured; with a few thousand, its noise is as large as the differences of many layers.
- "magnitude": norm of the output of the layer or head.
- "random": a random order, by the seed.
"""

_FORMAT = "gramian.hybrid_plan/1"
_UNMEASURED = {
    "loss": 'the losses were not measured; plan with criterion="loss".',
    "recurrence": 'no recurrences were fitted; plan with kind="recurrence".',
}
_PARAMETERS = ".safetensors"
_NAMES = {"layer": "layers", "head": "groups of heads"}
_ERRORS = {"of the window": "window", "of its output": "output"}
_ERRORS_OF_FITS = {"of a window's output": "output", "of the fit": "recurrence"}


@dataclass(frozen=True)
class PlannedLayer:
    """What was measured of one layer of H attention heads, and which of them are replaced.

    Attributes:
        name: path of the module in the model.
        mixer: name of the module's class.
        group: number of heads that share keys and values.
        token_bytes: bytes of the keys and values of one token, for all heads.
        ess: mean effective state-size of each head, (H).
        errors: relative error of the recurrences of each head, (H, number of orders).
        window_errors: relative error of the maps of each head, if it sees a window, (H).
        output_errors: relative error of the output of each head, if it sees a window, (H).
        norms: root mean square of the norm of each head's output at a token, before the output
            projection, (H).
        output_norm: the same for the output of the layer.
        loss_increases: increase of the loss in nats if one layer, or one group of heads after the
            other, is replaced; None if it was not measured.
        recurrence_errors: relative error of the output of each head, if it has the recurrence that
            was fitted, on sequences that were not fitted, (H); None if none was fitted.
        state_bytes: bytes of the states of the fitted recurrences of all heads.
        replaced: numbers of the heads that are replaced.
    """

    name: str
    mixer: str
    group: int
    token_bytes: int
    ess: tuple[float, ...]
    errors: tuple[tuple[float, ...], ...]
    window_errors: tuple[float, ...]
    output_errors: tuple[float, ...]
    norms: tuple[float, ...]
    output_norm: float
    loss_increases: tuple[float, ...] | None = None
    recurrence_errors: tuple[float, ...] | None = None
    state_bytes: int = 0
    replaced: tuple[int, ...] = ()

    @property
    def heads(self) -> int:
        """The number of heads."""
        return len(self.ess)

    @property
    def whole(self) -> bool:
        """Whether all heads are replaced."""
        return len(self.replaced) == self.heads

    def units(self, by: str) -> list[tuple[int, ...]]:
        """Return the heads that can only be replaced together: all, or those of each group."""
        size = self.heads if by == "layer" else self.group
        return [tuple(range(a, a + size)) for a in range(0, self.heads, size)]

    def score(self, criterion: str, unit: int, by: str, order: int) -> float:
        """Return the value of a criterion for a unit. `order` is the number of the order."""
        heads = self.units(by)[unit]
        if criterion == "state":
            return sum(self.ess[h] for h in heads) / len(heads)
        if criterion == "realization":
            return _root_mean_square([self.errors[h][order] for h in heads])
        if criterion == "window":
            return _root_mean_square([self.window_errors[h] for h in heads])
        if criterion in ("output", "recurrence"):
            errors = self.output_errors if criterion == "output" else self.recurrence_errors
            assert errors is not None
            lost = math.hypot(*(errors[h] * self.norms[h] for h in heads))
            whole = math.hypot(*(self.norms[h] for h in heads))
            return lost / whole if whole else 0.0
        if criterion == "magnitude":
            whole_layer = by == "layer"
            return self.output_norm if whole_layer else math.hypot(*(self.norms[h] for h in heads))
        assert self.loss_increases is not None
        return self.loss_increases[unit]


@dataclass(frozen=True)
class HybridPlan:
    """The plan of a hybrid. It prints as a table with a row for each layer.

    Attributes:
        model: name of the model.
        budget: what was to be replaced: a number of layers or groups of heads, or a share of the
            bytes of the cache of keys and values.
        by: "layer", or "head" if the heads that share keys and values are chosen on their own.
        criterion: what they were chosen by, one of `CRITERIA`.
        window: number of the last tokens that a replaced head sees.
        sinks: number of the first tokens that it sees, too.
        orders: numbers of states of the recurrences whose errors were measured.
        state: the one of them by which the criterion "realization" chooses, and the number of
            states of fitted recurrences.
        length: number of tokens of each sequence that was read.
        sequences: number of these sequences.
        seed: seed of the criterion "random".
        layers: the attention layers that can be replaced, in the order in which they run.
        left: path of every other layer that mixes tokens, and why it is not replaced.
        seconds: duration of the measurement in seconds.
        measured: the window and the number of first tokens for which errors were measured; None if
            they are those of the plan.
        kind: what replaces the heads: "window", or "recurrence" for a fitted recurrence beside the
            window.
        parameters: the parameters of the fitted recurrences of all layers, by name.
    """

    model: str
    budget: int | float
    by: str
    criterion: str
    window: int
    sinks: int
    orders: tuple[int, ...]
    state: int
    length: int
    sequences: int
    seed: int
    layers: tuple[PlannedLayer, ...]
    left: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0
    measured: tuple[int, int] | None = None
    kind: str = "window"
    parameters: Mapping[str, Tensor] = dataclasses.field(
        default_factory=dict, compare=False, repr=False
    )

    @property
    def edited(self) -> bool:
        """Whether what is replaced is not what the criterion chooses."""
        if self._unmeasured(self.criterion):
            return True
        return self.choose().replaced != self.replaced

    @property
    def chosen_by(self) -> str:
        """The criterion, or "hand" for a plan whose choice was edited."""
        return "hand" if self.edited else self.criterion

    def as_much(self) -> HybridPlan:
        """Return the plan with a budget by which any criterion replaces as much as it does.

        If the choice was edited, the budget is a number of layers, or of groups of heads if a layer
        is replaced in part.
        """
        if not self.edited:
            return self
        by = self.by if all(x.whole or not x.replaced for x in self.layers) else "head"
        size = {x.name: len(x.units(by)[0]) for x in self.layers}
        count = sum(math.ceil(len(x.replaced) / size[x.name]) for x in self.layers)
        return dataclasses.replace(self, by=by, budget=count)

    @property
    def replaced(self) -> dict[str, tuple[int, ...] | None]:
        """The replaced heads by the path of their layer; None if they are all heads of the layer.

        Layers that are not changed are left out. `gramian.analysis.window_attention` takes this.
        """
        return {x.name: None if x.whole else x.replaced for x in self.layers if x.replaced}

    @property
    def kept(self) -> tuple[str, ...]:
        """The paths of the layers in which no head is replaced."""
        return tuple(layer.name for layer in self.layers if not layer.replaced)

    def applied(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which the replaced heads of a model are those of the hybrid.

        Raises:
            ValueError: as `gramian.analysis.replace_attention`; or if the plan is one of
                recurrences and was read without its file of parameters.
        """
        return self.replacement.applied(model, self.replaced)

    @property
    def replacement(self) -> Replacement:
        """What takes the place of heads."""
        return kind_of(self.kind)(self.window, self.sinks, self.state, self.parameters)

    def cache_bytes(self, tokens: int) -> tuple[int, int]:
        """Return the bytes of the keys and values of these layers after some tokens.

        Returns:
            The bytes of the model, and of the hybrid, whose replaced heads store what they see,
            and the states of their recurrences.
        """
        seen = min(tokens, self.replacement.tokens)
        before = sum(layer.token_bytes for layer in self.layers) * tokens
        saved = sum(layer.token_bytes * len(layer.replaced) // layer.heads for layer in self.layers)
        states = sum(
            layer.state_bytes * len(layer.replaced) // layer.heads for layer in self.layers
        )
        return before, before - saved * (tokens - seen) + states

    def scores(self, criterion: str | None = None) -> list[tuple[str, tuple[int, ...], float]]:
        """Return the layers or groups of heads in the order in which they are replaced.

        Args:
            criterion: one of `CRITERIA`; by default that of the plan.

        Returns:
            For each, the path of its layer, its heads, and its value; for "random", its place.

        Raises:
            ValueError: if the criterion is unknown, or was not measured.
        """
        criterion = self.criterion if criterion is None else criterion
        check_choice(self.budget, self.by, criterion, self.orders, self.state)
        if self._unmeasured(criterion):
            raise ValueError(_UNMEASURED[criterion])
        units = [(x, u) for x in self.layers for u in range(len(x.units(self.by)))]
        if criterion == "random":
            generator = torch.Generator().manual_seed(self.seed)
            values = torch.randperm(len(units), generator=generator).double().tolist()
        else:
            order = self.orders.index(self.state)
            values = [x.score(criterion, u, self.by, order) for x, u in units]
        found = [(x.name, x.units(self.by)[u], v) for (x, u), v in zip(units, values, strict=True)]
        return sorted(found, key=lambda one: one[2])

    def _unmeasured(self, criterion: str) -> bool:
        """Return whether a criterion needs what was not measured of every layer."""
        name = {"loss": "loss_increases", "recurrence": "recurrence_errors"}.get(criterion)
        return name is not None and any(getattr(x, name) is None for x in self.layers)

    def choose(
        self,
        replace: int | float | None = None,
        criterion: str | None = None,
        *,
        state: int | None = None,
        seed: int | None = None,
    ) -> HybridPlan:
        """Return the plan with another choice, from the same measurement.

        Args:
            replace: the budget, as in `plan_hybrid`; by default that of the plan.
            criterion: one of `CRITERIA`; by default that of the plan.
            state: number of states for "realization"; by default that of the plan.
            seed: seed for "random"; by default that of the plan.

        Raises:
            ValueError: if the budget is out of range, or if the criterion or the number of states
                is unknown or was not measured.
        """
        changed = dataclasses.replace(
            self,
            budget=self.budget if replace is None else replace,
            criterion=self.criterion if criterion is None else criterion,
            state=self.state if state is None else state,
            seed=self.seed if seed is None else seed,
        )
        units = changed.scores()
        replaced: dict[str, list[int]] = {layer.name: [] for layer in self.layers}
        for name, heads, _ in units[: _count(changed, units)]:
            replaced[name] += heads
        layers = tuple(
            dataclasses.replace(layer, replaced=tuple(sorted(replaced[layer.name])))
            for layer in self.layers
        )
        return dataclasses.replace(changed, layers=layers)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as values that JSON and YAML can hold.

        The entries "replace" and "keep" name the layers, and "replace" also the heads.
        """
        values = {"format": _FORMAT} | {
            field.name: _plain(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.name not in ("layers", "left", "parameters")
        }
        return values | {
            "replace": {k: "all" if v is None else list(v) for k, v in self.replaced.items()},
            "keep": list(self.kept),
            "left": dict(self.left),
            "layers": [
                {
                    field.name: _plain(getattr(layer, field.name))
                    for field in dataclasses.fields(layer)
                    if field.name != "replaced"
                }
                for layer in self.layers
            ],
        }

    def to_yaml(self) -> str:
        """Return `to_dict` as YAML text."""
        require("a plan in YAML", "models", "yaml")
        import yaml

        text: str = yaml.safe_dump(
            self.to_dict(), sort_keys=False, default_flow_style=None, width=100
        )
        return text

    def to_json(self) -> str:
        """Return `to_dict` as indented JSON text."""
        return to_json(self.to_dict(), indent=2)

    def save(self, path: str | Path) -> Path:
        """Write the plan, completely or not at all, and return the path.

        The parameters of fitted recurrences go into a file beside it, of the same name with the
        ending .safetensors.

        Args:
            path: the file. If it ends in .json, it is JSON, and otherwise YAML.

        Raises:
            ValueError: if the file ends in .safetensors, and the plan has parameters.
        """
        require("a plan with parameters", "models", "safetensors")
        from safetensors.torch import save

        path = Path(path)
        text = f"{self.to_json()}\n" if path.suffix == ".json" else self.to_yaml()
        if self.parameters:
            if path.suffix == _PARAMETERS:
                raise ValueError(f"a plan is YAML or JSON, not {_PARAMETERS}; got {path}.")
            with staged_file(path.with_suffix(_PARAMETERS)) as stage:
                stage.write_bytes(save(dict(self.parameters)))
        with staged_file(path) as stage:
            stage.write_text(text, encoding="utf-8")
        return path

    @classmethod
    def from_dict(cls, values: Any, parameters: Mapping[str, Tensor] | None = None) -> HybridPlan:
        """Return the plan from which `to_dict` made `values`.

        What is replaced is what "replace" says, so that it may be edited.

        Args:
            values: the values.
            parameters: the parameters of fitted recurrences, which `values` do not have.

        Raises:
            ValueError: if `values` do not have the format of a plan, or if "replace" names a layer
                or head that was not measured, or a layer that "keep" names, too.
        """
        found = values.get("format") if isinstance(values, Mapping) else None
        if found != _FORMAT:
            raise ValueError(f"a plan of format {_FORMAT!r} is needed; got {found!r}.")
        try:
            later = ("measured", "kind", "parameters")
            names = [field.name for field in dataclasses.fields(cls) if field.name not in later]
            fields = {name: values[name] for name in names}
            fields |= {"kind": values.get("kind", "window"), "parameters": parameters or {}}
            measured = values.get("measured") or (values["window"], values["sinks"])
            fields["measured"] = tuple(measured)
            layers = [PlannedLayer(**_tuples(layer)) for layer in fields["layers"]]
            replace, keep = dict(values["replace"] or {}), values["keep"] or []
            fields |= {"left": tuple(fields["left"].items()), "orders": tuple(fields["orders"])}
        except KeyError as error:
            raise ValueError(f"the plan lacks the entry {error.args[0]!r}.") from error
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"an entry of the plan has another form: {error}.") from error
        if kind_of(fields["kind"]).fitted and fields["measured"] != (
            fields["window"],
            fields["sinks"],
        ):
            last, first = fields["measured"]
            raise ValueError(
                f"the recurrences were fitted beside a window of {last} tokens and the first "
                f"{first}; got {fields['window']} and {fields['sinks']}. Plan again for another "
                "window."
            )
        for name in replace:
            if name not in {layer.name for layer in layers}:
                raise ValueError(f"the plan replaces {name}, which is none of its layers.")
            if name in keep:
                raise ValueError(f"the plan replaces {name} and keeps it.")
        fields["layers"] = tuple(
            dataclasses.replace(layer, replaced=_heads(layer, replace.get(layer.name, [])))
            for layer in layers
        )
        return cls(**fields)

    @classmethod
    def load(cls, path: str | Path) -> HybridPlan:
        """Return the plan that `save` wrote.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if the file does not hold a plan.
            ImportError: if pyyaml is not installed.
        """
        require("a plan in YAML", "models", "yaml")
        import yaml

        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
            values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
            return cls.from_dict(values, _parameters(path, values))
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            place = "" if mark is None else f" at line {mark.line + 1}, column {mark.column + 1}"
            reason = f"it is not YAML{place}."
            raise ValueError(f"{path} is not the plan of a hybrid: {reason}") from error
        except json.JSONDecodeError as error:
            reason = f"it is not JSON at line {error.lineno}, column {error.colno}."
            raise ValueError(f"{path} is not the plan of a hybrid: {reason}") from error
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path} is not the plan of a hybrid: {reason}") from error

    def __str__(self) -> str:
        return text_table(self._columns, self._rows, self.summary)

    def __rich__(self) -> Table:
        return rich_table(self._columns, self._rows, self.summary)

    @property
    def summary(self) -> str:
        """A few sentences with the choice and the bytes of the cache."""
        by = self.as_much().by
        units = sum(len(x.units(by)) for x in self.layers)
        size = {x.name: len(x.units(by)[0]) for x in self.layers}
        chosen = sum(math.ceil(len(x.replaced) / size[x.name]) for x in self.layers)
        tokens = 16 * self.length
        before, after = self.cache_bytes(tokens)
        read = "1 sequence" if self.sequences == 1 else f"{self.sequences} sequences"
        words = (
            f"{self.model}: {chosen} of {units} {_NAMES[by]}, chosen by {self.chosen_by}, "
            f"{self.replacement.description()}. Measured on {read} of {self.length:,} tokens in "
            f"{self.seconds:.0f} s. Keys and values of {tokens:,} tokens: {before:,} bytes before, "
            f"{after:,} after."
        )
        if self.criterion == "loss":
            words += (
                f" The losses are means over {self.sequences * (self.length - 1):,} tokens; "
                "differences between layers may be noise."
            )
        return words + "".join(f" {path} is left: {reason}" for path, reason in self.left)

    @property
    def _columns(self) -> list[str]:
        states = f"error of {self.state} states"
        return ["layer", "heads", "ESS", states, *self._errors, "replaced"]

    @property
    def _errors(self) -> dict[str, str]:
        """The criteria that are shown, by their columns."""
        return _ERRORS_OF_FITS if kind_of(self.kind).fitted else _ERRORS

    @property
    def _rows(self) -> list[tuple[str, ...]]:
        order = self.orders.index(self.state)
        names = _shortened([x.name for x in self.layers])
        known = self.measured in (None, (self.window, self.sinks))

        def error(layer: PlannedLayer, criterion: str) -> str:
            return f"{layer.score(criterion, 0, 'layer', order):.3f}" if known else ""

        return [
            (
                name,
                str(x.heads),
                f"{x.score('state', 0, 'layer', order):.1f}",
                f"{x.score('realization', 0, 'layer', order):.3f}",
                *(error(x, criterion) for criterion in self._errors.values()),
                "all" if x.whole else ", ".join(map(str, x.replaced)),
            )
            for name, x in zip(names, self.layers, strict=True)
        ]


def check_choice(
    budget: int | float, by: str, criterion: str, orders: Sequence[int], state: int
) -> None:
    """Check how much is replaced, and what layers or heads are chosen by.

    Raises:
        ValueError: if a value is unknown or out of range, or if the number of states is not among
            those measured.
    """
    whole = isinstance(budget, int) and not isinstance(budget, bool) and budget >= 0
    if not whole and not (isinstance(budget, float) and 0 < budget < 1):
        raise ValueError(
            "replace must be a number of layers or groups of heads, or a share of the cache "
            f"between 0 and 1, both excluded; got {budget!r}."
        )
    if by not in _NAMES:
        raise ValueError(f"by must be {' or '.join(map(repr, _NAMES))}; got {by!r}.")
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}; got {criterion!r}.")
    if state not in orders:
        raise ValueError(
            f"state must be one of the orders {', '.join(map(str, orders))}; got {state}."
        )


def _parameters(path: Path, values: Any) -> dict[str, Tensor]:
    """Return the parameters beside a plan whose kind has some.

    Raises:
        ValueError: if their file is missing or cannot be read.
    """
    require("a plan with parameters", "models", "safetensors")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    kind = values.get("kind", "window") if isinstance(values, Mapping) else "window"
    if not kind_of(kind).fitted:
        return {}
    beside = path.with_suffix(_PARAMETERS)
    if not beside.is_file():
        raise ValueError(f"its parameters are missing, which belong into {beside}.")
    try:
        return load_file(beside)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"its parameters in {beside} cannot be read.") from error


def _count(plan: HybridPlan, units: Sequence[tuple[str, tuple[int, ...], float]]) -> int:
    """Return how many units, in their order, the budget of a plan replaces.

    Raises:
        ValueError: if the budget is out of range.
    """
    budget = plan.budget
    if isinstance(budget, int):
        if budget > len(units):
            raise ValueError(
                f"replace must be at most {len(units)}, the {_NAMES[plan.by]} there are; got "
                f"{budget}."
            )
        return budget
    sizes = {layer.name: layer.token_bytes / layer.heads for layer in plan.layers}
    wanted = budget * sum(layer.token_bytes for layer in plan.layers)
    found, count = 0.0, 0
    while found < wanted * (1 - 1e-9):
        path, heads, _ = units[count]
        found += sizes[path] * len(heads)
        count += 1
    return count


def _heads(layer: PlannedLayer, chosen: Any) -> tuple[int, ...]:
    """Return the heads that an entry of "replace" names."""
    if chosen == "all":
        return tuple(range(layer.heads))
    if not isinstance(chosen, Sequence) or isinstance(chosen, str):
        raise ValueError(f"{layer.name} must have all or numbers of heads; got {chosen!r}.")
    for head in chosen:
        if not isinstance(head, int) or not 0 <= head < layer.heads:
            raise ValueError(f"{layer.name} has {layer.heads} heads; got the number {head!r}.")
    return tuple(sorted({*chosen}))


def _shortened(names: Sequence[str]) -> list[str]:
    """Return paths without the modules that all of them begin with."""
    parts = [name.split(".") for name in names]
    same = 0
    while len(parts) > 1 and len({tuple(one[: same + 1]) for one in parts}) == 1:
        same += 1
    return [".".join(one[same:]) for one in parts]


def _root_mean_square(values: Sequence[float]) -> float:
    return math.hypot(*values) / math.sqrt(len(values))


def _plain(value: Any) -> Any:
    """Return tuples as lists."""
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    """Return a mapping whose lists are tuples."""
    if isinstance(value, Mapping):
        return {key: _tuples(one) for key, one in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
