"""The byte tokenizer: ids are bytes, and every text comes back."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from gramian.models import ByteTokenizer, GramianConfig


def texts() -> list[str]:
    rng = random.Random(17)
    planes = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]

    def character() -> str:
        low, high = rng.choice(planes)
        return chr(rng.randrange(low, high))

    return [
        "",
        "a",
        " leading and trailing \n\t ",
        "don 't  join , these .",
        "<|pad|> is text here, and so are <|bos|><|eos|>",
        "".join(map(chr, range(256))),
        *("".join(character() for _ in range(n)) for n in (1, 2, 3, 63, 257, 1000)),
    ]


@pytest.mark.parametrize("text", texts(), ids=len)
def test_ids_are_bytes_and_every_text_comes_back(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_special_tokens_lie_past_the_bytes() -> None:
    tokenizer = ByteTokenizer()
    specials = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert specials == (256, 257, 258)
    assert len(tokenizer) == GramianConfig().vocab_size == 259
    assert tokenizer.decode([256, 104, 105, 257, 258], skip_special_tokens=True) == "hi"


def test_bytes_that_are_no_text_do_not_fail() -> None:
    assert ByteTokenizer().decode([104, 255, 105]) == "h\N{REPLACEMENT CHARACTER}i"


def test_batches_are_padded_on_the_left() -> None:
    batch = ByteTokenizer()(["a", "abc"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[258, 258, 97], [97, 98, 99]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    assert set(batch) == {"input_ids", "attention_mask"}


def test_it_is_saved_and_read_back(tmp_path: Path) -> None:
    ByteTokenizer().save_pretrained(tmp_path)
    for read in (ByteTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert len(read) == 259
        assert read.padding_side == "left"
        assert (read.bos_token_id, read.eos_token_id, read.pad_token_id) == (256, 257, 258)
        for text in texts():
            ids = read(text)["input_ids"]
            assert ids == list(text.encode())
            assert read.decode(ids, skip_special_tokens=True) == text


def test_what_it_saves_needs_no_code_of_ours(tmp_path: Path) -> None:
    ByteTokenizer().save_pretrained(tmp_path)
    code = (
        "import sys; from transformers import AutoTokenizer;"
        f"t = AutoTokenizer.from_pretrained({str(tmp_path)!r});"
        "assert not any(m.startswith('gramian') for m in sys.modules);"
        "print(t('h\\xe9 <|eos|>')['input_ids'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.stdout.strip() == str(list("hé <|eos|>".encode())), done.stderr


def test_a_chat_is_plain_text_whose_answers_are_marked(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello, <|eos|>!"},
        {"role": "assistant", "content": "Hi."},
    ]
    text = "system: Be brief.\nuser: Hello, <|eos|>!\nassistant: Hi.\n"
    ByteTokenizer().save_pretrained(tmp_path)
    for tokenizer in (ByteTokenizer(), AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer.apply_chat_template(messages, tokenize=False) == text
        asked = tokenizer.apply_chat_template(messages[:2], add_generation_prompt=True)
        assert tokenizer.decode(asked["input_ids"]) == text.removesuffix("Hi.\n")
        found = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True)
        assert found["input_ids"] == list(text.encode())
        assert found["assistant_masks"] == [0] * (len(text) - 4) + [1] * 4
    assert ByteTokenizer(chat_template="x").chat_template == "x"
