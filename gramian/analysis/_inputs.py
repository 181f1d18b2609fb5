"""Turn the inputs of `analyze` into one sequence, and run the model on it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gramian.tasks import Encoder, documents_in

__all__ = ["model_name", "positions_in", "run_model", "sequence_of", "token_texts"]


def sequence_of(inputs: Any, tokenizer: Any) -> Tensor:
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


def positions_in(at: Sequence[int] | range | None, every: int | None, length: int) -> list[int]:
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


def run_model(model: Any, sequence: Tensor) -> None:
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
    if not numbers:
        options["attention_mask"] = torch.ones_like(sequence)
    if "input_ids_2" in accepted:  # the base model of a classifier of pairs reads one sequence
        model = model.base_model
    if "attention_mask" not in accepted:
        options.pop("attention_mask", None)
    model(**{name: sequence}, **options)


def model_name(model: nn.Module) -> str:
    path = getattr(getattr(model, "config", None), "_name_or_path", "")
    return str(path).rstrip("/").rsplit("/", 1)[-1] or type(model).__name__


def token_texts(sequence: Tensor, tokenizer: Any) -> list[str]:
    if sequence.is_floating_point():
        return [str(i) for i in range(sequence.shape[1])]
    ids = sequence[0].tolist()
    return [str(i) if tokenizer is None else tokenizer.decode([i]) for i in ids]
