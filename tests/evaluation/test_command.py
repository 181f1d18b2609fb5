"""`gramian evaluate` as its users meet it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("typer")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")

from transformers import GPT2Config, GPT2LMHeadModel

from gramian import cli
from gramian.evaluation import count_bigrams, evaluate_task, perplexity
from gramian.models import (
    ByteTokenizer,
    GramianConfig,
    GramianForCausalLM,
    GramianForSequenceClassification,
    GramianForSignalRegression,
    load,
    load_any,
)
from gramian.tasks import build

Call = Callable[[str], tuple[int, str, str]]
LISTOPS = {"name": "lra/listops", "min_length": 4, "max_length": 24, "eval_examples": 9}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of ours, one of transformers, a classifier, a text, a configuration."""
    folder = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "max_position_embeddings": 32}
    ours = GramianForCausalLM(GramianConfig(**sizes, num_heads=2))
    gpt2 = GPT2LMHeadModel(
        GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=32, vocab_size=259)
    )
    for name, model in (("ours", ours), ("gpt2", gpt2)):
        model.save_pretrained(folder / name)
        ByteTokenizer().save_pretrained(folder / name)
    ours.save_pretrained(folder / "wordless")
    small = GramianConfig(**sizes, num_heads=2, vocab_size=40)
    GramianForCausalLM(small).save_pretrained(folder / "small")
    classes = GramianConfig(**sizes, num_heads=2, vocab_size=18, num_labels=10)
    GramianForSequenceClassification(classes).save_pretrained(folder / "classifier")
    signal = GramianConfig(**sizes, num_heads=2, input_size=1, num_labels=2)
    GramianForSignalRegression(signal).save_pretrained(folder / "signal")
    (folder / "text.txt").write_text("All models are wrong, some are small. " * 3)
    (folder / "one.txt").write_text("A")
    (folder / "latin.txt").write_bytes("naïve".encode("latin-1"))
    run = {"output": "x", "seed": 7, "task": LISTOPS, "model": {}, "optimization": {"steps": 1}}
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder


