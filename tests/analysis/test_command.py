"""`gramian analyze` as its users meet it."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from transformers import LlamaConfig, LlamaForCausalLM

import gramian
from gramian import cli, tasks
from gramian.analysis import StateReport, StateReports, analyze_texts, open_model
from gramian.models import (
    ByteTokenizer,
    GramianConfig,
    GramianForCausalLM,
    GramianForPairClassification,
    GramianForSequenceClassification,
)

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """The command in this process: status, output and errors."""

    def main(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gramian", "analyze", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "120")
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main()
        assert isinstance(exit.value.code, int)
        return (exit.value.code, *capfd.readouterr())

    return main


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of ours, one of transformers, a text, and what is no model."""
    folder = tmp_path_factory.mktemp("analyze")
    torch.manual_seed(0)
    config = GramianConfig(
        hidden_size=12,
        num_hidden_layers=2,
        num_heads=3,
        mixers=["multi_hyena", "softmax_attention"],
        filter={"type": "modal", "orders": 2},
        max_position_embeddings=63,
    )
    GramianForCausalLM(config).save_pretrained(folder / "own")
    tokenizer = ByteTokenizer()
    foreign = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )
    foreign.save_pretrained(folder / "foreign")
    classes = GramianConfig(
        hidden_size=8, num_hidden_layers=1, num_heads=2, input_size=1, num_labels=10
    )
    GramianForSequenceClassification(classes).save_pretrained(folder / "digits")
    pairs = GramianConfig(hidden_size=8, num_hidden_layers=1, num_heads=2, num_labels=2)
    GramianForPairClassification(pairs).save_pretrained(folder / "pairs")
    recall = GramianConfig(hidden_size=8, num_hidden_layers=1, num_heads=2, vocab_size=40)
    GramianForCausalLM(recall).save_pretrained(folder / "recall")
    GramianForCausalLM(recall).save_pretrained(folder / "run" / "best")
    (folder / "run.yaml").write_text(
        "output: x\ntask: {name: digits}\nmodel: {}\noptimization: {steps: 1}\n"
    )
    (folder / "text.txt").write_text("A text. Another sentence! And a third one?\n")
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    (folder / "empty").mkdir()
    return folder


@pytest.fixture(scope="module")
def saved(place: Path) -> Path:
    """The report of the model of ours on a short text, which draws no figures."""
    model, tokenizer = open_model(place / "own")
    report = gramian.analyze(model, "some words", tokenizer=tokenizer, every=3)
    return dataclasses.replace(report, model=str(place / "own")).save(place / "saved.json")


def test_json_is_the_report(call: Call, place: Path) -> None:
    status, out, _ = call(
        place / "own", "--text", place / "text.txt", "--every", 5, "--horizon", 31, "--json"
    )
    assert status == 0
    report = StateReport.from_dict(json.loads(out))
    assert report.horizon == 31 and report.positions == tuple(range(0, 31, 5))
    model, tokenizer = open_model(place / "own")
    ids = tokenizer((place / "text.txt").read_text()).input_ids[:31]
    expected = gramian.analyze(model, ids, tokenizer=tokenizer, every=5)
    assert report.tokens == expected.tokens
    for one, other in zip(report.layers, expected.layers, strict=True):
        assert one.name == other.name and torch.equal(one.ess, other.ess)


def test_positions_and_a_tolerance_are_passed_on(call: Call, place: Path) -> None:
    arguments = ["--prompt", "memory " * 6, "--positions", 4, "--tolerance", 0.05]
    status, out, _ = call(place / "own", *arguments, "--json")
    assert status == 0
    assert json.loads(out)["positions"] == [5, 15, 26, 36]


def test_a_tolerance_out_of_range_takes_one_line(call: Call, place: Path) -> None:
    status, _, err = call(place / "own", "--prompt", "memory", "--tolerance", 0)
    assert status != 0
    assert "tolerance must be at least 0.001 and below 1; got 0.0." in " ".join(err.split())


def test_a_table_and_a_folder_of_pictures(call: Call, place: Path, tmp_path: Path) -> None:
    status, out, _ = call(place / "own", "--prompt", "some words", "-o", tmp_path / "out")
    assert status == 0 and "MultiHyena" in out and "SoftmaxAttention" in out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"page.html", "report.json", "map.png", "curves.png", "utilization.png"}
    status, _, err = call(place / "own", "--prompt", "some words", "-o", tmp_path / "out")
    assert status == 1 and "exists already" in err


def test_several_models_on_one_text(call: Call, place: Path, tmp_path: Path) -> None:
    arguments = ["--prompt", "some words", "--format", "svg", "--html", tmp_path / "page.html"]
    status, out, err = call(
        place / "own", place / "own", *arguments, "-o", tmp_path / "both", "--json"
    )
    assert status == 0, err
    assert len(json.loads(out)["models"]) == 2
    assert (tmp_path / "both" / "comparison.svg").is_file()
    assert (tmp_path / "both" / "map-2.svg").is_file()
    assert "some words"[0] in (tmp_path / "page.html").read_text()


