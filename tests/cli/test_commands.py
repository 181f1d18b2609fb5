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

Call = Callable[..., tuple[int, str, str]]


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
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
    commands = "demo distill convert generate check analyze train sweep evaluate export score embed"
    for command in commands.split():
        assert command in overview.stdout


@pytest.mark.parametrize(
    "arguments", [["--help"], ["generate", "--help"], ["generate", "missing", "--prompt", "x"]]
)
def test_an_answer_that_needs_no_model_waits_for_nothing(
    tmp_path: Path, arguments: list[str]
) -> None:
    program = (
        f"import sys; sys.argv = ['gramian', *{arguments}]\n"
        "from gramian.cli import main\n"
        "try: main()\n"
        "except SystemExit:\n"
        "    print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("distill model out --order 0", "the order must be at least 1; got 0."),
        ("distill model out --order 63", "the order must be an integer from 1 to 62"),
        ("distill model out --tol 0", "the tolerance must lie between 0 and 1"),
        ("distill model out --tol 1.5", "the tolerance must lie between 0 and 1"),
        ("distill model out --tol nan", "the tolerance must lie between 0 and 1"),
        ("distill model empty", "empty exists already"),
        ("distill missing out", "there is no model folder missing"),
        ("distill foreign out", "'gpt2'"),
        ("distill empty out", "no config.json"),
        ("distill corrupt out", "cannot be read"),
        ("distill distilled out", "nothing to distil"),
        ("distill model out --max-shard-size 5XB", "--max-shard-size: "),
        ("generate missing --prompt x", "there is no model folder missing"),
        (
            "generate wordless --prompt x",
            "save the one it was trained with there, by its method save_pretrained",
        ),
        ("generate model --prompt x --temperature 0", "--temperature must be above 0"),
        ("generate model --prompt x --top-p 2", "--top-p must be above 0 and at most 1"),
        ("generate model --prompt x --top-k -1", "--top-k must be 0"),
        ("generate model --prompt x --alphabet ''", "--alphabet: the alphabet must have at least"),
        ("generate model --prompt x --alphabet aé", "--alphabet: the alphabet must have chara"),
        ("generate model --prompt x --max-new-tokens 0", "--max-new-tokens must be at least 1"),
        ("demo --output empty --steps 1", "not written by the demo"),
        ("demo --tol 7", "the tolerance must lie between 0 and 1"),
    ],
)
def test_mistakes_get_one_line_and_change_nothing(
    workplace: Path, call: Call, arguments: str, sentence: str
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
        "generate model --prompt x --stream --json",
        "generate model --prompt x --prefill-chunk 0",
    ],
)
def test_wrong_usage_is_status_two(workplace: Path, call: Call, arguments: str) -> None:
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


def test_debug_is_an_option_and_no_word_of_a_prompt(workplace: Path, call: Call) -> None:
    status, out, err = call("generate missing --prompt=--debug", workplace)
    assert (status, out, err) == (1, "", "gramian: there is no model folder missing.\n")
    status, out, err = call("train --keyz", workplace)
    assert status == 2
    status, out, err = call("train", workplace)
    assert status == 2 and "CONFIG.yaml" in err


