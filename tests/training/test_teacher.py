"""Knowledge distillation in `gramian train`: a model learns the outputs of a teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("yaml")

from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from gramian.models import ByteTokenizer, load_any
from gramian.tasks import Description, find_kind
from gramian.training import ConfigError, parse_config, train
from gramian.training._run import _model, _task, check
from gramian.training.collation import Collator
from gramian.training.recording import read_lines
from gramian.training.teaching import load_teaching
from gramian.training.trainer import GramianTrainer

Run = Callable[..., dict[str, Any]]

KINDS = (
    "tokens",
    "classification",
    "token_classification",
    "pairs",
    "signal",
    "regression",
    "reconstruction",
)


def first_step(values: dict[str, Any]) -> dict[str, Any]:
    """Train a model, and return its first line of metrics."""
    train(parse_config(values))
    lines = read_lines(Path(values["output"]) / "metrics.jsonl")
    return next(line for line in lines if "loss" in line)


def saved(values: dict[str, Any], folder: Path, seed: int = 7, **changes: Any) -> str:
    """The folder of a new model for the task of a configuration."""
    config = parse_config(values)
    torch.manual_seed(seed)
    task = _task(config)
    model = _model(config, task.description())
    for key, value in changes.items():
        setattr(model.config, key, value)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_divergence_is_its_definition(kind: str, temperature: float) -> None:
    torch.manual_seed(0)
    classes = find_kind(kind).label_column(Description(kind, 5, num_labels=3)).integers
    shape = () if kind in ("classification", "pairs", "regression") else (5,)
    p, q = torch.randn(2, 4, *shape, 3, dtype=torch.float64)
    labels = torch.randint(3, p.shape[: len(shape) + 1]) if classes else torch.randn_like(p)
    labels[0] = -100
    if not classes and temperature != 1:
        with pytest.raises(ValueError, match="no temperature"):
            find_kind(kind).divergence(q, p, labels, temperature)
        return
    found = find_kind(kind).divergence(q, p, labels, temperature)
    if classes:
        p, q = ((one / temperature).softmax(-1) for one in (p, q))
        terms = temperature**2 * p * (p / q).log()
    else:
        terms = (p - q) ** 2
    torch.testing.assert_close(found, terms[1:].sum())


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_the_mean_of_two(kind: str, run: Run, tmp_path: Path) -> None:
    temperature = 1.0 if kind in ("signal", "regression") else 2.0
    values = run(tmp_path / "run", kind)
    teacher = {"path": saved(values, tmp_path / "teacher"), "weight": 0.25}
    config = parse_config(values | {"teacher": teacher | {"temperature": temperature}})
    task = _task(config)
    description = task.description()
    torch.manual_seed(0)
    model = _model(config, description).train()
    batch = Collator(description)(list(task.dataset("train", 0))[:8])
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    given: dict[str, Any] = {"model": model, "args": arguments}
    alone = GramianTrainer(description, tmp_path, **given).compute_loss(model, dict(batch))
    teaching = load_teaching(config, model, description)
    trainer = GramianTrainer(description, tmp_path, teaching=teaching, **given)
    taught = trainer.compute_loss(model, dict(batch))

    inputs = {name: value for name, value in batch.items() if "labels" not in name}
    logits, targets = model(**inputs).logits, load_any(teacher["path"])(**inputs).logits
    total = find_kind(kind).divergence(logits, targets, batch["labels"], temperature)
    divergence = total / (batch["labels"] != -100).sum()
    assert divergence > 0
    torch.testing.assert_close(taught, 0.75 * alone + 0.25 * divergence)
    assert trainer.logged["divergence"] == [pytest.approx(divergence.item(), rel=1e-4)]
    trainer.compute_loss(model.eval(), dict(batch))
    assert len(trainer.logged["divergence"]) == 1  # evaluations score the labels


def test_parts_and_packed_rows_have_the_same_loss(run: Run, tmp_path: Path) -> None:
    path = saved(run(tmp_path / "run", "tokens"), tmp_path / "teacher")
    losses = []
    for name, change in {
        "plain": {},
        "parts": {"accumulation": 2},
        "packed": {"packing": True},
    }.items():
        values = run(tmp_path / name, "tokens", optimization__steps=1, task__ragged=True)
        values["optimization"] |= change
        losses.append(first_step(values | {"teacher": {"path": path, "weight": 0.5}})["loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)


def test_own_teacher(run: Run, tmp_path: Path) -> None:
    """A model does not diverge from itself, and the labels do not count with a weight of 1."""
    values = run(tmp_path / "run", "tokens", optimization__steps=1)
    path = saved(values, tmp_path / "teacher")
    values |= {"model": {"path": path}, "teacher": {"path": path}}
    assert abs(first_step(values)["loss"]) < 1e-6


def test_small_model_learns_from_another_architecture(run: Run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    ByteTokenizer().save_pretrained(tmp_path / "llama")
    values = run(tmp_path / "run", "tokens", optimization__steps=60)
    values["optimization"]["learning_rate"] = 0.05
    values |= {"teacher": {"path": str(tmp_path / "llama")}, "evaluation": {}, "checkpoints": {}}
    train(parse_config(values))
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    steps = [line["divergence"] for line in lines if "divergence" in line]
    assert sum(steps[-5:]) < 0.6 * sum(steps[:5])

    packed = values | {"output": str(tmp_path / "packed")}
    packed["optimization"] = packed["optimization"] | {"packing": True}
    with pytest.raises(ConfigError, match="needs a teacher of Gramian"):
        train(parse_config(packed))
    values = run(tmp_path / "classes", "classification", teacher__path=str(tmp_path / "llama"))
    with pytest.raises(ConfigError, match="must hold a GramianForSequenceClassification"):
        train(parse_config(values))


@pytest.mark.parametrize(
    ("kind", "other", "changes", "message"),
    [
        ("tokens", "tokens", {"weight": 1.5}, "teacher.weight must lie from 0 to 1"),
        ("tokens", "tokens", {"temperature": 0.0}, "teacher.temperature must lie from 0.01 to 100"),
        ("tokens", "tokens", {"temperature": 1e9}, "teacher.temperature must lie from 0.01 to 100"),
        ("signal", "signal", {"temperature": 2.0}, "numbers for labels"),
        ("tokens", "classification", {}, "must hold a GramianForCausalLM"),
        ("classification", "tokens", {}, "must hold a GramianForSequenceClassification"),
        ("regression", "classification", {}, "tasks of the kind 'regression'"),
    ],
)
def test_refused_teachers(
    kind: str,
    other: str,
    changes: dict[str, Any],
    message: str,
    run: Run,
    tmp_path: Path,
) -> None:
    path = saved(run(tmp_path / "run", other), tmp_path / "teacher")
    with pytest.raises(ConfigError, match=message):
        train(parse_config(run(tmp_path / "run", kind) | {"teacher": {"path": path} | changes}))
    assert not (tmp_path / "run").exists()


def test_teacher_with_other_outputs(run: Run, tmp_path: Path) -> None:
    teacher = {"path": saved(run(tmp_path / "run", "tokens"), tmp_path / "teacher")}
    values = run(tmp_path / "run", "tokens", model__vocab_size=9) | {"teacher": teacher}
    with pytest.raises(ConfigError, match=r"as many outputs as the model, 9; .* has 4"):
        check(parse_config(values))
    with pytest.raises(FileNotFoundError, match="there is no model folder"):
        check(parse_config(values | {"teacher": {"path": str(tmp_path / "nowhere")}}))


def test_classes_have_the_order_of_the_teacher(tmp_path: Path) -> None:
    rows = [f"{'xyz'[number % 3]},{'abc'[number % 3]}" for number in range(24)]
    (tmp_path / "rows.csv").write_text("\n".join(["sequence,label", *rows]), encoding="utf-8")
    table = {"train": str(tmp_path / "rows.csv"), "validation": str(tmp_path / "rows.csv")}
    values: dict[str, Any] = {
        "output": str(tmp_path / "run"),
        "task": {"name": "table", "length": 4, **table},
        "model": {"hidden_size": 8, "num_hidden_layers": 1, "num_heads": 2},
        "optimization": {"steps": 1},
    }
    names = ["c", "a", "b"]
    path = saved(
        values,
        tmp_path / "teacher",
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )
    values["teacher"] = {"path": path}
    assert _task(parse_config(values)).classes() == names
    own = saved(
        values,
        tmp_path / "own",
        id2label=dict(enumerate("abc")),
        label2id={name: number for number, name in enumerate("abc")},
    )
    with pytest.raises(ConfigError, match=r"the labels of model\.path, \['a', 'b', 'c'\]"):
        check(parse_config(values | {"model": {"path": own}}))


def test_text_has_the_tokens_of_the_teacher(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    (tmp_path / "text.txt").write_text("one two " * 40, encoding="utf-8")
    text = {name: str(tmp_path / "text.txt") for name in ("train", "validation")}
    values: dict[str, Any] = {
        "output": str(tmp_path / "run"),
        "task": {"name": "text", "length": 8, **text},
        "model": {"hidden_size": 8, "num_hidden_layers": 1, "num_heads": 2},
        "optimization": {"steps": 1},
    }
    own = saved(values, tmp_path / "own")
    ByteTokenizer().save_pretrained(own)
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[EOS]": 1, "one": 2, "two": 3}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", eos_token="[EOS]", pad_token="[EOS]"
    )
    values["teacher"] = {"path": str(tmp_path / "teacher")}
    tokenizer.save_pretrained(tmp_path / "teacher")
    saved(values, tmp_path / "teacher")
    check(parse_config(values))
    first = _task(parse_config(values)).dataset("train", 0)[0]["input_ids"]
    assert {2, 3} <= set(first.tolist()) <= {0, 1, 2, 3}
    with pytest.raises(ConfigError, match=r"the tokens of model\.path"):
        check(parse_config(values | {"model": {"path": own}}))