def test_rows_of_tasks_are_read(call: Call, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    mqar = {"vocab_size": 40, "length": 16, "pairs": 2, "eval_examples": 3}
    settings = [part for key, value in mqar.items() for part in ("--set", f"{key}={value}")]
    status, out, err = call(
        "recall", "--task", "mqar", *settings, "--row", 1, "--seed", 4, "--every", 3, "--json"
    )
    assert status == 0, err
    report = StateReport.from_dict(json.loads(out))
    row = list(tasks.build("mqar", **mqar).rows("test", 4))[1]
    expected = gramian.analyze(open_model("recall")[0], torch.as_tensor(row["input_ids"]), every=3)
    assert report.tokens == expected.tokens == tuple(map(str, row["input_ids"]))
    assert report.source == "mqar, test split, row 1, seed 4" and report.model == "recall"
    assert torch.equal(report.layers[0].ess, expected.layers[0].ess)

    status, out, err = call("digits", "--config", "run.yaml", "--horizon", 20, "--json")
    assert status == 0, err
    assert StateReport.from_dict(json.loads(out)).horizon == 20
    text = ["--task", "python_documentation", "--set", "length=16", "--split", "validation"]
    for model in ("own", "pairs"):  # one sequence is enough for a model of pairs
        status, out, err = call(model, *text, "--json")
        assert status == 0, err
        assert StateReport.from_dict(json.loads(out)).tokens[:7] == tuple("Mapping")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["own"], 2, "--prompt"),
        (["own", "--prompt", "a", "--text", "text.txt"], 2, "--prompt"),
        (["own", "--prompt", "a", "--format", "gif"], 2, "png or svg"),
        (["own", "--prompt", ""], 1, "no tokens"),
        (["own", "--prompt", "a", "--measure", "rank"], 1, "rank"),
        (["own", "--text", "latin.txt"], 1, "UTF-8"),
        (["own", "--text", "absent.txt"], 1, "absent.txt"),
        (["text.txt", "--prompt", "a"], 1, "GGUF"),
        (["empty", "--prompt", "a"], 1, "empty"),
        (["foreign", "--prompt", "a"], 1, "foreign"),
        (
            ["recall", "--prompt", "a"],
            1,
            "recall has no tokenizer, so it cannot read a text; save the one",
        ),
        (["recall", "--prompt", "a", "--task", "mqar"], 2, "--task"),
        (["recall", "--prompt", "a", "--set", "length=3"], 2, "--set needs --task"),
        (["run", "--prompt", "a"], 1, "is the folder of a training run; its models are run/best"),
        (["recall", "--task", "mqr"], 1, "unknown task 'mqr'. Did you mean 'mqar'?"),
        (["recall", "--task", "mqar", "--split", "tset"], 1, "Did you mean 'test'?"),
        (["recall", "--task", "digits", "--row", "1000000"], 1, "has no row 1000000"),
        (["recall", "--task", "digits"], 1, "reads token ids; it was given continuous inputs"),
        (["digits", "--task", "mqar"], 1, "reads continuous inputs; it was given token ids"),
    ],
)
def test_mistakes_take_one_line(
    call: Call,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    status: int,
    message: str,
) -> None:
    monkeypatch.chdir(place)
    got, out, err = call(*arguments)
    assert got == status and message in err and not out
    assert "Traceback" not in err
    if status == 1:
        assert len(err.strip().splitlines()) == 1


def test_saved_reports_are_compared_over_depth(
    call: Call, place: Path, saved: Path, tmp_path: Path
) -> None:
    options = ["--prompt", "some words", "--every", 3]
    status, out, err = call(
        *(place / "own", *options, "--compare", saved, "--compare", saved),
        *("-o", tmp_path / "both", "--html", tmp_path / "page.html", "--json"),
    )
    assert status == 0, err
    values = json.loads(out)
    (report,) = values["models"]
    comparison = values["comparison"]
    assert comparison["models"] == [f"{place / 'own'} ({saved})"] * 2 + [str(place / "own")]
    assert comparison["models_average_ess"] == pytest.approx([report["average_ess"]] * 3)
    assert comparison["in_use_difference"] == [[pytest.approx(0)] * 2] * 3
    names = {path.name for path in (tmp_path / "both").iterdir()}
    assert {"report.json", "map.png", "comparison.png", "depth.png", "comparison.json"} <= names
    assert json.loads((tmp_path / "both" / "comparison.json").read_text()) == comparison
    assert (tmp_path / "page.html").read_text().count('"layers":[') == 3

    status, out, err = call("--compare", saved, "--compare", saved)
    assert status == 0 and "relative depth" in out and "(+0.00)" in out, err
    status, out, err = call(place / "own", place / "own", *options)
    assert status == 0 and "relative depth" in out, err


