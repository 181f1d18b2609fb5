"""The command `shrink`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from transformers import GPT2Config, GPT2LMHeadModel, Mamba2Config, Mamba2ForCausalLM
from transformers.models.mamba2 import modeling_mamba2

from gramian.models import ByteTokenizer, GramianConfig, GramianForCausalLM, load

Call = Callable[..., tuple[int, str, str]]

needs_scan = pytest.mark.skipif(
    not hasattr(modeling_mamba2, "mamba2_chunk_scan"),
    reason="shrinking a Mamba-2 needs a transformers that names its scan",
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Mamba2, a Gramian model, a GPT-2 and texts."""
    folder = tmp_path_factory.mktemp("work")
    torch.manual_seed(0)
    small = {"vocab_size": 259, "hidden_size": 16, "num_hidden_layers": 2}
    heads = {"num_heads": 4, "head_dim": 8, "state_size": 16, "n_groups": 1, "chunk_size": 16}
    models = {
        "mamba2": Mamba2ForCausalLM(Mamba2Config(**small, **heads)),
        "ours": GramianForCausalLM(
            GramianConfig(
                **small, mixers="gated_linear_attention", num_heads=2, initializer_range=0.2
            )
        ),
        "linear": GramianForCausalLM(
            GramianConfig(**small, mixers="linear_attention", num_heads=2, initializer_range=0.2)
        ),
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=8, n_layer=1, n_head=1)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        ByteTokenizer().save_pretrained(folder / name)
    (folder / "text.txt").write_text("What is read is not always kept. " * 12, encoding="utf-8")
    (folder / "short.txt").write_text("Too short.", encoding="utf-8")
    return folder


def contents(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@needs_scan
def test_shrink_writes_a_folder_that_transformers_reads(workplace: Path, call: Call) -> None:
    arguments = "shrink mamba2 small --text text.txt --keep 50% --context 40 --json"
    status, out, err = call(arguments, workplace)
    assert status == 0, err
    report = json.loads(out)
    assert json.loads((workplace / "small/shrinkage.json").read_text(encoding="utf-8")) == report
    assert {"shrinkage.png", "model.safetensors", "tokenizer_config.json"} <= {
        path.name for path in (workplace / "small").iterdir()
    }
    card = (workplace / "small/README.md").read_text(encoding="utf-8")
    assert "\nA `Mamba2ForCausalLM` made from `mamba2`:" in card and "import gramian" not in card
    small = Mamba2ForCausalLM.from_pretrained(workplace / "small")
    assert small.config.state_size == 8 and report["states_after"] == 16


def test_shrink_within_a_budget_lets_layers_differ(workplace: Path, call: Call) -> None:
    arguments = "shrink ours less --text text.txt --max-increase 50% --per-layer --context 40"
    status, out, err = call(arguments, workplace)
    assert status == 0, err
    assert "standard error" in " ".join(out.split()) and "Written to less" in out
    sizes = [mixer["state_size"] for mixer in load(workplace / "less").config.mixers]
    assert all(1 <= size <= 8 for size in sizes) and min(sizes) < 8
    status, out, err = call("shrink ours number --text text.txt --keep 3 --context 40", workplace)
    assert status == 0, err
    assert load(workplace / "number").config.mixers[0]["state_size"] == 3


# `tests/shrinking/test_recovery.py` trains in both ways.
@pytest.mark.parametrize("method", [pytest.param("full", marks=pytest.mark.slow), "lora"])
def test_shrink_recovers_what_was_lost(workplace: Path, call: Call, method: str) -> None:
    if method == "lora":
        pytest.importorskip("peft")
        if Version(torch.__version__) < Version("2.7"):
            pytest.skip("peft needs PyTorch 2.7")
    arguments = (
        f"shrink ours {method} --text text.txt --keep 2 --context 16 --recover-steps 30 "
        f"--recover {method} --recover-rate 3e-3 --recover-candidates 2 --choose-by accuracy --json"
    )
    status, out, err = call(arguments, workplace)
    assert status == 0, err
    report = json.loads(out)
    done = report["recovery"]
    assert report["choose_by"] == "accuracy" and done["candidates"] == 2
    assert (done["steps"], done["method"], done["learning_rate"]) == (30, method, 3e-3)
    assert done["divergence_after"] < done["divergence_before"]
    assert load(workplace / method).config.mixers[0]["state_size"] == 2


@needs_scan
def test_shrink_counts_labels_alone(workplace: Path, call: Call) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(259, (12, 20), generator=generator).tolist()
    lines = [{"input_ids": row, "labels": [-100] * 15 + row[15:]} for row in rows]
    path = workplace / "labels.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    arguments = "--labels labels.jsonl --keep 0.5 --choose-by accuracy --json"
    status, out, err = call(f"shrink mamba2 labelled {arguments}", workplace)
    assert status == 0, err
    found = json.loads(out)
    assert found["labelled"] and found["context"] == 20 and found["choose_by"] == "accuracy"
    assert "label error" in found["criteria"]
    assert Mamba2ForCausalLM.from_pretrained(workplace / "labelled").config.state_size == 8
    path.unlink()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}\n{"input_ids"', "line 2: no JSON"),
        ("[1, 2]", "line 1: an object is needed; got list"),
        ("", "must hold JSON lines with input_ids and labels; got no line."),
        ('{"input_ids": [1, 2], "label": [1, 2]}', "and labels; got input_ids, label."),
        ('{"labels": [1, 2]}', "need the column input_ids"),
        ('{"input_ids": ["a", "b"], "labels": [1, 2]}', "input_ids must be integers"),
        ('{"input_ids": [1, 2], "labels": [1]}', "labels must have the shape of input_ids"),
        (
            '{"input_ids": [1, 2], "labels": [1, 2]}\n{"input_ids": [1, 2]}',
            "rows must have the same columns; got no labels in row 1.",
        ),
    ],
)
def test_bad_labels_are_refused_in_one_sentence(
    workplace: Path, call: Call, content: str, message: str
) -> None:
    (workplace / "labels.jsonl").write_text(content, encoding="utf-8")
    code, _, err = call("shrink mamba2 refused --labels labels.jsonl --keep 0.5", workplace)
    assert code == 1 and message in " ".join(err.split())
    assert not (workplace / "refused").exists()


