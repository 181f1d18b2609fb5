"""Define a tokenizer over bytes. It encodes every text so that decoding gives the same text."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- message["role"] + ": " -}}
    {%- if message["role"] == "assistant" -%}
        {% generation %}{{- message["content"] + "\\n" -}}{% endgeneration %}
    {%- else -%}
        {{- message["content"] + "\\n" -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "assistant: " -}}
{%- endif -%}
"""


class ByteTokenizer(PreTrainedTokenizerFast):
    """A tokenizer whose ids 0–255 are bytes of UTF-8, and whose ids 256–258 are special tokens.

    The special tokens are `<|bos|>` with the id 256, `<|eos|>` with the id 257, and `<|pad|>` with
    the id 258. The tokenizer pads on the left and adds no special token to a text. The name of a
    special token in a text is encoded as plain text. `AutoTokenizer` can read the tokenizer's files
    without this package.

    The chat template writes a message as its role, a colon, its text and a new line, and then asks
    for a message of the role `assistant`. It has no special token, because such a token could not
    be told from its name in a message. The stop string of a chat is a new line and `user:`.

    Args:
        kwargs: arguments of `PreTrainedTokenizerFast`, such as another `chat_template`.
    """

    def __init__(self, **kwargs: Any) -> None:
        if kwargs.get("tokenizer_object") is None and kwargs.get("tokenizer_file") is None:
            kwargs["tokenizer_object"] = _with_special_tokens()
        settings = {
            **SPECIAL_TOKENS,
            "chat_template": CHAT_TEMPLATE,
            "padding_side": "left",
            "split_special_tokens": True,
            "clean_up_tokenization_spaces": False,
        }
        super().__init__(**(settings | kwargs))


def _with_special_tokens() -> Tokenizer:
    """Return a tokenizer over bytes. The special tokens have the ids after the bytes."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    return tokenizer


def byte_level() -> Tokenizer:
    """Return a byte-pair encoding without merges. The id of a byte is its value."""
    vocabulary = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_symbols() -> list[str]:
    """Return the characters that represent the 256 bytes in byte-level encoders.

    If a byte is a visible Latin-1 character, this character represents the byte. The characters
    from U+0100 on represent the other bytes, in order.
    """
    symbols: list[str] = []
    hidden = 0
    for byte in range(256):
        visible = 33 <= byte <= 126 or (161 <= byte <= 255 and byte != 173)
        symbols.append(chr(byte if visible else 256 + hidden))
        hidden += not visible
    return symbols
