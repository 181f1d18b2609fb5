"""Without extras the core imports, and every other package names the extra that it needs."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gramian

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
OPTIONAL = [  # the packages of all extras, and some that come with them
    *("transformers", "safetensors", "tokenizers", "huggingface_hub", "peft"),
    *("accelerate", "datasets", "pandas", "PIL", "yaml", "sklearn", "tensorboard", "scipy"),
    *("matplotlib", "typer", "rich", "gguf", "pyarrow", "pyfaidx", "lm_eval", "ray", "triton"),
    *("onnx", "onnxruntime", "onnxscript"),
]
WITHOUT = """
import importlib
import sys


class Without:
    def __init__(self, finder, hidden):
        self.finder, self.hidden = finder, hidden

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in self.hidden:
            return self.finder.find_spec(name, path, target)


sys.meta_path[:] = [Without(finder, sys.argv[1].split(",")) for finder in sys.meta_path]
for name in sys.argv[2:]:
    module, _, attribute = name.partition(":")
    try:
        found = importlib.import_module(module)
        for one in [attribute] if attribute else getattr(found, "__all__", []):
            getattr(found, one)
    except (ImportError, SystemExit) as error:
        print(module, type(error).__name__, error, sep="|")
    else:
        print(module, "imported", sep="|")
"""


def imported(names: list[str], hidden: list[str]) -> list[tuple[str, ...]]:
    """Import modules in a process in which some packages cannot be found."""
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT, ",".join(hidden), *names],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert ran.returncode == 0, ran.stderr
    return [tuple(line.split("|")) for line in ran.stdout.splitlines()]


def test_the_core_needs_no_extra() -> None:
    names = [f"gramian:{name}" for name in gramian.__all__]
    found = imported(names, OPTIONAL)
    assert found == [("gramian", "imported")] * len(names)


@pytest.mark.parametrize(
    ("package", "extra", "hidden"),
    [
        ("models", "models", "transformers"),
        ("checkpoints", "models", "transformers"),
        ("genomics", "models", "transformers"),
        ("demo", "cli", "rich"),
        ("training", "train", "accelerate"),
        ("training", "train", "yaml"),
    ],
)
def test_a_package_names_the_extra_that_it_needs(package: str, extra: str, hidden: str) -> None:
    ((_, kind, sentence),) = imported([f"gramian.{package}"], [hidden])
    assert kind == "ImportError"
    assert sentence.endswith(f'needs {hidden}: pip install "gramian[{extra}]".')


def test_the_command_line_names_its_extra() -> None:
    for hidden in ("typer", "rich"):
        ran = subprocess.run(
            [sys.executable, "-c", WITHOUT, hidden, "gramian.cli"],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert f'the command line needs {hidden}: pip install "gramian[cli]".' in ran.stderr
        assert ran.stdout == "gramian.cli|SystemExit|1\n"


CORE = {"torch", "numpy", "typing_extensions", "gramian"}
COME_WITH = {  # a package of an extra, and what it requires itself
    "transformers": {"huggingface_hub", "safetensors", "tokenizers", "yaml"},
    "onnxscript": {"onnx_ir"},
}
SAYING = {  # functions that say what is missing
    "new_figure": "matplotlib",
    "import_pandas": "pandas",
    "require_peft": "peft",
    "_require_peft": "peft",
    "_require_pyarrow": "pyarrow",
    "require_quantizer": "optimum",
}
KNOWN = {  # what has been imported already where this is reached
    ("gramian/_drawing.py", "matplotlib"): "`new_figure` has said it",
    ("gramian/_tables.py", "rich"): "a method `__rich__`, which rich calls",
    ("gramian/analysis/_attention.py", "transformers"): "a model of transformers is given",
    ("gramian/analysis/_table.py", "rich"): "a method `__rich__`, which rich calls",
    ("gramian/analysis/_tracing.py", "transformers"): "it is in `sys.modules`",
    ("gramian/analysis/_opening.py", "transformers"): "`open_model` has said it",
    ("gramian/export/_verify.py", "transformers"): "a model of `gramian.models` is given",
    ("gramian/models/quantization.py", "optimum"): "layers of optimum-quanto are found in a model",
    ("gramian/ops/kernels/_causal_convolution.py", "triton"): "`use_triton` has said it",
    ("gramian/ops/kernels/_hyena_step.py", "triton"): "`use_triton` has said it",
    ("gramian/ops/kernels/_selective_scan.py", "triton"): "`use_triton` has said it",
    ("gramian/shrinking/_recovery.py", "peft"): "`as_recovery` has said it",
    ("gramian/training/starting.py", "peft"): "the configuration has been checked",
}


def optional_imports(
    tree: ast.AST, way: tuple[ast.AST, ...] = ()
) -> Iterator[tuple[str, ast.AST, tuple[ast.AST, ...]]]:
    """The packages of extras that a module imports, each with its statement and what is around."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [node.module]
        for package in {name.partition(".")[0] for name in names} - CORE - sys.stdlib_module_names:
            yield package, node, (*way, tree)
        yield from optional_imports(node, (*way, tree))


