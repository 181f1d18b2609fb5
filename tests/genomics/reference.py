"""What a score must be: every token's log-probability, one by one, from an uncached forward."""

from __future__ import annotations

import copy
from typing import Any

import torch

COMPLEMENTS = dict(zip("ACGTN", "TGCAN", strict=True))


def other_strand(sequence: str) -> str:
    return "".join(COMPLEMENTS[letter] for letter in reversed(sequence))


class Reference:
    """A model in float64 that reads each sequence whole, alone, without a cache."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = copy.deepcopy(model).double().eval(), tokenizer
        self._known: dict[Any, list[float | None]] = {}

    def tokens(self, sequence: str, bos: bool = False) -> list[float | None]:
        """The log-probability of every letter; None for a first one without a prediction."""
        key = (sequence, bos)
        if key not in self._known:
            before = [self.tokenizer.bos_token_id] if bos else []
            letters = [self.tokenizer.convert_tokens_to_ids(letter) for letter in sequence]
            ids = torch.tensor(before + letters)
            with torch.no_grad():
                logits = self.model(ids[None], use_cache=False).logits[0]
            rows = logits[:-1] - torch.logsumexp(logits[:-1], 1, keepdim=True)
            values = rows.gather(1, ids[1:, None])[:, 0].tolist()
            self._known[key] = values if bos else [None, *values]
        return self._known[key]

    def score(
        self, sequence: str, bos: bool = False, count_unknown: bool = True
    ) -> tuple[float, int]:
        """The total over the letters that count, and their number."""
        if not sequence:
            return 0.0, 0
        kept = [
            value
            for letter, value in zip(sequence, self.tokens(sequence, bos), strict=True)
            if value is not None and (count_unknown or letter in "ACGT")
        ]
        return sum(kept), len(kept)
