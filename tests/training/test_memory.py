"""Losses on memory and state-sizes, in `gramian train` and in transformers' own trainer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("yaml")

from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import gramian
from gramian.memory import (
    MemoryLosses,
    Observer,
    ess_penalty,
    gate_regularizer,
    hankel_penalty,
)
from gramian.mixers import LinearRecurrence
from gramian.models import (
    GramianConfig,
    GramianForCausalLM,
    GramianForPairClassification,
    load,
)
from gramian.training import ConfigError, StateSizeCallback, parse_config, train
from gramian.training.recording import read_lines


def run(folder: Path, **sections: Any) -> dict[str, Any]:
    return {
        "output": str(folder),
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
            "mixers": "gated_linear_attention",
            "linear_recurrence": {"temperature": 1.0},
        },
        "optimization": {"steps": 6, "batch_size": 8, "learning_rate": 0.02},
        "evaluation": {"every": 3},
        "logging": {"every": 1},
        "hardware": {"device": "cpu", "threads": 1},
    } | sections


def model(mixers: Any = "gated_linear_attention") -> GramianForCausalLM:
    torch.manual_seed(0)
    config = GramianConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_heads=2,
        mixers=mixers,
        max_position_embeddings=24,
    )
    return GramianForCausalLM(config)


def test_losses_and_state_sizes_of_a_run(tmp_path: Path) -> None:
    sections = {
        "regularization": {"gates": 1.0, "ess": {"weight": 0.1, "share": 0.5}},
        "evaluation": {"every": 3, "ess": {"rows": 2, "every": 4}},
    }
    report = train(parse_config(run(tmp_path / "with", **sections)))
    lines = read_lines(tmp_path / "with" / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 6
    assert all(line["gate_regularizer"] > 0 and line["ess_penalty"] > 0 for line in steps)
    assert steps[-1]["gate_regularizer"] < steps[0]["gate_regularizer"]
    sizes = [line for line in lines if "eval_ess" in line]
    assert [line["step"] for line in sizes] == [3, 6]
    assert {"eval_ess_layer_0", "eval_ess_layer_1"} <= sizes[0].keys()
    assert 0 < sizes[-1]["eval_ess_utilization"] < 1
    assert report.metrics["ess"] == sizes[-1]["eval_ess"]

    # The figures are those of the model that the run left, on the rows that it was told.
    from gramian.tasks import build

    settings = run(tmp_path)["task"]
    rows = build(settings.pop("name"), **settings).dataset("validation", 0)
    trained, found = load(tmp_path / "with" / "last"), []
    for row in rows.select(range(2)):
        measured = gramian.analyze(trained, row["input_ids"], at=[4, 8, 12], max_channels=16)
        found.append(float(measured.average()))
    assert sizes[-1]["eval_ess"] == pytest.approx(sum(found) / 2, rel=1e-4)

    train(parse_config(run(tmp_path / "without")))
    plain = read_lines(tmp_path / "without" / "metrics.jsonl")
    assert not any("gate_regularizer" in line or "eval_ess" in line for line in plain)
    assert plain[0]["loss"] < steps[0]["loss"]  # which has the losses on memory in it


def test_parts_of_a_batch_add_up_to_its_loss(tmp_path: Path) -> None:
    first = []
    for parts in (1, 2):
        values = run(tmp_path / str(parts), regularization={"gates": 1.0})
        values["optimization"] |= {"accumulation": parts, "steps": 1}
        train(parse_config(values))
        lines = read_lines(tmp_path / str(parts) / "metrics.jsonl")
        first.append(next(line for line in lines if "loss" in line))
    whole, parted = first
    assert parted["loss"] == pytest.approx(whole["loss"], rel=1e-3)
    assert parted["gate_regularizer"] == pytest.approx(whole["gate_regularizer"], rel=1e-2)


@pytest.mark.slow
@pytest.mark.skipif(Version(torch.__version__) < Version("2.9"), reason="needs PyTorch 2.9")
def test_losses_on_memory_are_the_same_in_compiled_training(tmp_path: Path) -> None:
    losses = {"gates": 1.0, "ess": {"weight": 0.1, "share": 0.5}}
    found = []
    for compiled in (False, True):
        values = run(tmp_path / str(compiled), regularization=losses)
        values["optimization"] |= {"steps": 3}
        values["hardware"] |= {"compile": compiled}
        train(parse_config(values))
        lines = read_lines(tmp_path / str(compiled) / "metrics.jsonl")
        found.append([line for line in lines if "loss" in line])
    for plain, compiled in zip(*found, strict=True):
        for name in ("loss", "gate_regularizer", "ess_penalty"):
            assert compiled[name] == pytest.approx(plain[name], rel=1e-4)


def test_gates_of_chosen_layers_without_normalization(tmp_path: Path) -> None:
    """The first step logs the Frobenius norm of the second layer's gates alone."""
    regularization = {"gates": 1e-3, "normalize_gates": False, "gate_layers": [1]}
    values = run(tmp_path / "run", regularization=regularization)
    values["optimization"] |= {"steps": 1}
    train(parse_config(values))
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    logged = next(line["gate_regularizer"] for line in lines if "loss" in line)
    # 8 sequences of 16 tokens, 2 heads and 8 states; gates near 1/2 are as far from 1.
    assert logged == pytest.approx(0.5 * (8 * 16 * 2 * 8) ** 0.5, rel=0.1)

    net, ids = model(["hyena", "gated_linear_attention"]), torch.randint(0, 32, (3, 20))
    losses = MemoryLosses(net, 2.0, normalize_gates=False, gate_layers=[1])
    observer = Observer(net, LinearRecurrence)
    net(ids, use_cache=False)
    total, logs = losses()
    norm = gate_regularizer(observer.operators(), normalize=False)
    torch.testing.assert_close(total, 2.0 * norm)
    assert logs["gate_regularizer"] == pytest.approx(norm.item())
    with pytest.raises(ValueError, match=r"LinearRecurrence, of which .* has 1; got \[0\]"):
        MemoryLosses(net, 1.0, gate_layers=[0])
    values["regularization"] = {"gates": 1.0, "gate_layers": [2]}
    values["output"] = str(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"has 0, 1; got \[2\]"):
        train(parse_config(values))


