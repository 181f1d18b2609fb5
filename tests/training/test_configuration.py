"""The schema: what it takes, and one sentence for what it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("yaml")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")

import yaml

from gramian.models import GramianConfig
from gramian.training import ConfigError, load_config, load_sweep, parse_config
from gramian.training.configuration import keys, read_values
from gramian.training.keys import read_attributes

ROOT = Path(__file__).parents[2]
MINIMAL = """
output: out
task: {name: mqar}
model: {hidden_size: 8}
optimization: {steps: 3}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL)
    return path


def test_changes_reach_any_depth_and_keep_types(file: Path) -> None:
    config = load_config(
        file,
        [
            "seed=5",
            "optimization.learning_rate=1e-3",
            "optimization.steps=1e3",
            "task.length=32",
            "model.filter.type=rtf",
            "logging.report_to=tensorboard",
            "evaluation.every=null",
            "hardware.bf16=true",
        ],
    )
    assert config.seed == 5
    assert config.optimization.learning_rate == 1e-3
    assert config.optimization.steps == 1000 and isinstance(config.optimization.steps, int)
    assert config.task == {"name": "mqar", "length": 32}
    assert config.model == {"hidden_size": 8, "filter": {"type": "rtf"}}
    assert config.logging.report_to == ["tensorboard"]
    assert config.evaluation.every is None
    assert config.hardware.bf16 is True


def test_every_key_is_listed_with_its_default_and_meaning(file: Path) -> None:
    config = load_config(file).to_dict()
    everything = keys()
    of_models = [key for key in everything if key.name.startswith("model.")]
    listed = [key for key in everything if key not in of_models]
    defaults = GramianConfig().to_dict()
    assert {"model.hidden_size", "model.mixers", "model.eos_token_id"} <= {
        key.name for key in of_models
    }
    for key in of_models:
        value = defaults.get(key.name.removeprefix("model."))
        assert key.meaning and yaml.safe_load(key.default or "") == value, key
    given = {"output", "task", "model", "optimization.steps"}
    for key in listed:
        assert key.meaning, key.name
        value: Any = config
        for part in key.name.split("."):
            value = value[part]
        if key.name not in given:
            assert key.default is not None
            assert yaml.safe_load(key.default) == value, key
    assert [key.name for key in listed if key.default is None] == ["output", "task", "model"]

    def leaves(values: dict[str, Any], depth: int = 0) -> int:
        deeper = {"optimization", "regularization", "evaluation", "ess"}
        deeper |= {"teacher", "checkpoints", "logging", "hardware"}
        return sum(leaves(v, depth + 1) if k in deeper else 1 for k, v in values.items())

    assert len(listed) == leaves(config)


@pytest.mark.parametrize("indent", [0, 3, 8])
@pytest.mark.parametrize("hanging", [0, 2])
def test_meanings_do_not_depend_on_indentation(indent: int, hanging: int) -> None:
    class Sizes:
        width: int
        depth: int

    first, more = " " * indent, " " * (indent + hanging)
    Sizes.__doc__ = "\n".join(
        [
            "The sizes of a model.",
            "",
            "    Attributes:",
            f"{first}width: numbers at a position, with",
            f"{more}or without heads: all of them.",
            f"{first}depth: layers.",
            "",
            f"{first}width: not in the section.",
        ]
    )
    assert read_attributes(Sizes) == {
        "width": "numbers at a position, with or without heads: all of them.",
        "depth": "layers.",
    }


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        (["width: one."], "the docstring of Sizes has no entry for depth."),
        (["width: one.", "depth: two.", "width: three."], "has two entries for width."),
    ],
)
def test_every_field_has_one_meaning(entries: list[str], sentence: str) -> None:
    class Sizes:
        width: int
        depth: int

    Sizes.__doc__ = "\n".join(["Attributes:", *entries])
    with pytest.raises(ValueError, match=sentence):
        read_attributes(Sizes)


def test_the_keys_of_a_model_are_the_fields_of_its_configuration() -> None:
    listed = [key.name for key in keys() if key.name.startswith("model.")]
    assert sorted(listed) == sorted(f"model.{name}" for name in GramianConfig.__annotations__)


def test_a_configuration_survives_its_plain_form(file: Path) -> None:
    config = load_config(file, ["optimization.betas=[0.8, 0.9]"])
    assert parse_config(config.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("optimisation.steps=3", "Did you mean 'optimization'?"),
        ("optimization.step=3", "unknown key of optimization 'step'. Did you mean 'steps'?"),
        ("optimization.steps=many", "optimization.steps must be an integer; got 'many'"),
        ("optimization.steps=true", "optimization.steps must be an integer; got True"),
        ("optimization.steps=2.5", "optimization.steps must be an integer; got 2.5"),
        ("optimization.steps=0", "optimization.steps must be an integer of at least 1; got 0"),
        ("optimization.epochs=2", "give optimization.steps or optimization.epochs"),
        ("optimization.learning_rate=fast", "must be a number; got 'fast'"),
        ("optimization.learning_rate=-1", "must be at least 0 and finite; got -1.0"),
        ("optimization.betas=[0.9]", "must be two numbers in [0, 1)"),
        ("optimization.schedule=cosinus", "Did you mean 'cosine'?"),
        ("evaluation.metric=acuracy", "Did you mean 'accuracy'?"),
        ("hardware.bf16=1", "hardware.bf16 must be true or false; got 1"),
        ("hardware.device=gpu", "unknown hardware.device 'gpu'"),
        ("checkpoints.keep=1", "checkpoints.keep must be at least 2"),
        ("checkpoints.every=15", "must be a multiple of logging.every"),
        ("task=mqar", "task must hold keys and values; got 'mqar'"),
        ("optimization=3", "optimization must hold keys and values; got 3"),
        ("task.name.x=3", "changes a key of name, which has none"),
        ("seed", "must read key=value"),
        ("seed=[", "is not valid YAML"),
        ("seed=-1", "seed must be at least 0"),
        ("output=null", "output must be text; got None"),
    ],
)
def test_mistakes_are_one_sentence(file: Path, change: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(file, [change])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("task: [", "is not valid YAML"),
        ("- 1", "must hold keys and values"),
        ("output: out", "lacks the key task"),
        ("output: out\ntask: {}\nmodel: {}\noptimization: {steps: 1}", "task lacks a name"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, error: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=error):
        load_config(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no configuration file .*none\.yaml"):
        load_config(tmp_path / "none.yaml")


RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_build_their_task_and_model(recipe: Path) -> None:
    from gramian.training._run import _model, _task

    if "sweep" in read_values(recipe):
        sweep = load_sweep(recipe)
        assert sweep.output == f"runs/{recipe.stem}"
        configs = [point.config for point in sweep.points]
    else:
        configs = [load_config(recipe)]
        assert configs[0].output == f"runs/{recipe.stem}"
    for config in configs:
        model: Any = _model(config, _task(config).description())
        assert sum(parameter.numel() for parameter in model.parameters()) > 1000


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 3
