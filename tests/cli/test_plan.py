"""`gramian plan` as its users meet it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("typer")
pytest.importorskip("transformers")

from gramian.analysis import open_model
from gramian.hybrids import HybridPlan, plan_hybrid, try_hybrid
from gramian.models import GramianConfig, GramianForCausalLM

Call = Callable[..., tuple[int, str, str]]
TEXT = "The river rose. The bridge was gone! The river fell.\nThe road was closed? The end.\n" * 3
OTHER = "In the morning the water was low again; they counted the stones of the bridge. " * 3
SIZES = "--window 4 --sinks 1 --state 3 --length 24 --sequences 2"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    for name, mixers in (
        ("hybrid", ["softmax_attention", "linear_attention", "softmax_attention"]),
        ("recurrent", ["linear_attention"]),
    ):
        torch.manual_seed(0)
        config = GramianConfig(
            hidden_size=12,
            num_hidden_layers=len(mixers),
            num_heads=3,
            mixers=mixers,
            max_position_embeddings=128,
        )
        GramianForCausalLM(config).save_pretrained(folder / name)
    (folder / "text.txt").write_text(TEXT)
    (folder / "other.txt").write_text(OTHER)
    (folder / "empty.txt").write_text("")
    return folder


def test_plan_and_trial_are_those_of_python(call: Call, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.yaml"
    line = f"plan hybrid --text text.txt --replace 1 {SIZES} --try other.txt --try-sequences 2"
    status, shown, err = call(f"{line} --seeds 2 --criterion state -o {out}", place)
    assert status == 0, err
    assert "linear_attention" not in shown and shown.count("random") == 2
    assert "it is no attention but a recurrence" in " ".join(shown.split())
    model, tokenizer = open_model(place / "hybrid")
    expected = plan_hybrid(
        model,
        TEXT,
        tokenizer,
        replace=1,
        criterion="state",
        window=4,
        sinks=1,
        orders=(1, 3, 4, 16),
        state=3,
        length=24,
        sequences=2,
    )
    plan = HybridPlan.load(out)
    assert plan.model == "hybrid"
    assert (plan.replaced, plan.layers) == (expected.replaced, expected.layers)
    status, shown, err = call(f"plan hybrid --plan {out} --try other.txt --seeds 1 --json", place)
    assert status == 0, err
    values = json.loads(shown)
    assert HybridPlan.from_dict(values["plan"]) == plan
    trial = try_hybrid(model, expected, OTHER, tokenizer, seeds=1)
    found = [(one["criterion"], one["loss"]) for one in values["trial"]["choices"]]
    assert found == [(x.criterion, pytest.approx(x.loss, rel=1e-6)) for x in trial.choices]


def test_fitted_recurrences_are_stored_beside_the_plan(
    call: Call, place: Path, tmp_path: Path
) -> None:
    out = tmp_path / "plan.yaml"
    line = f"plan hybrid --text text.txt --kind recurrence --replace 1 {SIZES} --fit-sequences 4"
    trial = "--try other.txt --try-sequences 2 --seeds 1 --json"
    status, shown, err = call(f"{line} {trial} -o {out}", place)
    assert status == 0, err
    plan = HybridPlan.load(out)
    assert (plan.kind, plan.criterion, plan.state) == ("recurrence", "recurrence", 3)
    assert {path.name for path in tmp_path.iterdir()} == {"plan.yaml", "plan.safetensors"}
    first = json.loads(shown)
    assert HybridPlan.from_dict(first["plan"]) == plan
    status, shown, err = call(f"plan hybrid --plan {out} {trial}", place)
    assert status == 0, err
    assert json.loads(shown)["trial"] == first["trial"]


def test_an_edited_plan_is_tried(call: Call, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.yaml"
    line = f"plan hybrid --text text.txt --replace 50% --by head {SIZES} -o {out}"
    status, _, err = call(line, place)
    assert status == 0, err
    assert sum(len(x.replaced) for x in HybridPlan.load(out).layers) == 3
    values = yaml.safe_load(out.read_text())
    path = values["layers"][0]["name"]
    out.write_text(yaml.safe_dump(values | {"replace": {path: [2]}, "keep": []}))
    status, shown, err = call(f"plan hybrid --plan {out} --try other.txt --json", place)
    assert status == 0, err
    assert json.loads(shown)["trial"]["choices"][0]["heads"] == 1
    assert json.loads(shown)["plan"]["replace"] == {path: [2]}


def test_what_cannot_work_is_said_in_one_line(call: Call, place: Path, tmp_path: Path) -> None:
    (tmp_path / "there.yaml").write_text("a: 1\n")
    there, broken = tmp_path / "there.yaml", tmp_path / "broken.yaml"
    broken.write_text("a: [b\n")
    (tmp_path / "there.safetensors").write_bytes(b"")
    beside = tmp_path / "there.json"
    cases = [
        ("plan hybrid --text text.txt", 2, "--text needs --replace"),
        ("plan hybrid --plan none.yaml --try text.txt", 1, "there is no plan none.yaml"),
        ("plan hybrid --text text.txt --replace 1 -o none/p.yaml", 1, "there is no folder none"),
        ("plan hybrid --replace 1", 2, "give exactly one of --text and --plan"),
        (f"plan hybrid --plan {there}", 2, "--plan needs --try"),
        (f"plan hybrid --plan {there} --try other.txt", 1, "is not the plan of a hybrid"),
        (f"plan hybrid --text text.txt --replace 1 -o {there}", 1, "exists already"),
        ("plan hybrid --text text.txt --replace x", 1, "--replace takes a number of layers"),
        ("plan hybrid --text text.txt --replace 0", 1, "such as 0.25 or 25%; got '0'."),
        ("plan hybrid --text text.txt --replace 200%", 1, "got '200%'."),
        ("plan hybrid --text text.txt --replace 1.5", 1, "got '1.5'."),
        (f"plan hybrid --plan {broken} --try other.txt", 1, "it is not YAML at line 2, column 1."),
        (f"plan hybrid --text text.txt --replace 1 --kind x {SIZES}", 1, "replacement 'x'"),
        (f"plan hybrid --text text.txt --replace 1 -o {beside}", 1, "there.safetensors exists"),
        (f"plan hybrid --text text.txt --replace 7 {SIZES}", 1, "replace must be at most 2"),
        (f"plan hybrid --text text.txt --replace 1 --by x {SIZES}", 1, "by must be 'layer' or"),
        (f"plan recurrent --text text.txt --replace 1 {SIZES}", 1, "no attention that a window"),
        ("plan hybrid --text empty.txt --replace 1", 1, "there is no text"),
        ("plan hybrid --text nowhere.txt --replace 1", 1, "cannot be read"),
        ("plan ./nowhere --text text.txt --replace 1", 1, "there is no model ./nowhere"),
        ("plan no.gguf --text text.txt --replace 1", 1, "there is no model no.gguf"),
    ]
    for line, expected, message in cases:
        status, out, err = call(line, place)
        assert (status, out) == (expected, ""), line
        assert message in " ".join(err.split()), line
        assert expected == 2 or len(err.strip().splitlines()) == 1
