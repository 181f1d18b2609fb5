"""Encode documents as token ids, with any tokenizer of transformers.

If a tokenizer knows only nucleotides, as HyenaDNA's does, every text is read as a genome. White
space is then skipped, case is ignored, and U is read as T. A character that is not a code of
nucleotides is an error. The ids of Evo's tokenizer are bytes. For this tokenizer, a text of A, C,
G, T, U, N and white space is read as a genome. Other texts, for example with a species tag, are
encoded unchanged. For all other tokenizers, FASTA is read as upper-case codes, and other texts are
encoded unchanged.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from gramian._extras import require
from gramian.tasks import genomes
from gramian.tasks.documents import Document

__all__ = ["Encoder", "load_tokenizer"]

_CODES = (genomes.NUCLEOTIDES + genomes.AMBIGUOUS + genomes.MARKS).decode()
_LETTERS = {*_CODES, "U"} - {*genomes.MARKS.decode()}
_SPELLINGS = [str.maketrans(one) for one in ({}, {"T": "U"})]
_SPELLINGS += [
    str.maketrans({code: code.lower() for code in _CODES} | changed) for changed in ({}, {"T": "u"})
]
_PLAIN_GENOME = re.compile(r"[ACGTUNacgtun\s]+")


def load_tokenizer(path: str) -> Any:
    """Load a tokenizer of transformers from a folder or, by its name, from the Hugging Face Hub.

    Raises:
        OSError: if the tokenizer does not exist or cannot be read.
        ImportError: if transformers is not installed.
    """
    require("a tokenizer", "models", "transformers")
    from transformers import AutoTokenizer

    import gramian.models  # noqa: F401 (else transformers asks to run code from our folders)

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise OSError(f"the tokenizer {path} cannot be loaded: {reason}") from error


class Encoder:
    """An encoder of documents as the ids of a tokenizer.

    If each code of nucleotides is one token, the encoder uses a table for genomes and does not call
    the tokenizer.

    Args:
        tokenizer: a tokenizer of transformers.
        special_tokens: whether to add the special tokens that the tokenizer adds by default.

    Attributes:
        nucleotides_only: whether all words of the vocabulary consist of codes of nucleotides.
        letters: (256,) int64. The entry at a code's byte is the code's id. Entries without an id
            are -1. `letters` is None if codes are not single tokens.
    """

    def __init__(self, tokenizer: Any, *, special_tokens: bool = True) -> None:
        self.tokenizer = tokenizer
        self._options: dict[str, Any] = {} if special_tokens else {"add_special_tokens": False}
        self._special_tokens: list[str] = []
        self._spelling: dict[int, str] | None = {}
        self._around: tuple[list[int], list[int]] = ([], [])
        self.nucleotides_only = False
        self._bytes_of_genomes = False
        self.letters: np.ndarray | None = None
        if not hasattr(tokenizer, "get_vocab"):  # any other function from text to ids
            return
        self._options["verbose"] = False
        added = {str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values()}
        self._special_tokens = sorted(added | set(tokenizer.all_special_tokens), key=len)[::-1]
        words = [word for word in tokenizer.get_vocab() if word not in self._special_tokens]
        made_of_codes = [w for w in words if w.isascii() and _LETTERS.issuperset(w.upper())]
        self.nucleotides_only = len(made_of_codes) == len(words) and {*"ACG"}.issubset(
            "".join(words).upper()
        )
        self._bytes_of_genomes = len(tokenizer) == 256 and (
            (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)  # as in no tokenizer of text
        )
        self._spelling = next((one for one in _SPELLINGS if self._knows(one)), None)
        if self._spelling is None or any(len(word) > 1 for word in made_of_codes):
            return
        self.letters = self._letter_ids(self._spelling)
        if special_tokens and self.letters is not None:
            ids = list(tokenizer("A".translate(self._spelling))["input_ids"])
            place = ids.index(int(self.letters[ord("A")]))
            self._around = (ids[:place], ids[place + 1 :])

    def __call__(self, document: Document) -> np.ndarray:
        """Return the token ids (tokens,), int64.

        Raises:
            ValueError: if the tokenizer knows only nucleotides and the text is not a genome, or if
                the tokenizer does not know the codes of a genome.
        """
        codes, text = self._spelled(document)
        if codes is not None:
            return self._around_codes(codes)
        return np.array(self.tokenizer(text, **self._options)["input_ids"], dtype=np.int64)

    def sized(self, document: Document) -> tuple[np.ndarray, int]:
        """Return the token ids, and the number of UTF-8 bytes that they encode.

        The bytes of the first token are not counted, because no token predicts them.
        """
        codes, text = self._spelled(document)
        if codes is not None:
            unpredicted = 0 if self._around[0] else 1
            return self._around_codes(codes), max(1, len(codes) - unpredicted)
        fast = bool(getattr(self.tokenizer, "is_fast", False))
        encoded = self.tokenizer(text, return_offsets_mapping=fast, **self._options)
        ids = np.array(encoded["input_ids"], dtype=np.int64)
        if not len(ids):
            return ids, 0
        if fast:
            first = text[: encoded["offset_mapping"][0][1]]
        else:
            first = self.tokenizer.decode(ids[:1].tolist(), skip_special_tokens=True)
        return ids, max(1, len(text.encode()) - len(first.encode()))

    def encode_pieces(self, pieces: Iterable[bytes]) -> Iterator[np.ndarray]:
        """Yield the ids of a genome that is given in pieces.

        The ids are yielded piece by piece if each code is one token, and otherwise all at once.
        """
        if self.letters is not None:
            before, after = self._around
            if before:
                yield np.array(before, dtype=np.int64)
            for codes in pieces:
                yield self._of_codes(codes)
            if after:
                yield np.array(after, dtype=np.int64)
            return
        yield self(Document(b"".join(pieces).decode("ascii"), genome=True))

    def _around_codes(self, codes: bytes) -> np.ndarray:
        before, after = self._around
        return np.concatenate([before, self._of_codes(codes), after]).astype(np.int64)

    def _of_codes(self, codes: bytes) -> np.ndarray:
        assert self.letters is not None
        ids: np.ndarray = self.letters[np.frombuffer(codes, dtype=np.uint8)]
        if len(ids) and ids.min() < 0:
            unknown = chr(codes[int(np.argmin(ids))])
            raise ValueError(f"the tokenizer has no token for the code {unknown!r} of a genome.")
        return ids

    def _knows(self, spelling: dict[int, str]) -> bool:
        """Return whether the tokenizer knows A, C, G and T in this spelling."""
        unknown = self.tokenizer.unk_token_id
        found = []
        for letter in "ACGT":
            ids = self.tokenizer(letter.translate(spelling), add_special_tokens=False).input_ids
            if not ids or unknown in ids:
                return False
            found.append(tuple(ids))
        return len(set(found)) == 4

    def _letter_ids(self, spelling: dict[int, str]) -> np.ndarray | None:
        letters = np.full(256, -1, dtype=np.int64)
        for code in _CODES:
            ids = self.tokenizer(code.translate(spelling), add_special_tokens=False).input_ids
            if len(ids) == 1:
                letters[ord(code)] = ids[0]
        return None if letters[list(b"ACGT")].min() < 0 else letters

    def _spelled(self, document: Document) -> tuple[bytes | None, str]:
        """Return the codes of a genome and "", or None and the text for the tokenizer.

        Codes are returned if the document is a genome, its codes are single tokens, and its text
        contains no special tokens. Otherwise the text is returned.

        Raises:
            ValueError: if the document cannot be read as the tokenizer requires.
        """
        text = document.text
        genome = document.genome or self.nucleotides_only
        genome = genome or (self._bytes_of_genomes and _PLAIN_GENOME.fullmatch(text) is not None)
        if not genome:
            if self._bytes_of_genomes and text.lstrip().startswith(">"):
                raise ValueError(
                    f"{document.name or 'the text'} begins with '>', but is no FASTA by its name "
                    "or its first line of sequence, which then must hold A, C, G, T, U and N only."
                )
            return None, text
        if self._spelling is None:
            raise ValueError(
                f"the tokenizer {type(self.tokenizer).__name__} does not know the nucleotides A, "
                "C, G and T, so it cannot read a genome."
            )
        if document.genome:
            parts = [text]
        else:
            parts = self._as_genome(text, document.name or "the text")
        if len(parts) == 1 and self.letters is not None:
            return parts[0].encode("ascii"), ""
        parts[::2] = [part.translate(self._spelling) for part in parts[::2]]
        return None, "".join(parts)

    def _as_genome(self, text: str, where: str) -> list[str]:
        """Split a genome into codes, at even indices, and special tokens, at odd indices."""
        pattern = "|".join(map(re.escape, self._special_tokens))
        parts = re.split(f"({pattern})", text) if pattern else [text]
        odd: Counter[int] = Counter()
        for index in range(0, len(parts), 2):
            raw = parts[index].encode("utf-8", errors="surrogateescape")
            parts[index] = genomes.clean(raw, where, odd, numbers=False).decode("ascii")
        genomes.warn_of(odd, sum(map(len, parts[::2])), where)
        return parts