def test_shrink_projects_states(workplace: Path, call: Call) -> None:
    arguments = "shrink linear projected --text text.txt --keep 3 --projection --context 40 --json"
    status, out, err = call(arguments, workplace)
    assert status == 0, err
    found = json.loads(out)
    assert found["projection"] and found["layers"][0]["projection"]["error"] > 0
    mixers = load(workplace / "projected").config.mixers
    assert [(one["state_size"], one["feature_size"]) for one in mixers] == [(3, 8)] * 2


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("mamba2 refused --text text.txt", 2, "one of --keep and --max-increase"),
        ("mamba2 refused --text text.txt --keep 0.5 --max-increase 1%", 2, "one of --keep"),
        ("mamba2 refused --keep 0.5", 2, "give one of --text and --labels."),
        ("mamba2 refused --text text.txt --labels x.jsonl --keep 0.5", 2, "one of --text and"),
        ("mamba2 refused --labels nowhere.jsonl --keep 0.5", 1, "nowhere.jsonl cannot be read"),
        ("mamba2 refused --text text.txt --keep much", 1, "'much'"),
        ("mamba2 refused --text text.txt --keep 150%", 1, "a share between 0 and 1"),
        ("mamba2 refused --text text.txt --keep 0", 1, "a share between 0 and 1"),
        pytest.param(
            "mamba2 refused --text text.txt --keep 0.01 --context 40",
            1,
            "at least one of the 16",
            marks=needs_scan,
        ),
        ("mamba2 refused --text text.txt --keep 0.5", 1, "at least two windows of 1024 tokens"),
        ("mamba2 refused --text short.txt --keep 0.5 --context 8", 1, "at least two windows of 8"),
        ("mamba2 refused --text nowhere.txt --keep 0.5", 1, "nowhere.txt"),
        ("mamba2 mamba2 --text text.txt --keep 0.5", 1, "mamba2 exists already"),
        ("nowhere refused --text text.txt --keep 0.5", 1, "no model folder nowhere"),
        ("gpt2 refused --text text.txt --keep 0.5 --context 40", 1, "linear recurrences"),
        ("mamba2 refused --text text.txt --keep 0.5 --recover lora", 2, "need --recover-steps"),
        ("mamba2 refused --text text.txt --keep 1 --recover-candidates 2", 2, "--recover-steps"),
        (
            "mamba2 refused --text text.txt --keep 0.5 --context 40 --choose-by speed",
            1,
            "choose_by must be loss or accuracy; got 'speed'.",
        ),
        ("mamba2 refused --text text.txt --keep 0.5 --recover-steps -1", 2, "--recover-steps"),
        (
            "mamba2 refused --text text.txt --keep 0.5 --recover-steps 3 --recover all",
            1,
            "method of a recovery must be full or lora; got 'all'.",
        ),
        (
            "mamba2 refused --text text.txt --keep 0.5 --recover-steps 3 --recover-rate 0",
            1,
            "learning_rate of a recovery must be a positive number; got 0.0.",
        ),
        (
            "mamba2 refused --text text.txt --keep 0.5 --recover-steps 3 --context 150",
            1,
            "recovery needs at least two windows to choose by",
        ),
        (
            "mamba2 refused --text text.txt --keep 0.5 --per-layer --context 40",
            1,
            "per_layer needs a configuration",
        ),
        (
            "mamba2 refused --text text.txt --keep 0.5 --projection --context 40",
            1,
            "projection needs layers that can hold maps",
        ),
        (
            "ours refused --text text.txt --keep 0.5 --projection --context 40",
            1,
            "projection needs one gate per head and step",
        ),
    ],
)
def test_shrink_refuses_in_one_sentence_and_writes_nothing(
    workplace: Path, call: Call, arguments: str, status: int, message: str
) -> None:
    before = contents(workplace)
    code, _, err = call(f"shrink {arguments}", workplace)
    assert code == status and message in " ".join(err.split())
    assert contents(workplace) == before
