"""The loss of a causal language model on a text longer than it can take at once, in windows.

A text may be several documents, such as the records of a FASTA file: no window spans two. Of each,
inputs are windows of `window` tokens that begin every `stride` tokens; of each window the losses
count that no earlier window had. So every token but the first is predicted once and, after the
first window, from at least `window - stride + 1` tokens before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gramian.evaluation._measure import Measure, exponential, ratio
from gramian.tasks import Document, Encoder, documents_in

__all__ = ["Perplexity", "perplexity", "windows"]


@dataclass(frozen=True)
class Perplexity:
    """The loss on a text.

    Attributes:
        nats: summed over the tokens that were predicted.
        tokens: how many those are: all but the first of each document, which nothing stands before.
        bytes: of the text that those tokens stand for, in UTF-8.
        window: tokens of an input.
        stride: tokens between the beginnings of inputs.
        losses: nats of every window, over the tokens that count there.
        counts: of those tokens.
    """

    nats: float
    tokens: int
    bytes: int
    window: int
    stride: int
    losses: tuple[float, ...] = field(repr=False)
    counts: tuple[int, ...] = field(repr=False)

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Of a token: e to the power of the loss."""
        return exponential(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Bits a byte, which models of different vocabularies can be compared by."""
        return self.nats / math.log(2) / self.bytes

    def measures(self, name: str) -> list[Measure]:
        """Loss, perplexity and bits per byte of the text called `name`.

        Standard errors take windows as the independent pieces of data that they nearly are.
        """
        per_byte = self.tokens / self.bytes / math.log(2)
        return [
            ratio(name, "loss", self.losses, self.counts, higher_is_better=False),
            ratio(
                name,
                "perplexity",
                self.losses,
                self.counts,
                higher_is_better=False,
                of="exponential",
            ),
            ratio(
                name,
                "bits_per_byte",
                self.losses,
                self.counts,
                higher_is_better=False,
                scale=per_byte,
            ),
        ]


def perplexity(
    model: Any,
    tokenizer: Any,
    text: str | Sequence[Document],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """The loss of a causal language model on a text, with a sliding window.

    Args:
        model: a causal language model of ours or of transformers.
        tokenizer: its own.
        text: of at least two tokens; or documents, as `gramian.tasks.read_documents` reads them
            from a file. A text that is FASTA, by the rule told there, is its records.
        window: tokens of an input; by default what the configuration says the model was made for,
            at most 2,048.
        stride: tokens between the beginnings of inputs, at most `window`; by default half of it. A
            smaller stride leaves more tokens before each one that counts, and takes longer.
        batch_size: windows at once.
        progress: called as `progress(windows done, windows)`.

    Raises:
        ValueError: for a window or stride that is not in order, or a text of fewer than two tokens.
    """
    if window is None:
        window = min(int(getattr(model.config, "max_position_embeddings", None) or 2048), 2048)
    if window < 1:
        raise ValueError(f"window must be at least 1 token; got {window}.")
    if stride is None:
        stride = max(1, window // 2)
    if not 1 <= stride <= window:
        raise ValueError(f"stride must lie from 1 to the window, {window}; got {stride}.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
    encode = Encoder(tokenizer)
    parts = [encode.sized(one) for one in (documents_in(text) if isinstance(text, str) else text)]
    longest = max((len(part) for part, _ in parts), default=0)
    if longest < 2:
        raise ValueError(f"the text must have at least 2 tokens; it has {longest}.")
    places: list[tuple[int, int, int]] = []
    before = 0
    for part, _ in parts:
        places += (
            (start + before, begin + before, end + before)
            for start, begin, end in windows(len(part), window, stride)
        )
        before += len(part)
    ids = torch.from_numpy(np.concatenate([part for part, _ in parts]))
    size = sum(bytes_ for part, bytes_ in parts if len(part) > 1)
    losses: list[float] = []
    training = model.training
    model.eval()
    try:
        for first in range(0, len(places), batch_size):
            for group in _equally_long(places[first : first + batch_size]):
                losses += _losses(model, ids, group)
            if progress is not None:
                progress(len(losses), len(places))
    finally:
        model.train(training)
    counts = tuple(end - begin for _, begin, end in places)
    return Perplexity(math.fsum(losses), sum(counts), size, window, stride, tuple(losses), counts)


def windows(tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """`(start, begin, end)` of every window.

    Its input is tokens start … end - 2, and what counts are its predictions of begin … end - 1.
    """
    begin, start = 1, 0
    while begin < tokens:
        end = min(start + window + 1, tokens)
        yield start, begin, end
        begin, start = end, start + stride


def _equally_long(
    places: list[tuple[int, int, int]],
) -> Iterator[list[tuple[int, int, int]]]:
    """The windows in their order; the last ones may be shorter and go by themselves."""
    group: list[tuple[int, int, int]] = []
    for place in places:
        if group and place[2] - place[0] != group[0][2] - group[0][0]:
            yield group
            group = []
        group.append(place)
    yield group


@torch.no_grad()
def _losses(model: Any, ids: Tensor, places: list[tuple[int, int, int]]) -> list[float]:
    """Nats of each window, over the tokens that count."""
    device = next(model.parameters()).device
    inputs = torch.stack([ids[start : end - 1] for start, _, end in places]).to(device)
    logits = model(inputs, use_cache=False).logits
    losses = []
    for row, (_, begin, end) in zip(logits, places, strict=True):
        predicted = row[len(row) - (end - begin) :].float()
        due = ids[begin:end].to(device)
        losses.append(nn.functional.cross_entropy(predicted, due, reduction="none").double().sum())
    found: list[float] = torch.stack(losses).tolist()
    return found
