"""Compare exported programs with the PyTorch recurrence from which they were made."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gramian.export._generation import Rules
from gramian.export._report import ExportReport
from gramian.export._runtime import ExportedModel, ExportedRecurrence
from gramian.mixers import MixerRecurrence
from gramian.systems import Recurrence

if TYPE_CHECKING:
    from gramian.models import GramianForCausalLM

__all__ = ["verify_model", "verify_recurrence"]

_PROMPT = 45  # number of tokens or samples that are processed as one chunk
_SINGLE, _DOUBLE = 1e-4, 1e-9
"""The accepted differences of outputs, relative to the largest output.

The first number applies to programs that use single precision anywhere. The second number applies
to all other programs.
"""


class _Differences:
    """The largest differences between program and PyTorch so far, and the largest output."""

    def __init__(self) -> None:
        self.prefill = self.step = self.scale = 0.0

    def add(self, found: np.ndarray, expected: Tensor, prefill: bool = False) -> None:
        reference = expected.numpy()
        difference = float(np.abs(found - reference).max())
        if not np.isfinite(difference):
            difference = float("inf")
        if prefill:
            self.prefill = max(self.prefill, difference)
        else:
            self.step = max(self.step, difference)
        self.scale = max(self.scale, float(np.abs(reference).max()))

    def check(self, tolerance: float) -> None:
        largest = max(self.prefill, self.step)
        if not largest <= tolerance * self.scale:
            raise RuntimeError(
                f"the exported program differs from PyTorch by {largest:.1e} of outputs up to "
                f"{self.scale:.1e}: nothing was written."
            )


def verify_model(
    model: GramianForCausalLM,
    run: ExportedModel,
    description: dict[str, Any],
    *,
    tokens: int,
    seed: int,
) -> ExportReport:
    """Compare the greedy tokens of an exported model with the greedy tokens of PyTorch.

    Both models continue two random prompts, the second of which is shorter and padded on the left.
    Both read the tokens that PyTorch chooses. As long
    as all choices agree, two independent runs would generate the same text. If the choices differ,
    but PyTorch's logits of the two tokens differ by no more than the accepted difference of
    outputs, the choice is a tie. If the model has generation settings, the generation with these
    settings is compared, too.

    Args:
        model: The model in PyTorch.
        run: The exported model.
        description: The contents of `export.json`.
        tokens: Number of tokens to compare in each sequence.
        seed: Seed of the prompts.

    Raises:
        RuntimeError: if choices differ and are not a tie, or if outputs or generated texts differ.
    """
    from gramian.models.cache import CACHE

    generator = torch.Generator().manual_seed(seed)
    length = _PROMPT
    if run.context is not None:
        length = max(1, min(length, run.context // 2))
        tokens = min(tokens, run.context - length)
    tolerance = _tolerance(description, model.dtype)
    ids = torch.randint(model.config.vocab_size, (2, length), generator=generator)
    mask = _mask(length)
    differences, ties = _Differences(), 0
    found, state = run.prefill(ids.numpy(), attention_mask=mask.numpy())
    output = model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1)
    for index in range(tokens):
        expected = output.logits[:, -1]
        differences.add(found, expected, prefill=index == 0)
        chosen = expected.argmax(-1)
        other = torch.from_numpy(found.argmax(-1))
        margin = (expected.gather(1, chosen[:, None]) - expected.gather(1, other[:, None]))[:, 0]
        differ = chosen != other
        if bool((differ & (margin > tolerance * differences.scale)).any()):
            raise RuntimeError(
                f"the exported program writes another token than PyTorch at place {index}, where "
                f"its logits differ by {float(margin.max()):.1e}: nothing was written."
            )
        ties += int(differ.sum())
        if index + 1 < tokens:
            found, state = run.step(chosen.numpy(), state)
            output = model(
                input_ids=chosen[:, None],
                past_key_values=output[CACHE],
                use_cache=True,
            )
    differences.check(tolerance)
    if description["generation"]:
        _verify_rules(model, ids, mask, description["generation"], tokens, seed)
        _verify_generation(model, run, ids, mask, tokens, tolerance * differences.scale)
    return _report(run, description, differences, tokens, ties)


def _verify_rules(
    model: GramianForCausalLM,
    ids: Tensor,
    mask: Tensor,
    settings: dict[str, Any],
    tokens: int,
    seed: int,
) -> None:
    """Compare the probabilities that `Rules` and transformers compute from the same logits.

    Raises:
        RuntimeError: if the probability of a next token differs.
    """
    with torch.random.fork_rng(), _quiet():
        torch.manual_seed(seed)
        written = _generate(model, ids, mask, tokens, output_scores=True, output_logits=True)
    rules, prompt = Rules(settings), ids.shape[1]
    for index, (logits, scores) in enumerate(zip(written.logits, written.scores, strict=True)):
        past = written.sequences[:, : prompt + index].numpy()
        found = rules.scores(past, logits.numpy(), prompt, prompt + tokens)
        ours, theirs = torch.from_numpy(found).softmax(-1), scores.softmax(-1)
        if not torch.allclose(ours, theirs, rtol=0, atol=1e-4, equal_nan=True):
            raise RuntimeError(
                f"the generation settings give other probabilities than model.generate at place "
                f"{index}: nothing was written."
            )


def _verify_generation(
    model: GramianForCausalLM,
    run: ExportedModel,
    ids: Tensor,
    mask: Tensor,
    tokens: int,
    rounding: float,
) -> None:
    """Compare the texts that the exported model and `model.generate` greedily generate.

    The texts may diverge at a token if the scores of the two choices differ by no more than
    rounding.

    Raises:
        RuntimeError: if the texts diverge at another token, or end at different lengths.
    """
    with _quiet():
        written = _generate(model, ids, mask, tokens, do_sample=False, output_scores=True)
    expected = written.sequences.numpy()
    found = run.generate(ids.numpy(), tokens, attention_mask=mask.numpy(), temperature=0)
    length = min(expected.shape[1], found.shape[1])
    parted = False
    for row, (one, other) in enumerate(zip(expected[:, :length], found[:, :length], strict=True)):
        places = np.flatnonzero(one != other)
        if len(places):
            parted = True
            scores = written.scores[places[0] - ids.shape[1]][row]
            margin = float(scores[int(one[places[0]])] - scores[int(other[places[0]])])
            if not margin <= rounding:
                raise RuntimeError(
                    "the exported model generates another token than model.generate at place "
                    f"{places[0] - ids.shape[1]}: nothing was written."
                )
    if not parted and expected.shape != found.shape:
        raise RuntimeError(
            f"the exported model ends after {found.shape[1]} tokens, model.generate after "
            f"{expected.shape[1]}: nothing was written."
        )


def _mask(length: int) -> Tensor:
    """Return a mask (2, length) with padding on the left of the second row."""
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[1, : length // 3] = 0
    return mask


def _generate(
    model: GramianForCausalLM, ids: Tensor, mask: Tensor, tokens: int, **options: Any
) -> Any:
    return model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=tokens,
        return_dict_in_generate=True,
        **options,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress messages and warnings of transformers, for example about unused settings."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


@torch.no_grad()
def verify_recurrence(
    recurrence: MixerRecurrence | Recurrence,
    run: ExportedRecurrence,
    description: dict[str, Any],
    *,
    samples: int,
    seed: int,
) -> ExportReport:
    """Compare the outputs of an exported recurrence and of PyTorch for random samples.

    Both recurrences process a chunk of two sequences, and then single steps. If they take a mask,
    the second sequence is padded.

    Args:
        recurrence: The recurrence in PyTorch.
        run: The exported recurrence.
        description: The contents of `export.json`.
        samples: Number of steps.
        seed: Seed of the samples.

    Raises:
        RuntimeError: if an output differs.
    """
    dtype = getattr(torch, description["input"]["dtype"])
    length = _PROMPT
    if run.context is not None:
        length = max(1, min(length, run.context // 2))
        samples = min(samples, run.context - length)
    shape = [2 if size == "batch" else size for size in description["input"]["step"]]
    time = description["input"]["prefill"].index("length")
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(length + samples, *shape, generator=generator, dtype=dtype)
    chunk = draws[:length].movedim(0, time)
    differences = _Differences()
    if isinstance(recurrence, MixerRecurrence):
        mask = _mask(length)
        found, state = run.prefill(chunk.numpy(), mask=mask.numpy())
        expected, reference = recurrence.prefill(chunk, mask=mask)
        expected = expected * mask[..., None]
    else:
        found, state = run.prefill(chunk.numpy())
        expected, reference = recurrence.prefill(chunk)
    differences.add(found, expected, prefill=True)
    for sample in draws[length:]:
        found, state = run.step(sample.numpy(), state)
        expected, reference = recurrence.step(sample, reference)
        differences.add(found, expected)
    differences.check(_tolerance(description, dtype))
    return _report(run, description, differences, samples, 0)


def _tolerance(description: dict[str, Any], dtype: torch.dtype) -> float:
    states = {state["dtype"] for state in description["states"]}
    return _DOUBLE if dtype == torch.float64 and "float32" not in states else _SINGLE


def _report(
    run: ExportedModel | ExportedRecurrence,
    description: dict[str, Any],
    differences: _Differences,
    compared: int,
    ties: int,
) -> ExportReport:
    empty = run.initial_state(1)
    return ExportReport(
        kind=description["kind"],
        format=description["format"],
        states=len(empty.tensors),
        state_bytes=empty.nbytes,
        context=run.context,
        compared=compared,
        ties=ties,
        prefill_difference=differences.prefill,
        step_difference=differences.step,
        scale=differences.scale,
    )