def test_losses_are_those_of_the_observed_operators() -> None:
    net, ids = model(), torch.randint(0, 32, (3, 20))
    losses = MemoryLosses(net, 0.5, 2.0, target=3.0, sequences=3, channels=8)
    observer = Observer(net, LinearRecurrence)
    net(ids, use_cache=False)
    total, values = losses()
    systems = observer.operators()
    gates, penalty = gate_regularizer(systems), ess_penalty(systems, 3.0, at=[5, 10, 15])
    assert values["gate_regularizer"] == pytest.approx(gates.item())
    assert values["ess_penalty"] == pytest.approx(penalty.item())
    torch.testing.assert_close(total, 0.5 * gates + 2.0 * penalty)


@pytest.mark.parametrize("kind", ["ours", "llama"])
def test_state_sizes_in_transformers_own_trainer(kind: str, tmp_path: Path) -> None:
    if kind == "ours":
        net: Any = model(["gated_linear_attention", "hyena"])
    else:
        torch.manual_seed(0)
        net = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32,
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=32,
            )
        )
    torch.manual_seed(1)
    ids = torch.randint(0, 32, (6, 20))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        per_device_train_batch_size=2,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(net, arguments, train_dataset=rows, eval_dataset=rows)  # type: ignore[arg-type]
    trainer.add_callback(StateSizeCallback(trainer, rows=2, every=5))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_ess" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    metrics = trainer.evaluate()
    expected = sum(
        float(gramian.analyze(trainer.model, row, at=[5, 10, 15]).average()) for row in ids[:2]
    )
    assert metrics["eval_ess"] == pytest.approx(expected / 2, rel=1e-5)
    assert sum(key.startswith("eval_ess_layer_") for key in metrics) == 2
    assert json.dumps(metrics)


@pytest.mark.parametrize(
    "mixers", ["gated_linear_attention", ["hyena", "softmax_attention"], "long_convolution"]
)
def test_losses_are_those_of_sequences_alone(mixers: Any) -> None:
    net = model(mixers).double()
    losses = MemoryLosses(net, ess=1.0, target=2.0, sequences=4, channels=99)
    rows = [torch.randint(0, 32, (length,)) for length in (14, 3, 9, 3)]
    ids, mask = torch.zeros(2, 4, 15, dtype=torch.int64)
    for columns, one, row in zip(ids, mask, rows, strict=True):
        place = torch.randperm(15)[: len(row)].sort().values
        columns[place], one[place] = row, 1
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    right = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    real = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], True)

    def penalty(**batch: torch.Tensor) -> float:
        net(**batch)
        return losses()[1]["ess_penalty"]

    expected = sum(penalty(input_ids=row[None]) for row in rows) / len(rows)
    for batch in (
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": right, "attention_mask": real},
        {"input_ids": torch.cat(rows)[None], "position_ids": positions},
    ):
        assert penalty(**batch) == pytest.approx(expected, rel=1e-6)


