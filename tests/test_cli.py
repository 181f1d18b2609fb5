"""The command line as its users meet it: a process, its output, its exit status, the disk."""

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

import gramian
from gramian import cli
from gramian.distillation import distill
from gramian.models import ByteTokenizer, GramianConfig, GramianForCausalLM, load


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "COLUMNS": "120", "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, "-m", "gramian", *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """The command in this process: status, output and errors."""

    def main(arguments: str, cwd: Path) -> tuple[int, str, str]:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["gramian", *arguments.split()])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main()
        assert isinstance(exit.value.code, int)
        return (exit.value.code, *capfd.readouterr())

    return main


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def make(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    settings = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_heads": 3,
        "filter": {"type": "implicit", "frequency": 1.0},
        "max_position_embeddings": 63,
    }
    return GramianForCausalLM(GramianConfig(**(settings | changes))).eval()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a distilled one, one without a tokenizer, and what is none."""
    folder = tmp_path_factory.mktemp("cli")
    model = make()
    model.save_pretrained(folder / "model")
    ByteTokenizer().save_pretrained(folder / "model")
    distill(model, order=3)[0].save_pretrained(folder / "distilled")
    make(vocab_size=77).save_pretrained(folder / "wordless")
    (folder / "foreign").mkdir()
    (folder / "foreign" / "config.json").write_text('{"model_type": "gpt2"}')
    (folder / "empty").mkdir()
    model.save_pretrained(folder / "corrupt")
    weights = folder / "corrupt" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return folder


def test_version_and_help(tmp_path: Path) -> None:
    version = run("--version", cwd=tmp_path)
    assert (version.returncode, version.stdout) == (0, f"gramian {gramian.__version__}\n")
    overview = run("--help", cwd=tmp_path)
    assert overview.returncode == 0
    for command in ("demo", "distill", "generate", "train"):
        assert command in overview.stdout


def test_help_does_not_wait_for_transformers(tmp_path: Path) -> None:
    program = (
        "import sys; sys.argv = ['gramian', '--help']\n"
        "from gramian.cli import main\n"
        "try: main()\n"
        "except SystemExit: print('transformers' in sys.modules, 'matplotlib' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.splitlines()[-1] == "False False"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("distill model out --order 0", "The order must be at least 1; got 0."),
        ("distill model out --order 63", "The order must be an integer from 1 to 62"),
        ("distill model out --tol 0", "The tolerance must lie between 0 and 1"),
        ("distill model out --tol 1.5", "The tolerance must lie between 0 and 1"),
        ("distill model out --tol nan", "The tolerance must lie between 0 and 1"),
        ("distill model empty", "empty exists already"),
        ("distill missing out", "there is no model folder missing"),
        ("distill foreign out", "'gpt2'"),
        ("distill empty out", "no config.json"),
        ("distill corrupt out", "cannot be read"),
        ("distill distilled out", "Nothing to distil"),
        ("generate missing --prompt x", "there is no model folder missing"),
        ("generate wordless --prompt x", "has no tokenizer"),
        ("generate model --prompt x --temperature 0", "--temperature must be above 0"),
        ("generate model --prompt x --top-p 2", "--top-p must be above 0 and at most 1"),
        ("generate model --prompt x --top-k -1", "--top-k must be 0"),
        ("generate model --prompt x --max-new-tokens 0", "--max-new-tokens must be at least 1"),
        ("demo --output empty --steps 1", "not written by the demo"),
        ("demo --tol 7", "The tolerance must lie between 0 and 1"),
    ],
)
def test_mistakes_get_one_line_and_change_nothing(
    workplace: Path, call: Callable[..., tuple[int, str, str]], arguments: str, sentence: str
) -> None:
    before = contents(workplace)
    status, out, err = call(arguments, workplace)
    assert status == 1
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("gramian: ") and sentence in line
    assert contents(workplace) == before


@pytest.mark.parametrize(
    "arguments",
    [
        "distill model",
        "generate model",
        "unknown",
        "distill model out --tol x",
        "distill model out --tol 0.1 --order 3",
    ],
)
def test_wrong_usage_is_status_two(
    workplace: Path, call: Callable[..., tuple[int, str, str]], arguments: str
) -> None:
    before = contents(workplace)
    status, out, err = call(arguments, workplace)
    assert (status, out) == (2, "")
    assert "Usage" in err
    assert contents(workplace) == before


def test_a_traceback_is_shown_with_debug_only(workplace: Path) -> None:
    before = contents(workplace)
    plain = run("distill", "missing", "out", cwd=workplace)
    debug = run("distill", "missing", "out", "--debug", cwd=workplace)
    assert plain.returncode == debug.returncode == 1
    assert len(plain.stderr.splitlines()) == 1
    assert "Traceback" in debug.stderr
    assert contents(workplace) == before


def test_distil_and_generate(workplace: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    done = run("distill", workplace / "model", out, "--order", 5, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["order"] == 5 and report["max_order"] <= 5
    assert json.loads((out / "distillation.json").read_text()) == report

    expected, _ = distill(load(workplace / "model"), order=5)
    ids = torch.randint(0, 256, (1, 70))
    with torch.no_grad():
        torch.testing.assert_close(
            load(out)(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-5
        )

    prompt = "A naïve “prompt”"
    options = ("--prompt", prompt, "--max-new-tokens", 12, "--seed", 3)
    first = run("generate", out, *options, "--json", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    result = json.loads(first.stdout)
    assert result["prompt"] == prompt and result["new_tokens"] == 12
    assert result["prompt_tokens"] == len(prompt.encode())
    assert result["state_bytes"] == report["distilled_state_bytes"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep"]


def test_greedy_text_is_the_models_own(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    command = "gramian generate distilled --prompt abc --greedy --max-new-tokens 9 --seed 5"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    model, ids = load(workplace / "distilled"), torch.tensor([list(b"abc")])
    with torch.no_grad():
        for _ in range(9):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    expected = ByteTokenizer().decode(ids[0, 3:], skip_special_tokens=True)
    assert capfd.readouterr().out == f"abc{expected}\n"


def test_train_reports_and_names_mistakes(
    tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "config.yaml").write_text(
        "output: run\n"
        "task: {name: mqar, length: 8, vocab_size: 12, pairs: 1, train_examples: 8, "
        "eval_examples: 4}\n"
        "model: {hidden_size: 8, num_hidden_layers: 1, num_heads: 2}\n"
        "optimization: {steps: 2, batch_size: 4}\n"
        "hardware: {device: cpu}\n"
    )
    status, out, err = call("train config.yaml model.hiden_size=4", tmp_path)
    assert (status, out) == (1, "")
    assert "unknown key of model 'hiden_size'. Did you mean 'hidden_size'?" in err
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    status, out, err = call("train none.yaml", tmp_path)
    assert (status, out) == (1, "")
    assert err == "gramian: there is no configuration file none.yaml.\n"
    status, out, _ = call("train config.yaml seed=2 --json", tmp_path)
    assert status == 0
    report = json.loads(out)
    assert report == json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["steps"] == 2
    assert load(tmp_path / "run" / "best").config.vocab_size == 12


@pytest.mark.slow
def test_demo_with_too_little_training_fails_its_checks(tmp_path: Path) -> None:
    done = run("demo", "--steps", 1, "--json", "--output", "out", cwd=tmp_path)
    report = json.loads(done.stdout)
    assert done.returncode == 1 and not report["passed"]
    assert not report["checks"][0]["passed"]  # one step does not beat a bigram model
    assert json.loads((tmp_path / "out" / "demo.json").read_text()) == report
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
