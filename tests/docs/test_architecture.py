"""The page of the architecture states the layers that the linter holds; the glossary real names."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import gramian.filters
import gramian.mixers
import gramian.systems

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]


def contract() -> list[set[str]]:
    """The layers of pyproject.toml, lowest first, each as a set of names in `gramian`."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (layers,) = settings["tool"]["importlinter"]["contracts"]
    found = [set(re.split(r" [|:] ", layer)) for layer in reversed(layers["layers"])]
    required = [{name for name in layer if not name.startswith("(")} for layer in found]
    return [layer for layer in required if layer]


def test_the_table_of_layers_is_the_contract() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    table: dict[int, set[str]] = {}
    for layer, packages in re.findall(r"^\| (\d+) \| (.*?) \|", text, flags=re.MULTILINE):
        names = re.findall(r"`gramian/(\w+)(?:/|\.py)`", packages)
        table.setdefault(int(layer), set()).update(names)
    assert [table[layer] for layer in sorted(table)] == contract()


def test_every_package_has_a_layer() -> None:
    found = {path.parent.name for path in (ROOT / "gramian").glob("*/__init__.py")}
    named = {name for layer in contract() for name in layer if not name.startswith("_")}
    assert named <= found
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert found - named <= set(re.findall(r'"\((\w+)\)"', settings))  # those that need not exist


def parameters() -> set[str]:
    """The arguments and attributes of public filters, mixers, systems and configurations."""
    from gramian.models import GramianConfig

    names: set[str] = set()
    kinds: list[Any] = [GramianConfig]
    for package in (gramian.filters, gramian.mixers, gramian.systems):
        kinds += [getattr(package, name) for name in package.__all__]
    for kind in kinds:
        if inspect.isclass(kind):
            names |= {*inspect.signature(kind).parameters, *vars(kind)}
    return names


def test_our_names_in_the_glossary_exist() -> None:
    text = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
    section = text.split("## Sizes and options\n")[1].split("\n## ")[0]
    ours = [row.split("|")[1] for row in section.strip().splitlines()[2:]]
    words = {word for cell in ours for word in re.findall(r"`(\w+)`", cell)}
    assert len(words) > 15
    assert words - parameters() <= {"Hyena", "modes"}
