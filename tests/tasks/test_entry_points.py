"""One genome is one number, whichever file it comes in and whichever command reads it."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")

import gramian
from gramian import cli, tasks
from gramian.checkpoints import DNATokenizer, EvoTokenizer
from gramian.cli._inputs import spread_windows
from gramian.evaluation import evaluate_task, perplexity
from gramian.models import GramianConfig, GramianForCausalLM
from gramian.training import parse_config
from gramian.training._run import _task

GENOME = "".join(np.random.default_rng(0).choice([*"ACGT"], size=150))
LINES = [GENOME[i : i + 40] for i in range(0, len(GENOME), 40)]
FILES: dict[str, bytes] = {
    "plain.txt": GENOME.encode(),
    "plain_lower.txt": (GENOME.lower() + "\n").encode(),
    "plain_lines.txt": "\r\n".join(LINES).encode(),
    "plain_rna.txt": GENOME.replace("T", "U").encode(),
    "x.fna": "\n".join([">chr1 a genome", *LINES, ""]).encode(),
    "x.txt": "\n".join([">chr1 ACGT", *LINES, ""]).encode(),
    "crlf.fa": "\r\n".join([">chr1", *LINES, "", ""]).encode(),
    "cr.fa": "\r".join([">chr1", *LINES, ""]).encode(),
    "masked.fa": "\n".join([">chr1", LINES[0].lower(), *LINES[1:]]).encode(),
    "bom.fa": "\n".join(["\ufeff>chr1", *LINES]).encode(),
    "comments.fa": "\n".join(["; of a bank", ">chr1", "; again", *LINES, ">empty"]).encode(),
    "numbered.fa": "\n".join([">", *(f"  {i} {one}" for i, one in enumerate(LINES))]).encode(),
    "rna.fa": "\n".join([">chr1", *LINES]).replace("T", "u").encode(),
    "x.fa.gz": gzip.compress(b">chr1\n") + gzip.compress("\n".join(LINES).encode()),
}
MODELS: dict[str, Any] = {"dna": DNATokenizer(), "evo": EvoTokenizer()}


def saved(folder: Path, name: str) -> GramianForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_heads": 2, "initializer_range": 0.5}
    size = {"dna": 16, "evo": 256}[name]
    model = GramianForCausalLM(
        GramianConfig(**sizes, vocab_size=size, max_position_embeddings=64)
    ).eval()
    model.save_pretrained(folder / name)
    MODELS[name].save_pretrained(folder / name)
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("genomes")
    for name in MODELS:
        saved(folder, name)
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    (folder / "two.fa").write_text(f">a\n{GENOME[:50]}\n>b\n{GENOME[50:]}\n")
    (folder / "protein.fa").write_text(">p\nMKVLAAGIVGL\n")
    (folder / "protein.txt").write_text(">p\nMKVLAAGIVGL\n")
    (folder / "reads.fastq").write_text("@a\nACGT\n+\nIIII\n")
    (folder / "empty.fa").write_text("")
    return folder


@pytest.fixture
def call(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[[str], tuple[int, str, str]]:
    def main(line: str) -> tuple[int, str, str]:
        monkeypatch.chdir(place)
        monkeypatch.setattr(sys, "argv", ["gramian", *line.split()])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert isinstance(ended.value.code, int)
        return (ended.value.code, *capfd.readouterr())

    return main


def loss_of(model: GramianForCausalLM, ids: list[int], window: int) -> float:
    """Of windows side by side, each token but the first once: what every reading must give."""
    total = 0.0
    for start in range(0, len(ids) - 1, window):
        part = torch.tensor(ids[start : start + window + 1])
        with torch.no_grad():
            logits = model(part[None, :-1]).logits[0]
        total += float(torch.nn.functional.cross_entropy(logits, part[1:], reduction="sum"))
    return total / (len(ids) - 1)


@pytest.mark.parametrize("name", MODELS)
def test_one_loss_for_one_genome(call: Any, place: Path, name: str) -> None:
    model = gramian.models.load(place / name)
    expected = loss_of(model, MODELS[name](GENOME).input_ids, 32)
    texts = " ".join(f"--text {file}" for file in FILES)
    status, out, err = call(f"evaluate {name} {texts} --window 32 --stride 32 --json")
    assert status == 0, err
    losses = {
        one["task"]: one["value"] for one in json.loads(out)["measures"] if one["metric"] == "loss"
    }
    assert losses.keys() == FILES.keys()
    for value in losses.values():
        assert value == pytest.approx(expected, rel=1e-6)
    for file in FILES:
        if not file.startswith("plain"):
            settings = f"--set test={file} --set length=32"
            status, out, err = call(f"evaluate {name} --task fasta {settings} --json")
            assert status == 0, err
            found = {one["metric"]: one["value"] for one in json.loads(out)["measures"]}
            assert found["loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "file"),
    [*(("dna", file) for file in FILES), ("evo", "cr.fa"), ("evo", "plain_lines.txt")],
)
def test_distillation_and_analysis_read_the_same_tokens(
    call: Any, place: Path, name: str, file: str
) -> None:
    ids = MODELS[name](GENOME).input_ids
    model = gramian.models.load(place / name)
    windows = spread_windows(place / name, model, place / file, 65_536)
    assert windows.shape == (2, 64) and windows.flatten().tolist() == ids[:128]
    status, out, err = call(f"analyze {name} --text {file} --horizon 20 --every 19 --json")
    assert status == 0, err
    assert "".join(json.loads(out)["tokens"]) == GENOME[:20]


@pytest.mark.each
@pytest.mark.parametrize("prompt", [f">a\n{GENOME}\n", GENOME, GENOME.lower(), GENOME + "\r\n"])
@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_is_a_genome(
    call: Any, place: Path, monkeypatch: pytest.MonkeyPatch, name: str, prompt: str
) -> None:
    monkeypatch.setattr("builtins.print", lambda text: results.append(json.loads(text)))
    results: list[dict[str, Any]] = []
    for text in (GENOME, prompt):
        line = ["gramian", "generate", name, "--prompt", text, "--max-new-tokens", "6"]
        monkeypatch.chdir(place)
        monkeypatch.setattr(sys, "argv", [*line, "--greedy", "--json"])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        assert exit.value.code == 0
    assert results[0]["text"] == results[1]["text"]
    assert results[1]["prompt_tokens"] == len(GENOME)
    model = gramian.models.load(place / name)
    options = {"tokenizer": MODELS[name], "every": 30}
    one, other = (gramian.analyze(model, text, **options) for text in (GENOME, prompt))
    assert one.tokens == other.tokens
    assert torch.equal(one.layers[0].ess, other.layers[0].ess)


@pytest.mark.each
@pytest.mark.parametrize("file", [name for name in FILES if name.startswith(("x", "cr", "plain"))])
@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_in_a_file_is_a_genome(call: Any, name: str, file: str) -> None:
    options = "--max-new-tokens 6 --greedy --prefill-chunk 64 --json"
    status, expected, err = call(f"generate {name} --prompt {GENOME} {options}")
    assert status == 0, err
    status, out, err = call(f"generate {name} --prompt-file {file} {options}")
    assert status == 0, err
    assert json.loads(out)["text"] == json.loads(expected)["text"]
    assert json.loads(out)["prompt_tokens"] == len(GENOME)


@pytest.mark.parametrize(
    ("options", "status", "sentence"),
    [
        ("--prompt-file two.fa", 1, "two.fa holds 2 documents"),
        ("--prompt-file empty.fa", 1, "empty.fa is empty"),
        ("--prompt-file protein.fa", 1, "a protein cannot be read as a genome"),
        ("--prompt-file absent.fa", 1, "absent.fa cannot be read"),
        ("--prompt-file x.fna --prompt A", 2, "give one of --prompt TEXT and --prompt-file FILE"),
        ("", 2, "give one of --prompt TEXT and --prompt-file FILE"),
    ],
)
def test_what_is_no_prompt_is_told(call: Any, options: str, status: int, sentence: str) -> None:
    found, out, err = call(f"generate dna {options}")
    assert (found, out) == (status, "")
    assert sentence in " ".join(err.replace("│", " ").split())


@pytest.mark.parametrize("name", MODELS)
def test_no_window_spans_two_records(call: Any, place: Path, name: str) -> None:
    model, tokenizer = gramian.models.load(place / name), MODELS[name]
    parts = [GENOME[:50], GENOME[50:]]
    losses = [loss_of(model, tokenizer(part).input_ids, 64) for part in parts]
    expected = (losses[0] * 49 + losses[1] * 99) / 148
    documents = list(tasks.read_documents(place / "two.fa"))
    score = perplexity(model, tokenizer, documents, window=64, stride=64)
    assert score.loss == pytest.approx(expected, rel=1e-6)
    assert score.tokens == score.bytes == 148
    same = perplexity(model, tokenizer, (place / "two.fa").read_text(), window=64, stride=64)
    assert same == score
    task = tasks.build("fasta", test=str(place / "two.fa"), length=64)
    found = evaluate_task(model, task, tokenizer=tokenizer)
    assert found[0].value == pytest.approx(expected, rel=1e-6)
    windows = spread_windows(place / name, model, place / "two.fa", 65_536)
    starts = [(0, 0), (1, 0), (1, 32), (1, 64)]  # half as long, as most would be lost otherwise
    assert windows.tolist() == [tokenizer(parts[p][i : i + 32]).input_ids for p, i in starts]
    status, _, err = call(f"check {name} --text two.fa --batch 4 --length 50")
    assert status == 1 and "two.fa has 150 tokens in 2 documents; 4 sequences of 50" in err
    status, out, _ = call(f"analyze {name} --text two.fa --horizon 60 --every 59 --json")
    report = json.loads(out)
    assert (len(report["tokens"]), report["source"]) == (50, "two.fa, document 1 of 2, a")


def test_windows_of_many_short_records(place: Path, tmp_path: Path) -> None:
    records = [f">long\n{GENOME[:64]}", *(f">r{i}\n{GENOME[i : i + 20]}" for i in range(60))]
    (tmp_path / "x.fa").write_text("\n".join(records))
    model = gramian.models.load(place / "dna")
    windows = spread_windows(place / "dna", model, tmp_path / "x.fa", 65_536)
    assert windows.shape[1] == 16 and windows.numel() >= (64 + 60 * 20) / 2


@pytest.mark.each
@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("protein.fa", "a protein cannot be read as a genome"),
        ("reads.fastq", "is FASTQ, not FASTA"),
        ("empty.fa", "empty.fa is empty"),
        ("absent.fa", "absent.fa"),
    ],
)
@pytest.mark.parametrize(
    "command",
    [
        "evaluate {} --text {file}",
        "evaluate {} --task fasta --set test={file}",
        "evaluate {} --task text --set test={file}",
        "distill {} out --max-increase 1% --text {file}",
        "check {} --text {file}",
        "analyze {} --text {file}",
        "analyze {} --task fasta --set test={file}",
    ],
)
def test_what_is_no_genome_is_one_sentence(
    call: Any, command: str, file: str, sentence: str
) -> None:
    status, out, err = call(command.format("dna", file=file))
    assert status == 1 and sentence in err and not out
    assert err.startswith("gramian: ") and "Error" not in err and err.count("\n") == 1


def test_a_protein_in_any_file_is_refused_by_a_model_of_nucleotides(call: Any) -> None:
    status, _, err = call("evaluate dna --text protein.txt")
    assert status == 1 and "protein.txt: 'L', '>'" in err


def test_several_records_are_no_prompt(call: Any, place: Path) -> None:
    model = gramian.models.load(place / "dna")
    with pytest.raises(ValueError, match="the text is 2 FASTA records"):
        gramian.analyze(model, ">a\nACGT\n>b\nACGT", tokenizer=DNATokenizer())


def test_a_model_has_its_own_tokenizer_in_python_too(place: Path) -> None:
    task = tasks.build("fasta", test=str(place / "x.fna"), length=32)
    for name, tokenizer in MODELS.items():
        model = gramian.models.load(place / name)
        expected = loss_of(model, tokenizer(GENOME).input_ids, 32)
        assert evaluate_task(model, task)[0].value == pytest.approx(expected, rel=1e-6)
    model = GramianForCausalLM(GramianConfig(**model.config.to_diff_dict() | {"eos_token_id": 0}))
    with pytest.raises(ValueError, match="whose eos_token_id is 0 and not 1; give the model's"):
        evaluate_task(model, task)
    assert evaluate_task(model, task, tokenizer=EvoTokenizer())


@pytest.mark.parametrize("name", MODELS)
def test_training_goes_on_in_the_tokens_of_the_model(place: Path, name: str) -> None:
    config = parse_config(
        {
            "output": "x",
            "task": {"name": "fasta", "train": str(place / "x.fna"), "length": 200},
            "model": {"path": str(place / name)},
            "optimization": {"steps": 1, "batch_size": 1},
        }
    )
    (row,) = _task(config).rows("train", 0)
    assert row["input_ids"].tolist() == MODELS[name](GENOME).input_ids[:-1]


WORDS = "One line.\nAnother, naïve one.\nThe last."
TEXTS: dict[str, bytes] = {
    "lf.txt": WORDS.encode(),
    "crlf.txt": WORDS.replace("\n", "\r\n").encode(),
    "cr.txt": WORDS.replace("\n", "\r").encode(),
    "bom.txt": ("\ufeff" + WORDS).encode(),
    "packed.txt": gzip.compress(WORDS.encode()),
    "lines.jsonl": (json.dumps({"text": WORDS}) + "\n\n").encode(),
    "bom.jsonl": ("\ufeff" + json.dumps({"n": 1, "text": WORDS}) + "\r\n").encode(),
    "empties.jsonl": "\n".join(json.dumps({"text": one}) for one in ("", WORDS, "")).encode(),
}


@pytest.mark.parametrize("name", TEXTS)
def test_one_loss_for_one_text(call: Any, place: Path, tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_heads": 2, "initializer_range": 0.5}
    model = GramianForCausalLM(GramianConfig(**sizes, max_position_embeddings=64)).eval()
    model.save_pretrained(tmp_path / "words")
    (tmp_path / name).write_bytes(TEXTS[name])
    ids = list(WORDS.encode())
    expected = loss_of(model, ids, 16)
    line = f"evaluate {tmp_path}/words --text {tmp_path / name} --window 16 --stride 16 --json"
    status, out, err = call(line)
    assert status == 0, err
    assert json.loads(out)["measures"][0]["value"] == pytest.approx(expected, rel=1e-6)
    line = f"evaluate {tmp_path}/words --task text --set test={tmp_path / name} --set length=16"
    status, out, err = call(f"{line} --json")
    assert status == 0, err  # a text's end is due too
    expected = loss_of(model, [*ids, 257], 16)
    assert json.loads(out)["measures"][0]["value"] == pytest.approx(expected, rel=1e-6)
    assert spread_windows(tmp_path / "words", model, tmp_path / name, 100).flatten().tolist() == ids
    status, out, err = call(f"analyze {tmp_path}/words --text {tmp_path / name} --every 49 --json")
    assert status == 0 and len(json.loads(out)["tokens"]) == len(ids), err
