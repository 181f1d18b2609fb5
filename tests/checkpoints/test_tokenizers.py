"""The tokenizers of HyenaDNA and Evo: ids of the published ones, read back by AutoTokenizer."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from transformers import AutoTokenizer

from gramian import checkpoints
from gramian.checkpoints import DNATokenizer, EvoTokenizer
from gramian.models import ByteTokenizer, GramianConfig

PUBLISHED_DNA = ["[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]", *"ACGTN"]


def both(tokenizer: Any, folder: Path) -> list[Any]:
    """The tokenizer, and what AutoTokenizer makes of it when saved."""
    tokenizer.save_pretrained(folder)
    return [tokenizer, AutoTokenizer.from_pretrained(folder, local_files_only=True)]


def test_dna_ids_are_the_published_ones(tmp_path: Path) -> None:
    for tokenizer in both(DNATokenizer(model_max_length=1026), tmp_path):
        assert len(tokenizer) == 12
        assert tokenizer.convert_ids_to_tokens(range(12)) == PUBLISHED_DNA
        assert tokenizer("ACGTN").input_ids == [7, 8, 9, 10, 11]
        assert tokenizer("AxC\r\n ra").input_ids == [7, 6, 8, 6, 7]
        assert tokenizer("acgtn").input_ids == tokenizer("ACGTN").input_ids
        assert tokenizer("A[MASK]C").input_ids == [7, 3, 8]
        assert tokenizer("").input_ids == []
        assert tokenizer.decode([7, 8, 9, 10, 11, 7]) == "ACGTNA"
        assert tokenizer.decode([2, 7, 5, 8, 1], skip_special_tokens=True) == "AC"
        assert tokenizer.model_max_length == 1026
        names = ("cls", "sep", "bos", "mask", "pad", "unk", "eos")
        ids = [getattr(tokenizer, f"{name}_token_id") for name in names]
        assert ids == [0, 1, 2, 3, 4, 6, 1]


def test_dna_is_padded_on_the_left(tmp_path: Path) -> None:
    for tokenizer in both(DNATokenizer(), tmp_path):
        batch = tokenizer(["ACG", "T"], padding=True)
        assert batch.input_ids == [[7, 8, 9], [4, 4, 10]]
        assert batch.attention_mask == [[1, 1, 1], [0, 0, 1]]


def test_other_characters() -> None:
    assert DNATokenizer("ACGU")("UATX").input_ids == [10, 7, 10, 6]
    assert DNATokenizer("ACGTU")("UT").input_ids == [11, 10]


@pytest.mark.parametrize("text", ["ACGT", "a\tné“”\n", "", "Āā", "<|eos|>"])
def test_evo_ids_are_bytes(text: str, tmp_path: Path) -> None:
    for tokenizer in both(EvoTokenizer(), tmp_path):
        assert tokenizer(text).input_ids == list(text.encode())
        assert tokenizer.decode(tokenizer(text).input_ids) == text
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
        assert len(tokenizer) == 256


def test_evo_pads_on_the_left(tmp_path: Path) -> None:
    for tokenizer in both(EvoTokenizer(), tmp_path):
        assert tokenizer(["AC", "T"], padding=True).input_ids == [[65, 67], [1, 84]]
        assert tokenizer.decode([1, 65, 67, 0], skip_special_tokens=True) == "AC"


WITHOUT_GRAMIAN = """
import json
import sys

from transformers import AutoTokenizer, PreTrainedTokenizerFast

sys.modules["gramian"] = None  # as if it were not installed
rows, texts, chat = json.load(open("given.json", encoding="utf-8"))
for folder in sys.argv[1:]:
    for read in (
        PreTrainedTokenizerFast.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
    ):
        print(json.dumps(WHAT(read, rows, texts, chat)))
