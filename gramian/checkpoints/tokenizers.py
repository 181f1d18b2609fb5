"""Define the tokenizers of published models, as fast tokenizers that `AutoTokenizer` can read.

Reading a saved tokenizer needs no code of this package. By default, the tokenizers add no special
token to a text, so that a prompt is continued where it ends. The published tokenizers of HyenaDNA
append `[SEP]`, the token that ends a sequence. `DNATokenizer` also appends it for classifiers,
because they were trained with it.
"""

from __future__ import annotations

from typing import Any

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from gramian.models.tokenizer import byte_level, byte_symbols

__all__ = ["DNATokenizer", "EvoTokenizer"]

_DNA_SPECIAL = ("[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]")


class DNATokenizer(PreTrainedTokenizerFast):
    """HyenaDNA's tokenizer. It has one token per character and pads on the left.

    The special tokens have the ids 0 to 6: `[CLS]`, `[SEP]` (which ends a sequence), `[BOS]`,
    `[MASK]`, `[PAD]`, `[RESERVED]` and `[UNK]`. The known characters have the ids from 7 on; any
    other character becomes `[UNK]`. White space is skipped. Upper and lower case of a letter are
    the same token, unless `characters` has the letter in both cases. If `characters` has T but not
    U, a U is read as a T, and the other way round. (The published tokenizer maps U and lower-case
    letters, which mark masked bases, to `[UNK]`.)

    Args:
        characters: the known characters, in the order of their ids.
        append_end: whether `[SEP]` is appended to a sequence, as the published tokenizer does.
        kwargs: arguments of `PreTrainedTokenizerFast`.
    """

    def __init__(
        self, characters: str = "ACGTN", *, append_end: bool = False, **kwargs: Any
    ) -> None:
        if kwargs.get("tokenizer_object") is None and kwargs.get("tokenizer_file") is None:
            kwargs["tokenizer_object"] = _characters(characters)
            if append_end:
                kwargs["tokenizer_object"].post_processor = processors.TemplateProcessing(
                    single="$A [SEP]", special_tokens=[("[SEP]", 1)]
                )
        settings = {
            "bos_token": "[BOS]",
            "eos_token": "[SEP]",
            "sep_token": "[SEP]",
            "cls_token": "[CLS]",
            "pad_token": "[PAD]",
            "mask_token": "[MASK]",
            "unk_token": "[UNK]",
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
        }
        super().__init__(**(settings | kwargs))


class EvoTokenizer(PreTrainedTokenizerFast):
    """Evo's tokenizer. Its ids 0–255 are bytes of UTF-8; byte 0 ends a text, and byte 1 pads it.

    The tokenizer pads on the left, as generation requires. It decodes ids below 32 as bytes; the
    published tokenizer decodes them as spaces.

    Args:
        kwargs: arguments of `PreTrainedTokenizerFast`.
    """

    def __init__(self, **kwargs: Any) -> None:
        if kwargs.get("tokenizer_object") is None and kwargs.get("tokenizer_file") is None:
            kwargs["tokenizer_object"] = byte_level()
        end, padding = byte_symbols()[:2]
        settings = {
            "eos_token": end,
            "pad_token": padding,
            "padding_side": "left",
            "split_special_tokens": True,
            "clean_up_tokenization_spaces": False,
        }
        super().__init__(**(settings | kwargs))


def _characters(characters: str) -> Tokenizer:
    tokens = [*_DNA_SPECIAL, *characters]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    other = {character.swapcase(): character for character in characters}
    replaced: list[tuple[Any, str]] = [(Regex(r"\s+"), "")]
    replaced += [
        (odd, known) for odd, known in other.items() if len(odd) == 1 and odd not in vocabulary
    ]
    for odd, known in ("UT", "TU", "ut", "tu"):  # RNA as DNA, or the other way round
        spelled = known if known in vocabulary else known.swapcase()
        if not {odd, odd.swapcase()} & {*vocabulary} and spelled in vocabulary:
            replaced.append((odd, spelled))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(pattern, content) for pattern, content in replaced]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["[RESERVED]"])  # transformers adds the others by name
    return tokenizer
