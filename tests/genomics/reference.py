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
            ids = [self.tokenizer.convert_tokens_to_ids(letter) for letter in sequence]
            before = [self.tokenizer.bos_token_id] if bos else []
            with torch.no_grad():
                logits = self.model(torch.tensor([before + ids]), use_cache=False).logits[0]
            found: list[float | None] = [] if bos else [None]
            for place in range(1, len(before + ids)):
                row = logits[place - 1]
                found.append(float(row[(before + ids)[place]] - torch.logsumexp(row, 0)))
            self._known[key] = found
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