"""
WHAT = """
def what(tokenizer, rows, texts, chat):
    rows = [[token for token in row if token < len(tokenizer)] for row in rows]
    names = ("bos", "eos", "pad", "unk", "cls", "sep", "mask")
    return [
        len(tokenizer),
        [tokenizer.decode(row) for row in rows],
        [tokenizer.decode(row, skip_special_tokens=True) for row in rows],
        [tokenizer(text).input_ids for text in texts],
        tokenizer(["ACGT", "A"], padding=True).input_ids,
        [getattr(tokenizer, f"{name}_token_id") for name in names],
        tokenizer.chat_template and tokenizer.apply_chat_template(chat, tokenize=False),
    ]
"""


def test_a_tokenizer_of_a_model_is_read_without_this_package_and_without_a_question(
    tmp_path: Path,
) -> None:
    """Every id alone, rows that are no UTF-8, special tokens, padding and chats."""
    rng = random.Random(3)
    rows = [[token] for token in range(260)]
    rows += [[rng.randrange(260) for _ in range(rng.randrange(2, 9))] for _ in range(300)]
    texts = ["", "hé <|eos|>", "ACGTNacgu x\n", "\x00\x7f€", "ACGT [SEP]"]
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "given.json").write_text(json.dumps([rows, texts, chat]), encoding="utf-8")
    names: dict[str, Any] = {}
    exec(WHAT, names)
    kinds, expected = (ByteTokenizer, DNATokenizer, EvoTokenizer), []
    for kind in kinds:
        tokenizer = kind()
        tokenizer.save_pretrained(tmp_path / kind.__name__)
        GramianConfig().save_pretrained(tmp_path / kind.__name__)
        expected += 2 * [names["what"](tokenizer, rows, texts, chat)]
    ran = subprocess.run(
        [
            sys.executable,
            "-c",
            WHAT + WITHOUT_GRAMIAN.replace("WHAT", "what"),
            *(kind.__name__ for kind in kinds),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    assert [json.loads(line) for line in ran.stdout.splitlines()] == expected


def test_checkpoints_come_with_their_tokenizers(published: Any) -> None:
    kinds = {
        "hyenadna_tiny": DNATokenizer,
        "evo_tiny": EvoTokenizer,
        "safari_hyena_order2": type(None),
        "stripedhyena_tiny": type(None),
    }
    for name, kind in kinds.items():
        model, tokenizer, _ = checkpoints.load(published(name).file)
        assert type(tokenizer) is kind
        if tokenizer is not None:
            assert model.config.eos_token_id == tokenizer.eos_token_id
            assert model.config.pad_token_id == tokenizer.pad_token_id
            padding = list(range(len(tokenizer), model.config.vocab_size))
            assert model.generation_config.suppress_tokens == padding


def test_a_tokenizer_in_the_folder_is_taken(published: Any, tmp_path: Path) -> None:
    checkpoint = published("safari_hyena_order2")
    save_file(checkpoint.tensors(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(checkpoint.config()))
    DNATokenizer("ABCD").save_pretrained(tmp_path)
    tokenizer = checkpoints.load(tmp_path).tokenizer
    assert tokenizer is not None and tokenizer("D").input_ids == [10]
    (tmp_path / "tokenizer.json").write_text("{")
    assert checkpoints.load(tmp_path).tokenizer is None


@pytest.mark.parametrize(
    "characters", ["ACGTN", "ACGT", "acgt", "acgtn", "ACGUN", "acgu", "ACGTacgt"]
)
def test_a_text_of_bases_has_the_ids_that_tasks_give_it(characters: str) -> None:
    """Whatever its case and line ends are, and whether it is DNA or RNA."""
    from gramian.tasks import Document, Encoder

    tokenizer = DNATokenizer(characters)
    encode = Encoder(tokenizer, special_tokens=False)
    for text in ("ACGTTGCA", "ACGUUGCA", "AC GT\nACGT\r\n"):
        ids = encode(Document(text)).tolist()
        assert 6 not in ids
        assert tokenizer(text).input_ids == ids
        if characters != "ACGTacgt":
            assert tokenizer(text.lower()).input_ids == ids
    assert tokenizer("ACGU").input_ids == tokenizer("ACGT").input_ids
