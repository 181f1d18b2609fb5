"""Choose the coordinates of every recurrence's state, and build the smaller model."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from gramian._labels import IGNORED
from gramian.ops.precision import full_precision
from gramian.shrinking._choosing import Choices, Plan
from gramian.shrinking._elimination import squared_errors
from gramian.shrinking._family import Layer, find_layers
from gramian.shrinking._passes import (
    Change,
    Importance,
    Scores,
    compare,
    measure_importance,
    window_scores,
)
from gramian.shrinking._projection import Prediction, empty_gramians, predict
from gramian.shrinking._recovery import Recovery, as_recovery, check_windows, recover_best
from gramian.shrinking._report import (
    LayerShrinkage,
    ShrinkRecovery,
    ShrinkReport,
    ShrinkTrial,
    relative_increase,
)
from gramian.shrinking._state_bytes import state_bytes
from gramian.shrinking._texts import Windows, split_windows, windows_of
from gramian.shrinking._trying import MEASURES, Run, Small, search

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
    choose_by: str = "loss",
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

    This error is that of single layers, without the norms behind them and the layers above. So
    three simpler criteria are tried, too: the largest contributions of single coordinates, the
    largest keys and queries, and the largest weights. The one with the smallest loss on the windows
    to choose by is used.

    Args:
        model: a causal language model of Gramian or of transformers with linear recurrences.
        texts: a text, token ids (length), or several of either; or windows of token ids (count,
            length). Or tokens with labels: a mapping with `input_ids` and `labels`, each (length)
            or (count, length), a list of such rows, or a `datasets.Dataset` with these columns. As
            in transformers, labels are shifted by one, `shift_labels` are not, and -100 means that
            nothing is to be predicted. Then only the labels count: for errors, for losses, and in a
            recovery. Windows without labels are left out. A quarter of the windows is held out, and
            losses are measured there.
        keep: share of the states to keep, between 0 and 1, or their number, an integer. Sizes are
            rounded up to a multiple that kernels take.
        max_increase: largest increase of the loss on the held-out windows, relative to that of the
            given model. The smallest size within it is searched by bisection, first for the greedy
            elimination alone. Then all criteria are tried for that size and the next smaller one,
            and for further ones if these do not agree. Give this or `keep`.
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
        choose_by: "loss", or "accuracy": the criterion with the largest share of right tokens is
            used, and with the smallest loss among equals. Use it where right answers matter, and
            not their probabilities. Criteria are compared on 4,096 tokens; those whose accuracy is
            at most two standard errors below the best are compared again on all windows to choose
            by.
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
    _check(model, keep, max_increase, multiple, context, choose_by)
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
        original_bytes = state_bytes(model, windows.ids[0])
        importance, prediction = _measure(model, layers, chosen_by, projection, progress)
        choices = Choices.of(layers, importance, multiple)
        some = chosen_by.first(_COMPARED)
        run = Run(model, layers, choices, some, chosen_by, held_out, choose_by)
        before = window_scores(model, held_out)
        trials: list[ShrinkTrial] = []
        if max_increase is not None:
            plan = search(run, per_layer, max_increase, before.losses, trials)
        else:
            plan = _plan(choices, keep, per_layer)
        models = run.several(plan, recovery.candidates if recovery else 1)
        afters = [run.measure(x.kept, "held_out", (x.model, x.layers))[1] for x in models]
        changes = [compare(model, layers, x.layers, some.ids) for x in models]
        best, recovered = 0, None
        if recovery is not None:
            best, divergences = recover_best(
                model, models, chosen_by, recovery, seed, choose_by, progress
            )
            scores = window_scores(models[best].model, held_out)
            done = dataclasses.replace(recovery, candidates=len(models))
            recovered = _report_recovery(done, divergences, scores, before)
        small, after = models[best], afters[best]
        report = ShrinkReport(
            keep=keep,
            max_increase=max_increase,
            per_layer=per_layer,
            multiple=tuple(sorted({choices.step(layer) for layer in layers})),
            criterion=small.criterion,
            criteria=dict(small.criteria),
            choose_by=choose_by,
            labelled=windows.labelled,
            projection=projection,
            layers=tuple(
                _report(layer, run, small, changes[best][layer.path], prediction)
                for layer in layers
            ),
            left=left,
            tokens=chosen_by.ids.numel(),
            held_out_tokens=held_out.ids.numel(),
            context=windows.length,
            loss_before=float(before.losses.mean()),
            loss_after=float(after.losses.mean()),
            standard_error=_standard_error(after.losses - before.losses),
            accuracy_before=float(before.accuracies.mean()),
            accuracy_after=float(after.accuracies.mean()),
            original_state_bytes=original_bytes,
            shrunk_state_bytes=state_bytes(small.model, windows.ids[0]),
            trials=tuple(trials),
            seconds=time.perf_counter() - started,
            recovery=recovered,
        )
    finally:
        model.train(training)
    return small.model, report


def _plan(choices: Choices, keep: float | int | None, per_layer: bool) -> Plan:
    """Return the sizes that keep a share, or a number, of the states."""
    assert keep is not None
    if per_layer:
        return choices.of_total(_as_share(keep, choices.layers))
    return choices.share(keep)


def _measure(
    model: Any,
    layers: Sequence[Layer],
    windows: Windows,
    projection: bool,
    progress: Callable[[int, int], None] | None,
) -> tuple[Mapping[str, Importance], Prediction | None]:
    """Return the importance by which states are chosen, and what projections would do."""
    # Projections are predicted on the first windows.
    first = windows if projection else windows.first(_COMPARED)
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


def _report(
    layer: Layer, run: Run, small: Small, change: Change, prediction: Prediction | None
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
    recovery: Recovery, divergences: tuple[float, float], after: Scores, before: Scores
) -> ShrinkRecovery:
    return ShrinkRecovery(
        **dataclasses.asdict(dataclasses.replace(recovery, learning_rate=recovery.rate)),
        divergence_before=divergences[0],
        divergence_after=divergences[1],
        loss=float(after.losses.mean()),
        increase=relative_increase(float(before.losses.mean()), float(after.losses.mean())),
        standard_error=_standard_error(after.losses - before.losses),
        accuracy=float(after.accuracies.mean()),
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
    choose_by: str,
) -> None:
    from gramian.models.quantization import refuse_quantized

    if not (hasattr(model, "can_generate") and model.can_generate()):
        raise TypeError(
            "shrink takes a causal language model of Gramian or transformers; got an object of "
            f"type {type(model).__name__}."
        )
    refuse_quantized(model, "shrink", "quantize the smaller model instead")
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
    if choose_by not in MEASURES:
        raise ValueError(f"choose_by must be {' or '.join(MEASURES)}; got {choose_by!r}.")
    for name, size, least in (("multiple", multiple, 1), ("context", context, 2)):
        if size is not None and (not isinstance(size, int) or size < least):
            raise ValueError(f"{name} must be an integer of at least {least}; got {size!r}.")


def _context(model: Any) -> int:
    config = model.config.get_text_config()
    return min(1024, getattr(config, "max_position_embeddings", None) or 1024)


def _check_vocabulary(model: Any, windows: Windows) -> None:
    known = model.get_input_embeddings().num_embeddings
    due = windows.answers[windows.answers != IGNORED]
    for name, ids in (("token ids", windows.ids), ("labels", due)):
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= known:
            raise ValueError(
                f"{name} must lie in 0 … {known - 1}, the model's vocabulary; got {low} … {high}."
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
