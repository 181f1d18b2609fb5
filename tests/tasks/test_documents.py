"""What a text is, from any file and for any tokenizer."""

from __future__ import annotations

import gzip
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from gramian import tasks
from gramian.checkpoints import DNATokenizer, EvoTokenizer
from gramian.models import ByteTokenizer
from gramian.tasks import Document, Encoder, documents_in, read_documents, register_reader
from gramian.tasks.documents import _READERS
from gramian.testing import check_reader

QUOTE = "> A quotation.\nThe answer.\n"


LINES = '{"text": "one\\r\\ntwo"}\r\n\n{"text": "", "a": 1}\n{"text": "three, é"}'.encode()
RECORDS = b">a the first\nACGT\r\nNNacgu\n\n>b\n>c\nR"
CONTENTS: dict[str, tuple[bytes, list[Document], bytes]] = {
    ".jsonl": (LINES, [Document("one\ntwo"), Document("three, é")], b'{"texts": "one"}\n'),
    ".fa": (
        RECORDS,
        [Document("ACGTNNACGT", "a", genome=True), Document("R", "c", genome=True)],
        b">a\nMKVLE\n",
    ),
}


@pytest.mark.parametrize("suffix", sorted(_READERS))
def test_every_reader_conforms(suffix: str) -> None:
    kind = ".jsonl" if suffix in (".jsonl", ".ndjson") else ".fa"
    content, documents, refused = CONTENTS[kind]
    check_reader(_READERS[suffix], suffix, content, documents, refused=refused)


