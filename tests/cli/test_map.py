"""One command on many inputs: what it keeps, refuses and goes on after, here and on Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")

from gramian.cli._jobs import Template, plan
from gramian.models import ByteTokenizer, GramianConfig, GramianForCausalLM, load

Call = Callable[..., tuple[int, str, str]]
DISTIL = "map 'distill {input} {output} --order 2' models/a models/b.c -o out"


def save(folder: Path, seed: int, **changes: Any) -> None:
    torch.manual_seed(seed)
    settings = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_heads": 2,
        "filter": {"type": "implicit", "frequency": 1.0},
        "max_position_embeddings": 31,
    }
    GramianForCausalLM(GramianConfig(**settings | changes)).save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    save(tmp_path / "models" / "a", 0)
    save(tmp_path / "models" / "b.c", 1)
    return tmp_path


def states(out: str) -> dict[str, str]:
    return {job["name"]: job["state"] for job in json.loads(out)["jobs"]}


def test_results_are_those_of_the_command_itself(workplace: Path, call: Call) -> None:
    status, out, _ = call(f"{DISTIL} --json", workplace)
    assert (status, states(out)) == (0, {"a": "done", "b.c": "done"})
    assert call("distill models/b.c alone --order 2", workplace)[0] == 0
    mapped, alone = (load(workplace / name).state_dict() for name in ("out/b.c", "alone"))
    assert mapped.keys() == alone.keys()
    assert all(torch.equal(mapped[name], alone[name]) for name in alone)
    assert "Written to out/b.c" in (workplace / "out/jobs/b.c.log").read_text()
    assert call(DISTIL, workplace)[:2] == (
        0,
        "2 kept from an earlier call.\nWritten to out\n",
    )


def test_a_failure_stops_nothing_and_is_tried_again(workplace: Path, call: Call) -> None:
    weights = workplace / "models/a/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    status, out, err = call(f"{DISTIL} --json", workplace)
    assert (status, states(out)) == (1, {"a": "failed", "b.c": "done"})
    (line,) = err.splitlines()
    assert line.startswith("gramian: a: ") and "cannot be read" in line
    assert "Traceback" in (workplace / "out/jobs/a.log").read_text()
    assert not (workplace / "out/a").exists()
    weights.write_bytes(whole)
    status, out, _ = call(f"{DISTIL} --json", workplace)
    assert (status, states(out)) == (0, {"a": "done", "b.c": "kept"})


def test_other_options_and_other_inputs_are_refused(workplace: Path, call: Call) -> None:
    (workplace / "text").write_text("ab" * 40)
    command = "map 'distill {input} {output} --order 2 --text text' models/* -o out"
    command = command.replace("models/*", "models/a models/b.c")
    assert call(command, workplace)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in (workplace / "out").rglob("*")}

    def refused(arguments: str, reason: str) -> None:
        status, _, err = call(arguments, workplace)
        assert status == 1
        assert reason in err and "Remove it, or name another folder." in err

    refused(command.replace("2", "3"), "its command was 'distill {input} {output} --order 2 --t")
    save(workplace / "models/b.c", 7)
    refused(command, "out/b.c was made otherwise: the contents of its input have changed.")
    save(workplace / "models/b.c", 1)
    (workplace / "text").write_text("cd" * 40)
    refused(command, "the contents of text have changed")
    assert {path: path.stat().st_mtime_ns for path in (workplace / "out").rglob("*")} == before


def test_results_of_a_killed_call_are_made_again(workplace: Path, call: Call) -> None:
    """It was killed after one of the command's two results."""
    command = "map 'analyze {input} --prompt abcdefg --output {output} --table {output}.csv'"
    command += " models/a -o out --json"
    assert call(command, workplace)[0] == 0
    record = workplace / "out/jobs/a.json"
    (workplace / "out/a.csv").unlink()
    status, _, err = call(command, workplace)
    assert status == 1 and "out/a exists but out/a.csv does not" in err
    record.write_text(record.read_text().replace('"finished": true', '"finished": false'))
    (workplace / "out/a/report.json").write_text("half")
    assert call(command, workplace)[0] == 0
    assert (workplace / "out/a.csv").is_file()
    assert json.loads((workplace / "out/a/report.json").read_text())
    record.unlink()
    status, _, err = call(command, workplace)
    assert status == 1 and "out/a exists already and was not made by this command" in err


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        ("'distill {input} out' models/a", 1, "must contain {input} and {output}"),
        ("'distill {input} {output}' models/d", 1, "there is no file or folder models/d"),
        ("'distill {input} \" {output}' models/a", 1, "cannot be split"),
        ("'distill {input} {output}' models/a ./models/a", 1, "--parents 1 puts the names"),
        ("'distill {input} {output} --tol x' models/a", 2, "--tol"),
        ("'destill {input} {output}' models/a", 2, "destill"),
        ("'map {input} {output}' models/a", 2, "another command than map"),
    ],
)
def test_mistakes_start_nothing(
    workplace: Path, call: Call, arguments: str, status: int, sentence: str
) -> None:
    code, _, err = call(f"map {arguments} -o out", workplace)
    assert code == status
    assert sentence in " ".join(err.replace("│", " ").split())
    assert not (workplace / "out").exists()


def test_names_of_inputs(tmp_path: Path) -> None:
    files = [tmp_path / "one" / name for name in ("x.fa.gz", "y.fna", "z")]
    files[0].parent.mkdir()
    for file in files:
        file.touch()
    (tmp_path / "two.5").mkdir()
    template = Template.of("score model {input} --output={output}.tsv")
    jobs = plan(template, [*files, tmp_path / "two.5"], Path("out"), 0)
    assert [job.name for job in jobs] == ["x", "y", "z", "two.5"]
    assert [job.outputs for job in jobs][::3] == [(Path("out/x.tsv"),), (Path("out/two.5.tsv"),)]
    assert jobs[1].words == ("score", "model", str(files[1]), "--output=out/y.tsv")
    assert plan(template, files[1:2], Path("out"), 1)[0].name == "one-y"


@pytest.mark.slow
def test_a_ray_cluster_gives_what_this_process_gives(workplace: Path, call: Call) -> None:
    """On a cluster of this machine with two workers; one of three models cannot be read."""
    ray = pytest.importorskip("ray")
    save(workplace / "models" / "d", 3)
    (workplace / "models/d/config.json").write_text("{}")
    command = DISTIL.replace("models/b.c", "models/b.c models/d") + " --json"
    status, here, reasons = call(command, workplace)
    assert status == 1
    cluster = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        address = cluster.address_info["gcs_address"]
        words = ["map", "distill {input} {output} --order 2", "models/a", "models/b.c", "models/d"]
        words += ["-o", "there", "--address", address, "--json"]
        root = str(Path(__file__).parents[2])
        child = subprocess.run(
            [sys.executable, "-m", "gramian", *words],
            cwd=workplace,
            env={**os.environ, "PYTHONPATH": root},
            capture_output=True,
            text=True,
            timeout=300,
        )
    finally:
        ray.shutdown()
    assert child.returncode == 1, child.stderr
    assert states(child.stdout) == states(here) == {"a": "done", "b.c": "done", "d": "failed"}
    assert child.stderr.splitlines()[-1] == reasons.splitlines()[-1]
    for name in ("a", "b.c"):
        one, other = (load(workplace / folder / name).state_dict() for folder in ("out", "there"))
        assert all(torch.equal(one[key], other[key]) for key in one)
