"""Pass the causal operators of a model's layers to a function while the model reads a text."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gramian._modules import in_mode
from gramian.analysis._inputs import (
    ModelInputs,
    check_causal,
    check_inputs,
    check_model,
    read_inputs,
)
from gramian.analysis._recording import RecordedOperator, Recorder
from gramian.ops.precision import full_precision

__all__ = ["exclusive", "record", "record_operators"]

# What an analysis changes belongs to the process: functions of modeling files, forwards and modes
# of modules, random numbers, and the stance of `torch.compile`. If analyses overlapped, each would
# put back what the other had changed. A callback that analyzes a part does not wait for itself.
_one_at_a_time = threading.RLock()


@full_precision()
def record_operators(
    model: nn.Module,
    inputs: Any,
    visit: Callable[[RecordedOperator], None],
    *,
    tokenizer: Any = None,
) -> tuple[tuple[str, str], ...]:
    """Pass the operator of every layer that mixes tokens to a function, one layer at a time.

    This is how `analyze` reads a model. What the layers compute does not change. An operator must
    not be kept whole: the operators of all layers together may not fit into memory.

    Args:
        model: A model, as in `analyze`.
        inputs: One sequence without padding, as in `analyze`.
        visit: A function that is called with each operator when its layer runs.
        tokenizer: Tokenizer of the text, if the inputs are one.

    Returns:
        For every layer that mixes tokens but could not be read, its path and the reason.

    Raises:
        TypeError: if the inputs have another type, or the model is not a module.
        ValueError: if the model has no layers that mix tokens, is not causal, is an encoder-decoder
            or has no weights in memory; or if it cannot read the inputs.
    """
    check_model(model)
    given = read_inputs(inputs, tokenizer)
    check_inputs(model, given)
    return record(Recorder(model, visit), given)


def record(recorder: Recorder, inputs: ModelInputs) -> tuple[tuple[str, str], ...]:
    """Run a recorder's model in evaluation mode on a sequence, and return what could not be read.

    Raises:
        ValueError: if no layer mixes tokens, or if none is read because the model is not causal.
    """
    model = recorder.model
    with exclusive(), in_mode(model, training=False), torch.no_grad():
        recorder.record(inputs)
        if not recorder.visits:
            check_causal(model, inputs)
    unread = recorder.unread()
    if not recorder.visits and not unread:
        raise ValueError(f"{type(model).__name__} has no layer that is known to mix tokens.")
    return unread


@contextmanager
def exclusive() -> Iterator[None]:
    """Wait for analyses in other threads, and run what `torch.compile` has compiled as it was.

    So its calls can be followed.
    """
    with _one_at_a_time:
        if "torch._dynamo" not in sys.modules:
            yield
            return
        with torch.compiler.set_stance("force_eager"):
            yield
