"""The code asks nothing of a system that Windows or macOS lacks, which no run on Linux shows."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("gramian", "benchmarks", "docs", "examples", "recipes", "tests", ".ci", ".github")
OWN = ("gramian", "benchmarks", "docs", "examples", ".ci")

UNIX_MODULES = {"fcntl", "grp", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"}
UNIX_NAMES = {
    *("os.chown", "os.fork", "os.getpgid", "os.getuid", "os.killpg", "os.mkfifo", "os.nice"),
    *("os.sched_getaffinity", "os.setsid", "os.sysconf", "os.uname", "os.wait", "os.rename"),
    *("signal.SIGALRM", "signal.SIGHUP", "signal.SIGKILL", "signal.SIGUSR1", "signal.alarm"),
    *("signal.pause", "signal.setitimer"),
}
KNOWN = {  # reached on Linux only, whose /proc/stat is looked for first
    "gramian/ops/processors.py: os.sched_getaffinity",
    "gramian/ops/processors.py: os.sysconf",
}


@functools.cache
def in_folder(folder: str) -> dict[str, ast.Module]:
    return {
        file.relative_to(ROOT).as_posix(): ast.parse(file.read_text(encoding="utf-8"))
        for file in sorted((ROOT / folder).rglob("*.py"))
    }


def sources(*folders: str) -> Iterator[tuple[str, ast.Module]]:
    for folder in folders:
        yield from in_folder(folder).items()


def value(node: ast.expr | None) -> object:
    return node.value if isinstance(node, ast.Constant) else None


def is_text_without_encoding(call: ast.Call) -> bool:
    """Whether a call opens a text in the encoding of the system, which on Windows is not UTF-8."""
    options = {one.arg: one.value for one in call.keywords}
    if "encoding" in options or None in options:
        return False
    last = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if last in ("read_text", "write_text"):
        return len(call.args) <= (last == "write_text")
    if last in ("NamedTemporaryFile", "TemporaryFile"):
        mode = options.get("mode", call.args[0] if call.args else None)
        return "b" not in str(value(mode) or "w+b")
    if last != "open":
        return False
    name = ast.unparse(call.func)
    is_method = name not in ("open", "io.open", "gzip.open", "bz2.open", "lzma.open")
    place = 0 if is_method else 1
    mode = value(options.get("mode", call.args[place] if len(call.args) > place else None))
    if is_method and call.args and not re.fullmatch("[rwaxbt+]{1,3}", str(mode)):
        return False  # `open` of something else, such as an image
    if name.startswith(("gzip", "bz2", "lzma")):
        return "t" in str(mode)
    return "b" not in str(mode or "r")


def test_every_text_names_its_encoding() -> None:
    found = [
        f"{path}:{node.lineno}"
        for path, tree in sources(*OWN)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and is_text_without_encoding(node)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("open(path)", True),
        ("open(path, 'a')", True),
        ("open(path, mode='rb')", False),
        ("open(path, encoding='utf-8')", False),
        ("path.open()", True),
        ("path.open('wb')", False),
        ("Image.open(path)", False),
        ("gzip.open(path)", False),
        ("gzip.open(path, 'rt')", True),
        ("path.read_text()", True),
        ("path.read_text('utf-8')", False),
        ("path.write_text(text)", True),
        ("path.write_text(text, 'utf-8')", False),
        ("NamedTemporaryFile()", False),
        ("NamedTemporaryFile('w')", True),
    ],
)
def test_what_counts_as_a_text_without_encoding(code: str, expected: bool) -> None:
    (call,) = ast.parse(code).body
    assert isinstance(call, ast.Expr) and isinstance(call.value, ast.Call)
    assert is_text_without_encoding(call.value) is expected


def unix_only(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ({alias.name for alias in node.names} & UNIX_MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in UNIX_MODULES:
            yield node.module
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in UNIX_NAMES:
            yield ast.unparse(node)
        elif isinstance(node, ast.Constant) and str(node.value).startswith(("/tmp/", "/dev/")):
            yield node.value


def test_the_package_uses_no_name_that_windows_or_macos_lacks() -> None:
    found = {
        f"{path}: {name}"
        for path, tree in sources("gramian", "examples")
        for name in unix_only(tree)
    }
    assert found == KNOWN


def test_a_device_is_asked_for_double_precision_not_for_its_name() -> None:
    """Apple's GPUs are the first without it, and not the last."""
    found = {
        path
        for path, tree in sources("gramian")
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value == "mps"
    }
    assert found == {"gramian/ops/devices.py", "gramian/ops/precision.py"}


def test_every_file_can_lie_on_every_system() -> None:
    """Windows refuses some names, and like macOS does not tell upper from lower case."""
    names = [
        file.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for file in (ROOT / folder).rglob("*")
        if "__pycache__" not in file.parts
    ]
    assert len(names) > 100
    reserved = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")
    for name in names:
        assert len(name) <= 160, name
        for part in PurePosixPath(name).parts:
            assert not re.search(r'[<>:"|?*\\]|[. ]$', part), name
            assert not reserved.fullmatch(part), name
    assert len({name.lower() for name in names}) == len(names)
