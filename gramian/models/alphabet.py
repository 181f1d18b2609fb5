"""Restrict generation to an alphabet: find the allowed tokens, and make a model write no others.

The tokens that are not allowed are listed in `suppress_tokens` of transformers' `GenerationConfig`.
Every kind of decoding obeys this field. The field is saved with a model and copied when the model
is distilled, and exported programs apply it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["allowed_tokens", "restrict_generation", "suppressed_tokens"]

_NAMED = 40
"""The largest number of the tokenizer's characters that an error message lists."""


def allowed_tokens(tokenizer: Any, alphabet: str | Iterable[str]) -> list[int]:
    """Return the ids of all tokens that write only characters of an alphabet.

    A token of several characters is returned if all of its characters are allowed. Special tokens,
    such as the end of a text, write no characters and are not returned.

    Args:
        tokenizer: a tokenizer of transformers.
        alphabet: the allowed characters.

    Raises:
        ValueError: if the alphabet is empty, or if one of its characters is in no token that writes
            only characters of the alphabet. The message lists the tokenizer's characters.
    """
    letters = dict.fromkeys("".join(alphabet))
    if not letters:
        raise ValueError("the alphabet must have at least one character; got none.")
    pieces = _pieces(tokenizer)
    allowed = {token: piece for token, piece in pieces.items() if letters.keys() >= {*piece}}
    written = _in_context(tokenizer, allowed, letters)
    unknown = [letter for letter in letters if letter not in set("".join(written.values()))]
    if unknown:
        known = sorted({letter for piece in pieces.values() for letter in piece} - {"\ufffd"})
        shown = ", ".join(map(_shown, known[:_NAMED])) + (", …" if len(known) > _NAMED else "")
        raise ValueError(
            f"the alphabet must have characters that the tokenizer's tokens write, which are "
            f"{shown}; got {', '.join(map(_shown, unknown))}."
        )
    return sorted(written)


def suppressed_tokens(
    allowed: Iterable[int], vocab_size: int, suppressed: Iterable[int] | None = None
) -> list[int]:
    """Return the ids that generation must not choose: all ids that are not allowed.

    Args:
        allowed: ids of the allowed tokens.
        vocab_size: number of ids.
        suppressed: ids that are suppressed already. They stay suppressed.

    Raises:
        ValueError: if an id is not in the vocabulary, or no token is left to choose.
    """
    wanted = {int(token) for token in allowed}
    outside = sorted(token for token in wanted if not 0 <= token < vocab_size)
    if outside:
        raise ValueError(f"allowed tokens must lie from 0 to {vocab_size - 1}; got {outside[0]}.")
    wanted -= {int(token) for token in suppressed or ()}
    if not wanted:
        raise ValueError(
            "allowed tokens must leave at least one to choose that is not suppressed; got none."
        )
    return [token for token in range(vocab_size) if token not in wanted]


def restrict_generation(model: Any, tokens: Iterable[int]) -> None:
    """Restrict a language model to writing the given tokens, from now on.

    The restriction is part of `model.generation_config`. So it is saved and loaded with the model,
    and distilled models and exported programs keep it. For a single call,
    `model.generate(..., allowed_tokens=…)` does the same. The end of a text is a token like any
    other. So a text ends before its largest length only if that token is allowed.

    Args:
        model: a Gramian language model.
        tokens: ids of the allowed tokens, such as `allowed_tokens(tokenizer, "ACGT")`.

    Raises:
        ValueError: if an id is not in the vocabulary, if no token is left to choose, or if the
            model's generation configuration forces a token that is not allowed.
    """
    config = model.generation_config
    tokens = list(tokens)
    suppressed = suppressed_tokens(tokens, model.config.vocab_size, config.suppress_tokens)
    check_forced(config, suppressed)
    config.suppress_tokens = suppressed


def check_forced(config: Any, suppressed: Iterable[int]) -> None:
    """Raise a ValueError if a generation configuration forces a token that is not allowed."""
    banned = set(suppressed)
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        forced = getattr(config, name, None)
        for token in forced if isinstance(forced, list) else [forced]:
            if token is not None and int(token) in banned:
                raise ValueError(
                    f"the generation configuration forces the token {token} by {name}, which must "
                    "be among the allowed tokens."
                )


def _pieces(tokenizer: Any) -> dict[int, str]:
    """Return a mapping from the id of every token to its text, without special tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {token for token, one in added.items() if getattr(one, "special", True)}
    special |= set(tokenizer.all_special_ids)
    ids = sorted(token for token in tokenizer.get_vocab().values() if token not in special)
    return dict(zip(ids, _decode(tokenizer, [[token] for token in ids]), strict=True))


def _in_context(tokenizer: Any, pieces: dict[int, str], letters: Iterable[str]) -> dict[int, str]:
    """Return the tokens that write only allowed letters after another token, too.

    Some tokens begin with a space, which a decoder removes at the beginning of a text but writes in
    the middle.

    Args:
        tokenizer: a tokenizer of transformers.
        pieces: a mapping from the ids of tokens to their texts at the beginning of a text.
        letters: the allowed characters.

    Returns:
        A mapping from the ids of these tokens to their texts after another token.
    """
    written = {token: piece for token, piece in pieces.items() if piece}
    if not written:
        return {}
    first, start = next(iter(written.items()))
    after = _decode(tokenizer, [[first, token] for token in written])
    known = {*letters}
    return {
        token: text[len(start) :]
        for token, text in zip(written, after, strict=True)
        if text.startswith(start) and len(text) > len(start) and known >= {*text[len(start) :]}
    }


def _decode(tokenizer: Any, rows: list[list[int]]) -> list[str]:
    return [
        tokenizer.decode(row, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for row in rows
    ]


def _shown(letter: str) -> str:
    return letter if letter.isprintable() and not letter.isspace() else repr(letter)
