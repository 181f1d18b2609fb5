"""Measure the state-sizes of every layer of a model while the model reads a text."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gramian.analysis._inputs import (
    check_inputs,
    check_model,
    model_name,
    positions_in,
    read_inputs,
    token_texts,
)
from gramian.analysis._measuring import check_tolerance, joined, measure_layer
from gramian.analysis._operators import record
from gramian.analysis._recording import RecordedOperator, Recorder
from gramian.analysis._report import LayerState, StateReport
from gramian.ess import effective_state_size
from gramian.ops.precision import full_precision

__all__ = ["analyze"]

_LONG = 1024
"""The length from which on attention is read by rows, if its state-sizes may be estimated."""


@full_precision()
def analyze(
    model: nn.Module,
    inputs: str | Tensor | Sequence[int] | Mapping[str, Any],
    *,
    tokenizer: Any = None,
    at: Sequence[int] | range | None = None,
    every: int | None = None,
    positions: int | None = None,
    horizon: int | None = None,
    measure: str = "entropy",
    tol: float | None = None,
    rtol: float | None = None,
    tolerance: float | None = None,
    max_channels: int | None = 64,
    include: str = "core",
    ranks: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> StateReport:
    """Measure the effective state-size of every layer, head and position of a model on one input.

    The model runs once on a short sequence, which shows what mixes tokens; once on at most 1,024
    tokens of the input, which shows what mixes only tokens that are far apart; and then once on the
    whole input. Each causal operator is measured when its layer runs and is then dropped, so the
    operators of no more than one layer are held at once. What the layers compute does not change.

    The function measures every layer in which some values are mixed linearly: the mixers of
    `gramian.mixers`; attention, from its maps; the scans of state-space models, delta rules and
    linear attention, exactly and from their arguments; and all others, such as short and dilated
    convolutions and shifts of tokens, from their responses to impulses. An operator counts only if
    it predicts what the layer returns. A convolution over all channels of a group has an operator
    for each pair of an input and an output channel. The report names all other layers that mix
    tokens; those that mix only tokens more than 1,024 positions apart are not found.

    Args:
        model: A model of Gramian or of transformers, or any module that contains mixers of
            `gramian.mixers`.
        inputs: One sequence without padding. A text, a FASTA record or a `gramian.tasks.Document`
            needs `tokenizer`. Token ids are (L) or (1, L), a sequence of integers, or a mapping
            with `input_ids`, as tokenizers return it. A mapping may have `inputs_embeds`,
            (1, L, width), in place of `input_ids`, and further arguments of the model with integers
            for each token, such as `position_ids`. Inputs of models of continuous inputs are
            floating-point numbers, (L, size) or (1, L, size).
        tokenizer: Tokenizer of the text. It also provides the texts of tokens in the report.
        at: The positions at which to measure; all by default. Position i separates the tokens
            before i from token i and later tokens.
        every: Distance between positions, of which the first is 0.
        positions: Number of positions, evenly spread over the sequence. Give one of `at`, `every`
            and `positions`.
        horizon: Number of tokens to read; all by default. The rank of `T[i:horizon, :i]` is at most
            min(i, horizon - i), so the horizon should be well past the last position of interest.
        measure: "entropy" or "tolerance", as in `gramian.effective_state_size`.
        tol: Absolute tolerance of the measure "tolerance".
        rtol: Relative tolerance of the measure "tolerance".
        tolerance: Relative error up to which the mean entropy-ESS of each layer may be estimated,
            as in `gramian.ess.estimated_mean_state_size`; None to compute all sizes exactly. It
            makes long contexts possible: the maps of attention over 1,024 tokens or more are then
            never held all at once, but computed a few rows at a time. The errors of the means and
            the larger ones of single sizes are in the report. Recurrences are measured exactly.
        max_channels: Maximal number of heads or channels to measure in a layer. If a layer has
            more, every n-th of them is measured. If it is None, all are measured.
        include: "core" measures scans and attention alone, and short convolutions as layers of
            their own. "mixer" counts the short convolution in a layer to the operator of the scan
            that it feeds, `T_scan diag(s) T_convolution` for every value channel. Here s is the
            factor by which the activation between the two multiplies its input. Convolutions that
            are modules beside the scan stay layers of their own.
        ranks: Whether to measure stable and effective rank of the states of recurrences as well, as
            `gramian.ess.state_ranks` does. Layers without such states, such as attention, have
            none.
        progress: A function that is called after each layer with the number of layers measured so
            far and the number of known layers.

    Returns:
        The report, which prints as a table.

    Raises:
        TypeError: if the inputs have another type, the model is not a module, or a position in `at`
            is not an integer.
        ValueError: if the model has no layers that mix tokens, is not causal, is an
            encoder-decoder or has no weights in memory; if the inputs are empty, padded, or more
            than one sequence, or longer than the model's table of positions; if a mapping has a
            key that the model does not read; if a text is given without a tokenizer; if a position
            or the horizon is outside of the sequence; if the measure is unknown; or if an operator
            is not finite. In the last case, the message names the layer.
    """
    check_model(model)
    if max_channels is not None and max_channels < 1:
        raise ValueError(f"max_channels must be at least 1 or None; got {max_channels}.")
    if include not in ("core", "mixer"):
        raise ValueError(f'include must be "core" or "mixer"; got {include!r}.')
    given = read_inputs(inputs, tokenizer)
    length = given.length
    if horizon is not None and not 1 <= horizon <= length:
        raise ValueError(
            f"horizon must be at least 1 and at most {length}, the tokens there are; got {horizon}."
        )
    given = given.first(horizon)
    check_inputs(model, given)
    length = given.length
    places = positions_in(at, every, positions, length)
    options: dict[str, Any] = {"measure": measure, "tol": tol, "rtol": rtol}
    effective_state_size(torch.eye(2), **options)  # raise its errors before the model runs
    check_tolerance(tolerance, measure)
    layers: list[LayerState] = []

    def visit(recorded: RecordedOperator) -> None:
        layers.append(
            measure_layer(recorded, places, length, max_channels, options, ranks, tolerance)
        )
        if progress is not None:
            known = max(recorder.expected, len(layers))
            progress(len(layers), known)

    joins = include == "mixer"
    long = None if tolerance is None or joins else _LONG  # maps are joined as a whole
    recorder = Recorder(model, visit, joins, long)
    started = time.perf_counter()
    unread = record(recorder, given)
    return StateReport(
        model=model_name(model),
        layers=tuple(joined(layers)),
        positions=tuple(places),
        tokens=tuple(token_texts(given, tokenizer)),
        measure=measure,
        tol=tol,
        rtol=rtol,
        unread=unread,
        seconds=time.perf_counter() - started,
        include=include,
    )