def test_distil_and_generate(workplace: Path, tmp_path: Path, call: Call) -> None:
    out = tmp_path / "deep" / "out"
    command = f"distill {workplace / 'model'} {out} --order 5 --max-shard-size 50KB --json"
    status, written, err = call(command, tmp_path)
    assert status == 0, err
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 1
    report = json.loads(written)
    assert report["order"] == 5 and report["max_order"] <= 5
    assert json.loads((out / "distillation.json").read_text()) == report

    expected, _ = distill(load(workplace / "model"), order=5)
    ids = torch.randint(0, 256, (1, 70))
    with torch.no_grad():
        torch.testing.assert_close(
            load(out)(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-5
        )

    prompt = "A naïve “prompt”"
    command = f"generate deep/out --prompt '{prompt}' --max-new-tokens 12 --seed 3 --json"
    status, written, err = call(command, tmp_path)
    assert status == 0, err
    result = json.loads(written)
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


@pytest.mark.parametrize(
    "options",
    ["--stream", "--prefill-chunk 2", pytest.param("--compile --stream", marks=pytest.mark.slow)],
)
def test_ways_of_generating_write_the_same_text(workplace: Path, call: Call, options: str) -> None:
    """The model's filters are long, so --compile packs its projections and compiles nothing."""
    command = "generate model --prompt abcdefg --max-new-tokens 20 --seed 5"
    status, plain, _ = call(command, workplace)
    assert call(f"{command} {options}", workplace)[:2] == (status, plain) == (0, plain)


@pytest.mark.parametrize("options", ["", "--greedy", "--stream", "--prefill-chunk 2"])
@pytest.mark.parametrize("model", ["model", "distilled"])
def test_an_alphabet_is_kept(workplace: Path, call: Call, model: str, options: str) -> None:
    command = f"generate {model} --prompt xyz --max-new-tokens 25 --alphabet ACGT {options}"
    status, out, err = call(command, workplace)
    assert (status, err) == (0, "")
    assert out.startswith("xyz") and out.endswith("\n")
    assert len(out) == 29 and {*out[3:-1]} <= {*"ACGT"}


def test_a_stream_comes_in_pieces(
    workplace: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import TextStreamer

    pieces: list[str] = []
    write = TextStreamer.on_finalized_text

    def spy(streamer: Any, text: str, stream_end: bool = False) -> None:
        pieces.append(text)
        write(streamer, text, stream_end)

    monkeypatch.setattr(TextStreamer, "on_finalized_text", spy)
    command = "generate model --prompt abc --max-new-tokens 40 --seed 5 --stream"
    _, out, _ = call(command, workplace)
    assert out == "abc" + "".join(pieces) + "\n"
    assert len(pieces) > 20


def test_train_reports_and_names_mistakes(tmp_path: Path, call: Call) -> None:
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
    status, out, err = call("train --keys", tmp_path)
    assert status == 0 and "optimization.learning_rate" in out and "needed" in out
    status, out, err = call("train --keys --json", tmp_path)
    listed = {key["key"]: key["default"] for key in json.loads(out)}
    assert listed["optimization.warmup"] == "0.05" and listed["model.rms_norm_eps"] == "1.0e-06"
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


def test_check_prints_a_table_and_its_exit_status_tells(workplace: Path, call: Call) -> None:
    arguments = "check model --batch 2 --length 11 --order 3"
    status, out, _ = call(arguments, workplace)
    assert status == 0 and "bfloat16" in out and "distilled" in out
    assert "within their limits" in " ".join(out.split())
    status, out, _ = call(f"{arguments} --dtype float32 --tolerance 1e-12 --json", workplace)
    report = json.loads(out)
    assert status == 1 and not report["passed"]
    assert {row["dtype"] for row in report["rows"]} == {"float32"}


def test_check_reads_text(workplace: Path, call: Call) -> None:
    (workplace / "text.txt").write_text("The state of a recurrence. " * 3)
    arguments = "check model --batch 2 --order 0 --dtype float32 --text text.txt --json"
    status, out, _ = call(f"{arguments} --length 12", workplace)
    assert status == 0 and json.loads(out)["length"] == 12
    status, _, err = call(f"{arguments} --length 100", workplace)
    assert status == 1 and "need 200" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("check nowhere", "no model folder"),
        ("check model --batch 1", "at least 2 sequences"),
        ("check model --dtype int8", "int8"),
        ("check model --order -1", "--order"),
        ("check model --tolerance 0", "positive"),
        ("check model --text nowhere.txt", "nowhere.txt"),
    ],
)
def test_check_refuses(workplace: Path, call: Call, arguments: str, message: str) -> None:
    status, out, err = call(arguments, workplace)
    assert status == 1 and out == "" and message in err and err.count("\n") == 1


def test_distill_under_a_budget_of_quality_on_a_text(workplace: Path, call: Call) -> None:
    (workplace / "budget.txt").write_text("Poles, residues and Markov parameters. " * 20)
    arguments = "distill model budgeted --max-increase 5% --text budget.txt --finetune 2 --json"
    status, out, _ = call(arguments, workplace)
    report = json.loads(out)
    quality = report["quality"]
    assert status == 0 and quality["max_increase"] == 0.05 and len(quality["finetuned"]) == 2
    assert quality["trials"][-1]["increase"] <= 0.05
    written = {path.name for path in (workplace / "budgeted").iterdir()}
    assert {"distillation.json", "distillation.png", "model.safetensors"} <= written
    card = (workplace / "budgeted/README.md").read_text(encoding="utf-8")
    assert "\n# budgeted\n\nA `GramianForCausalLM` made from `model`." in card
    assert "order min/mean/max" in card and str(workplace) not in card
    assert load(workplace / "budgeted").config.filter[0]["type"] == "modal"


def test_distill_to_an_order_tells_the_loss_on_a_text(workplace: Path, call: Call) -> None:
    (workplace / "words.txt").write_text("Hankel singular values. " * 9)
    status, out, _ = call("distill model told --order 3 --text words.txt", workplace)
    assert status == 0 and "Loss on" in out and "after" in out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("--tol 0.1 --max-increase 1% --text budget.txt", 2, "one of --tol"),
        ("--max-increase 1%", 2, "need --text"),
        ("--finetune 3", 2, "need --text"),
        ("--max-increase much --text budget.txt", 1, "'much'"),
        ("--max-increase 0% --text budget.txt", 1, "'0%'"),
        ("--finetune -1 --text budget.txt", 1, "number of steps"),
        ("--max-order 0", 1, "at least 1"),
        ("--text nowhere.txt", 1, "nowhere.txt"),
    ],
)
def test_distill_refuses_options_that_do_not_go_together(
    workplace: Path,
    call: Call,
    arguments: str,
    status: int,
    message: str,
) -> None:
    before = contents(workplace)
    code, _, err = call(f"distill model refused {arguments}", workplace)
    assert code == status and message in " ".join(err.split())
    assert contents(workplace) == before
