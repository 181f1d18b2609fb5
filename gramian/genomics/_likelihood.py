"""Compute log-likelihoods of many sequences, in batches, and in chunks with the model's state.

The log-likelihood of a sequence is `sum_t log p(x_t | x_0 … x_(t-1))` in nats, over the tokens that
count. These are all tokens or, on request, only those of A, C, G and T. The first token has no
prediction, unless a BOS token (beginning of sequence) is put before it. If the sequences of a group
have a common beginning, it is read once. Each sequence then continues from a copy of the state at
the end of this beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gramian._modules import in_mode
from gramian.genomics._sequences import Alphabet, Letters, unknown
from gramian.models import GramianCache, GramianForCausalLM

__all__ = ["LogLikelihood", "Reader", "evaluating", "language_model"]

_LOGITS = 2**22  # number of logits in memory at once


class LogLikelihood(NamedTuple):
    """The log-likelihood of a sequence.

    Attributes:
        total: the sum, in nats, over the tokens that count.
        tokens: the number of tokens that count.
    """

    total: float
    tokens: int

    @property
    def mean(self) -> float:
        """Return the mean over the tokens that count, in nats, or NaN if no token counts."""
        return self.total / self.tokens if self.tokens else float("nan")


class _Row(NamedTuple):
    """A part of a sequence, from the token `start` to the token `stop` (excluded)."""

    letters: Letters
    start: int  # token 0 is the BOS token, if there is one
    stop: int


def language_model(model: Any) -> GramianForCausalLM:
    """Return the language model or, if it is inside an adapter of peft, the model in the adapter.

    Raises:
        TypeError: if the model is not a `GramianForCausalLM`.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not isinstance(model, GramianForCausalLM):
        raise TypeError(f"model must be a GramianForCausalLM; got {type(model).__name__}.")
    return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, disable gradients, and restore both at the end."""
    with in_mode(model, training=False), torch.no_grad():
        yield


class Reader:
    """A function that computes log-likelihoods of sequences of nucleotides.

    Args:
        model: the language model.
        alphabet: ids of the nucleotides.
        bos: whether to put the BOS token before every sequence.
        count_unknown: whether the log-likelihood includes letters other than A, C, G and T.
        chunk_size: largest number of tokens of a sequence that are read at once.

    Attributes:
        tell: called with the number of bases after they were read, or None.
    """

    def __init__(
        self,
        model: GramianForCausalLM,
        alphabet: Alphabet,
        bos: bool,
        count_unknown: bool,
        chunk_size: int,
    ) -> None:
        self.model, self.alphabet = model, alphabet
        self.begin = alphabet.begin if bos else None
        self.count_unknown, self.chunk_size = count_unknown, chunk_size
        self.tell: Callable[[int], None] | None = None

    def read(self, groups: Sequence[Sequence[Letters]]) -> list[list[LogLikelihood]]:
        """Return the log-likelihood of every sequence of every group. Groups are read together."""
        offset = 0 if self.begin is None else 1  # the sequences share the BOS token
        shared = [offset + _common_beginning(group) if len(group) > 1 else 0 for group in groups]
        rows, parted = [], []
        found: list[list[LogLikelihood]] = [[] for _ in groups]
        for index, (group, common) in enumerate(zip(groups, shared, strict=True)):
            if common:
                parted.append(index)
            else:
                rows += [(index, _Row(one, 0, offset + len(one))) for one in group]
        with evaluating(self.model):
            if rows:
                whole, _ = self._read([row for _, row in rows], None, keep=False)
                for (index, _), result in zip(rows, whole, strict=True):
                    found[index].append(result)
            if parted:
                self._read_parted(groups, parted, shared, offset, found)
        return found

    def _read_parted(
        self,
        groups: Sequence[Sequence[Letters]],
        parted: list[int],
        shared: list[int],
        offset: int,
        found: list[list[LogLikelihood]],
    ) -> None:
        """Read the common beginning of each group, and then the rest of each sequence."""
        before, cache = self._read(
            [_Row(groups[index][0], 0, shared[index]) for index in parted], None, keep=True
        )
        assert cache is not None
        source = [row for row, index in enumerate(parted) for _ in groups[index]]
        cache.batch_select_indices(torch.tensor(source))
        rest = [
            _Row(one, shared[index], offset + len(one)) for index in parted for one in groups[index]
        ]
        after, _ = self._read(rest, cache, keep=False)
        for row, part in zip(source, after, strict=True):
            both = (before[row].total + part.total, before[row].tokens + part.tokens)
            found[parted[row]].append(LogLikelihood(*both))

    def _read(
        self, rows: list[_Row], cache: GramianCache | None, *, keep: bool
    ) -> tuple[list[LogLikelihood], GramianCache | None]:
        """Read each row from its start to its stop, and return its log-likelihood.

        Args:
            rows: the rows, in the order of the cache if one is given.
            cache: the model's state before each row, or None if all rows start at token 0.
            keep: whether to return the state after the rows too. Each row must then have a token.
        """
        longest = max(row.stop - row.start for row in rows)
        totals = np.zeros(len(rows))
        counts = np.zeros(len(rows), dtype=np.int64)
        chunked = keep or cache is not None or longest > self.chunk_size
        if cache is None and chunked:
            cache = GramianCache(self.model.config)
        before = None if cache is None else cache.last_hidden_state
        for begin in range(0, longest, self.chunk_size):
            ids, mask, due = self._batch(rows, begin, min(begin + self.chunk_size, longest))
            hidden = self._hidden(ids, mask, cache)
            if before is None:
                predicting, targets, due = hidden[:, :-1], ids[:, 1:], due[:, 1:]
            else:
                predicting, targets = torch.cat([before[:, None], hidden[:, :-1]], dim=1), ids
            place, values = self._values(predicting, targets, due)
            np.add.at(totals, place, values)
            counts += due.sum(1)
            if self.tell is not None:
                extra = sum(row.start + begin == 0 for row in rows) if self.begin is not None else 0
                self.tell(int(mask.sum()) - extra)
            before = None if cache is None else cache.last_hidden_state
        if not np.isfinite(totals).all():
            raise ValueError(
                "the model's log-likelihoods are not finite; its weights or its activations hold "
                "NaN or infinity."
            )
        results = [LogLikelihood(float(t), int(n)) for t, n in zip(totals, counts, strict=True)]
        return results, cache if keep else None

    def _batch(
        self, rows: list[_Row], begin: int, end: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return token ids, a mask of real tokens, and a mask of the tokens that count.

        All three are (rows, end - begin).
        """
        shape = (len(rows), end - begin)
        ids = np.zeros(shape, dtype=np.int64)
        mask, due = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
        offset = 0 if self.begin is None else 1
        for index, row in enumerate(rows):
            start, stop = row.start + begin, min(row.start + end, row.stop)
            if stop <= start:
                continue
            count = stop - start
            mask[index, :count] = True
            if self.begin is not None and start == 0:
                ids[index, 0] = self.begin
                first = 1
            else:
                first = 0
            codes = row.letters.read(start + first - offset, stop - offset)
            ids[index, first:count] = self.alphabet.ids(codes)
            due[index, first:count] = True if self.count_unknown else ~unknown(codes)
        return ids, mask, due

    def _hidden(self, ids: np.ndarray, mask: np.ndarray, cache: GramianCache | None) -> Tensor:
        device = next(self.model.parameters()).device
        outputs = self.model.base_model(
            input_ids=torch.from_numpy(ids).to(device),
            attention_mask=None if mask.all() else torch.from_numpy(mask).long().to(device),
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return outputs.last_hidden_state

    def _values(
        self, hidden: Tensor, targets: np.ndarray, due: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the row and the log-likelihood of every token that counts, both (tokens,)."""
        place, column = np.nonzero(due)
        device = hidden.device
        rows, columns = torch.from_numpy(place).to(device), torch.from_numpy(column).to(device)
        wanted = torch.from_numpy(targets[place, column]).to(device)
        project: Any = self.model.get_output_embeddings()
        size = max(1, _LOGITS // self.model.config.vocab_size)
        values = []
        for first in range(0, len(place), size):
            part = slice(first, first + size)
            logits = project(hidden[rows[part], columns[part]])
            logits = logits if logits.dtype == torch.float64 else logits.float()
            losses = nn.functional.cross_entropy(logits, wanted[part], reduction="none")
            values.append(-losses.cpu().double().numpy())
        return place, np.concatenate([np.zeros(0), *values])


def _common_beginning(group: Sequence[Letters]) -> int:
    """Return the number of codes with which all sequences of a group begin."""
    shortest = min(map(len, group))
    texts = [np.frombuffer(one.read(0, shortest), dtype=np.uint8) for one in group]
    equal = np.all([text == texts[0] for text in texts], axis=0)
    return shortest if equal.all() else int(np.argmin(equal))
