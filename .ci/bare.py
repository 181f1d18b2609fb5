"""Install a wheel without extras into an environment of its own, and import it there.

The environment holds the wheel and what it requires, directly or not, and nothing else. What it
requires is linked from the environment that runs this script, so that PyTorch is not installed
again.

    python .ci/bare.py dist/gramian-VERSION-py3-none-any.whl
"""

import subprocess
import sys
import tempfile
import venv
from importlib.metadata import Distribution, PathDistribution, distribution
from pathlib import Path
from zipfile import Path as ZipPath
from zipfile import ZipFile

from packaging.requirements import Requirement

PROGRAM = """
import importlib.util
import sys

import torch
import gramian

assert gramian.__file__.startswith(sys.prefix), gramian.__file__
sums = gramian.causal_convolution(torch.ones(1, 8), torch.ones(1, 8))
torch.testing.assert_close(sums, torch.arange(1.0, 9.0)[None])
for name in gramian.__all__:  # what needs an extra says so where it is used
    getattr(gramian, name)
one = torch.ones(1, 1, dtype=torch.complex64)
size = gramian.effective_state_size(gramian.Modal(one / 2, one, torch.ones(1)), at=[4])
torch.testing.assert_close(size, torch.ones(1, 1))
extras = [name for name in ("transformers", "typer", "datasets") if importlib.util.find_spec(name)]
assert not extras, extras
"""


def required(found: Distribution) -> dict[str, Distribution]:
    """Everything that a distribution requires without extras, by name."""
    reached: dict[str, Distribution] = {}
    waiting = [found]
    while waiting:
        for text in waiting.pop().requires or []:
            requirement = Requirement(text)
            marker = requirement.marker
            if marker is not None and not marker.evaluate({"extra": ""}):
                continue
            if requirement.name not in reached:
                reached[requirement.name] = distribution(requirement.name)
                waiting.append(reached[requirement.name])
    return reached


def link(found: Distribution, folder: Path) -> None:
    """Link the packages, modules and metadata of a distribution into a folder."""
    for top in {file.parts[0] for file in found.files or [] if file.parts[0] not in ("..", "/")}:
        if not (folder / top).exists():
            (folder / top).symlink_to(Path(str(found.locate_file(top))))


def main(wheel: Path) -> None:
    (metadata,) = [
        name for name in ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA")
    ]
    itself = PathDistribution(ZipPath(wheel, metadata.removesuffix("METADATA")))
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=False)
        python = Path(folder, "bin/python")
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        site = Path(folder, "lib", version, "site-packages")
        for found in required(itself).values():
            link(found, site)
        pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
        install = [*pip, "install", "-q", "--no-deps", "--no-index", str(wheel.resolve())]
        subprocess.run(install, check=True)
        subprocess.run([*pip, "check"], check=True)
        subprocess.run([str(python), "-I", "-c", PROGRAM], check=True, cwd=folder)
    print(f"{wheel.name}: installed without extras and imported")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