@pytest.mark.parametrize(
    ("name", "text", "genome"),
    [
        ("x.fa", ">a\nACGT\n", True),
        ("x.FASTA", ">a\nRACGTACGTACGT\n", True),
        ("x.fna.gz", ">a\nACGT\n", True),
        ("x.txt", ">a\nACGT\n", True),
        ("x.txt", "\n;c\n>a b\n\nacgu\n", True),
        ("x.txt", "\ufeff>a\r\nACGTNN\r\n", True),
        ("x.md", QUOTE, False),
        ("x.txt", "> a\n> b\n", False),
        ("x.txt", "ACGT\n", False),
        ("x.txt", "A>C\nACGT\n", False),
        ("x.txt", ">p\nMKVLE\n", False),
        ("x.jsonl", '{"text": ">a\\nACGT"}\n', False),
    ],
)
def test_one_rule_tells_fasta_from_text(name: str, text: str, genome: bool, tmp_path: Path) -> None:
    raw = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    (document,) = read_documents(tmp_path / name)
    assert document.genome == genome
    if name.endswith((".txt", ".md")):
        (same,) = documents_in(text)
        assert (same.text, same.genome) == (document.text, genome)


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("x.txt", b"\xef\xbb\xbfone\r\ntwo\rthree\n", ["one\ntwo\nthree\n"]),
        ("x", b"", []),
        ("x.txt.gz", gzip.compress(b"one", mtime=0), ["one"]),
        (
            "x.jsonl",
            b'\xef\xbb\xbf{"text": "a\\r\\nb"}\r\n\r\n{"text": ""}\n{"text": "c"}',
            ["a\nb", "c"],
        ),
        ("x.ndjson", b'{"text": "a\xe2\x80\xa8b"}', ["a\u2028b"]),
        ("x.JSONL.gz", gzip.compress(b'{"n": 1, "text": "a"}', mtime=0), ["a"]),
        ("x.json", b'{"text": "a"}', ['{"text": "a"}']),
    ],
)
def test_texts(name: str, data: bytes, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    assert [document.text for document in read_documents(tmp_path / name)] == expected
    task = tasks.build("text", train=str(tmp_path / name), length=100)
    got = [bytes(row["input_ids"].tolist()).decode() for row in task.rows("train", 0)]
    assert got == expected


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("x.txt", "naïve".encode("latin-1"), "is not UTF-8 text: invalid continuation byte at"),
        ("x.txt", "naïve".encode("utf-16"), "is text in UTF-16 or UTF-32; give UTF-8"),
        ("x.txt", "text".encode("utf-16-le"), "is no text: it holds bytes of value 0"),
        ("x.fastq", b"@a\nACGT\n+\nIIII\n", "is FASTQ, not FASTA"),
        ("x.fq", b"@a\nACGT\n+\nIIII\n", "is FASTQ, not FASTA"),
        ("x.zip", b"PK\x03\x04", "is a zip archive"),
        ("x.zst", b"\x28\xb5\x2f\xfd", "is compressed by zstd"),
        ("x.jsonl", b'{"text": "a"}\n{"txt": "b"}', "line 2: no 'text' among 'txt'"),
        ("x.jsonl", b'{"text": "a"}\n{"text": null}', "line 2: 'text' must be a text; got NoneT"),
        ("x.jsonl", b'{"text": ["a"]}', "line 1: 'text' must be a text; got list"),
        ("x.jsonl", b'"the text"', "line 1: an object is needed; got str"),
        ("x.jsonl", b'[{"text": "a"}]', "line 1: an object is needed; got list"),
        ("x.jsonl", b'{"text": "a"', "line 1: no JSON"),
        ("x.jsonl", b"{\n", "line 1: no JSON"),
        ("x.jsonl", b'{"text": "\\ud800"}', "line 1: 'text' has half of a surrogate pair"),
        ("x.jsonl", b'{"text": "na\xefve"}', "is not UTF-8 text"),
        ("x.pdf", b"%PDF-1.4", "is a PDF"),
        ("x.parquet", b"PAR1", "is a table in Parquet"),
    ],
)
def test_what_is_no_text_is_refused(name: str, data: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        list(read_documents(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)
    ByteTokenizer().save_pretrained(tmp_path / "tokenizer")
    task = tasks.build("text", train=str(tmp_path / name), tokenizer=str(tmp_path / "tokenizer"))
    with pytest.raises(ValueError, match=re.escape(sentence)):
        list(task.rows("train", 0))


def test_bytes_that_are_no_text_are_bytes(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"na\xefve \xc3\xaf")
    task = tasks.build("text", train=str(tmp_path / "x.txt"))
    assert [row["input_ids"].tolist() for row in task.rows("train", 0)] == [[*b"na\xefve \xc3\xaf"]]


def test_a_separator_cuts_every_kind_of_text(tmp_path: Path) -> None:
    from datasets import Dataset

    (tmp_path / "x.txt").write_bytes(b"one\r\n\r\ntwo\n\n")
    (tmp_path / "y.jsonl").write_text(json.dumps({"text": "three\n\nfour"}) + "\n")
    Dataset.from_dict({"text": ["five\n\nsix", None, ""]}).save_to_disk(str(tmp_path / "corpus"))

    def texts(**settings: Any) -> list[str]:
        task = tasks.build("text", separator="\n\n", length=100, **settings)
        return [bytes(row["input_ids"].tolist()).decode() for row in task.rows("train", 0)]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files = [str(tmp_path / "x.txt"), str(tmp_path / "y.jsonl")]
        assert texts(train=files) == ["one", "two", "three", "four"]
        assert texts(corpus=str(tmp_path / "corpus")) == ["five", "six"]
    (tmp_path / "z.txt").write_text("one two")
    with pytest.warns(UserWarning, match=r"the separator '\\n\\n' is nowhere in the train split"):
        assert texts(train=str(tmp_path / "z.txt")) == ["one two"]


def test_a_corpus_without_the_column(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_dict({"txt": ["a"], "n": [1]}).save_to_disk(str(tmp_path / "corpus"))
    with pytest.raises(ValueError, match="Did you mean 'txt'"):
        list(tasks.build("text", corpus=str(tmp_path / "corpus")).rows("train", 0))
    with pytest.raises(ValueError, match="row 0: 'n' must be a text; got int"):
        list(tasks.build("text", corpus=str(tmp_path / "corpus"), column="n").rows("train", 0))


def words(vocabulary: list[str], **special: str) -> Any:
    """A tokenizer of single characters, as others than ours may be."""
    ids = {word: index for index, word in enumerate([*special.values(), *vocabulary])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=special.get("unk_token")))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if "cls_token" in special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<c> $A <s>", special_tokens=[("<c>", ids["<c>"]), ("<s>", ids["<s>"])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


GENOMES = {
    "dna": (DNATokenizer(), {"A": 7, "C": 8, "G": 9, "T": 10, "N": 11}),
    "rna": (DNATokenizer("ACGUN"), {"A": 7, "C": 8, "G": 9, "T": 10, "N": 11}),
    "lower": (words([*"acgtn"], unk_token="?"), {"A": 1, "C": 2, "G": 3, "T": 4, "N": 5}),
    "evo": (EvoTokenizer(), {letter: ord(letter) for letter in "ACGTN"}),
    "bytes": (ByteTokenizer(), {letter: ord(letter) for letter in "ACGTN"}),
}


@pytest.mark.parametrize("name", GENOMES)
def test_a_genome_has_the_ids_of_the_tokenizer(name: str) -> None:
    tokenizer, ids = GENOMES[name]
    encode = Encoder(tokenizer)
    assert encode(Document("GATTACAN", genome=True)).tolist() == [ids[one] for one in "GATTACAN"]
    assert encode.sized(Document("GATTACAN", genome=True))[1] == 7
    assert encode(Document("", genome=True)).tolist() == []
    assert encode.letters is not None


@pytest.mark.parametrize("name", ["dna", "rna", "lower", "evo"])
@pytest.mark.parametrize("text", ["GATTACAN", "gattacan\n", "GAT\r\nTAC\tAN ", "\n\nGAUuACaN"])
def test_plain_letters_are_a_genome_to_a_model_of_genomes(name: str, text: str) -> None:
    tokenizer, ids = GENOMES[name]
    (document,) = documents_in(text)
    assert Encoder(tokenizer)(document).tolist() == [ids[one] for one in "GATTACAN"]


def test_other_texts_stay_as_they_are() -> None:
    for tokenizer in (EvoTokenizer(), ByteTokenizer()):
        text = "|d__Bacteria|acgt\n"
        assert Encoder(tokenizer)(Document(text)).tolist() == list(text.encode())
    assert Encoder(ByteTokenizer())(Document("a cat\n")).tolist() == list(b"a cat\n")


def test_special_tokens_in_a_prompt_of_nucleotides() -> None:
    encode = Encoder(DNATokenizer())
    assert encode(Document("[BOS]ac[MASK]\nG")).tolist() == [2, 7, 8, 3, 9]


@pytest.mark.parametrize(
    "text", ["MKVLE", "A quotation.", "ACGT>", "ACGé", "1 ACGT", " 2 4\na ACGT"]
)
def test_a_tokenizer_of_nucleotides_refuses_other_texts(text: str) -> None:
    with pytest.raises(ValueError, match="the text: '"):
        Encoder(DNATokenizer())(Document(text))


@pytest.mark.parametrize("text", [">a\nRACGT\n", ">p\nMKVLE\n"])
def test_what_may_be_fasta_is_no_text_to_a_model_of_genomes(text: str) -> None:
    (document,) = documents_in(text)
    assert not document.genome
    for tokenizer in (DNATokenizer(), EvoTokenizer()):
        with pytest.raises(ValueError, match="'>'"):
            Encoder(tokenizer)(document)
    assert Encoder(ByteTokenizer())(document).tolist() == list(text.encode())


def test_a_tokenizer_without_nucleotides_refuses_a_genome() -> None:
    encode = Encoder(words([*"0123456789"], unk_token="?"))
    assert encode(Document("17")).tolist() == [2, 8]
    with pytest.raises(ValueError, match="does not know the nucleotides A, C, G and T"):
        encode(Document("ACGT", genome=True))


def test_a_code_without_a_token_is_named() -> None:
    drops_others = Tokenizer(models.BPE({"A": 0, "C": 1, "G": 2, "T": 3}, []))
    encode = Encoder(PreTrainedTokenizerFast(tokenizer_object=drops_others))
    assert encode(Document("GATTACA", genome=True)).tolist() == [2, 0, 3, 3, 0, 1, 0]
    with pytest.raises(ValueError, match="no token for the code 'N'"):
        encode(Document("ACNGT", genome=True))


def test_special_tokens_stand_around_a_genome() -> None:
    tokenizer = words([*"ACGTN"], unk_token="?", cls_token="<c>", sep_token="<s>")
    document = Document("GATTACA", genome=True)
    ids, size = Encoder(tokenizer).sized(document)
    assert ids.tolist() == tokenizer("GATTACA").input_ids and size == 7
    assert len(Encoder(tokenizer, special_tokens=False)(document)) == 7


def test_pieces_of_a_genome_are_the_whole(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    text = "".join(random.choice([*"ACGTNRY"], size=300))
    pieces = [text[:1], text[1:100], text[100:]]
    merged = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(
            models.BPE(
                {"A": 0, "C": 1, "G": 2, "T": 3, "N": 4, "R": 5, "Y": 6, "AC": 7}, [("A", "C")]
            )
        )
    )
    for tokenizer in (DNATokenizer(), EvoTokenizer(), merged):
        encode = Encoder(tokenizer)
        parts = encode.encode_pieces(piece.encode() for piece in pieces)
        whole = encode(Document(text, genome=True))
        assert np.concatenate(list(parts)).tolist() == whole.tolist() == tokenizer(text).input_ids
    assert Encoder(merged).letters is None and 7 in whole


@pytest.mark.parametrize("name", ["fasta", "text"])
@pytest.mark.parametrize("model", GENOMES)
def test_a_task_is_read_by_the_models_own_tokenizer(name: str, model: str, tmp_path: Path) -> None:
    (tmp_path / "x.fa").write_text(">a\nGATT\nacan\n")
    tokenizer, ids = GENOMES[model]
    task = tasks.build(name, train=str(tmp_path / "x.fa"), length=100).tokens_of(tokenizer)
    (row,) = task.rows("train", 0)
    expected = [ids[one] for one in "GATTACAN"]
    assert row["input_ids"].tolist()[: len(expected)] == expected[: len(row["input_ids"])]
    description = task.description()
    assert description.vocab_size == len(tokenizer)
    assert description.pad_token_id == (tokenizer.pad_token_id or 0)
    assert task.own_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_a_task_with_a_tokenizer_of_its_own_refuses_another() -> None:
    task = tasks.build("fasta", train="x", tokenizer=DNATokenizer("ACGU"))
    with pytest.raises(ValueError, match="leave the setting tokenizer out"):
        task.tokens_of(DNATokenizer())
    same = task.tokens_of(DNATokenizer("ACGU"))
    assert same is task
    abstract = tasks.build("mqar")
    assert abstract.tokens_of(DNATokenizer()) is abstract and abstract.own_tokenizer() is None


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"train": []}, "train must be a path or pattern, or a list of them; got []"),
        ({"train": "x", "test": [None]}, "test must be a path or pattern, or a list of them"),
        ({"train": ""}, "train must be a path or pattern"),
    ],
)
@pytest.mark.parametrize("name", ["fasta", "text"])
def test_files_are_paths(name: str, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        tasks.build(name, **settings)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"separator": 1}, "separator must be a text"),
        ({"separator": ""}, "separator must be a text"),
        ({"corpus_config": "raw"}, "corpus_config needs a corpus"),
        ({"column": "body"}, "column is 'body', but none of the train files has keys"),
    ],
)
def test_settings_that_would_do_nothing(
    settings: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "x.txt").write_text("text")
    with pytest.raises(ValueError, match=sentence):
        list(tasks.build("text", train=tmp_path / "x.txt", **settings).rows("train", 0))


@pytest.mark.parametrize("name", ["fasta", "text"])
def test_a_tokenizer_that_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    task = tasks.build(name, train="x", tokenizer=str(tmp_path / "none"))
    with pytest.raises(OSError, match=r"the tokenizer .*none cannot be loaded"):
        task.description()


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        (".fa", r"files in \.fa have a reader already"),
        ("gb", "must begin with a period, in lower case; got 'gb'"),
        (".GB", "must begin with a period, in lower case; got '.GB'"),
    ],
)
def test_a_reader_is_registered_for_a_suffix_of_its_own(suffix: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        register_reader(suffix)
