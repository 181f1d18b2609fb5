"""Find the tokens that a model can recall: those that complete a bigram which occurred before.

A bigram is a pair of adjacent tokens. Arora et al. 2023 ("Zoology", arXiv 2312.04927, section 3)
call token t an associative-recall hit if the bigram of tokens t - 1 and t occurred earlier in the
context and is rare in the training data, where it occurs at most 1,250 times. A frequent bigram
needs no recall, because a model knows it by heart. The perplexity on the hits is the bigram-recall
perplexity of Parnichkun et al. 2025 (arXiv 2504.19561).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gramian.tasks import Document, Encoder, documents_in

__all__ = [
    "RARE",
    "BigramCounts",
    "count_bigrams",
    "earlier_bigrams",
    "largest_count",
    "repeated_bigrams",
]

RARE = 1250
"""The largest number of occurrences in the training data of a bigram that the paper counts."""

_HELD = 2**22  # bigrams that are held before equal ones are merged


@dataclass(frozen=True, eq=False)
class BigramCounts:
    """How often each bigram occurs in the data that a model was trained on.

    Attributes:
        codes: (bigrams,) int64, ascending; the first token's id times 2³² plus the second's.
        counts: (bigrams,) int64, how often each of them occurs.
        tokens: number of tokens that were read.
    """

    codes: np.ndarray = field(repr=False)
    counts: np.ndarray = field(repr=False)
    tokens: int

    def of(self, ids: np.ndarray) -> np.ndarray:
        """Return how often the bigrams of a sequence occur.

        Args:
            ids: (tokens,) token ids.

        Returns:
            (tokens,) int64. Entry t is the count of tokens t - 1 and t; entry 0 is 0.
        """
        found = np.zeros(len(ids), dtype=np.int64)
        wanted = _codes(ids)
        at = np.searchsorted(self.codes, wanted)
        known = np.flatnonzero(at < len(self.codes))
        known = known[self.codes[at[known]] == wanted[known]]
        found[known + 1] = self.counts[at[known]]
        return found


def count_bigrams(
    text: str | Iterable[Document] | Iterable[Tensor], tokenizer: Any = None
) -> BigramCounts:
    """Count the bigrams of a text, such as that on which a model was trained.

    No bigram spans two documents.

    Args:
        text: a text or documents, as for `perplexity`. Or token ids (tokens,) of each document.
        tokenizer: the model's tokenizer. Token ids need none.

    Raises:
        ValueError: if the text needs a tokenizer, if token ids are not one-dimensional or negative,
            or if no document has two tokens.
    """
    held: list[np.ndarray] = []
    codes = counts = np.empty(0, dtype=np.int64)
    tokens = size = 0
    for ids in _token_ids(text, tokenizer):
        held.append(_codes(ids))
        tokens, size = tokens + len(ids), size + len(held[-1])
        if size >= _HELD:
            codes, counts = _merged(codes, counts, held)
            held, size = [], 0
    codes, counts = _merged(codes, counts, held)
    if not len(codes):
        raise ValueError(f"no document has two tokens to count; there are {tokens} tokens in all.")
    return BigramCounts(codes, counts, tokens)


def repeated_bigrams(
    ids: Tensor,
    mask: Tensor | None = None,
    *,
    training_bigrams: BigramCounts | None = None,
    rare: int | None = None,
) -> Tensor:
    """Return which tokens complete a bigram that occurred earlier in the same row.

    These are the associative-recall hits of Arora et al. 2023 (arXiv 2312.04927), for batches that
    a loop of your own evaluates: `losses[repeated_bigrams(ids, mask)[:, 1:]].mean().exp()` is the
    bigram-recall perplexity if `losses` (batch, length - 1) are those of tokens 1 and later.

    Args:
        ids: (batch, length) or (length,), token ids.
        mask: of the same shape; where it is 0 there is padding, which is skipped: tokens on both
            sides of it are adjacent. None means no padding.
        training_bigrams: the bigrams of the model's training data, from `count_bigrams`. Without
            them, frequent bigrams are included.
        rare: largest number of occurrences there; by default the paper's, 1,250.

    Returns:
        bool, of the shape and on the device of `ids`. The first token of a row is never included.

    Raises:
        ValueError: if `ids` are not integers of one or two dimensions, if the mask has another
            shape, or if `rare` is negative or stands without `training_bigrams`.
    """
    if ids.dim() not in (1, 2) or ids.is_floating_point() or ids.is_complex():
        raise ValueError(
            "ids must be integers of shape (batch, length) or (length,); got "
            f"{str(ids.dtype).removeprefix('torch.')} of shape {tuple(ids.shape)}."
        )
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(
            f"the mask must have the shape of ids, {tuple(ids.shape)}; got {tuple(mask.shape)}."
        )
    rare = largest_count(training_bigrams, rare)
    rows = np.atleast_2d(ids.detach().cpu().numpy())
    real = np.ones(rows.shape, bool) if mask is None else np.atleast_2d((mask != 0).cpu().numpy())
    hits = np.zeros(rows.shape, bool)
    for row, places, found in zip(rows, real, hits, strict=True):
        found[places] = earlier_bigrams(row[places], training_bigrams, rare) >= 0
    return torch.from_numpy(hits).view(ids.shape).to(ids.device)


def largest_count(training_bigrams: BigramCounts | None, rare: int | None) -> int | None:
    """Return the largest count of a rare bigram, or None if the training data are not known."""
    if training_bigrams is None:
        if rare is not None:
            raise ValueError(f"rare bounds counts of training_bigrams; got {rare} without them.")
        return None
    rare = RARE if rare is None else rare
    if rare < 0:
        raise ValueError(f"rare must be a number of occurrences, at least 0; got {rare}.")
    return rare


def earlier_bigrams(
    ids: np.ndarray, training_bigrams: BigramCounts | None = None, rare: int | None = None
) -> np.ndarray:
    """Return where each token and the one before it last occurred as a bigram.

    Args:
        ids: (tokens,) token ids.
        training_bigrams: the bigrams of the training data, or None to count all bigrams.
        rare: the largest number of occurrences there of a bigram that counts.

    Returns:
        (tokens,) int64. Entry t is the largest s < t with `ids[s - 1 : s + 1] == ids[t - 1 : t +
        1]`, or -1 if there is none or if the bigram is frequent in the training data.
    """
    earlier = np.full(len(ids), -1, dtype=np.int64)
    codes = _codes(ids)
    order = np.argsort(codes, kind="stable")
    again = codes[order[1:]] == codes[order[:-1]]
    earlier[order[1:][again] + 1] = order[:-1][again] + 1
    if training_bigrams is not None and rare is not None:
        earlier[training_bigrams.of(ids) > rare] = -1
    return earlier


def _codes(ids: np.ndarray) -> np.ndarray:
    """Return the codes (tokens - 1,) of the bigrams of a sequence."""
    ids = ids.astype(np.int64)
    return (ids[:-1] << 32) + ids[1:]


def _token_ids(
    text: str | Iterable[Document] | Iterable[Tensor], tokenizer: Any
) -> Iterator[np.ndarray]:
    """Yield the token ids of each document."""
    encode = None if tokenizer is None else Encoder(tokenizer)
    for one in documents_in(text) if isinstance(text, str) else text:
        if isinstance(one, Tensor):
            if one.dim() != 1 or one.is_floating_point() or bool((one < 0).any()):
                raise ValueError(
                    "token ids of a document must be non-negative integers of shape (tokens,); got "
                    f"{str(one.dtype).removeprefix('torch.')} of shape {tuple(one.shape)}."
                )
            yield one.cpu().numpy()
        elif encode is None:
            raise ValueError("a text needs a tokenizer to be counted; give tokenizer or token ids.")
        else:
            yield np.asarray(encode(one))


def _merged(
    codes: np.ndarray, counts: np.ndarray, held: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return codes and counts with those of the held bigrams added."""
    new = np.concatenate([np.empty(0, dtype=np.int64), *held])
    every, place = np.unique(np.concatenate([codes, new]), return_inverse=True)
    weights = np.concatenate([counts, np.ones(len(new), dtype=np.int64)])
    total = np.zeros(len(every), dtype=np.int64)
    np.add.at(total, place, weights)
    return every, total
