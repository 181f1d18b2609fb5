"""Every recipe is accepted, makes its model at full size, and takes a step at a reduced one."""

from __future__ import annotations

import copy
import itertools
import wave
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from gramian import tasks
from gramian.training import TrainingConfig, load_sweep, parse_config, train
from gramian.training._run import _model, _task

RECIPES = Path(__file__).parents[2] / "recipes"
FILES = sorted(RECIPES.rglob("*.yaml"))


def parts_of(file: Path) -> str:
    """The task, mixers, filter and block that a recipe names, without their sizes."""
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    model = values["model"]
    filter = model.get("filter", {}).get("type")
    return str([values["task"]["name"], model.get("mixers"), filter, model.get("block")])


PARTS = {file: parts_of(file) for file in FILES if file.parent.name != "sweeps"}
FIRST = {parts: file for file, parts in reversed(PARTS.items())}
# Of recipes with the same parts, the first is stepped. A sweep's base is a recipe of the same kinds
# of model and task, or nearly.
STEPPED = [
    pytest.param(
        file,
        id=str(file.relative_to(RECIPES)),
        marks=[pytest.mark.slow] * (file not in FIRST.values()),
    )
    for file in FILES
]
CHANGES = {  # what makes a task small, besides fewer examples
    "lra/listops": {"min_length": 5, "max_length": 30},
    "lra/text": {"length": 32},
    "lra/retrieval": {"length": 32},
    "speech_commands": {"num_labels": 2, "decimate": 500},
    "text": {"length": 16},
    "python_documentation": {"length": 32},
    "copying": {"memorize": 4},
    "delay": {"length": 32, "lag": 4, "lags": 2},
}


class Tokenizer:
    """In place of one that comes from the Hub."""

    eos_token_id = 50256
    pad_token_id = None

    def __len__(self) -> int:
        return 50257


@pytest.fixture(autouse=True)
def offline_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gramian.tasks.tokenized.load_tokenizer", lambda path: Tokenizer())


def configurations(file: Path) -> Iterator[dict[str, Any]]:
    """Of a recipe, or of every point of a sweep."""
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    axes = []
    for name, axis in values.pop("sweep", {}).items():
        axes.append([*axis.values()] if isinstance(axis, dict) else [{name: one} for one in axis])
    for point in itertools.product(*axes):
        changed = copy.deepcopy(values)
        for key, value in itertools.chain.from_iterable(changes.items() for changes in point):
            *parents, last = key.split(".")
            place = changed
            for parent in parents:
                place = place[parent]
            place[last] = value
        yield changed


def model_of(config: TrainingConfig) -> torch.nn.Module:
    with torch.device("meta"):
        return _model(config, _task(config).description())


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(RECIPES)))
def test_models_are_built_at_full_size(file: Path) -> None:
    seen = set()
    for values in configurations(file):
        if repr((values["task"], values["model"])) not in seen:
            seen.add(repr((values["task"], values["model"])))
            model = model_of(parse_config(values))
            assert sum(parameter.numel() for parameter in model.parameters()) > 1_000
    assert seen


@pytest.mark.parametrize(
    ("recipe", "millions"),
    [
        # What the published configurations come to, embeddings once.
        ("wikitext103_hyena", (120, 130)),
        ("pile_multi_hyena", (120, 160)),
        ("pile_multi_hyena_attention", (155, 165)),
    ],
)
def test_language_models_have_the_published_size(recipe: str, millions: tuple[int, int]) -> None:
    (values,) = configurations(RECIPES / f"papers/{recipe}.yaml")
    count = sum(parameter.numel() for parameter in model_of(parse_config(values)).parameters())
    assert millions[0] < count / 1e6 < millions[1]


def test_sweeps_are_accepted() -> None:
    sweeps = [file for file in FILES if "sweep" in yaml.safe_load(file.read_text(encoding="utf-8"))]
    assert sweeps
    for file in sweeps:
        points = load_sweep(file).points
        assert [point.config.to_dict() | {"output": ""} for point in points] == [
            parse_config(values).to_dict() | {"output": ""} for values in configurations(file)
        ]