def said(scope: ast.AST, before: int = 10**9) -> set[str]:
    """The packages of which a piece of code says before a line that they are missing."""
    found: set[str] = set()
    for node in ast.walk(scope):
        if isinstance(node, ast.Call) and node.lineno < before:
            name = ast.unparse(node.func).rpartition(".")[2]
            found.add(SAYING.get(name, ""))
            if name == "require":
                found |= {one.value for one in node.args[2:] if isinstance(one, ast.Constant)}
    return with_theirs(found)


def with_theirs(packages: set[str]) -> set[str]:
    return packages | {name for one in packages for name in COME_WITH.get(one, ())}


def is_tried(way: tuple[ast.AST, ...]) -> bool:
    return any(
        isinstance(node, ast.Try)
        and any("ImportError" in ast.unparse(handler.type or node) for handler in node.handlers)
        for node in way
    )


def unsaid(path: str, source: str, of_package: set[str]) -> list[str]:
    """The imports of a module that end in a `ModuleNotFoundError` where an extra is missing."""
    tree = ast.parse(source)
    found, imports = [], list(optional_imports(tree))
    for package, node, way in imports:
        functions = [one for one in way if isinstance(one, ast.FunctionDef)]
        if package in of_package or (path, package) in KNOWN or is_tried((*way, node)):
            continue
        if any(one.name == "__rich__" for one in functions):  # rich calls it
            continue
        scope: ast.AST = functions[0] if functions else tree
        if functions and functions[0].name.startswith("_"):  # another function has said it
            tried = {one for one, node, way in imports if is_tried((*way, node))}
            known = said(tree) | with_theirs(tried)
        else:
            known = said(scope, node.lineno)
        if package not in known:
            found.append(f"{path}:{node.lineno} {package}")
    return found


def test_no_missing_package_is_a_bare_error() -> None:
    found: list[str] = []
    for file in sorted((ROOT / "gramian").rglob("*.py")):
        path = file.relative_to(ROOT)
        if path.parts[1] == "cli":  # every command adds what to install
            continue
        package = ROOT.joinpath(*path.parts[:2], "__init__.py")
        init = package.read_text(encoding="utf-8") if package.is_file() else ""
        needs = said(ast.parse(init))
        found += unsaid(path.as_posix(), file.read_text(encoding="utf-8"), needs)
    assert found == [], "\n".join(found)


def test_a_bare_import_would_be_found() -> None:
    bare = "def draw():\n    import matplotlib\n    new_figure()\n"
    assert unsaid("a.py", bare, set()) == ["a.py:2 matplotlib"]
    assert unsaid("a.py", "import onnx_ir", set()) == ["a.py:1 onnx_ir"]
    guarded = 'def f():\n    require("f", "export", "onnxscript")\n    import onnx_ir\n'
    assert unsaid("a.py", guarded, set()) == []


def test_what_is_to_be_installed_exists_and_can_be_pasted() -> None:
    """A shell such as zsh takes brackets without quotes for a pattern of file names."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = set(settings["project"]["optional-dependencies"])
    files = [ROOT / "README.md", *(ROOT / "gramian").rglob("*.py"), *(ROOT / "docs").rglob("*.md")]
    named = 0
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"pip install (-\S+ )*(gramian|\.)\[", text), file
        for name in re.findall(r"pip install [^\n`]*?\bgramian\[([a-z,]+)\]", text):
            assert set(name.split(",")) <= extras, (file, name)
            named += 1
    assert named > 20
