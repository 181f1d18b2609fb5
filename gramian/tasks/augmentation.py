"""Change windows of nucleotides: read the other strand, and hide unknown nucleotides."""

from __future__ import annotations

from typing import Any

import numpy as np

from gramian._labels import IGNORED
from gramian.tasks import genomes
from gramian.tasks._task import Row
from gramian.tasks.encoding import Encoder

__all__ = ["Nucleotides"]


class Nucleotides:
    """The ids of nucleotides in a tokenizer that has one token for each nucleotide.

    Args:
        encoder: the encoder of the tokenizer.

    Raises:
        ValueError: if a nucleotide is not one token.
    """

    def __init__(self, encoder: Encoder) -> None:
        if encoder.letters is None:
            raise ValueError(
                "intervals, reverse_complement, shift and replace_n need a tokenizer with one "
                f"token for each nucleotide; got {type(encoder.tokenizer).__name__}."
            )
        self._letters = encoder.letters
        self._tokenizer = encoder.tokenizer

    def complement(self) -> np.ndarray:
        """Return the id of the complement of each id, (largest id + 1,), int64.

        Raises:
            ValueError: if a complement has no token, or if letters with different complements share
                an id.
        """
        table = np.arange(int(self._letters.max()) + 1)
        for code in genomes.NUCLEOTIDES + genomes.AMBIGUOUS + genomes.MARKS:
            other = genomes.reverse_complement(bytes([code]))[0]
            here, there = int(self._letters[code]), int(self._letters[other])
            if here < 0:
                continue
            if there < 0 or table[here] not in (here, there):
                raise ValueError(
                    f"reverse_complement needs a token for the complement of {chr(code)!r}, which "
                    f"{type(self._tokenizer).__name__} has not."
                )
            table[here] = there
        return table

    def hide_unknown(self, row: Row) -> Row | None:
        """Replace letters other than A, C, G and T by padding, and do not score them as labels.

        Returns:
            The new row, or None if no label is left.

        Raises:
            ValueError: if the tokenizer has no token for padding.
        """
        padding: Any = self._tokenizer.pad_token_id
        if padding is None:
            raise ValueError("replace_n needs a tokenizer with a token for padding.")
        bases = self._letters[list(b"ACGT")]
        known, due = np.isin(row["input_ids"], bases), np.isin(row["labels"], bases)
        if not due.any():
            return None
        inputs = np.where(known, row["input_ids"], padding)
        return {"input_ids": inputs, "labels": np.where(due, row["labels"], IGNORED)}
