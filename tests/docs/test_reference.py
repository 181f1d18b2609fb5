"""The reference lists every public name, each documented, and links between pages lead somewhere.

Read from the sources of the site: mkdocs is not needed.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import itertools
import re
import types
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs/reference").glob("*.md"))
PACKAGES = (
    "gramian",
    "gramian.analysis",
    "gramian.checking",
    "gramian.checkpoints",
    "gramian.demo",
    "gramian.distillation",
    "gramian.ess",
    "gramian.evaluation",
    "gramian.export",
    "gramian.filters",
    "gramian.genomics",
    "gramian.hybrids",
    "gramian.memory",
    "gramian.mixers",
    "gramian.models",
    "gramian.ops",
    "gramian.reduction",
    "gramian.reports",
    "gramian.shrinking",
    "gramian.systems",
    "gramian.tasks",
    "gramian.testing",
    "gramian.training",
)


def listed() -> list[str]:
    return [
        name
        for page in PAGES
        for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]


def public(package: str) -> dict[str, Any]:
    module = importlib.import_module(package)
    return {name: getattr(module, name) for name in module.__all__}


def resolve(path: str) -> Any:
    package, _, name = path.rpartition(".")
    return getattr(importlib.import_module(package), name)


def test_no_package_is_forgotten() -> None:
    found = {
        f"gramian.{folder.parent.name}"
        for folder in (ROOT / "gramian").glob("*/__init__.py")
        if folder.parent.name != "cli"  # which has a page of its own
    }
    assert found | {"gramian"} == {*PACKAGES}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_in_the_reference(package: str) -> None:
    names = listed()
    objects = {id(resolve(name)) for name in names}
    missing = []
    for name, value in public(package).items():
        if isinstance(value, types.ModuleType):
            if ROOT / f"docs/reference/{name}.md" not in PAGES:
                missing.append(name)
        elif callable(value):
            if id(value) not in objects:
                missing.append(name)
        elif f"{package}.{name}" not in names:
            missing.append(name)
    assert not missing


def test_the_reference_lists_public_names_only_and_each_once() -> None:
    names = listed()
    assert len(names) == len({*names})
    kinds = {id(kind) for kind in tasks().values()}
    for name in names:
        package, _, last = name.rpartition(".")
        if package in PACKAGES:
            assert last in public(package), name
        else:
            assert id(resolve(name)) in kinds, name


def tasks() -> dict[str, type]:
    from gramian.tasks._task import _REGISTRY

    return {
        name: kind for name, kind in _REGISTRY.items() if kind.__module__.startswith("gramian.")
    }


def test_every_task_is_in_the_reference_under_its_name() -> None:
    page = (ROOT / "docs/reference/tasks.md").read_text(encoding="utf-8")
    for name, kind in tasks().items():
        path = f"{kind.__module__}.{kind.__name__}"
        assert f"::: {path}\n    options:\n      heading: {name}\n" in page, name
        assert documented(kind.__module__, kind.__name__, kind), name


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_a_docstring(package: str) -> None:
    assert importlib.import_module(package).__doc__
    without = [
        name for name, value in public(package).items() if not documented(package, name, value)
    ]
    assert not without


def documented(package: str, name: str, value: Any) -> bool:
    if isinstance(value, types.ModuleType) or inspect.isfunction(value):
        return bool(value.__doc__)
    if inspect.isclass(value):
        # Dataclasses and named tuples without a docstring have one that shows their signature.
        text = value.__dict__.get("__doc__") or ""
        return bool(text) and not text.startswith(f"{name}(")
    owners = [one for one in PACKAGES if public(one).get(name) is value]  # constants are shared
    return any(name in constants_with_docstrings(owner) for owner in owners)


def constants_with_docstrings(package: str) -> set[str]:
    """Names assigned in a module of the package, or in one that all packages share, whose next
    statement is a text.
    """
    module = importlib.import_module(package)
    assert module.__file__ is not None
    found = set()
    folder = Path(module.__file__).parent
    for file in [*folder.glob("*.py"), *folder.parent.glob("_*.py")]:
        body = ast.parse(file.read_text(encoding="utf-8")).body
        for statement, following in itertools.pairwise(body):
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                targets = getattr(statement, "targets", None) or [
                    getattr(statement, "target", None)
                ]
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def test_the_reference_of_the_command_line_has_every_command() -> None:
    pytest.importorskip("typer")
    from gramian.cli import app

    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs/hooks.py")
    assert spec is not None
    assert spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    page = (ROOT / "docs" / hooks.PAGE).read_text(encoding="utf-8")
    assert hooks.MARK in page
    text = hooks.commands()
    page = (ROOT / "docs" / hooks.KEYS_PAGE).read_text(encoding="utf-8")
    assert hooks.KEYS_MARK in page
    assert "| `optimization.steps` | number of optimizer steps; or give" in hooks.training_keys()
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        assert f"## gramian {name}\n" in text
    assert "| `--prompt` | " in text
    assert "| `MODEL` | Folder of a saved model. | required |" in text


def slug(heading: str) -> str:
    """The anchor that GitHub and the site make of a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


@pytest.mark.parametrize(
    "page",
    [
        *sorted(ROOT.glob("*.md")),
        ROOT / "recipes/README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    ],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_links_lead_somewhere_on_github_too(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        inside = (ROOT / "docs") in page.parents
        assert not inside or (ROOT / "docs") in file.parents, f"{target} is outside of the site"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, target
