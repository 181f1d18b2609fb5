"""Measure the state-sizes of every layer of a model while the model reads a text."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gramian.analysis._recording import RecordedOperator, Recorder
from gramian.analysis._report import LayerState, StateReport
from gramian.ess import effective_state_size, theoretical_state_size
from gramian.ops.precision import full_precision
from gramian.tasks import Encoder, documents_in

__all__ = ["analyze"]

_MATRIX_BYTES = 2**27  # the largest number of bytes of double-precision operators held at once


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
        inputs: One sequence without padding. A text or a FASTA record needs `tokenizer`. Token ids
            are (L) or (1, L), a sequence of integers, or a mapping with `input_ids`, as tokenizers
            return it. Inputs of models of continuous inputs are floating-point numbers, (L, size)
            or (1, L, size).
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
        progress: A function that is called after each layer with the number of layers measured so
            far and the number of known layers.

    Returns:
        The report, which prints as a table.

    Raises:
        TypeError: if the inputs have another type, or the model is not a module.
        ValueError: if the model has no layers that mix tokens; if the inputs are empty, padded, or
            more than one sequence; if a text is given without a tokenizer; if a position or the
            horizon is outside of the sequence; if the measure is unknown; or if an operator is not
            finite. In the last case, the message names the layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a model to analyze must be a torch module; got {type(model).__name__}.")
    if max_channels is not None and max_channels < 1:
        raise ValueError(f"max_channels must be at least 1 or None; got {max_channels}.")
    sequence = _sequence(inputs, tokenizer)
    length = sequence.shape[1]
    if horizon is not None and not 1 <= horizon <= length:
        raise ValueError(
            f"horizon must be at least 1 and at most {length}, the tokens there are; got {horizon}."
        )
    sequence = sequence[:, :horizon]
    length = sequence.shape[1]
    positions = _positions(at, every, length)
    options: dict[str, Any] = {"measure": measure, "tol": tol, "rtol": rtol}
    effective_state_size(torch.eye(2), **options)  # raise its errors before the model runs
    started = time.perf_counter()
    layers: list[LayerState] = []

    def visit(recorded: RecordedOperator) -> None:
        layers.append(_layer(recorded, positions, length, max_channels, options))
        if progress is not None:
            known = max(len(recorder.mixers), len(layers))
            progress(len(layers), known)

    recorder = Recorder(model, visit)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), recorder.recording():
            _run(model, sequence)
    finally:
        model.train(training)
    unread = recorder.unread()
    if not layers and not unread:
        raise ValueError(f"{type(model).__name__} has no layer that is known to mix tokens.")
    return StateReport(
        model=_name(model),
        layers=tuple(_joined(layers)),
        positions=tuple(positions),
        tokens=tuple(_tokens(sequence, tokenizer)),
        measure=measure,
        tol=tol,
        rtol=rtol,
        unread=unread,
        seconds=time.perf_counter() - started,
    )


def _layer(
    recorded: RecordedOperator,
    positions: list[int],
    length: int,
    max_channels: int | None,
    options: dict[str, Any],
) -> LayerState:
    """Measure the state-sizes of a recorded layer, a few channels at a time."""
    step = 1 if max_channels is None else math.ceil(recorded.count / max_channels)
    chosen = range(0, recorded.count, step)
    size = max(1, _MATRIX_BYTES // (8 * length * length))
    ess, tss = [], []
    for begin in range(0, len(chosen), size):
        part = chosen[begin : begin + size]
        system = recorded.system(slice(part.start, part.stop, part.step))
        try:
            sizes = effective_state_size(system, positions, horizon=length, **options)
        except ValueError as error:
            raise ValueError(f"{recorded.name}: {error}") from error
        capacity = theoretical_state_size(system, positions, horizon=length)
        ess.append(sizes.reshape(-1, len(positions)).float().cpu())
        tss.append(capacity.reshape(-1, len(positions)).float().cpu())
    return LayerState(
        name=recorded.name,
        mixer=recorded.mixer,
        kind=recorded.kind,
        channels=tuple(chosen),
        count=recorded.count,
        ess=torch.cat(ess),
        tss=torch.cat(tss),
    )


def _joined(layers: list[LayerState]) -> Iterator[LayerState]:
    """Yield the layers. Join the heads or channels of layers that have the same name."""
    by_name: dict[str, list[LayerState]] = {}
    for layer in layers:
        by_name.setdefault(layer.name, []).append(layer)
    for parts in by_name.values():
        if len(parts) == 1:
            yield parts[0]
            continue
        before = [sum(part.count for part in parts[:i]) for i in range(len(parts))]
        channels = [c + b for part, b in zip(parts, before, strict=True) for c in part.channels]
        yield LayerState(
            name=parts[0].name,
            mixer=parts[0].mixer,
            kind=parts[0].kind,
            channels=tuple(channels),
            count=sum(part.count for part in parts),
            ess=torch.cat([part.ess for part in parts]),
            tss=torch.cat([part.tss for part in parts]),
        )


def _sequence(inputs: Any, tokenizer: Any) -> Tensor:
    """Return the inputs as token ids (1, L) or as floating-point numbers (1, L, size)."""
    if isinstance(inputs, str):
        if tokenizer is None:
            raise ValueError("a text needs a tokenizer: give `tokenizer`, or token ids.")
        documents = documents_in(inputs)
        if len(documents) > 1:
            raise ValueError(f"one sequence is needed; the text is {len(documents)} FASTA records.")
        inputs = Encoder(tokenizer)(documents[0]) if documents else []
    if isinstance(inputs, Mapping) or hasattr(inputs, "input_ids"):
        mask = inputs.get("attention_mask")
        if mask is not None and not bool(torch.as_tensor(mask).all()):
            raise ValueError("one sequence without padding is needed: the attention mask has 0.")
        inputs = inputs["input_ids"]
    try:
        sequence = torch.as_tensor(inputs)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            "a text, token ids or continuous inputs are needed; got "
            f"{type(inputs).__name__}: {error}"
        ) from error
    if sequence.numel() == 0:
        raise ValueError("there is nothing to analyze: the input has no tokens.")
    dimensions = 2 if sequence.is_floating_point() else 1
    if sequence.ndim == dimensions:
        sequence = sequence[None]
    if sequence.ndim != dimensions + 1 or len(sequence) != 1:
        raise ValueError(
            "one sequence is needed, token ids (L) or (1, L) or numbers (L, size) or (1, L, size); "
            f"got shape {tuple(sequence.shape)}."
        )
    return sequence


def _positions(at: Sequence[int] | range | None, every: int | None, length: int) -> list[int]:
    if at is not None and every is not None:
        raise ValueError("give positions `at` or a distance `every`, not both.")
    if every is not None and every < 1:
        raise ValueError(f"every must be at least 1; got {every}.")
    positions = list(range(0, length, every or 1)) if at is None else [int(i) for i in at]
    if not positions or min(positions) < 0 or max(positions) >= length:
        raise ValueError(
            f"positions must lie in 0 … {length - 1} for {length} tokens, and there must be one; "
            f"got {positions}."
        )
    return positions


def _run(model: Any, sequence: Tensor) -> None:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    sequence = sequence.to(device)
    name = getattr(model, "main_input_name", None)
    if name is None:
        model(sequence)
        return
    numbers = sequence.is_floating_point()
    if name == ("input_ids" if numbers else "input_values"):
        kinds = ("token ids", "continuous inputs")
        wanted, given = kinds if numbers else kinds[::-1]
        raise ValueError(f"this {type(model).__name__} reads {wanted}; it was given {given}.")
    find: Any = getattr(model, "get_input_embeddings", None)
    embedding = find() if find is not None and not numbers else None
    known = getattr(embedding, "num_embeddings", None)
    if known is not None and not 0 <= int(sequence.min()) <= int(sequence.max()) < known:
        raise ValueError(
            f"token ids must lie in 0 … {known - 1}, the model's vocabulary; got "
            f"{int(sequence.min())} … {int(sequence.max())}."
        )
    accepted = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {}
    if getattr(model.config, "use_cache", None) is not None:
        options["use_cache"] = False
    if "logits_to_keep" in accepted:
        options["logits_to_keep"] = 1
    if not numbers:
        options["attention_mask"] = torch.ones_like(sequence)
    if "input_ids_2" in accepted:  # the base model of a classifier of pairs reads one sequence
        model = model.base_model
    if "attention_mask" not in accepted:
        options.pop("attention_mask", None)
    model(**{name: sequence}, **options)


def _name(model: nn.Module) -> str:
    path = getattr(getattr(model, "config", None), "_name_or_path", "")
    return str(path).rstrip("/").rsplit("/", 1)[-1] or type(model).__name__


def _tokens(sequence: Tensor, tokenizer: Any) -> list[str]:
    if sequence.is_floating_point():
        return [str(i) for i in range(sequence.shape[1])]
    ids = sequence[0].tolist()
    return [str(i) if tokenizer is None else tokenizer.decode([i]) for i in ids]
