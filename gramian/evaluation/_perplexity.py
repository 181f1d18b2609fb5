"""Compute the loss of a causal language model on a text longer than its context, in windows.

A text may consist of several documents, such as the records of a FASTA file. No window spans two
documents. The inputs are windows of `window` tokens, and a window begins every `stride` tokens of a
document. Each window contributes the losses of the tokens that no earlier window predicted. So
every token of a document except the first is predicted once. After the first window, every
prediction is made from at least the `window - stride + 1` tokens before the predicted one.

Bigram-recall perplexity is the perplexity on the tokens that a model can recall: those which, with
the token before them, form a bigram that occurred earlier in the same window (the "AR hits" of
Arora et al. 2023, arXiv 2312.04927). As in the paper, bigrams that are frequent in the training
data are left out if these data are given.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gramian._modules import in_mode
from gramian.evaluation._bigrams import BigramCounts, earlier_bigrams, largest_count
from gramian.evaluation._measure import Measure, exponential, ratio
from gramian.ops.processors import adapt_threads
from gramian.tasks import Document, Encoder, documents_in

__all__ = ["Perplexity", "perplexity", "windows"]


@dataclass(frozen=True)
class Perplexity:
    """The loss on a text.

    Attributes:
        nats: sum of the losses over the predicted tokens.
        tokens: number of predicted tokens, which are all tokens except the first of each document.
        bytes: number of bytes of UTF-8 that these tokens encode.
        window: number of tokens in an input.
        stride: number of tokens between the beginnings of inputs.
        losses: (windows,) for each window, the sum of the losses in nats over the tokens that the
            window contributes.
        counts: (windows,) for each window, the number of tokens that it contributes.
        recall_losses: (windows,) the part of `losses` over the tokens that complete a bigram which
            occurred earlier in the window.
        recall_counts: (windows,) the number of these tokens.
        rare: largest number of occurrences in the training data of a bigram that counts as
            recalled, or None if all of them count.
    """

    nats: float
    tokens: int
    bytes: int
    window: int
    stride: int
    losses: tuple[float, ...] = field(repr=False)
    counts: tuple[int, ...] = field(repr=False)
    recall_losses: tuple[float, ...] = field(repr=False)
    recall_counts: tuple[int, ...] = field(repr=False)
    rare: int | None = None

    @property
    def loss(self) -> float:
        """Return the mean loss in nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Return the perplexity per token, which is the exponential of the loss."""
        return exponential(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Return the bits per byte. They can be compared between vocabularies."""
        return self.nats / math.log(2) / self.bytes

    @property
    def recall_tokens(self) -> int:
        """Return the number of tokens that complete a bigram seen earlier in their window."""
        return sum(self.recall_counts)

    @property
    def recall_perplexity(self) -> float | None:
        """Return the bigram-recall perplexity, or None if no bigram occurred before."""
        tokens = self.recall_tokens
        return exponential(math.fsum(self.recall_losses) / tokens) if tokens else None

    @property
    def other_perplexity(self) -> float | None:
        """Return the perplexity on all other tokens, or None if there are none."""
        tokens = self.tokens - self.recall_tokens
        nats = self.nats - math.fsum(self.recall_losses)
        return exponential(nats / tokens) if tokens else None

    def measures(self, name: str) -> list[Measure]:
        """Return the measures of the text called `name`.

        They are the loss, the perplexity, the bits per byte, the bigram-recall perplexity and the
        perplexity on the other tokens; without the last two if there are no such tokens. The
        standard errors treat windows as independent units of data. They are nearly independent.
        """
        whole = self.losses, self.counts
        per_byte = self.tokens / self.bytes / math.log(2)
        recalled = self.recall_losses, self.recall_counts
        others = tuple(
            tuple(one - part for one, part in zip(*both, strict=True))
            for both in zip(whole, recalled, strict=True)
        )
        wanted: list[tuple[str, Any, dict[str, Any]]] = [
            ("loss", whole, {}),
            ("perplexity", whole, {"of": "exponential"}),
            ("bits_per_byte", whole, {"scale": per_byte}),
            ("bigram_recall_perplexity", recalled, {"of": "exponential"}),
            ("other_perplexity", others, {"of": "exponential"}),
        ]
        return [
            dataclasses.replace(
                ratio(name, metric, losses, counts, higher_is_better=False, **options),
                tokens=sum(counts),
            )
            for metric, (losses, counts), options in wanted
            if sum(counts)
        ]


