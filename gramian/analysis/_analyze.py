"""Measure the state-sizes of every layer of a model while the model reads a text."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gramian._modules import in_mode
from gramian.analysis._inputs import (
    check_causal,
    check_model,
    model_name,
    positions_in,
    read_inputs,
    run_model,
    token_texts,
)
from gramian.analysis._measuring import joined, measure_layer
from gramian.analysis._recording import RecordedOperator, Recorder
from gramian.analysis._report import LayerState, StateReport
from gramian.ess import effective_state_size
from gramian.ops.precision import full_precision

__all__ = ["analyze"]


@full_precision()
def analyze(
    model: nn.Module,
    inputs: str | Tensor | Sequence[int] | Mapping[str, Any],
    *,
    tokenizer: Any = None,
    at: Sequence[int] | range | None = None,
    every: int | None = None,
    horizon: int | None = None,
    measure: str = "entropy",
    tol: float | None = None,
    rtol: float | None = None,
    max_channels: int | None = 64,
    ranks: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> StateReport:
    """Measure the effective state-size of every layer, head and position of a model on one input.

    The model runs once. Each causal operator is measured when its layer runs and is then dropped,
    so the operators of no more than one layer are held at once. The function measures the mixers of
    `gramian.mixers`, softmax attention of every architecture that uses transformers' attention
    interface, selective scans (Mamba, FalconMamba, Jamba, Zamba; Mamba2, Bamba, Falcon-H1,
    Nemotron-H), and the gated delta rule (Qwen3-Next, Qwen3.5, OLMo-Hybrid). The report names the
    other layers that mix tokens.

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
        every: Distance between positions, of which the first is 0. Give `every` or `at`, not both.
        horizon: Number of tokens to read; all by default. The rank of `T[i:horizon, :i]` is at most
            min(i, horizon - i), so the horizon should be well past the last position of interest.
        measure: "entropy" or "tolerance", as in `gramian.effective_state_size`.
        tol: Absolute tolerance of the measure "tolerance".
        rtol: Relative tolerance of the measure "tolerance".
        max_channels: Maximal number of heads or channels to measure in a layer. If a layer has
            more, every n-th of them is measured. If it is None, all are measured.
        ranks: Whether to measure stable and effective rank of the states of recurrences as well, as
            `gramian.ess.state_ranks` does. Layers without such states, such as attention, have
            none.
        progress: A function that is called after each layer with the number of layers measured so
            far and the number of known layers.

    Returns:
        The report, which prints as a table.

    Raises:
        TypeError: if the inputs have another type, or the model is not a module.
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
    given = read_inputs(inputs, tokenizer)
    length = given.length
    if horizon is not None and not 1 <= horizon <= length:
        raise ValueError(
            f"horizon must be at least 1 and at most {length}, the tokens there are; got {horizon}."
        )
    given = given.first(horizon)
    length = given.length
    positions = positions_in(at, every, length)
    options: dict[str, Any] = {"measure": measure, "tol": tol, "rtol": rtol}
    effective_state_size(torch.eye(2), **options)  # raise its errors before the model runs
    started = time.perf_counter()
    layers: list[LayerState] = []

    def visit(recorded: RecordedOperator) -> None:
        layers.append(measure_layer(recorded, positions, length, max_channels, options, ranks))
        if progress is not None:
            known = max(len(recorder.mixers), len(layers))
            progress(len(layers), known)

    recorder = Recorder(model, visit)
    with in_mode(model, training=False), torch.no_grad():
        with recorder.recording():
            run_model(model, given)
        if not layers:
            check_causal(model, given)
    unread = recorder.unread()
    if not layers and not unread:
        raise ValueError(f"{type(model).__name__} has no layer that is known to mix tokens.")
    return StateReport(
        model=model_name(model),
        layers=tuple(joined(layers)),
        positions=tuple(positions),
        tokens=tuple(token_texts(given, tokenizer)),
        measure=measure,
        tol=tol,
        rtol=rtol,
        unread=unread,
        seconds=time.perf_counter() - started,
    )
