"""Measure what every attention head of a model needs of the past, and plan a hybrid."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Any

import torch
from torch import Tensor, nn

from gramian._checks import check_integers
from gramian._modules import in_mode
from gramian.analysis import RecordedOperator, record_operators, window_maps
from gramian.ess import effective_state_size, realization_errors
from gramian.evaluation import perplexity
from gramian.hybrids._plan import HybridPlan, PlannedLayer, check_choice
from gramian.hybrids._replacement import Fitted, Replacement, kind_of
from gramian.tasks import Document, Encoder, documents_in
from gramian.tasks.windows import spread_windows

__all__ = ["plan_hybrid", "rows_of"]

_POSITIONS = 16  # at so many positions of a sequence the state-size is measured
_DIGITS = 6


def plan_hybrid(
    model: Any,
    text: str | Sequence[Document] | Sequence[Tensor],
    tokenizer: Any,
    *,
    replace: int | float,
    by: str = "layer",
    kind: str = "window",
    criterion: str | None = None,
    window: int = 64,
    sinks: int = 4,
    orders: Sequence[int] = (1, 2, 4, 8, 16, 32),
    state: int = 16,
    length: int = 512,
    sequences: int = 4,
    fit_sequences: int = 16,
    fit_steps: int = 60,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> HybridPlan:
    """Plan which attention layers or heads of a language model a window or a recurrence replaces.

    The model reads a few sequences of the text. For every head the plan says how large a state it
    needs (`gramian.effective_state_size`), how far recurrences of n states are from its map
    (`gramian.ess.realization_errors`), and how far the map of a window is. All of these are of the
    maps on the given text: a recurrence that computes one of them is not a layer that computes the
    next one. `try_hybrid` measures what the plan costs.

    With the kind "recurrence", every layer is also fitted by a gated linear recurrence of `state`
    states for each head, beside the window (`gramian.hybrids.LayerRecurrence`), while the model
    stays as it is. The plan says what this recurrence loses on sequences that were not fitted.

    The layers that can be replaced are those that `gramian.analysis.replace_attention` takes. A
    recurrence needs causal softmax attention to the whole past.

    Args:
        model: A causal language model of Gramian or transformers.
        text: A text, documents, or token ids (tokens,) of each document.
        tokenizer: The model's tokenizer.
        replace: What to replace, in the order of the criterion: an integer is a number of layers,
            or of groups of heads. A share between 0 and 1 replaces the fewest of them whose keys
            and values take this share of the bytes of the cache.
        by: "layer", or "head" to choose heads on their own. Heads that share keys and values are
            replaced together.
        kind: "window", or "recurrence" for a recurrence fitted on the text, beside the window.
        criterion: One of `CRITERIA`; by default "output" for windows and "recurrence" for
            recurrences. "loss" takes a forward pass for every layer or group of heads and each
            sequence, and its noise is large unless there are many sequences.
        window: Number w of the last tokens that a replaced head sees, its own included.
        sinks: Number of the first tokens that it sees, too.
        orders: Numbers n of states for which errors are measured.
        state: The one of them by which the criterion "realization" chooses, and the number of
            states of fitted recurrences.
        length: Number of tokens of a sequence. It should be well above the window.
        sequences: Largest number of sequences. They are spread over the text.
        fit_sequences: Largest number of sequences for fitting recurrences, at least 2. A quarter of
            them is kept for their errors.
        fit_steps: Number of steps of the optimizer for each layer, a sequence each.
        seed: Seed of the criterion "random", and of the fits.
        progress: A function that is called as `progress(done, total)` with numbers of forward
            passes, or of fitted layers.

    Returns:
        The plan.

    Raises:
        TypeError: if the model is no causal language model.
        ValueError: if an option is out of range; if the text has too few tokens; if the model
            cannot read them, or has no attention that a window can replace.
    """
    started = time.perf_counter()
    orders = tuple(orders)
    criterion = kind_of(kind).criterion if criterion is None else criterion
    _check(model, window, sinks, orders, length, sequences, fit_sequences, fit_steps)
    check_integers(int(kind_of(kind).fitted), state=state)  # a recurrence has a state to fit
    check_choice(replace, by, criterion, orders, state)
    if replace == 0:
        raise ValueError("replace must be at least 1 layer or group of heads; got 0.")
    if criterion == "recurrence" and not kind_of(kind).fitted:
        raise ValueError('the criterion "recurrence" needs kind="recurrence".')
    rows = rows_of(text, tokenizer, length, sequences)
    if rows.shape[1] <= window:
        raise ValueError(
            f"a window of {window} tokens needs longer sequences to be measured on; the text gives "
            f"sequences of {rows.shape[1]}."
        )
    measured, left = _measure(model, rows, tokenizer, orders, window, sinks, progress)
    layers = tuple(_planned(one, len(rows)) for one in measured)
    layers = _with_norms(model, layers, rows)
    found = Fitted({}, {}, {}, {})
    if kind_of(kind).fitted:
        fit_rows = rows_of(text, tokenizer, length, fit_sequences)
        found = kind_of(kind).fit(
            model,
            fit_rows,
            [layer.name for layer in layers],
            window=window,
            sinks=sinks,
            state=state,
            steps=fit_steps,
            seed=seed,
            progress=progress,
        )
        layers, left = _with_fits(layers, left, found)
    if criterion == "loss":
        replacement = kind_of(kind)(window, sinks, state, found.parameters)
        layers = _with_losses(model, layers, rows, tokenizer, by, replacement, progress)
    plan = HybridPlan(
        model=type(model).__name__,
        budget=replace,
        by=by,
        criterion=criterion,
        window=window,
        sinks=sinks,
        orders=orders,
        state=state,
        length=rows.shape[1],
        sequences=len(rows),
        seed=seed,
        layers=layers,
        left=left,
        measured=(window, sinks),
        kind=kind,
        parameters=found.parameters,
    ).choose()
    return changed(plan, seconds=round(time.perf_counter() - started, 1))


def rows_of(
    text: str | Sequence[Document] | Sequence[Tensor], tokenizer: Any, length: int, count: int
) -> Tensor:
    """Return sequences of tokens, spread over a text, (at most `count`, at most `length`).

    Raises:
        ValueError: if no document has at least two tokens.
    """
    documents = documents_in(text) if isinstance(text, str) else text
    encode = Encoder(tokenizer)
    ids = [
        one.long().cpu() if isinstance(one, Tensor) else torch.from_numpy(encode(one)).long()
        for one in documents
    ]
    return spread_windows(ids, length, count * length)[:count]


@dataclass
class _Sums:
    """Sums over sequences, of one layer of H heads, in double precision.

    Attributes:
        name: path of its module.
        mixer: name of the module's class.
        group: number of heads that share keys and values.
        token_bytes: bytes of the keys and values of one token.
        ess: effective state-sizes, (H).
        errors: squares of the relative errors of recurrences, (H, orders).
        window: squares of the relative errors of the maps, (H).
        lost: squares of the changes of the outputs, as a mean over tokens, (H).
        energy: squares of the outputs, as a mean over tokens, (H).
        runs: number of times that the layer was recorded.
    """

    name: str
    mixer: str
    group: int
    token_bytes: int
    ess: Tensor
    errors: Tensor
    window: Tensor
    lost: Tensor
    energy: Tensor
    runs: int = 1

    def add(self, other: _Sums) -> None:
        for name in ("ess", "errors", "window", "lost", "energy", "runs"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


def _measure(
    model: nn.Module,
    rows: Tensor,
    tokenizer: Any,
    orders: Sequence[int],
    window: int,
    sinks: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[list[_Sums], tuple[tuple[str, str], ...]]:
    """Return the sums of all layers that a window can replace, and what else mixes tokens."""
    found: dict[str, _Sums] = {}
    left: dict[str, str] = {}
    modules = dict(model.named_modules())

    def visit(recorded: RecordedOperator) -> None:
        name, values = recorded.name, recorded.values
        if recorded.auxiliary:
            return
        if recorded.kind != "attention":
            left[name] = f"it is no attention but a {recorded.kind}."
        elif values is None:
            left[name] = "its attention goes through no function that takes a mask."
        elif name not in modules:
            left[name] = "its module runs more than once."
        else:
            sums = _sums(recorded, values(), orders, window, sinks)
            if name in found:
                found[name].add(sums)
            else:
                found[name] = sums

    for number, row in enumerate(rows, 1):
        left |= dict(record_operators(model, row[None], visit, tokenizer=tokenizer))
        if progress is not None:
            progress(number, len(rows))
    for name, sums in list(found.items()):
        again = any(other.startswith(f"{name} (run ") for other in left)
        if again or sums.runs != len(rows):
            left[name] = "its module attends more than once."
            del found[name]
    if not found:
        reason = "".join(f": {path}: {why}" for path, why in list(left.items())[:1]) or "."
        raise ValueError(
            f"{type(model).__name__} has no attention that a window can replace{reason}"
        )
    return list(found.values()), tuple(sorted(left.items()))


def _sums(
    recorded: RecordedOperator, values: Tensor, orders: Sequence[int], window: int, sinks: int
) -> _Sums:
    """Measure one layer on one sequence."""
    system = recorded.system(slice(None))
    maps = system.matrix(values.shape[1])  # type: ignore[union-attr]
    maps = maps.reshape(-1, *maps.shape[-2:]).to(values.dtype)  # (H, L, L)
    length = maps.shape[-1]
    narrow = window_maps(maps, window, sinks)
    outputs = maps @ values  # (H, L, N)
    places = sorted({(2 * k + 1) * length // (2 * _POSITIONS) for k in range(_POSITIONS)})
    storage = recorded.storage
    assert storage is not None  # attention whose values are known has a known storage
    return _Sums(
        name=recorded.name,
        mixer=recorded.mixer,
        group=storage.group,
        token_bytes=storage.nbytes(len(maps) // storage.group),
        ess=effective_state_size(maps, places).double().mean(-1).cpu(),
        errors=realization_errors(maps, orders).square().cpu(),
        window=(_energy(maps - narrow) / _energy(maps)).cpu(),
        lost=(_energy(outputs - narrow @ values) / length).cpu(),
        energy=(_energy(outputs) / length).cpu(),
    )


def _energy(x: Tensor) -> Tensor:
    """Return the sum of squares of each matrix, in double precision."""
    return x.double().square().sum((-2, -1))


def _planned(sums: _Sums, count: int) -> PlannedLayer:
    lost, energy = (sums.lost / count).sqrt(), (sums.energy / count).sqrt()
    return PlannedLayer(
        name=sums.name,
        mixer=sums.mixer,
        group=sums.group,
        token_bytes=sums.token_bytes,
        ess=_numbers(sums.ess / count),
        errors=tuple(_numbers(row) for row in (sums.errors / count).sqrt()),
        window_errors=_numbers((sums.window / count).sqrt()),
        output_errors=_numbers(torch.where(energy > 0, lost / energy, 0)),
        norms=_numbers(energy),
        output_norm=math.nan,
    )


def _numbers(values: Tensor) -> tuple[float, ...]:
    return tuple(_rounded(value) for value in values.tolist())


def _rounded(value: float) -> float:
    """Return a number with as many digits as a plan stores."""
    return float(f"{value:.{_DIGITS}g}")


def _with_norms(
    model: nn.Module, layers: tuple[PlannedLayer, ...], rows: Tensor
) -> tuple[PlannedLayer, ...]:
    """Return the layers with the norms of their outputs."""
    energies: dict[str, float] = {layer.name: 0.0 for layer in layers}

    def keep(name: str, output: Any) -> None:
        first = output[0] if isinstance(output, tuple | list) else output
        energies[name] += float(first.double().square().sum(-1).mean())

    device = next(model.parameters()).device
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(in_mode(model, training=False))
        for name in energies:
            module = model.get_submodule(name)
            hook = module.register_forward_hook(lambda m, a, output, name=name: keep(name, output))
            stack.callback(hook.remove)
        for row in rows:
            model(row[None].to(device), use_cache=False)
    return tuple(
        changed(layer, output_norm=_rounded(math.sqrt(energies[layer.name] / len(rows))))
        for layer in layers
    )


def _with_fits(
    layers: tuple[PlannedLayer, ...], left: tuple[tuple[str, str], ...], found: Fitted
) -> tuple[tuple[PlannedLayer, ...], tuple[tuple[str, str], ...]]:
    """Return the layers with the errors of their recurrences, and what is left.

    Raises:
        ValueError: if no layer can have a recurrence.
    """
    if not found.errors:
        path, reason = next(iter(found.refused.items()))
        raise ValueError(f"no layer can have a recurrence: {path}: {reason}")
    fitted = tuple(
        changed(
            layer,
            recurrence_errors=found.errors[layer.name],
            state_bytes=found.state_bytes[layer.name],
        )
        for layer in layers
        if layer.name in found.errors
    )
    return fitted, tuple(sorted((*left, *found.refused.items())))


def _with_losses(
    model: nn.Module,
    layers: tuple[PlannedLayer, ...],
    rows: Tensor,
    tokenizer: Any,
    by: str,
    replacement: Replacement,
    progress: Callable[[int, int], None] | None,
) -> tuple[PlannedLayer, ...]:
    """Return the layers with the increase of the loss that each unit alone causes."""

    def loss(heads: dict[str, tuple[int, ...]]) -> float:
        with replacement.applied(model, heads):
            return perplexity(
                model, tokenizer, list(rows), window=rows.shape[1], stride=rows.shape[1]
            ).loss

    whole, done = loss({}), 0
    total = sum(len(layer.units(by)) for layer in layers)

    def increases(layer: PlannedLayer) -> Iterator[float]:
        nonlocal done
        for heads in layer.units(by):
            yield _rounded(loss({layer.name: heads}) - whole)
            done += 1
            if progress is not None:
                progress(done, total)

    return tuple(changed(layer, loss_increases=tuple(increases(layer))) for layer in layers)


def _check(
    model: Any,
    window: int,
    sinks: int,
    orders: Sequence[int],
    length: int,
    sequences: int,
    fit_sequences: int,
    fit_steps: int,
) -> None:
    if not (hasattr(model, "can_generate") and model.can_generate()):
        raise TypeError(
            "plan_hybrid takes a causal language model of Gramian or transformers; got an object "
            f"of type {type(model).__name__}."
        )
    for order in orders:
        check_integers(0, orders=order)
    realization_errors(torch.eye(1), orders)  # raises its errors before the model runs
    check_integers(0, sinks=sinks, fit_steps=fit_steps)
    check_integers(1, window=window, sequences=sequences)
    check_integers(2, length=length, fit_sequences=fit_sequences)
