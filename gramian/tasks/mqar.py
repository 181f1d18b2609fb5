"""Define multi-query associative recall (Zoology: Arora, Eyuboglu et al., arXiv 2312.04927).

A sequence begins with pairs of keys and values. Later, every key occurs once more. The label at
this second occurrence, the query, is the key's value. The gap between a pair and its query follows
a power law, like the gaps between repeated bigrams in text. Keys are from the lower half of the
vocabulary, without 0, and values from the upper half. All other positions hold random tokens or
zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gramian._labels import IGNORED
from gramian.tasks._task import Description, GeneratedTask, Row, register, require_sizes

__all__ = ["MQAR"]


def _paper(length: int, pairs: int) -> dict[str, int | bool]:
    # The paper's figure fills the gaps with zeros (mqar_dmodel.py in its code).
    return {"length": length, "pairs": pairs, "random_non_queries": False}


@register("mqar")
@dataclass(frozen=True, kw_only=True)
class MQAR(GeneratedTask):
    """Multi-query associative recall, as `zoology/data/multiquery_ar.py` generates it.

    Args:
        vocab_size: number of token ids. The keys are 1 … vocab_size // 2 - 1, and the values are
            vocab_size // 2 … vocab_size - 1.
        length: number of tokens in a sequence, even and below `vocab_size`.
        pairs: number of pairs. Their keys are different.
        passes: number of times that all pairs are shown before the queries.
        power: exponent a of the density `a x^(a-1)` of gaps, above 0. With a = 1, gaps are uniform.
        random_non_queries: whether free positions hold random tokens of the whole vocabulary. If
            not, they hold zeros.

    Raises:
        ValueError: if `length` is odd, not below `vocab_size`, or too short for the pairs and
            queries; or if another setting is out of range.
    """

    train_examples: int = 100_000
    eval_examples: int = 3_000
    vocab_size: int = 8_192
    length: int = 64
    pairs: int = 4
    passes: int = 1
    power: float = 0.01
    random_non_queries: bool = True

    published = {  # noqa: RUF012
        "64x4": _paper(64, 4),
        "128x8": _paper(128, 8),
        "256x16": _paper(256, 16),
        "512x64": _paper(512, 64),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, "vocab_size", "length", "pairs", "passes")
        if self.length % 2:
            raise ValueError(f"length must be even; got {self.length}.")
        if self.vocab_size <= self.length:
            raise ValueError(
                f"vocab_size must be above length; got {self.vocab_size} and {self.length}."
            )
        needed = 2 * self.pairs * (self.passes + 1)
        if needed > self.length:
            raise ValueError(
                f"{self.pairs} pairs in {self.passes} passes and their queries need a length of at "
                f"least {needed}; got {self.length}."
            )
        if not self.power > 0:
            raise ValueError(f"power must be above 0; got {self.power!r}.")

    def description(self) -> Description:
        return Description("tokens", self.length, vocab_size=self.vocab_size)

    def row(self, random: np.random.Generator, split: str) -> Row:
        half = self.vocab_size // 2
        keys = 1 + random.choice(half - 1, self.pairs, replace=False)
        values = half + random.choice(self.vocab_size - half, self.pairs, replace=False)
        context = 2 * self.pairs * self.passes
        tokens = np.zeros(self.length, dtype=np.int64)
        labels = np.full(self.length, IGNORED, dtype=np.int64)
        tokens[:context] = np.tile(np.stack([keys, values], -1).ravel(), self.passes)

        # Sorting log densities with added Gumbel noise samples gaps without replacement.
        space = (self.length - context) // 2
        density = (self.power - 1) * np.log(np.arange(1, space + 1))
        gaps = np.argsort(-(density + random.gumbel(size=space)))[: self.pairs]
        places = context + 2 * gaps
        tokens[places] = keys
        labels[places] = values
        if self.random_non_queries:
            free = tokens == 0
            tokens[free] = random.integers(self.vocab_size, size=int(free.sum()))
        return {"input_ids": tokens, "labels": labels}
