"""Define the tasks of the MAD suite (mechanistic architecture design).

The suite was published by Poli et al. (arXiv 2403.17844; athms/mad-lab). The default settings are
the suite's baselines, and the suite's variations change a few settings. As published, training on
the recall tasks scores every next token, and evaluation scores the values of keys that occurred
before. Memorization and selective copying score only the answers, in training and in evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gramian._checks import check_probability
from gramian._labels import IGNORED
from gramian.tasks._task import Description, GeneratedTask, Row, register, require_sizes

__all__ = [
    "Compression",
    "FuzzyRecall",
    "InContextRecall",
    "Memorization",
    "NoisyRecall",
    "SelectiveCopying",
]


@dataclass(frozen=True, kw_only=True)
class _MADTask(GeneratedTask):
    train_examples: int = 12_800
    eval_examples: int = 1_280
    vocab_size: int = 16
    length: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, "vocab_size", "length", least=4)


@dataclass(frozen=True, kw_only=True)
class _NoisyTask(_MADTask):
    noise_vocab_size: int = 0
    noise: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, "noise_vocab_size", least=0)
        check_probability("noise", self.noise)
        if self.noise > 0 and self.noise_vocab_size < 1:
            raise ValueError("noise needs a noise_vocab_size of at least 1; got 0.")
        if self._ordinary < 2:
            raise ValueError(
                f"a vocab_size of {self.vocab_size} with {self.noise_vocab_size} for noise leaves "
                "fewer than two ordinary tokens."
            )

    @property
    def _special(self) -> int:
        """Return the number of special tokens.

        The vocabulary has ordinary tokens first, then noise tokens, then special tokens.
        """
        return 0

    @property
    def _ordinary(self) -> int:
        return self.vocab_size - self._special - self.noise_vocab_size

    def _noise_tokens(self, random: np.random.Generator, count: int) -> np.ndarray:
        return self._ordinary + random.integers(self.noise_vocab_size, size=count)


@register("mad/in-context-recall")
@dataclass(frozen=True, kw_only=True)
class InContextRecall(_NoisyTask):
    """Pairs of keys and values. When a key occurs again, the model must predict its value.

    The dictionary of keys and values is drawn anew for each sequence.

    Args:
        vocab_size: number of token ids. The last ids are `noise_vocab_size` noise tokens and,
            unless `multi_query` is on, the copy mark. The lower half of the other ids are keys, and
            the upper half are values.
        length: number of tokens in all pairs, even. The last value is not an input. So a sequence
            has `length` - 1 tokens, or `length` tokens with the copy mark.
        multi_query: whether to score the value of every repeated key. If not, only the value of the
            last key, which comes after the copy mark, is scored.
        noise: share of pairs that are replaced by noise tokens, at least 0 and below 1.
        noise_vocab_size: number of noise tokens.
    """

    multi_query: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length % 2:
            raise ValueError(f"length must be even; got {self.length}.")

    @property
    def _special(self) -> int:
        return 0 if self.multi_query else 1

    def description(self) -> Description:
        return Description("tokens", self.length - 1 + self._special, vocab_size=self.vocab_size)

    def row(self, random: np.random.Generator, split: str) -> Row:
        half, pairs = self._ordinary // 2, self.length // 2
        values_of = random.integers(half, self._ordinary, size=half)  # this sequence's dictionary
        keys = random.integers(half, size=pairs - 1)
        noisy = random.random(pairs - 1) < self.noise
        kept = int(random.integers(pairs))  # one place without noise, so that a pair remains
        if kept < pairs - 1:
            noisy[kept] = False
        elif noisy.all():
            noisy[0] = False
        known = np.flatnonzero(~noisy)
        shown, first = np.unique(keys[known], return_index=True)
        repeated = np.zeros(pairs - 1, dtype=bool)
        repeated[known] = True
        repeated[known[first]] = False

        body = np.stack([keys, values_of[keys]], axis=1)  # (pairs - 1, 2)
        body[noisy] = self._noise_tokens(random, 2 * int(noisy.sum())).reshape(-1, 2)
        due = np.full_like(body, IGNORED)
        if self.multi_query:
            due[repeated, 1] = body[repeated, 1]
        asked = random.choice(shown)
        mark = [] if self.multi_query else [self.vocab_size - 1]
        tokens = np.concatenate([body.ravel(), mark, [asked, values_of[asked]]]).astype(np.int64)
        answers = np.concatenate(
            [due.ravel(), [IGNORED] * (len(mark) + 1), [values_of[asked]]]
        ).astype(np.int64)
        return {
            "input_ids": tokens[:-1],
            "labels": (tokens if split == "train" else answers)[1:],
        }


@register("mad/noisy-in-context-recall")
@dataclass(frozen=True, kw_only=True)
class NoisyRecall(InContextRecall):
    """In-context recall with noise by default. It has the same settings as `InContextRecall`."""

    vocab_size: int = 32
    noise_vocab_size: int = 16
    noise: float = 0.2


@register("mad/fuzzy-in-context-recall")
@dataclass(frozen=True, kw_only=True)
class FuzzyRecall(_NoisyTask):
    """In-context recall whose keys and values consist of several tokens each.

    In training, the numbers of tokens in keys and values are random, up to the largest numbers. In
    evaluation, only the number of tokens in a value is random, and keys have the largest number.
    Sequences are padded on the left. The key at the end of a sequence always occurs, with its
    value, earlier in the sequence. The published generator draws a random place for this pair, and
    omits the pair if the place is past the end of the pairs.

    Args:
        vocab_size: number of token ids. The last ids are `noise_vocab_size` noise tokens, the
            padding token and, unless `multi_query` is on, the copy mark. The lower half of the
            other ids are parts of keys, and the upper half are parts of values.
        length: number of tokens in a sequence, including padding.
        key_size: largest number of tokens in a key. The tokens of a key are all different.
        value_size: largest number of tokens in a value. The tokens of a value are all different.
        multi_query: whether to score the value of every repeated key. If not, only the value of the
            last key, which comes after the copy mark, is scored.
        noise: share of pairs that are replaced by noise tokens, at least 0 and below 1.
        noise_vocab_size: number of noise tokens.
    """

    key_size: int = 3
    value_size: int = 3
    multi_query: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, "key_size", "value_size")
        half = self._ordinary // 2
        if self.key_size > half or self.value_size > self._ordinary - half:
            raise ValueError(
                f"keys of {self.key_size} and values of {self.value_size} different tokens need "
                f"more than the {half} and {self._ordinary - half} tokens that there are for them."
            )
        if self.length < 3 * (self.key_size + self.value_size) + 2:
            raise ValueError(
                f"length must hold three pairs of the largest size and two more tokens, here "
                f"{3 * (self.key_size + self.value_size) + 2}; got {self.length}."
            )

    @property
    def _special(self) -> int:
        return 1 if self.multi_query else 2

    def description(self) -> Description:
        return Description("tokens", self.length, vocab_size=self.vocab_size)

    def row(self, random: np.random.Generator, split: str) -> Row:
        half, largest = self._ordinary // 2, self.key_size + self.value_size
        padding = self.vocab_size - self._special

        def draw_key() -> tuple[int, ...]:
            size = random.integers(1, self.key_size + 1) if split == "train" else self.key_size
            return tuple(random.choice(half, size, replace=False).tolist())

        def draw_value() -> tuple[int, ...]:
            size = random.integers(1, self.value_size + 1)
            drawn = half + random.choice(self._ordinary - half, size, replace=False)
            return tuple(drawn.tolist())

        asked, answer = draw_key(), draw_value()
        asked_size = len(asked) + len(answer)
        end = self.length - asked_size - largest  # no pair begins here or later
        place = int(random.integers(end - asked_size))
        values = {asked: answer}
        shown: set[tuple[int, ...]] = set()
        tokens: list[int] = []
        due: list[int] = []
        while len(tokens) < end:
            if asked not in shown and len(tokens) + largest > place:
                key = asked
            else:
                if random.random() < self.noise:
                    size = len(draw_key()) + len(draw_value())
                    tokens.extend(self._noise_tokens(random, size).tolist())
                    due.extend([IGNORED] * size)
                    continue
                key = draw_key()
            if key not in values:
                values[key] = draw_value()
            known = key in shown and self.multi_query
            tokens.extend(key + values[key])
            due.extend([IGNORED] * len(key))
            due.extend(values[key] if known else [IGNORED] * len(values[key]))
            shown.add(key)
        mark = [] if self.multi_query else [self.vocab_size - 1]
        tokens.extend([*mark, *asked, *answer])
        due.extend([IGNORED] * (len(mark) + len(asked)) + list(answer))
        missing = self.length + 1 - len(tokens)
        sequence = np.array([padding] * missing + tokens)
        answers = np.array([IGNORED] * missing + due)
        return {
            "input_ids": sequence[:-1],
            "labels": (sequence if split == "train" else answers)[1:],
        }


@register("mad/memorization")
@dataclass(frozen=True, kw_only=True)
class Memorization(_NoisyTask):
    """Keys of a fixed dictionary. A mark follows each key, and its label is the key's value.

    Args:
        vocab_size: number of token ids. The last ids are `noise_vocab_size` noise tokens and the
            mark. The lower half of the other ids are keys, and the upper half are values.
        length: number of tokens in a sequence, even.
        dictionary_seed: seed of the dictionary. All splits and all seeds of rows share the
            dictionary.
        noise: share of keys that, with their marks, are replaced by noise tokens; at least 0 and
            below 1.
        noise_vocab_size: number of noise tokens.
    """

    train_examples: int = 256
    vocab_size: int = 256
    length: int = 32
    dictionary_seed: int = 12345

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, "dictionary_seed", least=0)
        if self.length % 2:
            raise ValueError(f"length must be even; got {self.length}.")

    @property
    def _special(self) -> int:
        return 1

    def description(self) -> Description:
        return Description("tokens", self.length, vocab_size=self.vocab_size)

    def dictionary(self) -> Mapping[int, int]:
        """Return a mapping from every key to its value. All values are different."""
        half = self._ordinary // 2
        random = np.random.default_rng(self.dictionary_seed)
        values = half + random.permutation(self._ordinary - half)[:half]
        return dict(enumerate(values.tolist()))

    def row(self, random: np.random.Generator, split: str) -> Row:
        values_of = np.array(list(self.dictionary().values()))
        pairs = self.length // 2
        keys = random.integers(len(values_of), size=pairs)
        noisy = random.random(pairs) < self.noise
        noisy[random.integers(pairs)] = False
        tokens = np.stack([keys, np.full(pairs, self.vocab_size - 1)], axis=1)
        due = np.stack([np.full(pairs, IGNORED), values_of[keys]], axis=1)
        tokens[noisy] = self._noise_tokens(random, 2 * int(noisy.sum())).reshape(-1, 2)
        due[noisy] = IGNORED
        return {"input_ids": tokens.ravel(), "labels": due.ravel()}


@register("mad/compression")
@dataclass(frozen=True, kw_only=True)
class Compression(_NoisyTask):
    """Random tokens and a final mark. The whole input must be decoded from the mark's position.

    Noise tokens must be decoded too, as published.

    Args:
        vocab_size: number of token ids. The ordinary tokens come first, then `noise_vocab_size`
            noise tokens, then the mark.
        length: number of tokens in a sequence, including the mark.
        noise: share of tokens that are replaced by noise tokens, at least 0 and below 1.
        noise_vocab_size: number of noise tokens.
    """

    length: int = 32

    @property
    def _special(self) -> int:
        return 1

    def description(self) -> Description:
        return Description("reconstruction", self.length, vocab_size=self.vocab_size)

    def row(self, random: np.random.Generator, split: str) -> Row:
        tokens = random.integers(self._ordinary, size=self.length)
        noisy = random.random(self.length) < self.noise
        tokens[noisy] = self._noise_tokens(random, int(noisy.sum()))
        tokens[-1] = self.vocab_size - 1
        return {"input_ids": tokens, "labels": tokens.copy()}


@register("mad/selective-copying")
@dataclass(frozen=True, kw_only=True)
class SelectiveCopying(_MADTask):
    """Tokens scattered among blanks, then a mark, then one blank for each of these tokens.

    The labels of the blanks after the mark are the tokens, in order.

    Args:
        vocab_size: number of token ids. The last two are the blank and the mark, in this order, and
            the others are the tokens that can be copied.
        length: number of tokens in a sequence, including blanks and the mark.
        tokens: number of tokens to copy.
    """

    length: int = 256
    tokens: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, "tokens")
        if self.length <= 2 * self.tokens + 1:
            raise ValueError(
                f"length must be above 2 × tokens + 1, here {2 * self.tokens + 1}; got "
                f"{self.length}."
            )

    def description(self) -> Description:
        return Description("tokens", self.length, vocab_size=self.vocab_size)

    def row(self, random: np.random.Generator, split: str) -> Row:
        blank, mark = self.vocab_size - 2, self.vocab_size - 1
        blanks = self.length - 2 * self.tokens - 1
        copied = random.integers(blank, size=self.tokens)
        # Blanks are inserted before a token, never after the last token.
        before = random.integers(self.tokens, size=blanks)
        scattered = np.insert(copied, before, blank)
        tokens = np.concatenate([scattered, [mark], np.full(self.tokens, blank)])
        labels = np.full_like(tokens, IGNORED)
        labels[-self.tokens :] = copied
        return {"input_ids": tokens, "labels": labels}