def test_pairs_are_measured_by_their_first_sequence(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GramianConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_heads=2,
        mixers="gated_linear_attention",
        max_position_embeddings=16,
        num_labels=2,
    )
    net, first = GramianForPairClassification(config), torch.randint(0, 32, (12,)).tolist()
    trainer = Trainer(net, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    pair = {"input_ids": first, "input_ids_2": first[::-1]}
    measured = StateSizeCallback(trainer, [pair], every=4).measure(net)["eval_ess"]
    expected = gramian.analyze(net.base_model, first, at=[4, 8]).average()
    assert measured == pytest.approx(float(expected), rel=1e-6)


def test_padding_of_rows_is_left_out(tmp_path: Path) -> None:
    net, row = model(), torch.randint(0, 32, (12,)).tolist()
    trainer = Trainer(net, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    padded = {"input_ids": [0] * 5 + row, "attention_mask": [0] * 5 + [1] * 12}
    figures = [
        StateSizeCallback(trainer, [given], every=3).measure(net)["eval_ess"]
        for given in (row, padded)
    ]
    assert figures[0] == figures[1]


def test_what_cannot_be_measured_does_not_end_training(tmp_path: Path) -> None:
    net = model()
    trainer = Trainer(net, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    callback = StateSizeCallback(trainer, [[1, 2, 3, 4]], every=1)
    with torch.no_grad():
        net.model.layers[0].mixer.in_proj.weight.fill_(float("nan"))
    metrics: dict[str, float] = {}
    with pytest.warns(UserWarning, match="no state-sizes at step 0"):
        callback.on_evaluate(trainer.args, trainer.state, trainer.control, metrics, model=net)
    assert metrics == {}
    with pytest.raises(ValueError, match="at least one row"):
        StateSizeCallback(trainer)
    with pytest.raises(ValueError, match="every must be at least 1"):
        StateSizeCallback(trainer, [[1, 2]], every=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"regularization": {"ess": {"weight": 1.0}}}, "target or its share, one of the two"),
        ({"regularization": {"ess": {"weight": 1, "target": 2, "share": 0.5}}}, "one of the two"),
        ({"regularization": {"ess": {"weight": 1, "share": 1.5}}}, r"in \(0, 1\]"),
        ({"regularization": {"ess": {"weight": 1, "target": -2}}}, "above 0"),
        ({"regularization": {"gates": -1}}, "regularization.gates must be at least 0"),
        ({"regularization": {"gate": 1}}, "gates"),
        ({"evaluation": {"ess": {"rows": 1, "every": 0}}}, "evaluation.ess.every"),
        ({"regularization": {"gates": 1}, "hardware": {"fsdp": True}}, "only shards"),
        ({"regularization": {"gate_layers": 1}}, "gate_layers"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(run(tmp_path, **changes))


def convolving(folder: Path, **sections: Any) -> dict[str, Any]:
    """A run whose first layer has a modal filter and whose second has an S4D."""
    values = run(folder, **sections)
    values["model"] = {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "intermediate_size": 16,
        "mixers": ["hyena", "long_convolution"],
        "filter": [{"type": "modal", "orders": 4}, {"type": "s4d", "state_size": 8}],
    }
    return values


def test_the_loss_on_hankel_singular_values_of_a_run(tmp_path: Path) -> None:
    steps = {}
    for weight in (0.0, 3.0):
        folder = tmp_path / str(weight)
        values = convolving(folder, regularization={"hankel": weight})
        values["optimization"] = {"steps": 30, "batch_size": 8, "learning_rate": 0.01}
        train(parse_config(values))
        model = load(folder / "last")
        steps[weight] = [layer.mixer.filter(24) for layer in model.base_model.layers]
        logged = [line for line in read_lines(folder / "metrics.jsonl") if "loss" in line]
        assert all(("hankel_penalty" in line) == (weight > 0) for line in logged)
    assert logged[-1]["hankel_penalty"] < logged[0]["hankel_penalty"]
    with torch.no_grad():
        assert hankel_penalty(steps[3.0], 24) < 0.95 * hankel_penalty(steps[0.0], 24)


def test_the_loss_on_hankel_singular_values_counts_every_filter_once() -> None:
    torch.manual_seed(0)
    net = model(["hyena", "gated_linear_attention"])
    net.add_module("again", net.base_model.layers[0].mixer.filter)
    other = gramian.filters.RTF(4, state_size=4, max_length=8, initialization="xavier")
    net.add_module("other", other)
    systems = [net.again(24), net.other(8)]
    expected = (hankel_penalty(systems[0], 24) + hankel_penalty(systems[1], 8)) / 2
    total, values = MemoryLosses(net, hankel=0.5, hankel_channels=None)()
    assert values["hankel_penalty"] == pytest.approx(expected.item())
    torch.testing.assert_close(total, expected / 2)
    total.backward()
    assert net.other.a.grad.abs().sum() > 0
    _, some = MemoryLosses(net, hankel=0.5, hankel_channels=3)()
    assert some["hankel_penalty"] != values["hankel_penalty"]


def test_packed_rows_go_with_the_loss_on_filters_only() -> None:
    values = convolving(Path("run"), regularization={"hankel": 1.0})
    values["optimization"] |= {"packing": True}
    parse_config(values)
    values["regularization"] = {"gates": 1.0}
    with pytest.raises(ConfigError, match=r"regularization\.gates and .*ess read rows"):
        parse_config(values)
    values["optimization"]["packing"] = False
    values["regularization"], values["hardware"] = {"hankel": 1.0}, {"fsdp": True}
    with pytest.raises(ConfigError, match=r"hardware\.fsdp has only shards"):
        parse_config(values)
    values["regularization"] = {"hankel": -1.0}
    with pytest.raises(ConfigError, match=r"regularization\.hankel must be at least 0"):
        parse_config(values)


def test_a_model_without_filters_is_refused(tmp_path: Path) -> None:
    values = run(tmp_path / "run", regularization={"hankel": 1.0})
    with pytest.raises(ConfigError, match=r"regularization\.hankel needs filters of at least 2"):
        train(parse_config(values))
    with pytest.raises(ValueError, match="hankel_channels must be at least 1 or None; got 0"):
        MemoryLosses(model(), hankel=1.0, hankel_channels=0)


def test_a_run_that_drops_modes_resumes_to_the_same_losses(tmp_path: Path) -> None:
    def values(name: str) -> dict[str, Any]:
        given = convolving(tmp_path / name, regularization={"truncation": 0.02, "hankel": 0.1})
        given["optimization"] = {"steps": 12, "batch_size": 8, "learning_rate": 0.02}
        return given | {"evaluation": {"every": 3}, "checkpoints": {"every": 6, "keep": 3}}

    whole = train(parse_config(values("whole")))
    lines = read_lines(tmp_path / "whole" / "metrics.jsonl")
    counts = [line["eval_modes"] for line in lines if "eval_modes" in line]
    assert len(counts) == 4 and 64 > counts[0] >= counts[1] >= counts[3] == whole.metrics["modes"]

    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    (tmp_path / "again" / "report.json").unlink()
    (tmp_path / "again" / "checkpoints" / "checkpoint-12" / "complete").unlink()
    config = tmp_path / "again" / "config.yaml"
    config.write_text(config.read_text().replace(str(tmp_path / "whole"), str(tmp_path / "again")))
    again = train(parse_config(values("again")))
    assert again.resumed_from == 6
    repeated = read_lines(tmp_path / "again" / "metrics.jsonl")
    keys = ("step", "loss", "eval_loss", "eval_modes", "hankel_penalty")
    for one, other in zip(lines, repeated, strict=True):
        assert [one.get(key) for key in keys] == [other.get(key) for key in keys]
    assert again.parameters == whole.parameters
    for name in ("best", "last"):
        weights = load(tmp_path / "again" / name).state_dict()
        for key, value in load(tmp_path / "whole" / name).state_dict().items():
            assert torch.equal(value, weights[key])
    orders = load(tmp_path / "whole" / "last").config.filter[0]["orders"]
    assert sum(orders) < 32


def test_truncation_is_refused_where_it_cannot_be(tmp_path: Path) -> None:
    values = convolving(tmp_path / "run", regularization={"truncation": 1.0})
    with pytest.raises(ConfigError, match=r"truncation must be at least 0 and below 1; got 1\.0"):
        parse_config(values)
    values["regularization"] = {"truncation": 0.1}
    values["hardware"] = {"compile": True}
    with pytest.raises(ConfigError, match="changes the shapes of parameters"):
        parse_config(values)
    values["hardware"] = {}
    values["model"] |= {"mixers": "hyena", "filter": {"type": "implicit"}}
    with pytest.raises(ConfigError, match="needs filters of the type modal or s4d"):
        train(parse_config(values))
    assert not (tmp_path / "run").exists()


def test_a_model_without_gates_is_refused(tmp_path: Path) -> None:
    values = run(tmp_path / "run", regularization={"gates": 1.0})
    values["model"] = {"hidden_size": 16, "num_hidden_layers": 1, "mixers": "hyena"}
    with pytest.raises(ConfigError, match=r"regularization\.gates needs linear recurrences"):
        train(parse_config(values))
    assert not (tmp_path / "run").exists()  # where the corrected run will be
