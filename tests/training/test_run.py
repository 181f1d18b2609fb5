"""Whole runs: the folder, resumption after a real kill, several processes."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("yaml")

from gramian.models import GramianForCausalLM, GramianForSequenceClassification, load
from gramian.tasks import build
from gramian.tasks.encoding import load_tokenizer
from gramian.training import ConfigError, parse_config, train
from gramian.training.collation import Collator
from gramian.training.recording import read_lines

ROOT = Path(__file__).parents[2]


def mqar(folder: Path, **changes: Any) -> dict[str, Any]:
    """A run of seconds, with dropout so that random states matter."""
    values: dict[str, Any] = {
        "output": str(folder),
        "seed": 3,
        "task": {
            "name": "mqar",
            "vocab_size": 32,
            "length": 16,
            "pairs": 2,
            "train_examples": 48,
            "eval_examples": 20,
        },
        "model": {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_heads": 2,
            "intermediate_size": 16,
            "dropout": 0.1,
        },
        "optimization": {"steps": 12, "batch_size": 8, "learning_rate": 0.01},
        "evaluation": {"every": 6},
        "checkpoints": {"every": 4},
        "logging": {"every": 2},
        "hardware": {"device": "cpu", "threads": 1},
    }
    for name, change in changes.items():
        section, _, key = name.partition("__")
        values[section][key] = change
    return values


def learned(folder: Path) -> list[dict[str, Any]]:
    """What was logged, but for how long things took."""
    return [
        {key: value for key, value in line.items() if "second" not in key and "runtime" not in key}
        for line in read_lines(folder / "metrics.jsonl")
    ]


def process(config: Path, *launcher: str, wait: bool = True) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, *(launcher or ("-m", "gramian")), "train", str(config)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    if wait:
        _, err = child.communicate(timeout=300)
        assert child.returncode == 0, err
    return child


def test_a_run_leaves_a_complete_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    report = train(parse_config(mqar(folder)))
    assert "Writing" not in capfd.readouterr().err  # no bars of others
    assert sorted(path.name for path in folder.iterdir()) == [
        "best",
        "checkpoints",
        "config.yaml",
        "environment.json",
        "last",
        "metrics.jsonl",
        "report.json",
        "samples.jsonl",
        "training.png",
    ]
    assert json.loads((folder / "report.json").read_text()) == report.to_dict()
    written = parse_config(yaml.safe_load((folder / "config.yaml").read_text()))
    assert written == parse_config(mqar(folder))
    assert report.steps == 12 and report.resumed_from == 0
    lines = learned(folder)
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8, 10, 12]
    evaluations = {line["step"]: line for line in lines if "eval_loss" in line}
    assert sorted(evaluations) == [6, 12]
    assert report.metrics["loss"] == evaluations[12]["eval_loss"]
    samples = read_lines(folder / "samples.jsonl")
    assert [line["step"] for line in samples] == [6, 6, 12, 12]
    assert all(len(line["due"]) == len(line["predicted"]) == 2 for line in samples)

    for name, values in (("best", report.best), ("last", report.metrics)):
        card = (folder / name / "README.md").read_text(encoding="utf-8")
        assert f"# run/{name}\n\nA `GramianForCausalLM` of" in card and "task `mqar`" in card
        assert all(f"\n{key}: {value:.6g}\n" in card for key, value in values.items())

    # A second call finds the run finished; one with other settings is refused.
    assert train(parse_config(mqar(folder))) == report
    with pytest.raises(ConfigError, match=r"another model\.dropout"):
        train(parse_config(mqar(folder, model__dropout=0.2)))


def test_saved_models_score_what_was_reported(tmp_path: Path) -> None:
    """The last evaluation, computed again from the saved model by its definition."""
    report = train(parse_config(mqar(tmp_path / "run")))
    model = load(tmp_path / "run" / "last")
    assert isinstance(model, GramianForCausalLM) and model.config.use_cache
    task = build("mqar", **{k: v for k, v in mqar(tmp_path)["task"].items() if k != "name"})
    data = task.dataset("validation", seed=3)
    loss = right = count = 0.0
    with torch.no_grad():
        for row in data:
            logits = model(row["input_ids"][None], use_cache=False).logits[0].double()
            for place in torch.nonzero(row["labels"] >= 0).flatten():
                due = row["labels"][place]
                loss -= float(logits[place].log_softmax(-1)[due])
                right += float(logits[place].argmax() == due)
                count += 1
    assert count == 40
    assert report.metrics["loss"] == pytest.approx(loss / count, rel=1e-5)
    assert report.metrics["accuracy"] == right / count
    best = min(line["eval_loss"] for line in learned(tmp_path / "run") if "eval_loss" in line)
    assert report.best["loss"] == best


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("first step", marks=pytest.mark.slow),
        "while writing",
        pytest.param("after a checkpoint", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_resumes_to_the_same_losses(tmp_path: Path, moment: str) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(parse_config(mqar(whole)))
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(mqar(killed)))
    # The process kills itself in the middle of its work, as a machine would: no handler runs.
    step = {"first step": 1, "while writing": 8, "after a checkpoint": 7}[moment]
    program = tmp_path / "killing.py"
    program.write_text(
        "import os, signal, sys\n"
        "from gramian.training import trainer\n"
        "class Killed(trainer.GramianTrainer):\n"
        "    def training_step(self, *args, **kwargs):\n"
        f"        if self.state.global_step == {step} and {step} != 8:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return super().training_step(*args, **kwargs)\n"
        "    def _save_optimizer_and_scheduler(self, folder):\n"
        f"        if self.state.global_step == {step}:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        super()._save_optimizer_and_scheduler(folder)\n"
        "import gramian.training._run as run\n"
        "run.GramianTrainer = Killed\n"
        "from gramian.cli import main\n"
        "main()\n"
    )
    child = process(config, str(program), wait=False)
    child.communicate(timeout=300)
    assert child.returncode == -signal.SIGKILL
    assert not (killed / "report.json").exists()
    report = train(parse_config(mqar(killed)))
    assert report.resumed_from == (0 if moment == "first step" else 4)
    assert report.steps == 12
    assert learned(killed) == learned(whole)
    assert len(json.loads((killed / "environment.json").read_text())) == 2
    for name in ("best", "last"):
        one = load(whole / name).state_dict()
        other = load(killed / name).state_dict()
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_a_run_killed_from_outside_at_any_time_resumes_to_the_same_losses(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    changes = {"optimization__steps": 60, "evaluation__every": 20}
    train(parse_config(mqar(whole, **changes)))
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(mqar(killed, **changes)))
    for seen in (5, 25):  # lines of metrics after which the process dies
        child = process(config, wait=False)
        lines = killed / "metrics.jsonl"
        while not lines.is_file() or len(read_lines(lines)) < seen:
            assert child.poll() is None
            time.sleep(0.01)
        child.kill()
        child.communicate()
    process(config)
    assert learned(killed) == learned(whole)


# Runs that sum in another order stay together where no dropout is drawn and steps are small; at ten
# times this rate the training is chaotic, and rounding errors of 1e-7 are 1e-2 after twelve steps.
SMOOTH = {"model__dropout": 0.0, "optimization__learning_rate": 1e-3}


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    train(parse_config(mqar(tmp_path / "one", **SMOOTH)))
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(mqar(tmp_path / "two", **SMOOTH)))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    process(config, *launcher, "-m", "gramian")
    one, two = learned(tmp_path / "one"), learned(tmp_path / "two")
    assert len(one) == len(two)
    for first, second in zip(one, two, strict=True):
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert second[key] == pytest.approx(value, rel=1e-4), key
    report = json.loads((tmp_path / "two" / "environment.json").read_text())
    assert report[0]["processes"] == 2
    saved = [load(tmp_path / run / "last").state_dict() for run in ("one", "two")]
    for name, value in saved[0].items():
        torch.testing.assert_close(saved[1][name], value, rtol=1e-2, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_sharded_processes_give_the_losses_of_one_and_resume(
    tmp_path: Path, checkpointing: bool
) -> None:
    train(parse_config(mqar(tmp_path / "one", **SMOOTH)))
    values = mqar(tmp_path / "two", **SMOOTH, hardware__fsdp=True)
    values["hardware"]["gradient_checkpointing"] = checkpointing
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    one, folder = learned(tmp_path / "one"), tmp_path / "two"
    for resumed in (False, True):
        process(config, *launcher, "-m", "gramian")
        two = learned(folder)
        assert len(one) == len(two)
        for first, second in zip(one, two, strict=True):
            assert first.keys() == second.keys()
            for key, value in first.items():
                assert second[key] == pytest.approx(value, rel=1e-4), key
        saved = [load(tmp_path / run / "last").state_dict() for run in ("one", "two")]
        for name, value in saved[0].items():
            torch.testing.assert_close(saved[1][name], value, rtol=1e-2, atol=1e-4)
        report = json.loads((folder / "report.json").read_text())
        assert report["resumed_from"] == (8 if resumed else 0)
        assert report["parameters"] == sum(
            value.numel() for value in load(folder / "last").parameters()
        )
        # As if the processes had been killed while they wrote the last checkpoint.
        (folder / "report.json").unlink()
        (folder / "checkpoints" / "checkpoint-12" / "complete").unlink()


def test_accumulation_gives_the_losses_of_one_batch(tmp_path: Path) -> None:
    for name, parts in (("one", 1), ("four", 4)):
        run = mqar(tmp_path / name, **SMOOTH, optimization__accumulation=parts)
        train(parse_config(run))
    one, four = learned(tmp_path / "one"), learned(tmp_path / "four")
    losses = [[line["loss"] for line in run if "loss" in line] for run in (one, four)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_classifier_of_ragged_rows_learns(tmp_path: Path) -> None:
    config = parse_config(
        {
            "output": str(tmp_path / "run"),
            "task": {
                "name": "lra/listops",
                "min_length": 4,
                "max_length": 24,
                "train_examples": 64,
                "eval_examples": 16,
            },
            "model": {
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "mixers": "long_convolution",
                "filter": {"type": "rtf", "state_size": 4},
                "block": "glu",
            },
            "optimization": {"steps": 30, "batch_size": 32, "learning_rate": "1e-2"},
            "evaluation": {"metric": "accuracy", "samples": 1},
            "logging": {"every": 5},
            "hardware": {"device": "cpu"},
        }
    )
    train(config)
    losses = [line["loss"] for line in learned(tmp_path / "run") if "loss" in line]
    assert losses[-1] < losses[0] - 0.1
    best = GramianForSequenceClassification.from_pretrained(tmp_path / "run" / "best")
    assert best.config.num_labels == 10 and best.config.vocab_size == 18
    filters = [name for name, _ in best.named_parameters() if "filter" in name]
    assert filters


def test_early_stopping_counts_over_a_resumption(tmp_path: Path) -> None:
    """A rate of 0 never improves: the second evaluation without a better loss is the last."""
    changes = {
        "optimization__learning_rate": 0.0,
        "evaluation__every": 2,
        "evaluation__patience": 2,
        "checkpoints__every": 2,
    }
    report = train(parse_config(mqar(tmp_path / "run", **changes)))
    assert report.steps == 6
    assert report.best["step"] == 2


def test_training_stops_once_the_metric_passes_its_goal(tmp_path: Path) -> None:
    """The first evaluation is at step 2. Its loss is below 100, and its accuracy not above 1."""
    for metric, goal, steps in (("loss", 100.0, 2), ("loss", 0.0, 6), ("accuracy", 1.0, 6)):
        changes = {
            "optimization__steps": 6,
            "evaluation__every": 2,
            "evaluation__metric": metric,
            "evaluation__stop_at": goal,
        }
        report = train(parse_config(mqar(tmp_path / f"{metric}-{goal}", **changes)))
        assert report.steps == steps


def test_text_is_sampled_and_its_model_knows_its_tokenizer(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the same line again. " * 40)
    values = mqar(tmp_path / "run")
    values["task"] = {"name": "text", "train": str(text), "validation": str(text), "length": 32}
    values["evaluation"]["sample_length"] = 5
    report = train(parse_config(values))
    assert report.metrics["bits_per_byte"] == pytest.approx(
        report.metrics["loss"] / 0.6931471805599453
    )
    samples = read_lines(tmp_path / "run" / "samples.jsonl")
    assert samples[0]["prompt"] == "the same line ag"
    assert (tmp_path / "run" / "best" / "tokenizer.json").is_file()


def test_a_model_of_genomes_and_one_trained_on_keep_their_tokenizers(tmp_path: Path) -> None:
    """Also where the task that a model is trained on stands for no text."""
    genome = tmp_path / "genome.fa"
    genome.write_text(">one\n" + "ACGTTGCA" * 20 + "\n>two\nACGTACGT\n")
    values = mqar(tmp_path / "first")
    records = {"validation_records": "two", "length": 16}
    values["task"] = {"name": "fasta", "train": str(genome), **records}
    train(parse_config(values))
    values = mqar(tmp_path / "second")
    values["task"] |= {"vocab_size": 12, "length": 4, "pairs": 1}
    values["model"] = {"path": str(tmp_path / "first" / "best")}
    train(parse_config(values))
    for run, name in itertools.product(("first", "second"), ("best", "last")):
        tokenizer = load_tokenizer(str(tmp_path / run / name))
        assert tokenizer("ACGTN").input_ids == [7, 8, 9, 10, 11], (run, name)


def test_shares_of_a_batch_must_be_whole(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be divisible by processes × accumulation"):
        train(parse_config(mqar(tmp_path / "run", optimization__accumulation=3)))
    assert not (tmp_path / "run").exists()


def test_sharding_over_one_process_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"hardware\.fsdp needs several processes"):
        train(parse_config(mqar(tmp_path / "run", hardware__fsdp=True)))
    assert not (tmp_path / "run").exists()


def test_mistakes_in_a_model_leave_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'hidden_size'"):
        train(parse_config(mqar(tmp_path / "run", model__hidden_sise=3)))
    with pytest.raises(ConfigError, match="at least the task's 32"):
        train(parse_config(mqar(tmp_path / "run", model__vocab_size=31)))
    look = {
        "output": str(tmp_path / "run"),
        "task": {"name": "digits"},
        "model": {
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "mixers": "long_convolution",
            "bidirectional": True,
            "filter": {"type": "rtf", "state_size": 2},
        },
        "optimization": {"steps": 1},
        "evaluation": {"ess": {"rows": 1}},
    }
    with pytest.raises(ConfigError, match=r"evaluation\.ess\.rows must be 0 for a bidirectional"):
        train(parse_config(look))
    assert not (tmp_path / "run").exists()


def test_ragged_rows_are_padded_under_a_mask() -> None:
    task = build("lra/listops", min_length=4, max_length=24, train_examples=9)
    rows = list(task.rows("train", 0))
    batch = Collator(task.description())(rows)
    lengths = [len(row["input_ids"]) for row in rows]
    assert batch["input_ids"].shape == (9, max(lengths))
    assert batch["attention_mask"].sum(1).tolist() == lengths
    for row, ids, length in zip(rows, batch["input_ids"], lengths, strict=True):
        assert ids[:length].tolist() == row["input_ids"].tolist()


def test_a_stream_trains_in_its_own_order(tmp_path: Path) -> None:
    values = mqar(tmp_path / "run", **SMOOTH, evaluation__samples=0)
    values["task"]["streaming"] = True
    train(parse_config(values))
    first = next(line for line in learned(tmp_path / "run") if "loss" in line)

    # The loss of the first step, of the first rows under the first weights.
    from transformers import set_seed

    from gramian.training._run import _model

    config = parse_config(mqar(tmp_path, **SMOOTH))
    settings = {key: value for key, value in config.task.items() if key != "name"}
    task = build("mqar", **settings)
    set_seed(config.seed)
    model = _model(config, task.description())
    rows = list(task.rows("train", config.seed))[:8]
    batch = Collator(task.description())(rows)
    with torch.no_grad():
        loss = float(model(**batch).loss)
    assert first["step"] == 2
    assert first["loss"] == pytest.approx(loss, abs=0.02)  # the mean of the first two steps


def test_a_stream_needs_a_number_of_steps(tmp_path: Path) -> None:
    values = mqar(tmp_path / "run")
    values["task"]["streaming"] = True
    values["optimization"] = {"epochs": 1}
    with pytest.raises(ConfigError, match=r"give optimization\.steps"):
        train(parse_config(values))


@pytest.mark.slow
def test_two_processes_share_a_stream_of_ragged_rows(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": "abc" * n}) + "\n" for n in range(1, 40)))
    for name in ("one", "two"):
        values = mqar(tmp_path / name, **SMOOTH)
        values["task"] = {"name": "text", "train": str(text), "length": 64, "streaming": True}
        values["task"]["validation"] = str(text)
        values["evaluation"] = {"samples": 0, "examples": 6}
        values["optimization"]["steps"] = 4
        if name == "one":
            train(parse_config(values))
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    process(config, *launcher, "-m", "gramian")
    runs = [learned(tmp_path / name) for name in ("one", "two")]
    for key in ("loss", "eval_loss"):
        one, two = ([line[key] for line in run if key in line] for run in runs)
        assert two == pytest.approx(one, rel=1e-4) and one


def test_a_genome_of_one_record_is_trained_on_and_held_out(tmp_path: Path) -> None:
    pytest.importorskip("pyfaidx")
    genome = tmp_path / "genome.fa"
    genome.write_text(">one\n" + "ACGTTGCANA" * 40 + "\n")
    values = mqar(tmp_path / "run")
    values["task"] = {
        "name": "fasta",
        "train": str(genome),
        "length": 16,
        "validation_share": 0.2,
        "validation_by": "positions",
        "reverse_complement": True,
        "shift": 3,
        "replace_n": True,
    }
    report = train(parse_config(values))
    assert report.metrics["loss"] > 0
    tokenizer = load_tokenizer(str(tmp_path / "run" / "best"))
    assert tokenizer("acgu").input_ids == [7, 8, 9, 10]
