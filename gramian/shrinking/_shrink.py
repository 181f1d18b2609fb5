"""Choose the coordinates of every recurrence's state, and build the smaller model."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn

from gramian.ops.precision import full_precision
from gramian.shrinking._choosing import Choices, Plan, count_within
from gramian.shrinking._elimination import squared_errors
from gramian.shrinking._family import Layer, find_layers
from gramian.shrinking._folding import fold
from gramian.shrinking._passes import (
    Change,
    Importance,
    compare,
    measure_importance,
    window_losses,
)
from gramian.shrinking._projection import Prediction, empty_gramians, predict
from gramian.shrinking._recovery import Recovery, as_recovery, check_windows
from gramian.shrinking._recovery import recover as recover_model
from gramian.shrinking._report import LayerShrinkage, ShrinkRecovery, ShrinkReport, ShrinkTrial
from gramian.shrinking._state_bytes import state_bytes
from gramian.shrinking._texts import split_windows, windows_of

__all__ = ["shrink"]

_Model = TypeVar("_Model", bound=nn.Module)
_COMPARED = 2**12  # tokens on which errors are measured and criteria are compared


@full_precision()
def shrink(
    model: _Model,
    texts: Any,
    *,
    keep: float | int | None = None,
    max_increase: float | None = None,
    per_layer: bool = False,
    projection: bool = False,
    multiple: int | None = None,
    tokenizer: Any = None,
    context: int | None = None,
    max_tokens: int = 32_768,
    seed: int = 0,
    recover: Recovery | int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[_Model, ShrinkReport]:
    """Make the states of a model's recurrences smaller, by what a text needs of them.

    The state of a head is a matrix with one row for each of n coordinates, which keys write and
    queries read. The error that dropped coordinates cause in the outputs of a layer on a text is
    known exactly, and coordinates are dropped greedily by it. The rest of the weights is kept, and
    is trained only if `recover` is given. The smaller model has the same class, with the number of
    states in its configuration. So it can be saved, loaded, trained and used for generation like
    any other model, by transformers alone if the model is one of transformers. The given model
    stays unchanged.

    This error is that of single layers, without the norms behind them and the layers above. So two
    simpler criteria are tried, too: the largest contributions of single coordinates, and the
    largest keys and queries. The one with the smallest loss on the windows to choose by is used.

    Args:
        model: a causal language model of Gramian or of transformers with linear recurrences.
        texts: a text, token ids (length), or several of either; or windows of token ids (count,
            length). A quarter of the windows is held out, and losses are measured there.
        keep: share of the states to keep, between 0 and 1, or their number, an integer. Sizes are
            rounded up to a multiple that kernels take.
        max_increase: largest increase of the loss on the held-out windows, relative to that of the
            given model. The smallest size within it is searched by bisection, first by the greedy
            elimination and its loss on 4,096 tokens of the other windows. That size and the next
            smaller one are then tried on the held-out windows, and the search goes on there if they
            do not agree. Give this or `keep`.
        per_layer: whether layers may have different sizes. Then all layers have the same largest
            predicted error, and `keep` counts the states of all layers. Only configurations with a
            size for each layer, those of Gramian models, allow this.
        projection: whether to project the states obliquely onto the coordinates of a balanced
            basis, in place of dropping coordinates of the model. Keys and queries then pass through
            linear maps, which only Gramian models can hold, behind their feature map
            (`feature_size` in their configuration). One gate per head and step must multiply each
            state: linear attention, and weighted or gated linear attention with `head_gates`.
        multiple: number of which the sizes are multiples; by default the one that the fused kernels
            of the architecture need. It is ignored if a layer's own size is no multiple of it.
        tokenizer: tokenizer of the texts; not needed for token ids.
        context: number of tokens of a window; by default 1024, or the model's
            `max_position_embeddings` if that is smaller.
        max_tokens: largest number of tokens in all windows.
        seed: seed of the choice of the held-out windows, and of the recovery.
        recover: number of steps of training in which the smaller model learns the predictions of
            the given one on the windows to choose by, or a `Recovery` with further options. If it
            does not help on a tenth of these windows, it is undone. It comes after the search for
            `max_increase`, whose losses are those before it.
        progress: a function that is called as `progress(windows done, all windows)`, and in a
            recovery as `progress(steps done, all steps)`.

    Returns:
        The smaller model, in evaluation mode, and a report.

    Raises:
        TypeError: if the model is no causal language model, `texts` are neither texts nor token
            ids, or `recover` is neither a number of steps nor a `Recovery`.
        ValueError: if the model has no recurrence whose state can be made smaller, is quantized,
            has adapters, or is spread over several devices; if neither or both of `keep` and
            `max_increase` are given, or one is out of range; if states that are to be projected
            have no scalar gates, or their layers cannot hold the maps; if the texts are shorter
            than two windows, or three with `recover`; or if no smaller size keeps the loss within
            `max_increase`.
        ImportError: if the recovery needs peft, which is not installed.
    """
    started = time.perf_counter()
    _check(model, keep, max_increase, multiple, context)
    recovery = as_recovery(recover)
    layers, left = _recurrences(model, per_layer)
    if projection:
        _check_projection(layers)
    windows = windows_of(texts, tokenizer, context or _context(model), max_tokens)
    _check_vocabulary(model, windows)
    chosen_by, held_out = split_windows(windows, seed)
    if recovery is not None:
        check_windows(chosen_by)
    training = model.training
    model.eval()
    try:
        importance, prediction = _measure(model, layers, chosen_by, projection, progress)
        run = _Run(model, layers, Choices.of(layers, importance, multiple), chosen_by)
        before = window_losses(model, held_out)
        trials: list[ShrinkTrial] = []
        if max_increase is not None:
            small, after = _search(run, per_layer, max_increase, before, held_out, trials)
        elif per_layer:
            small = run.shrink(run.choices.of_total(_as_share(keep, layers)))
        else:
            assert keep is not None
            small = run.shrink(run.choices.share(keep))
        if max_increase is None:
            after = window_losses(small.model, held_out)
        changes = compare(model, layers, small.layers, _some(chosen_by))
        report = ShrinkReport(
            keep=keep,
            max_increase=max_increase,
            per_layer=per_layer,
            multiple=tuple(sorted({run.choices.step(layer) for layer in layers})),
            criterion=small.criterion,
            criteria=dict(small.criteria),
            projection=projection,
            layers=tuple(
                _report(layer, run, small, changes[layer.path], prediction) for layer in layers
            ),
            left=left,
            tokens=chosen_by.numel(),
            held_out_tokens=held_out.numel(),
            context=windows.shape[1],
            loss_before=float(before.mean()),
            loss_after=float(after.mean()),
            standard_error=_standard_error(after - before),
            original_state_bytes=state_bytes(model, windows[0]),
            shrunk_state_bytes=state_bytes(small.model, windows[0]),
            trials=tuple(trials),
            seconds=time.perf_counter() - started,
        )
        if recovery is not None:
            cut = list(small.layers.values())
            told_of = recover_model(model, small.model, cut, chosen_by, recovery, seed, progress)
            report = dataclasses.replace(
                report,
                recovery=_report_recovery(recovery, told_of, small.model, held_out, before),
                seconds=time.perf_counter() - started,
            )
    finally:
        model.train(training)
    return small.model, report


@dataclass(frozen=True)
class _Small:
    """A smaller model.

    Attributes:
        model: the model.
        layers: its cut layers, by path.
        kept: the coordinates that were kept, (groups, k), by path.
        criterion: how they were chosen.
        criteria: the loss of every criterion on the windows to choose by.
    """

    model: Any
    layers: Mapping[str, Layer]
    kept: Mapping[str, Tensor]
    criterion: str
    criteria: Mapping[str, float]


@dataclass(frozen=True)
class _Run:
    """What all sizes of one model share.

    Attributes:
        model: the model.
        layers: its layers.
        choices: the sizes and coordinates that can be chosen.
        windows: the windows to choose by.
        losses: the loss of every choice of coordinates that was tried on some of the windows.
    """

    model: Any
    layers: Sequence[Layer]
    choices: Choices
    windows: Tensor
    losses: dict[tuple[bytes, ...], float] = field(default_factory=dict)

    def shrink(self, plan: Plan) -> _Small:
        """Return the model with the sizes of a plan, by the criterion with the smallest loss."""
        best: tuple[Any, dict[str, Layer]] | None = None
        criteria: dict[str, float] = {}
        candidates = self.choices.candidates(plan)
        for name, kept in candidates.items():
            small, loss = self._try(kept)
            if not criteria or loss < min(criteria.values()):
                best = small
            criteria[name] = loss
        name = min(criteria, key=lambda one: criteria[one])
        if best is None:
            best = fold(self.model, self.layers, candidates[name], self.choices.importance)
        return _Small(*best, candidates[name], name, criteria)

    def loss(self, plan: Plan) -> float:
        """Return the loss of the greedy elimination to the sizes of a plan."""
        return self._try(self.choices.candidates(plan)["error"])[1]

    def _try(self, kept: Mapping[str, Tensor]) -> tuple[tuple[Any, dict[str, Layer]] | None, float]:
        """Return the model with some coordinates, or None if it was tried before, and its loss."""
        key = tuple(kept[layer.path].numpy().tobytes() for layer in self.layers)
        if key in self.losses:
            return None, self.losses[key]
        small = fold(self.model, self.layers, kept, self.choices.importance)
        loss = float(window_losses(small[0], _some(self.windows)).mean())
        self.losses[key] = math.inf if math.isnan(loss) else loss
        return small, self.losses[key]


def _measure(
    model: Any,
    layers: Sequence[Layer],
    windows: Tensor,
    projection: bool,
    progress: Callable[[int, int], None] | None,
) -> tuple[Mapping[str, Importance], Prediction | None]:
    """Return the importance by which states are chosen, and what projections would do."""
    first = windows if projection else _some(windows)  # those on which projections are predicted
    total = len(windows) + len(first) * projection

    def told(before: int) -> Callable[[int], None] | None:
        return None if progress is None else (lambda done: progress(before + done, total))

    gramians = empty_gramians(layers)
    importance = measure_importance(model, layers, first, told(0), gramians=gramians)
    if projection:
        prediction = predict(model, layers, first, importance, gramians, told(len(first)))
        assert prediction is not None
        return prediction.balanced.importance, prediction
    prediction = predict(model, layers, first, importance, gramians)
    if len(first) < len(windows):
        rest = measure_importance(model, layers, windows[len(first) :], told(len(first)))
        importance = {path: one + rest[path] for path, one in importance.items()}
    return importance, prediction


def _some(windows: Tensor) -> Tensor:
    """Return the first windows, of 4,096 tokens in all, and at least one."""
    return windows[: max(1, _COMPARED // windows.shape[1])]


def _search(
    run: _Run,
    per_layer: bool,
    max_increase: float,
    before: Tensor,
    held_out: Tensor,
    trials: list[ShrinkTrial],
) -> tuple[_Small, Tensor]:
    """Return the smallest model within the budget that the search finds, and its losses."""
    plans = run.choices.plans(per_layer)
    if not plans:
        raise ValueError(
            "max_increase needs a smaller size to try; got layers of the smallest size that "
            "kernels take."
        )
    whole = float(window_losses(run.model, _some(run.windows)).mean())
    guess = count_within(len(plans), lambda at: run.loss(plans[at]) / whole - 1 <= max_increase)
    found: tuple[_Small, Tensor] | None = None

    def within(at: int) -> bool:
        nonlocal found
        small = run.shrink(plans[at])
        losses = window_losses(small.model, held_out)
        loss = float(losses.mean())
        states = sum(layer.shape.groups * layer.shape.states for layer in small.layers.values())
        trials.append(ShrinkTrial(states, loss, loss / float(before.mean()) - 1))
        good = trials[-1].increase <= max_increase  # NaN is not within the budget
        if good:
            found = small, losses
        return good

    count_within(len(plans), within, guess)
    if found is None:
        best = min(trials, key=lambda trial: trial.increase)
        raise ValueError(
            f"max_increase must allow the loss of a smaller state, which is {best.increase:.3%} "
            f"above the original's with {best.states} states in all; got {max_increase:.3%}."
        )
    return found


def _report(
    layer: Layer, run: _Run, small: _Small, change: Change, prediction: Prediction | None
) -> LayerShrinkage:
    commutes = prediction is not None and layer.family.commutes(layer.module)
    gram, kept = run.choices.importance[layer.path].gram, small.kept[layer.path]
    whole = float(gram.sum())
    predicted = float(squared_errors(gram, kept).sum())
    return LayerShrinkage(
        layer=layer.path,
        mixer=type(layer.module).__name__,
        groups=layer.shape.groups,
        states_before=layer.shape.states,
        states_after=kept.shape[1],
        kept=tuple(map(tuple, kept.tolist())),
        predicted_error=(predicted / whole) ** 0.5 if whole > 0 else 0.0,
        measured_error=change.scan_error,
        output_error=change.output_error,
        spectrum=tuple(run.choices.errors[layer.path][1:]),
        projection=prediction.at(layer, kept.shape[1]) if prediction and commutes else None,
        note=layer.family.note if kept.shape[1] < layer.shape.states else "",
    )


def _report_recovery(
    recovery: Recovery,
    divergences: tuple[float, float],
    small: Any,
    held_out: Tensor,
    before: Tensor,
) -> ShrinkRecovery:
    after = window_losses(small, held_out)
    return ShrinkRecovery(
        **dataclasses.asdict(dataclasses.replace(recovery, learning_rate=recovery.rate)),
        divergence_before=divergences[0],
        divergence_after=divergences[1],
        loss=float(after.mean()),
        increase=float(after.mean() / before.mean()) - 1,
        standard_error=_standard_error(after - before),
    )


def _recurrences(model: Any, per_layer: bool) -> tuple[list[Layer], tuple[tuple[str, str], ...]]:
    """Return the layers to cut, and the paths of the others with reasons."""
    layers, left = [], []
    for layer in find_layers(model):
        refusal = layer.family.refusal(layer.module)
        if refusal is None:
            layers.append(layer)
        else:
            left.append((layer.path, refusal))
    name = type(model).__name__
    if not layers and left:
        raise ValueError(f"the states of this {name} cannot be made smaller: {left[0][1]}")
    if not layers:
        raise ValueError(
            "shrink needs a model with linear recurrences (linear attention, Mamba, Mamba2, Gated "
            f"DeltaNet); got a {name} without them."
        )
    single = [layer for layer in layers if not layer.family.per_layer]
    if per_layer and single:
        raise ValueError(
            "per_layer needs a configuration with a size for each layer; got a "
            f"{name}, which has {single[0].family.field(single[0].module)} for all."
        )
    return layers, tuple(left)


def _check_projection(layers: Sequence[Layer]) -> None:
    for layer in layers:
        if not layer.family.maps:
            raise ValueError(
                "projection needs layers that can hold maps of keys and queries, those of linear "
                f"attention in Gramian models; got {type(layer.module).__name__} ({layer.path})."
            )
        if not layer.family.commutes(layer.module):
            raise ValueError(
                "projection needs one gate per head and step, which commutes with every change of "
                f"basis; got {type(layer.module).__name__} ({layer.path}) with a gate for each "
                "state."
            )


def _check(
    model: Any,
    keep: float | int | None,
    max_increase: float | None,
    multiple: int | None,
    context: int | None,
) -> None:
    if not (hasattr(model, "can_generate") and model.can_generate()):
        raise TypeError(
            "shrink takes a causal language model of Gramian or transformers; got an object of "
            f"type {type(model).__name__}."
        )
    if getattr(model, "is_quantized", False):
        raise ValueError("shrink needs weights that are not quantized; got a quantized model.")
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1 or "meta" in devices:
        raise ValueError(f"shrink needs a model on one device; got {', '.join(devices)}.")
    if (keep is None) == (max_increase is None):
        raise ValueError(f"give one of keep and max_increase; got {keep!r} and {max_increase!r}.")
    if max_increase is not None and not 0 < max_increase < math.inf:
        raise ValueError(f"max_increase must be a positive number; got {max_increase!r}.")
    whole = isinstance(keep, int) and not isinstance(keep, bool) and keep >= 1
    if keep is not None and not whole and not (isinstance(keep, float) and 0 < keep < 1):
        raise ValueError(
            "keep must be a share between 0 and 1, both excluded, or a number of states, at least "
            f"1; got {keep!r}."
        )
    for name, size, least in (("multiple", multiple, 1), ("context", context, 2)):
        if size is not None and (not isinstance(size, int) or size < least):
            raise ValueError(f"{name} must be an integer of at least {least}; got {size!r}.")


def _context(model: Any) -> int:
    config = model.config.get_text_config()
    return min(1024, getattr(config, "max_position_embeddings", None) or 1024)


def _check_vocabulary(model: Any, windows: Tensor) -> None:
    known = model.get_input_embeddings().num_embeddings
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= known:
        raise ValueError(
            f"token ids must lie in 0 … {known - 1}, the model's vocabulary; got {low} … {high}."
        )


def _as_share(keep: float | int | None, layers: Sequence[Layer]) -> float:
    """Return the share of all states that a number for every layer means."""
    assert keep is not None
    if isinstance(keep, float):
        return keep
    return keep * len(layers) / sum(layer.shape.states for layer in layers)


def _standard_error(differences: Tensor) -> float:
    count = len(differences)
    return float(differences.std() / math.sqrt(count)) if count > 1 else math.nan
