"""Define the base of tasks in which a model predicts the next token of tokenized documents.

By default, no row spans two documents. If documents shared a sequence, a convolution or a
recurrence would carry its state from one document to the next, and no mask could prevent this. So
each document is cut into windows separately. The last window may be short; the collator pads it and
masks the padding. With `packing="concatenate"`, as usual for WikiText-103 and similar corpora, all
documents form one stream, with an end token after each document, and the stream is cut into
windows.

The label of a token is the next token. The windows of a document share no labels, and a document's
first token is never a label.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from gramian.tasks._task import Description, Row, Task, require_sizes
from gramian.tasks.encoding import load_tokenizer

__all__ = ["TokenizedTask", "byte_tokenizer", "dna_tokenizer", "windows"]


@dataclass(frozen=True, kw_only=True)
class TokenizedTask(Task):
    """The base class of tasks that predict the next token of documents.

    Args:
        length: number of tokens in a row.
        tokenizer: a tokenizer of transformers, its folder or its name, or `"bytes"` or `"dna"` for
            `gramian.models.ByteTokenizer` or `gramian.checkpoints.DNATokenizer`; by default the
            model's tokenizer if it is known, otherwise the default tokenizer of the task.
    """

    length: int = 1024
    tokenizer: Any = None

    def __post_init__(self) -> None:
        require_sizes(self, "length")

    @abstractmethod
    def default_tokenizer(self) -> Any:
        """Return the tokenizer that encodes the documents if no tokenizer is given."""

    def own_tokenizer(self) -> Any:
        if self.tokenizer is None:
            return self.default_tokenizer()
        if self.tokenizer == "bytes":
            return byte_tokenizer()
        if self.tokenizer == "dna":
            return dna_tokenizer()
        if isinstance(self.tokenizer, str):
            return load_tokenizer(self.tokenizer)
        return self.tokenizer

    def tokens_of(self, tokenizer: Any) -> Task:
        own = self.own_tokenizer()
        if own.get_vocab() == tokenizer.get_vocab():
            if _special_tokens(own) == _special_tokens(tokenizer):
                return self
        elif self.tokenizer is not None:
            raise ValueError(
                f"the task's tokenizer has {len(own):,} tokens that are not the "
                f"{len(tokenizer):,} of the model's own; leave the setting tokenizer out to use "
                "the model's."
            )
        return dataclasses.replace(self, tokenizer=tokenizer)

    def description(self) -> Description:
        tokenizer = self.own_tokenizer()
        pad = tokenizer.pad_token_id
        return Description(
            "tokens",
            self.length,
            vocab_size=len(tokenizer),
            pad_token_id=0 if pad is None else pad,
        )


def _special_tokens(tokenizer: Any) -> int:
    """Return the number of special tokens that a tokenizer adds to a sequence by default."""
    count = getattr(tokenizer, "num_special_tokens_to_add", None)
    return 0 if count is None else int(count())


def byte_tokenizer() -> Any:
    """Return a tokenizer of bytes."""
    from gramian.models import ByteTokenizer

    return ByteTokenizer()


def dna_tokenizer() -> Any:
    """Return HyenaDNA's tokenizer of nucleotides."""
    from gramian.checkpoints import DNATokenizer

    return DNATokenizer()


def windows(
    documents: Iterator[np.ndarray] | Iterator[Iterator[np.ndarray]],
    length: int,
    packing: str,
    end: int | None,
) -> Iterator[Row]:
    """Yield rows of at most `length` tokens from documents of token ids.

    Args:
        documents: token ids of each document, as one array (tokens,) or as an iterator of arrays.
        length: largest number of tokens in a row. The label of a token is the next token.
        packing: `"document"` to cut each document separately, or `"concatenate"` to cut one stream.
        end: id that is appended to each document, or None to append nothing.
    """
    streams = (iter([one]) if isinstance(one, np.ndarray) else one for one in documents)
    if packing == "concatenate":
        streams = (stream for stream in [_chain(streams, end)])  # one document with all tokens
        end = None
    for pieces in streams:
        rest = np.empty(0, dtype=np.int64)
        for piece in pieces:
            rest = np.concatenate([rest, piece])
            starts = range(0, max(0, len(rest) - length), length)
            for start in starts:
                window = rest[start : start + length + 1]
                yield {"input_ids": window[:-1], "labels": window[1:]}
            rest = rest[len(starts) * length :]
        if packing == "document":
            if end is not None:
                rest = np.append(rest, end)
            for start in range(0, len(rest) - 1, length):
                window = rest[start : start + length + 1]
                yield {"input_ids": window[:-1], "labels": window[1:]}


def _chain(documents: Iterator[Iterator[np.ndarray]], end: int | None) -> Iterator[np.ndarray]:
    for pieces in documents:
        yield from pieces
        if end is not None:
            yield np.array([end])
