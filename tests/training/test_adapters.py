"""Runs that train an adapter, and runs that go on from a model of another class."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("peft")

from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

from gramian import cli, tasks
from gramian.checkpoints import DNATokenizer
from gramian.evaluation import evaluate_task
from gramian.models import (
    GramianConfig,
    GramianForCausalLM,
    GramianForSequenceClassification,
    GramianForTokenClassification,
    load,
    load_any,
)
from gramian.training import parse_config, train
from gramian.training.configuration import ConfigError

TASK: dict[str, Any] = {
    "name": "mqar",
    "length": 16,
    "pairs": 2,
    "vocab_size": 32,
    "train_examples": 64,
    "eval_examples": 16,
}
LORA: dict[str, Any] = {"type": "lora", "r": 4, "lora_alpha": 8, "target_modules": ["in_proj"]}


def small(**options: Any) -> dict[str, Any]:
    settings = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 4}
    return settings | {"mixers": "hyena", "filter": {"type": "implicit", "hidden": 8}} | options


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    GramianForCausalLM(GramianConfig(**small())).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def run(output: Path, base: Path, adapter: Any = LORA, **sections: Any) -> Any:
    values: dict[str, Any] = {
        "output": str(output),
        "task": TASK,
        "model": {"path": str(base)},
        "adapter": adapter,
        "optimization": {"steps": 12, "batch_size": 8, "learning_rate": 1e-2},
        "evaluation": {"every": 6},
        "checkpoints": {"every": 4},
        "logging": {"every": 4},
        "hardware": {"device": "cpu"},
    }
    return parse_config(values | sections)


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_a_run_holds_an_adapter_of_its_base(tmp_path: Path, base: Path) -> None:
    before = hashes(base)
    report = train(run(tmp_path / "run", base))
    assert hashes(base) == before
    for name in ("best", "last"):
        folder = tmp_path / "run" / name
        assert {file.name for file in folder.iterdir()} == {
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert "\nlibrary_name: peft\n" in card and 'pip install "gramian[adapters]"' in card
        values = json.loads((folder / "adapter_config.json").read_text())
        assert values["base_model_name_or_path"] == str(base.resolve())
        assert (values["r"], values["lora_alpha"], values["task_type"]) == (4, 8, "CAUSAL_LM")
        names = load_file(folder / "adapter_model.safetensors")
        assert len(names) == 4 and all("in_proj.lora_" in one for one in names)
    merged = load(tmp_path / "run" / "last")
    task = tasks.build(**TASK)
    found = {m.metric: m.value for m in evaluate_task(merged, task, split="validation")}
    for name in ("loss", "accuracy"):
        assert found[name] == pytest.approx(report.metrics[name], rel=1e-4)
    start = {m.metric: m.value for m in evaluate_task(load(base), task, split="validation")}
    assert found["loss"] < start["loss"]

    # the merged weights are W + (alpha / r) B A, and no others differ
    tensors = load_file(tmp_path / "run" / "last" / "adapter_model.safetensors")
    expected = dict(load(base).named_parameters())
    for name, down in tensors.items():
        if "lora_A" in name:
            short = name.removeprefix("base_model.model.").replace(".lora_A", "")
            with torch.no_grad():
                expected[short].add_(2 * tensors[name.replace("lora_A", "lora_B")] @ down)
    for name, parameter in merged.named_parameters():
        assert_close(parameter, expected[name])
    ids = torch.arange(12)[None]
    unmerged = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "last").eval()
    again = PeftModel.from_pretrained(load(base), tmp_path / "run" / "last").eval()
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "last").eval()
    with torch.no_grad():
        for one in (unmerged, again, auto):
            assert_close(one(input_ids=ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-5)
    assert train(run(tmp_path / "run", base)) == report  # finished


@pytest.mark.parametrize(
    "sections",
    [
        {"hardware": {"device": "cpu", "gradient_checkpointing": True, "bf16": True}},
        {"optimization": {"steps": 4, "batch_size": 8, "packing": True, "accumulation": 2}},
        {"evaluation": {"every": 6, "ess": {"rows": 1, "every": 4, "channels": 2}}},
        {"regularization": {"ess": {"weight": 0.1, "target": 2.0, "sequences": 1, "channels": 1}}},
    ],
    ids=str,
)
def test_other_options_go_with_an_adapter(
    tmp_path: Path, base: Path, sections: dict[str, Any]
) -> None:
    report = train(run(tmp_path / "run", base, LORA, **sections))
    assert np.isfinite(report.metrics["loss"])
    if "evaluation" in sections:
        assert report.metrics["ess"] > 0
    if "regularization" in sections:
        lines = (tmp_path / "run" / "metrics.jsonl").read_text()
        assert "ess_penalty" in lines
    up = load_file(tmp_path / "run" / "last" / "adapter_model.safetensors")
    assert all(value.abs().sum() > 0 for name, value in up.items() if "lora_B" in name)


def learned(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = ("loss", "eval_loss")
    return [(one["step"], one[key]) for one in lines for key in keys if key in one]


def test_an_interrupted_run_resumes_to_the_same_losses(tmp_path: Path, base: Path) -> None:
    adapter = LORA | {"lora_dropout": 0.2, "target_modules": "all-linear"}
    report = train(run(tmp_path / "whole", base, adapter))
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for path in (tmp_path / "killed").glob("checkpoints/checkpoint-12"):
        shutil.rmtree(path)
    for name in ("report.json", "config.yaml"):
        (tmp_path / "killed" / name).unlink()
    shutil.rmtree(tmp_path / "killed" / "last")
    config = run(tmp_path / "killed", base, adapter)
    import yaml

    (tmp_path / "killed" / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    again = train(config)
    assert again.resumed_from == 8 and again.metrics == pytest.approx(report.metrics)
    assert learned(tmp_path / "killed") == learned(tmp_path / "whole")
    one, other = (
        load_file(tmp_path / name / "last" / "adapter_model.safetensors")
        for name in ("whole", "killed")
    )
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    names = {name.split(".lora_")[0].rpartition(".")[2] for name in one}
    assert {"in_proj", "down_proj", "output"} <= names  # the output of an implicit filter


@pytest.mark.parametrize(
    ("adapter", "sections", "message"),
    [
        ({"ranks": 4}, {}, "unknown key of adapter 'ranks'"),
        ({"type": "lora", "alpha": 4}, {}, "unknown key of adapter 'alpha'.*lora_alpha"),
        ({"base_model_name_or_path": "x"}, {}, "unknown key of adapter 'base_model_name_or_path'"),
        ({"type": "ia3"}, {}, r"adapter.type must be 'lora'; got 'ia3'\."),
        ({"r": 0, "target_modules": ["in_proj"]}, {}, "adapter: .*r.* should be a positive"),
        ({"target_modules": ["absent"]}, {}, "adapter: Target modules .*absent.* not found"),
        (LORA | {"target_modules": ["lm_head"]}, {}, "adapter: lm_head must stay as it is"),
        (LORA | {"modules_to_save": ["embed_tokens"]}, {}, "adapter: embed_tokens must stay"),
        (
            {"target_parameters": ["short.weight"], "target_modules": []},
            {},
            "adapter: target_parameters must be weights of linear maps; .*short is a ShortConvol",
        ),
        (
            {"target_modules": ["down_proj"], "lora_bias": True},
            {},
            "adapter: lora_bias must be off, since .*down_proj has no bias",
        ),
        (LORA, {"model": small()}, "adapter needs model.path"),
        (LORA, {"hardware": {"compile": True}}, "adapter cannot be trained with hardware.compile"),
        ("lora", {}, "adapter must hold keys and values; got 'lora'"),
    ],
)
def test_what_peft_does_not_know_is_refused(
    tmp_path: Path, base: Path, adapter: Any, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        train(run(tmp_path / "run", base, adapter, **sections))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_map_in_eight_bits_is_not_adapted(tmp_path: Path) -> None:
    """Merged into it, a small change would be rounded away."""
    options = small(mixers={"type": "hyena", "fp8_scales": [16.0, 64.0]})
    GramianForCausalLM(GramianConfig(**options)).save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError, match=r"in_proj must stay as it is, .* 8-bit floating point"):
        train(run(tmp_path / "run", tmp_path / "base"))
    other = LORA | {"target_modules": ["out_proj"]}
    report = train(run(tmp_path / "run", tmp_path / "base", other))
    merged = load(tmp_path / "run" / "last")
    found = evaluate_task(merged, tasks.build(**TASK), split="validation")
    assert found[0].value == pytest.approx(report.metrics["loss"], rel=1e-3)
    # a checkpoint is a model too
    ids = torch.arange(12)[None]
    checkpoint = load(tmp_path / "run" / "checkpoints" / "checkpoint-12")
    with torch.no_grad():
        assert torch.equal(checkpoint(ids).logits, merged(ids).logits)


def test_without_peft_the_cure_is_named(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(run(tmp_path / "run", base))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r'pip install "gramian\[adapters\]"'):
        train(run(tmp_path / "other", base))
    with pytest.raises(ImportError, match=r'pip install "gramian\[adapters\]"'):
        load(tmp_path / "run" / "last")
    assert type(load(base)) is GramianForCausalLM


def write_tables(folder: Path) -> dict[str, Any]:
    """DNA in lines, classified by its most frequent base."""
    random = np.random.default_rng(0)
    task: dict[str, Any] = {"name": "table", "tokenizer": "dna", "length": 20}
    for split, rows in (("train", 96), ("validation", 24)):
        lines = ["sequence,label"]
        for _ in range(rows):
            base = random.integers(3)
            odds = np.full(4, 0.1)
            odds[base] = 0.7
            lines.append(
                "".join(random.choice(list("ACGT"), 20, p=odds)) + f",mostly {'ACG'[base]}"
            )
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        task[split] = str(folder / f"{split}.csv")
    return task


@pytest.fixture
def dna(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = GramianForCausalLM(GramianConfig(**small(max_position_embeddings=20)))
    model.save_pretrained(tmp_path / "dna")
    DNATokenizer().save_pretrained(tmp_path / "dna")
    return tmp_path / "dna"


@pytest.mark.parametrize("adapter", [None, LORA])
def test_a_language_model_becomes_a_classifier(
    tmp_path: Path, dna: Path, adapter: dict[str, Any] | None
) -> None:
    """Its head is as large as the task needs, and is trained and saved with an adapter too."""
    task = write_tables(tmp_path)
    options = {"steps": 40, "batch_size": 16, "learning_rate": 1e-2}
    sections = {"optimization": options, "evaluation": {"metric": "accuracy"}, "task": task}
    report = train(run(tmp_path / "run", dna, adapter, **sections))
    assert report.metrics["accuracy"] > 0.9
    model = load_any(tmp_path / "run" / "last")
    assert type(model) is GramianForSequenceClassification
    assert model.config.id2label == {0: "mostly A", 1: "mostly C", 2: "mostly G"}
    built = tasks.build(**task)
    found = {m.metric: m.value for m in evaluate_task(model, built, split="validation")}
    assert found == pytest.approx({k: report.metrics[k] for k in found}, rel=1e-4)
    files = {file.name for file in (tmp_path / "run" / "last").iterdir()}
    assert ("model.safetensors" in files) == (adapter is None)
    assert "config.json" in files  # its classes are not those of the base
    assert "tokenizer.json" in files
    # and goes on from there, merged
    sections |= {"optimization": options | {"steps": 4}}
    train(run(tmp_path / "more", tmp_path / "run" / "last", None, **sections))
    assert type(load_any(tmp_path / "more" / "last")) is GramianForSequenceClassification
    if adapter is not None:
        with pytest.raises(ConfigError, match="is itself an adapter: save it merged first"):
            train(run(tmp_path / "third", tmp_path / "run" / "last", LORA, **sections))


def test_a_model_that_does_not_fit_its_task_is_refused(tmp_path: Path, dna: Path) -> None:
    task = write_tables(tmp_path)

    def refused(path: Path, message: str, **changes: Any) -> None:
        with pytest.raises(ConfigError, match=message):
            train(run(tmp_path / "run", path, None, task=task | changes))
        assert not (tmp_path / "run").exists()

    for kind, labels, message in (
        (GramianForSequenceClassification, 2, "model.path: the task has 3 classes and the model h"),
        (GramianForTokenClassification, 1, "model.path: the task has 3 classes and the model has"),
    ):
        model = kind(GramianConfig(**small(num_labels=labels)))
        model.save_pretrained(tmp_path / f"{kind.__name__}")
        if kind is GramianForTokenClassification:
            text = (tmp_path / "train.csv").read_text().replace("mostly ", "")
            lines = [line + line[-1] * 19 for line in text.splitlines()[1:]]
            (tmp_path / "tags.csv").write_text("\n".join(["sequence,label", *lines]))
            tags = {"kind": "token_classification", "train": str(tmp_path / "tags.csv")}
            refused(tmp_path / kind.__name__, message, **tags, validation=tags["train"])
        else:
            refused(tmp_path / kind.__name__, message)
    few = GramianForCausalLM(GramianConfig(**small(vocab_size=9)))
    few.save_pretrained(tmp_path / "few")
    refused(tmp_path / "few", "at least the task's 12 tokens; .*few has 9")
    regression = GramianForSequenceClassification(
        GramianConfig(**small(num_labels=3, problem_type="regression"))
    )
    regression.save_pretrained(tmp_path / "regression")
    refused(tmp_path / "regression", "for tasks of the kind 'classification'; .*'regression'")
    numbers = GramianForSequenceClassification(GramianConfig(**small(num_labels=3, input_size=2)))
    numbers.save_pretrained(tmp_path / "numbers")
    refused(tmp_path / "numbers", "of the task's input_size, None; .*numbers has 2")


def test_commands_take_the_folder_of_an_adapter(
    tmp_path: Path,
    dna: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    rows = "".join(f">{number}\n{'ACGTTGCA' * 20}\n" for number in range(4))
    (tmp_path / "genome.fa").write_text(rows, encoding="utf-8")
    task = {"name": "fasta", "length": 20, "train": str(tmp_path / "genome.fa")}
    task["validation"] = task["train"]
    config = run(tmp_path / "run", dna, LORA | {"target_modules": "all-linear"}, task=task)
    with pytest.warns(UserWarning, match="training files too"):
        train(config)
    folder = tmp_path / "run" / "best"
    load(folder).save_pretrained(tmp_path / "merged")
    DNATokenizer().save_pretrained(tmp_path / "merged")

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["gramian", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main()
        out, err = capfd.readouterr()
        assert exit.value.code == 0, err
        return out

    def timeless(out: str) -> str:
        return re.sub(r'"seconds": [0-9.e-]+', "", out)

    commands: list[Callable[[Path], tuple[object, ...]]] = [
        lambda model: (
            *("generate", model, "--prompt", "ACGT", "--alphabet", "ACGT", "--seed", 3),
            *("--max-new-tokens", 20),
        ),
        lambda model: ("evaluate", model, "--text", tmp_path / "genome.fa", "--json"),
        lambda model: ("analyze", model, "--prompt", "ACGTACGT", "--json"),
    ]
    for command in commands:
        found, expected = call(*command(folder)), call(*command(tmp_path / "merged"))
        for name in (folder, tmp_path / "merged"):
            found, expected = found.replace(str(name), "M"), expected.replace(str(name), "M")
        assert timeless(found) == timeless(expected)
    call("check", folder, "--length", 12, "--dtype", "float32", "--order", 4)
    call("distill", folder, tmp_path / "small", "--order", 6)
    assert (tmp_path / "small" / "tokenizer.json").is_file()
    small_model = load(tmp_path / "small")
    assert small_model.config.filter_of(0) is not None
    assert small_model.config.filter_of(0)["type"] == "modal"
    shutil.rmtree(dna)
    monkeypatch.setattr(sys, "argv", ["gramian", "generate", str(folder), "--prompt", "A"])
    with pytest.raises(SystemExit):
        cli.main()
    assert (
        "must name the folder of its base model; it names the base model" in capfd.readouterr()[1]
    )