def shrink(values: dict[str, Any], output: Path) -> dict[str, Any]:
    """The same kinds of task, mixer, filter and block, small."""
    task, model = values["task"], values["model"]
    task.update(CHANGES.get(task["name"], {}))
    known = {field.name for field in fields(type(tasks.build(**arguments(task))))}
    if "train_examples" in known:
        task.update(train_examples=4, eval_examples=2)
    small = {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8, "hyena_mimo_size": 4}
    model.update(
        {name: min(value, model.get(name, value)) for name, value in small.items() if name in model}
    )
    if isinstance(model.get("mixers"), list):
        model["num_hidden_layers"] = len(model["mixers"])
        for mixer in model["mixers"]:
            if "heads" in mixer:
                mixer["heads"] = 4  # of width 2
    if "num_heads" in model:
        model["num_heads"] = min(2, model["num_heads"])
    model.pop("max_position_embeddings", None)  # the task's length
    if "filter" in model:
        sizes = {"state_size": 2, "hidden": 4, "num_denominators": 4}
        for name, value in sizes.items():
            if name in model["filter"]:
                model["filter"][name] = min(value, model["filter"][name])
    optimization = values["optimization"]
    optimization.pop("epochs", None)
    optimization.update(steps=1, batch_size=2, accumulation=1)
    values["evaluation"].update(every=None, examples=2, batch_size=2, sample_length=4)
    values.update(output=str(output), checkpoints={}, logging={}, hardware={"device": "cpu"})
    return values


def arguments(task: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in task.items() if name != "streaming"}


@pytest.mark.parametrize("file", STEPPED)
def test_one_step_at_a_reduced_size(file: Path, tmp_path: Path) -> None:
    values = next(configurations(file))
    name = values["task"]["name"]
    if name in MAKERS:
        values["task"].update(MAKERS[name](tmp_path))
    values = shrink(values, tmp_path / "run")
    model_of(parse_config(values))
    report = train(parse_config(values))
    assert report.steps == 1
    assert np.isfinite(report.metrics["loss"])


def make_reviews(folder: Path) -> dict[str, Any]:
    for part, label in itertools.product(("train", "test"), ("pos", "neg")):
        (folder / part / label).mkdir(parents=True)
        for index in range(2):
            (folder / part / label / f"{index}.txt").write_text(f"{label} {index}")
    return {"path": str(folder)}


def make_pairs(folder: Path) -> dict[str, Any]:
    for part in ("train", "eval", "test"):
        lines = [f"{index % 2}.0\ta\tb\tone text\tanother text\n" for index in range(4)]
        (folder / f"new_aan_pairs.{part}.tsv").write_text("".join(lines))
    return {"path": str(folder)}


def make_images(folder: Path) -> dict[str, Any]:
    records = np.random.default_rng(0).integers(256, size=(4, 3073), dtype=np.uint8)
    records[:, 0] %= 10
    for name in (*(f"data_batch_{index}.bin" for index in range(1, 6)), "test_batch.bin"):
        records.tofile(folder / name)
    return {"path": str(folder)}


def make_speech(folder: Path) -> dict[str, Any]:
    samples = np.random.default_rng(0).integers(-999, 999, size=16_000, dtype=np.int16)
    data = folder / "speech"
    for word in ("no", "yes"):
        (data / word).mkdir(parents=True)
        for index in range(4):
            with wave.open(str(data / word / f"{index}.wav"), "wb") as sound:
                sound.setparams((1, 2, 16_000, 0, "NONE", ""))
                sound.writeframes(samples.tobytes())
    (data / "validation_list.txt").write_text("no/0.wav\nyes/0.wav\n")
    (data / "testing_list.txt").write_text("no/1.wav\nyes/1.wav\n")
    return {"path": str(data)}


def make_text(folder: Path) -> dict[str, Any]:
    (folder / "text.txt").write_text("some words that are read as bytes, again and again. " * 4)
    file = str(folder / "text.txt")
    return {
        "train": file,
        "validation": file,
        "corpus": None,
        "corpus_config": None,
        "tokenizer": None,
        "streaming": False,
    }


MAKERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "lra/text": make_reviews,
    "lra/retrieval": make_pairs,
    "lra/image": make_images,
    "speech_commands": make_speech,
    "text": make_text,
}