@pytest.fixture
def call(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Call:
    monkeypatch.chdir(workplace)

    def main(arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gramian", "evaluate", *arguments.split()])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main()
        assert isinstance(exit.value.code, int)
        return (exit.value.code, *capfd.readouterr())

    return main


def test_a_text_by_two_kinds_of_models(workplace: Path, call: Call) -> None:
    status, out, _ = call("ours --against gpt2 --text text.txt --window 16 --stride 4 --json")
    assert status == 0
    report = json.loads(out)
    text = (workplace / "text.txt").read_text()
    for key, model in (
        ("measures", load(workplace / "ours")),
        ("before", GPT2LMHeadModel.from_pretrained(workplace / "gpt2").eval()),
    ):
        score = perplexity(model, ByteTokenizer(), text, window=16, stride=4)
        values = {one["metric"]: one["value"] for one in report[key]}
        assert values["perplexity"] == pytest.approx(score.perplexity, rel=1e-5)
        assert values["bits_per_byte"] == pytest.approx(score.bits_per_byte, rel=1e-5)
    status, out, _ = call("ours --against gpt2 --text text.txt --window 16")
    assert status == 0 and "difference" in out and "perplexity" in out


def test_a_training_text_bounds_what_counts_as_recalled(workplace: Path, call: Call) -> None:
    text = (workplace / "text.txt").read_text()
    bigrams = count_bigrams(text, ByteTokenizer())
    model = load(workplace / "ours")
    for given, rare in (("", None), (" --rare 3", 3)):
        line = f"ours --text text.txt --window 64 --training-text text.txt{given} --json"
        status, out, err = call(line)
        assert status == 0, err
        report = json.loads(out)
        score = perplexity(
            model, ByteTokenizer(), text, window=64, training_bigrams=bigrams, rare=rare
        )
        tokens = {one["metric"]: one["tokens"] for one in report["measures"]}
        assert tokens.get("bigram_recall_perplexity", 0) == score.recall_tokens
        assert report["conditions"]["rare"] == score.rare == (rare or 1250)


def test_tasks_with_settings_and_of_a_training_configuration(workplace: Path, call: Call) -> None:
    settings = "--set vocab_size=32 --set length=16 --set pairs=2 --set eval_examples=8"
    status, out, _ = call(f"ours --task mqar {settings} --limit 5 --seed 3 --json")
    assert status == 0
    task = build("mqar", vocab_size=32, length=16, pairs=2, eval_examples=8)
    expected = evaluate_task(load(workplace / "ours"), task, name="mqar", seed=3, examples=5)
    found = json.loads(out)["measures"]
    assert [one["metric"] for one in found] == [one.metric for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["value"] == pytest.approx(other.value, rel=1e-5) and one["units"] == 5
    status, out, _ = call("classifier --config run.yaml --split validation --json")
    assert status == 0
    report = json.loads(out)
    found = report["measures"]
    listops = build(LISTOPS["name"], **{k: v for k, v in LISTOPS.items() if k != "name"})
    model = load_any(workplace / "classifier")
    assert isinstance(model, GramianForSequenceClassification)
    expected = evaluate_task(model, listops, split="validation", seed=7)  # the configuration's
    assert found[0]["value"] == pytest.approx(expected[0].value, rel=1e-5)
    assert report["conditions"]["seed"] == 7
    conditions = report["conditions"]["tasks"]["lra/listops"]
    assert (conditions["split"], conditions["max_length"]) == ("validation", 24)
    status, out, _ = call("classifier --config run.yaml --set eval_examples=2 --seed 1")
    assert status == 0 and "test split, seed 1" in " ".join(out.split())
    assert " 2 " in out
    assert [(one["task"], one["metric"], one["units"]) for one in found] == [
        ("lra/listops", "loss", 9),
        ("lra/listops", "accuracy", 9),
    ]
    settings = "--set length=40 --set lags=2 --set lag=5 --set eval_examples=4"
    status, out, _ = call(f"signal --task delay {settings} --json")
    assert status == 0
    assert [one["metric"] for one in json.loads(out)["measures"]] == ["mse", "relative_error"]


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        ("ours", 2, "at least one of --task"),
        ("ours --text text.txt --set a=1", 2, "--set needs one --task"),
        ("nowhere --text text.txt", 1, "there is no model nowhere"),
        ("ours --text nowhere.txt", 1, "the text nowhere.txt cannot be read: No such file"),
        ("ours --text latin.txt", 1, "is not UTF-8 text"),
        ("ours --text text.txt --window 4 --stride 5", 2, "--stride must be at most --window, 4"),
        ("ours --text text.txt --rare 3", 2, "--rare needs --training-text; got 3 alone"),
        ("ours --task mqar --training-text text.txt", 2, "--training-text needs --text"),
        ("ours --text text.txt --training-text one.txt", 1, "--training-text: no document has two"),
        ("ours --text text.txt --output gpt2", 1, "exists already"),
        ("ours --text text.txt --device nowhere", 1, "--device nowhere"),
        ("small --text text.txt", 1, "has no tokenizer, so it cannot read a text; save the one"),
        ("small --task mqr", 1, "unknown task of ours 'mqr'. Did you mean 'mqar'?"),
        (".", 2, "at least one of --task"),
        ("small --task mqar --set vocab_size=64 --set pairs=2 --set length=16", 1, "has 64 tokens"),
        ("ours --task mqar --set par=2", 1, "Did you mean 'pairs'"),
        ("ours --task mqar --split tests --set pairs=2 --set vocab_size=80", 1, "unknown split"),
        ("ours --task delay", 1, "of the kind 'signal'"),
        ("classifier --text text.txt", 1, "is a GramianForSequenceClassification; texts need"),
        ("ours --text text.txt --include-path nowhere", 1, "no folder nowhere"),
    ],
)
def test_mistakes_get_one_line(call: Call, arguments: str, status: int, sentence: str) -> None:
    code, out, err = call(arguments)
    assert (code, out) == (status, "")
    assert sentence in " ".join(err.split())
    if status == 1:
        assert err.count("\n") == 1


def test_tasks_of_the_harness_need_it(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "lm_eval" else find(name)
    )
    status, _, err = call("ours --task mqr")
    assert status == 1 and err.count("\n") == 1
    assert "unknown task 'mqr'. Did you mean 'mqar'?" in err and "gramian[evaluate]" in err
