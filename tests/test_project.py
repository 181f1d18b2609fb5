"""What the project says about itself in several places is said once, or alike."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

import gramian

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]
SETTINGS: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT: dict[str, Any] = SETTINGS["project"]
WORKFLOWS = {
    path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / ".github/workflows").glob("*.yml"))
}


def test_the_version_has_one_source() -> None:
    assert "version" not in PROJECT
    assert "version" in PROJECT["dynamic"]
    source = (ROOT / SETTINGS["tool"]["hatch"]["version"]["path"]).read_text(encoding="utf-8")
    assert re.findall(r'^__version__ = "(.*)"$', source, flags=re.MULTILINE) == [
        gramian.__version__
    ]
    assert "version:" not in (ROOT / "CITATION.cff").read_text(encoding="utf-8").split("\n", 1)[1]


def test_the_page_on_pypi_has_links_that_work_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    relative = set(re.findall(r"\]\((?!https?:)([^)]+)\)", text))
    assert {"docs/tutorial.md", "docs/figures/cost.png"} <= relative
    hook = SETTINGS["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    for rule in hook["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert all(link.startswith("https://") for link in links)
    repository = PROJECT["urls"]["Repository"]
    pages, files = f"{repository}/blob/main/", repository.replace("github", "raw.githubusercontent")
    assert {f"{pages}{name}" for name in relative if name.endswith(".md")} <= {*links}
    assert f"{files}/main/docs/figures/cost.png" in links
    assert all((ROOT / name).is_file() for name in relative)


def test_the_source_distribution_has_every_tracked_file() -> None:
    """The tests read the documentation, the recipes and the benchmarks."""
    assert "sdist" not in SETTINGS["tool"]["hatch"]["build"]["targets"]
    assert "fancy-pypi-readme" in SETTINGS["build-system"]["requires"][0]


def lower_bound(requirements: list[str], name: str) -> str:
    (found,) = [text for text in requirements if re.match(rf"{name}\b", text)]
    match = re.search(r">=([\d.]+)", found)
    assert match is not None
    return match[1]


def requirements_of(extra: str) -> set[str]:
    """The requirements of an extra, and of the extras that it names."""
    found: set[str] = set()
    for text in PROJECT["optional-dependencies"][extra]:
        inner = re.fullmatch(r"gramian\[(.+)\]", text)
        found |= {text} if inner is None else set()
        for name in inner[1].split(",") if inner else ():
            found |= requirements_of(name)
    return found


def test_continuous_integration_runs_every_python_and_both_ends_of_what_is_accepted() -> None:
    pythons = [
        text.rsplit(" ", 1)[1]
        for text in PROJECT["classifiers"]
        if re.search(r"Python :: 3\.\d", text)
    ]
    assert PROJECT["requires-python"] == f">={pythons[0]}"
    jobs = WORKFLOWS["ci"]["jobs"]
    matrix = jobs["newest"]["strategy"]["matrix"]["include"]
    assert [one["python"] for one in matrix if one["os"] == "ubuntu-latest"] == pythons
    assert {one["os"].split("-")[0] for one in matrix} == {"ubuntu", "macos", "windows"}
    (setup,) = [step for step in jobs["lowest"]["steps"] if "python" in step.get("uses", "")]
    assert setup["with"]["python-version"] == pythons[0]
    assert jobs["lowest"]["steps"][-1]["run"] == "make test-lowest"


def test_the_lowest_versions_are_tested_with_every_extra_that_they_allow() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    listed = re.search(r"^LOWEST_EXTRAS := (.*)$", makefile, flags=re.MULTILINE)
    assert listed is not None
    chosen = {text for name in listed[1].split(",") for text in requirements_of(name)}
    assert lower_bound(PROJECT["dependencies"], "torch") == "2.6"
    for extra in PROJECT["optional-dependencies"]:
        if extra in ("analysis", "dev", "docs", "ray", "triton"):  # a benchmark's, tools, clusters
            continue
        needs = requirements_of(extra)
        assert (needs <= chosen) != any(re.match(r"torch\b", text) for text in needs), extra


def test_every_target_that_is_called_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    texts = [(ROOT / ".ci/run").read_text(encoding="utf-8")]
    for workflow in WORKFLOWS.values():
        texts += [
            step["run"]
            for job in workflow["jobs"].values()
            for step in job["steps"]
            if "run" in step
        ]
    called = {
        target
        for text in texts
        for line in re.findall(r"^make (.*)$", text, flags=re.MULTILINE)
        for target in re.findall(r"(?:^| )([a-z-]+)(?= |$)", line)
    }
    assert {"lint", "test", "docs", "wheel", "test-all", "coverage"} <= called
    assert called <= targets


def test_only_publishing_may_speak_for_the_project() -> None:
    for name, workflow in WORKFLOWS.items():
        assert workflow["permissions"] == {"contents": "read"}, name
        for job, settings in workflow["jobs"].items():
            expected = {"id-token": "write"} if (name, job) == ("release", "publish") else None
            assert settings.get("permissions") == expected, (name, job)


@pytest.mark.parametrize(
    "path",
    [
        "CITATION.cff",
        ".pre-commit-config.yaml",
        *(f".github/ISSUE_TEMPLATE/{name}.yml" for name in ("bug", "config", "feature")),
    ],
)
def test_files_for_services_are_valid_yaml(path: str) -> None:
    assert isinstance(yaml.safe_load((ROOT / path).read_text(encoding="utf-8")), dict)
