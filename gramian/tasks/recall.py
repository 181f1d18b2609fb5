"""Define induction heads and associative recall (H3: Dao, Fu et al., arXiv 2212.14052; Hyena).

In associative recall, a sequence ends in a mark and a key, and the answer is the value that
followed this key before. In induction heads, a sequence ends in a mark, and the answer consists of
the tokens that followed an earlier mark. The vocabulary has two special tokens: 0, which is "." in
the published code, and vocab_size - 1, the mark, which is "=>" in the published code. Training
scores every next token, and evaluation scores only the answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gramian._labels import IGNORED
from gramian.tasks._task import Description, GeneratedTask, Row, register, require_sizes

__all__ = ["AssociativeRecall", "InductionHeads"]

TRIES = 1000


@dataclass(frozen=True, kw_only=True)
class _RecallTask(GeneratedTask):
    train_examples: int = 5_000
    eval_examples: int = 500
    vocab_size: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, "vocab_size", least=4)

    def rows(self, split: str, seed: int) -> Iterator[Row]:
        """Yield the rows of a split. As published, all of them are different."""
        random = self.random(split, seed)
        seen: set[bytes] = set()
        for _ in range(self.train_examples if split == "train" else self.eval_examples):
            for _ in range(TRIES):
                row = self.row(random, split)
                key = row["input_ids"].tobytes() + row["labels"].tobytes()
                if key not in seen:
                    break
            else:
                raise ValueError(
                    f"there are hardly more than {len(seen)} different sequences with these "
                    f"settings; ask for fewer than {self.train_examples} and {self.eval_examples}."
                )
            seen.add(key)
            yield row

    def _shifted(self, sequence: np.ndarray, answers: int, split: str) -> Row:
        labels = sequence[1:].copy()
        if split != "train":
            labels[:-answers] = IGNORED
        return {"input_ids": sequence[:-1], "labels": labels}


@register("associative_recall")
@dataclass(frozen=True, kw_only=True)
class AssociativeRecall(_RecallTask):
    """Pairs of keys and values, the mark, and one of the keys again. The answer is its value.

    The dictionary of keys and values is drawn anew for each sequence. Keys consist of tokens of the
    lower half of the ordinary tokens, and values are tokens of the upper half.

    Args:
        vocab_size: number of token ids, including the two special tokens.
        input_length: number of tokens before the mark, rounded down to whole pairs.
        keys: number of tokens in a key.
    """

    input_length: int = 40
    keys: int = 1

    published = {  # noqa: RUF012
        "h3": {"vocab_size": 20, "input_length": 40},
        "vocabulary-10": {"vocab_size": 10, "input_length": 20},
        "hyena-131k": {"vocab_size": 30, "input_length": 131_072, "train_examples": 4_000},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, "input_length", "keys")
        if self.input_length < self.keys + 1:
            raise ValueError(
                f"input_length must hold a pair of {self.keys + 1} tokens; got {self.input_length}."
            )

    def description(self) -> Description:
        pair = self.keys + 1
        length = self.input_length // pair * pair + pair
        return Description("tokens", length, vocab_size=self.vocab_size)

    def row(self, random: np.random.Generator, split: str) -> Row:
        ordinary = self.vocab_size - 2
        half = ordinary // 2
        pairs = self.input_length // (self.keys + 1)
        keys = random.integers(1, 1 + half, size=(pairs, self.keys))
        code = keys @ half ** np.arange(self.keys)  # encodes each key as a number
        _, first, inverse = np.unique(code, return_index=True, return_inverse=True)
        values = random.integers(1 + half, 1 + ordinary, size=len(first))[inverse]
        asked = random.choice(first)  # uniform over the different keys of the sequence
        tail = [self.vocab_size - 1, *keys[asked], values[asked]]
        shown = np.concatenate([keys, values[:, None]], axis=1).ravel()
        return self._shifted(np.concatenate([shown, tail]), 1, split)


@register("induction_heads")
@dataclass(frozen=True, kw_only=True)
class InductionHeads(_RecallTask):
    """Random tokens with a mark among them and another mark at the end.

    The answer after the last mark consists of the tokens that followed the first mark.

    Args:
        vocab_size: number of token ids, including the two special tokens.
        input_length: number of tokens before the last mark.
        answer_length: number of tokens in the answer.
        triggers: largest number of marks before the last mark. As published, half of the sequences
            have only one mark there.
    """

    input_length: int = 30
    answer_length: int = 1
    triggers: int = 1

    published = {"h3": {"vocab_size": 20, "input_length": 30}}  # noqa: RUF012

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, "input_length", "answer_length", "triggers")
        if self.input_length < self.answer_length + 2:
            raise ValueError(
                f"input_length must be at least answer_length + 2, here {self.answer_length + 2}; "
                f"got {self.input_length}."
            )

    def description(self) -> Description:
        length = self.input_length + self.answer_length
        return Description("tokens", length, vocab_size=self.vocab_size)

    def row(self, random: np.random.Generator, split: str) -> Row:
        mark, answers = self.vocab_size - 1, self.answer_length
        tokens = random.integers(1, mark, size=self.input_length)
        triggers = 1 if random.random() < 0.5 else self.triggers
        drawn = np.sort(random.integers(self.input_length - 1 - answers, size=triggers))
        places: list[int] = []
        for place in drawn.tolist():
            if not places or place - places[-1] > answers:
                places.append(place)
        copied = tokens[places[0] + 1 : places[0] + 1 + answers].copy()
        for place in places:
            tokens[place] = mark
            tokens[place + 1 : place + 1 + answers] = copied
        return self._shifted(np.concatenate([tokens, [mark], copied]), answers, split)