def test_what_cannot_be_compared_is_refused(
    call: Call, place: Path, saved: Path, tmp_path: Path
) -> None:
    again = [place / "own", "--compare", saved]
    for arguments, wanted, message in (
        (["--compare", saved], 2, "give a MODEL, or at least two reports"),
        (["--compare", saved, "--compare", saved, "--prompt", "a"], 2, "need a MODEL that reads"),
        ([*again, "--prompt", "words"], 1, "same number of tokens; got 10 and 5"),
        ([*again, "--prompt", "some words", "--measure", "tolerance", "--tol", 1], 1, "--measure"),
        (
            [place / "own", "--prompt", "a", "--compare", place / "text.txt"],
            1,
            "not a state report",
        ),
        ([place / "own", "--prompt", "a", "--compare", "absent.json"], 1, "absent.json"),
    ):
        status, out, err = call(*arguments, "-o", tmp_path / "out")
        assert status == wanted and message in err, err
        assert not out and not (tmp_path / "out").exists()
    status, _, err = call(*again, "--prompt", "more words")  # as long as what was read
    assert status == 0, err


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_of_all_models(call: Call, place: Path, tmp_path: Path, suffix: str) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    file = tmp_path / f"states.{suffix}"
    status, out, err = call(place / "own", place / "own", "--prompt", "some words", "--table", file)
    assert status == 0 and str(file) in out.replace("\n", ""), err
    frame = pandas.read_csv(file) if suffix == "csv" else pandas.read_parquet(file)
    report = gramian.analyze(*open_model(place / "own")[:1], list(b"some words"))
    assert len(frame) == 2 * sum(layer.ess.numel() for layer in report.layers)
    status, _, err = call(place / "own", "--prompt", "a", "--table", tmp_path / "states.xlsx")
    assert status == 2 and ".csv or .parquet; got states.xlsx" in " ".join(err.split())


def test_layers_are_ranked(call: Call, place: Path) -> None:
    status, out, err = call(place / "own", "--prompt", "some words", "--rank")
    assert status == 0 and "suggestion" in out and "Measure the loss" in " ".join(out.split()), err
    status, out, _ = call(place / "own", "--prompt", "some words")
    assert status == 0 and "suggestion" not in out


def test_encoders_take_one_line(
    call: Call, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    size = {"vocab_size": 259, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    t5 = {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 16}
    for kind, auto, sizes in (
        ("t5", AutoModelForSeq2SeqLM, size | t5),
        ("bert", AutoModelForCausalLM, size | {"intermediate_size": 16}),
    ):
        folder = tmp_path / kind
        auto.from_config(AutoConfig.for_model(kind, **sizes)).save_pretrained(folder)
        ByteTokenizer().save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    for kind, message in (("t5", "an encoder-decoder model"), ("bert", "is not causal")):
        status, out, err = call(kind, "--prompt", "some words")
        assert status == 1 and message in err and not out
        assert len(err.strip().splitlines()) == 1 and len(err) < 300


def test_several_texts_have_means_and_spreads(call: Call, place: Path, tmp_path: Path) -> None:
    texts = ["A text. Another one.", "Something else! And more?", "The third of them, longer."]
    lines = tmp_path / "texts.jsonl"
    lines.write_text("\n".join(json.dumps({"text": one}) for one in texts))
    out, table = tmp_path / "out", tmp_path / "table.csv"
    arguments = ["--text", lines, "--texts", 2, "--text", place / "text.txt", "--every", 3]
    status, shown, err = call(place / "own", *arguments, "-o", out, "--table", table)
    assert status == 0, err
    assert "of 3 texts of 20 to 43 tokens" in " ".join(shown.split()) and "±" in shown
    names = {path.name for path in out.iterdir()}
    assert names == {"page.html", "reports.json", "spread.png"}
    model, tokenizer = open_model(place / "own")
    chosen = [*texts[:2], (place / "text.txt").read_text()]
    expected = analyze_texts(model, chosen, tokenizer=tokenizer, every=3)
    saved = StateReports.load(out / "reports.json")
    assert saved.names == (f"{lines}, document 1", f"{lines}, document 2", f"{place}/text.txt")
    for one, other in zip(saved, expected, strict=True):
        for mine, theirs in zip(one.layers, other.layers, strict=True):
            assert torch.equal(mine.ess, theirs.ess)
    with table.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0][:2] == ["text", "model"] and len(rows) == 1 + sum(
        layer.ess.numel() for report in saved for layer in report.layers
    )
    status, shown, _ = call(place / "own", place / "own", *arguments, "--json")
    assert status == 0
    (one, _) = json.loads(shown)["models"]
    assert one["average"]["mean"] == pytest.approx(expected.average().mean)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["own", "--prompt", "a", "--texts", "2"], 2, "--texts needs --text"),
        (["own", "--text", "text.txt", "--texts", "2"], 1, "has one document"),
        (["own", "--text", "text.txt", "--text", "text.txt", "--rank"], 2, "take one text"),
        (["own", "--text", "text.txt", "--text", "absent.txt"], 1, "absent.txt"),
        (["recall", "--text", "text.txt", "--text", "text.txt"], 1, "recall has no tokenizer"),
    ],
)
def test_mistakes_with_several_texts_take_one_line(
    call: Call,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    status: int,
    message: str,
) -> None:
    monkeypatch.chdir(place)
    got, out, err = call(*arguments)
    assert got == status and message in err and not out
