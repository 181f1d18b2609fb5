"""Define ListOps of the Long Range Arena (Tay et al., arXiv 2011.04006): nested lists of digits.

The task is to evaluate an expression such as `[MAX 4 [MIN 2 3 ] 1 [SM 5 6 ] ]`. Its value is a
digit. Every opening bracket with its operator, every digit and every closing bracket is a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import numpy as np

from gramian.tasks._task import Description, GeneratedTask, Row, register, require_sizes

__all__ = ["ListOps", "evaluate"]

PAD, UNKNOWN, END, DIGIT, OPERATORS, CLOSE = 0, 1, 2, 3, 13, 17
MIN, MAX, MEDIAN, SUM_MOD = range(OPERATORS, CLOSE)
VOCABULARY = 18
NESTED = 0.25  # probability that an argument is a list


@register("lra/listops")
@dataclass(frozen=True, kw_only=True)
class ListOps(GeneratedTask):
    """Distinct expressions, generated as in the Long Range Arena and labelled with their values.

    The token ids are 0 for padding, 1 for unknown tokens (never used), 2 for the end, 3 … 12 for
    the digits, 13 … 16 for `[MIN`, `[MAX`, `[MED` and `[SM`, and 17 for `]`. The loaders of S4 and
    RTF use the same vocabulary and the same end token.

    Args:
        max_depth: largest depth of nesting.
        max_arguments: largest number of arguments of a list. The smallest number is 2.
        min_length: exclusive lower bound of the number of tokens, without the end token, as
            published.
        max_length: exclusive upper bound of the same number, as published.
    """

    train_examples: int = 96_000
    eval_examples: int = 2_000
    max_depth: int = 10
    max_arguments: int = 10
    min_length: int = 500
    max_length: int = 2_000

    published = {"lra": {}}  # noqa: RUF012

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, "max_depth", least=2)
        require_sizes(self, "max_arguments", least=2)
        require_sizes(self, "min_length", least=1)
        if self.max_length < max(6, self.min_length + 2):
            raise ValueError(
                f"max_length must be at least 6 and min_length + 2; got {self.max_length} with "
                f"min_length {self.min_length}."
            )
        widest = self.max_arguments if self.max_depth == 2 else 10**9
        if self.min_length >= widest + 2:
            raise ValueError(
                f"no list of {self.max_arguments} digits is longer than min_length "
                f"{self.min_length}."
            )

    def description(self) -> Description:
        return Description(
            "classification",
            self.max_length,
            vocab_size=VOCABULARY,
            num_labels=10,
            pad_token_id=PAD,
        )

    def rows(self, split: str, seed: int) -> Iterator[Row]:
        """Yield the rows of a split. No expression occurs twice."""
        random = self.random(split, seed)
        others: set[bytes] = set()
        for _ in range(self.train_examples if split == "train" else self.eval_examples):
            while True:
                row = self.row(random, split)
                key = row["input_ids"].astype(np.uint8).tobytes()
                if key not in others:
                    break
            others.add(key)
            yield row

    def row(self, random: np.random.Generator, split: str) -> Row:
        while True:
            tokens: list[int] = []
            if self._expression(random, tokens, 1) and len(tokens) > self.min_length:
                break
        return {"input_ids": np.array([*tokens, END]), "labels": evaluate(tokens)}

    def _expression(self, random: np.random.Generator, tokens: list[int], depth: int) -> bool:
        """Append a list at nesting level `depth` to `tokens`.

        A single digit is too short for any `min_length`, so the whole expression is always a list.

        Returns:
            Whether the expression is shorter than `max_length`.
        """
        arguments = int(random.integers(2, self.max_arguments + 1))
        tokens.append(int(random.integers(OPERATORS, CLOSE)))
        nested = random.random(arguments) <= NESTED if depth + 1 < self.max_depth else None
        digits = random.integers(10, size=arguments)
        for index in range(arguments):
            if nested is not None and nested[index]:
                if not self._expression(random, tokens, depth + 1):
                    return False
            else:
                tokens.append(DIGIT + int(digits[index]))
        tokens.append(CLOSE)
        return len(tokens) < self.max_length


def evaluate(tokens: list[int]) -> int:
    """Return the value of an expression. The median of an even number of digits is rounded down."""
    stack: list[list[int]] = [[]]
    for token in tokens:
        if DIGIT <= token < DIGIT + 10:
            stack[-1].append(token - DIGIT)
        elif OPERATORS <= token < CLOSE:
            stack.append([token])
        elif token == CLOSE:
            operator, *values = stack.pop()
            stack[-1].append(_apply(operator, values))
    ((value,),) = stack
    return value


def _apply(operator: int, values: list[int]) -> int:
    if operator == MIN:
        return min(values)
    if operator == MAX:
        return max(values)
    if operator == MEDIAN:
        return int(median(values))
    return sum(values) % 10