def perplexity(
    model: Any,
    tokenizer: Any,
    text: str | Sequence[Document] | Sequence[Tensor],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 1,
    training_bigrams: BigramCounts | None = None,
    rare: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Compute the loss of a causal language model on a text, with a sliding window.

    The loss on the tokens that complete a bigram which occurred earlier in the window is computed
    beside the loss on all tokens (Arora et al. 2023, arXiv 2312.04927, section 3).

    Args:
        model: a causal language model of Gramian or of transformers.
        tokenizer: the model's tokenizer.
        text: a text of at least two tokens, or documents, such as those that
            `gramian.tasks.read_documents` reads from a file. If `gramian.tasks.documents`
            recognizes a text as FASTA, the text is split into its records. Or token ids (tokens,)
            of each document.
        window: number of tokens in an input; by default the context length in the model's
            configuration, at most 2,048.
        stride: number of tokens between the beginnings of inputs, at most `window`; by default half
            of `window`. A smaller stride gives each counted token more context, and takes longer.
        batch_size: number of windows in a batch.
        training_bigrams: the bigrams of the data on which the model was trained, from
            `count_bigrams` with the same tokenizer. Bigrams that are frequent there then do not
            count as recalled, as in the paper. By default every bigram of the window counts.
        rare: largest number of occurrences in the training data of a bigram that counts; by default
            the paper's, 1,250.
        progress: function called as `progress(done, total)` with numbers of windows, or None.

    Raises:
        ValueError: if the window, the stride or the batch size is invalid, if no document has at
            least two tokens, or if `rare` is negative or stands without `training_bigrams`.
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
    rare = largest_count(training_bigrams, rare)
    encode = Encoder(tokenizer)
    documents = documents_in(text) if isinstance(text, str) else text
    parts = [
        _sized(one, tokenizer) if isinstance(one, Tensor) else encode.sized(one)
        for one in documents
    ]
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
    earlier = earlier_bigrams(ids.numpy(), training_bigrams, rare)
    losses: list[float] = []
    recalled: list[tuple[float, int]] = []
    with in_mode(model, training=False):
        for first in range(0, len(places), batch_size):
            adapt_threads()
            for group in _equally_long(places[first : first + batch_size]):
                for place, values in zip(group, _losses(model, ids, group), strict=True):
                    start, begin, end = place
                    losses.append(float(values.sum()))
                    hit = torch.from_numpy(earlier[begin:end] > start)
                    recalled.append((float(values[hit].sum()), int(hit.sum())))
            if progress is not None:
                progress(len(losses), len(places))
    counts = tuple(end - begin for _, begin, end in places)
    return Perplexity(
        math.fsum(losses),
        sum(counts),
        size,
        window,
        stride,
        tuple(losses),
        counts,
        tuple(loss for loss, _ in recalled),
        tuple(count for _, count in recalled),
        rare,
    )


def _sized(ids: Tensor, tokenizer: Any) -> tuple[np.ndarray, int]:
    """Return token ids, and the number of UTF-8 bytes of all tokens except the first."""
    text = tokenizer.decode(ids[1:].tolist()) if len(ids) > 1 else ""
    return ids.cpu().numpy().astype(np.int64), max(1, len(text.encode()))


def windows(tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield `(start, begin, end)` of every window.

    The window's input is tokens start … end - 2. Of its predictions, those of tokens begin … end -
    1 count.
    """
    begin, start = 1, 0
    while begin < tokens:
        end = min(start + window + 1, tokens)
        yield start, begin, end
        begin, start = end, start + stride


def _equally_long(
    places: list[tuple[int, int, int]],
) -> Iterator[list[tuple[int, int, int]]]:
    """Group adjacent windows of equal length. The last window of a document may be shorter."""
    group: list[tuple[int, int, int]] = []
    for place in places:
        if group and place[2] - place[0] != group[0][2] - group[0][0]:
            yield group
            group = []
        group.append(place)
    yield group


@torch.no_grad()
def _losses(model: Any, ids: Tensor, places: list[tuple[int, int, int]]) -> list[Tensor]:
    """Return the losses of each window in nats, one for each token that it contributes."""
    device = next(model.parameters()).device
    inputs = torch.stack([ids[start : end - 1] for start, _, end in places]).to(device)
    logits = model(inputs, use_cache=False).logits
    losses = []
    for row, (_, begin, end) in zip(logits, places, strict=True):
        predicted = row[len(row) - (end - begin) :].float()
        due = ids[begin:end].to(device)
        losses.append(nn.functional.cross_entropy(predicted, due, reduction="none").double().cpu())
    return losses
