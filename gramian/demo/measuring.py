"""Measure quality, spectra, the agreement of two methods of generation, and cost."""

from __future__ import annotations

import copy
import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gramian.distillation import mean_loss
from gramian.filters import ModalFilter
from gramian.models import GramianForCausalLM
from gramian.models.cache import CACHE
from gramian.systems import Modal

__all__ = [
    "Agreement",
    "Decoder",
    "bits_per_byte",
    "compare_greedy",
    "cut_to_tap_zero",
    "hankel_spectra",
    "interleaved_seconds",
    "median_ratio",
    "recomputation_seconds",
]


def bits_per_byte(model: GramianForCausalLM, windows: Tensor) -> float:
    """Measure the mean bits per byte on windows (count, length), without their first bytes."""
    return mean_loss(model, windows.long()) / math.log(2)


@torch.no_grad()
def cut_to_tap_zero(model: GramianForCausalLM) -> GramianForCausalLM:
    """Copy a model, and set all taps of its long filters except tap 0 to zero in the copy.

    A filter with tap 0 only has no memory.
    """
    cut = copy.deepcopy(model)
    for block in cut.model.layers:
        mixer: Any = block.mixer
        first = mixer.filter().impulse_response(1)[:, 0]  # (channels,)
        nothing = torch.zeros(len(first), 0, dtype=torch.complex64)
        direct = Modal(nothing, nothing, first)
        mixer.filter = ModalFilter.from_system(direct, max_length=mixer.filter.max_length)
    return cut


@torch.no_grad()
def hankel_spectra(model: GramianForCausalLM, taps: int) -> dict[str, Tensor]:
    """Return the singular values of `T[taps/2:, :taps/2]` for each layer's filters.

    The result maps the name of each layer to singular values (filters, values) in float64.
    """
    spectra = {}
    for index, block in enumerate(model.model.layers):
        mixer: Any = block.mixer
        values = mixer.filter(taps).to(dtype=torch.float64).hankel_singular_values(length=taps)
        spectra[f"layer {index}"] = values  # (filters, values)
    return spectra


@dataclass(frozen=True)
class Agreement:
    """The agreement of two greedy generations, by recurrence and by full recomputation.

    Attributes:
        tokens: number of generated tokens.
        first_difference: index of the first token that differs, or None if none does.
        gap: difference of the two largest logits of the recomputation at that token, or None.
        max_logit_difference: largest difference between logits before that token, or at all tokens
            if none differs.
    """

    tokens: int
    first_difference: int | None
    gap: float | None
    max_logit_difference: float

    def holds(self, tie: float = 1e-4) -> bool:
        """Return whether all tokens are equal, or the first difference comes from a tie.

        A tie means that the two largest logits differ by at most `tie`.
        """
        return self.gap is None or self.gap <= tie


@torch.no_grad()
def compare_greedy(
    model: GramianForCausalLM,
    prompt: Tensor,
    tokens: int,
    on_token: Callable[[int], None] | None = None,
) -> Agreement:
    """Generate greedily with the model's cache, then by recomputing everything at every token.

    Args:
        model: the model.
        prompt: (1, length) token ids.
        tokens: number of tokens to generate.
        on_token: function that is called after each recomputed token with their number so far, or
            None.
    """
    generated = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    written = generated.sequences[0, prompt.shape[1] :].tolist()
    sequence, worst = prompt, 0.0
    for index, token in enumerate(written):
        logits = model(sequence, use_cache=False, logits_to_keep=1).logits[0, -1]
        best = logits.topk(2)
        if best.indices[0].item() != token:
            gap = (best.values[0] - best.values[1]).item()
            return Agreement(len(written), index, gap, worst)
        worst = max(worst, (logits - generated.logits[index][0]).abs().max().item())
        sequence = torch.cat([sequence, sequence.new_tensor([[token]])], dim=1)
        if on_token is not None:
            on_token(index + 1)
    return Agreement(len(written), None, None, worst)


class Decoder:
    """A model that has read a context and continues it, one token at a time.

    Args:
        model: the model.
        context: (1, length) token ids.
    """

    @torch.no_grad()
    def __init__(self, model: GramianForCausalLM, context: Tensor) -> None:
        self.model = model
        output = model(context, use_cache=True, logits_to_keep=1)
        self.cache = output[CACHE]
        self.token = output.logits[:, -1].argmax(-1, keepdim=True)  # (1, 1)

    @property
    def state_bytes(self) -> int:
        """Return the size of the model's state in bytes."""
        return self.cache.nbytes

    @torch.no_grad()
    def seconds_per_token(self, tokens: int) -> float:
        """Write `tokens` tokens greedily, and return the mean time per token in seconds."""
        started = time.perf_counter()
        for _ in range(tokens):
            logits = self.model(self.token, past_key_values=self.cache, use_cache=True).logits
            self.token = logits[:, -1].argmax(-1, keepdim=True)
        return (time.perf_counter() - started) / tokens


def interleaved_seconds(
    decoders: dict[int, Decoder],
    *,
    tokens: int,
    rounds: int,
    on_round: Callable[[int], None] | None = None,
) -> dict[int, list[float]]:
    """Measure each decoder's seconds per token in each of `rounds` runs of `tokens` tokens.

    The decoders take turns, in an order that is reversed in every other round, so that other load
    on the machine affects all of them alike.
    """
    samples: dict[int, list[float]] = {key: [] for key in decoders}
    for decoder in decoders.values():
        decoder.seconds_per_token(2)
    enabled = gc.isenabled()
    gc.disable()
    try:
        for index in range(rounds):
            for key in list(decoders)[:: 1 if index % 2 else -1]:
                samples[key].append(decoders[key].seconds_per_token(tokens))
            if on_round is not None:
                on_round(index + 1)
    finally:
        if enabled:
            gc.enable()
    return samples


def median_ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the median over rounds of `first / second`.

    The machine had about the same load for the two times of a round.
    """
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


@torch.no_grad()
def recomputation_seconds(
    model: GramianForCausalLM, context: Tensor, lengths: Sequence[int]
) -> dict[int, float]:
    """Measure the seconds per token without a cache, at each length of the context.

    A token then costs one pass over the whole context. The result maps each length to the shortest
    of three passes.
    """
    costs = {}
    for length in lengths:
        passes = []
        for _ in range(3):
            started = time.perf_counter()
            model(context[:, :length], use_cache=False, logits_to_keep=1)
            passes.append(time.perf_counter() - started)
        costs[length] = min(passes)
    return costs
