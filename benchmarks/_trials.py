"""The registry of `benchmarks/ecosystem.py`: trials of other tools on Gramian's models.

A trial is a function. Its file is named `_trials_SUBJECT.py`, and `benchmarks/ecosystem.py` imports
every file of such a name:

    from benchmarks._trials import Models, compare, refused, trial

    @trial("torch.export", "a whole model, with any batch and length")
    def export(models: Models) -> str:
        ...
        return f"largest difference of logits {compare(logits, expected):.0e}"

    @trial("torch.jit", "scripting a model")
    def script(models: Models) -> str:
        return refused(lambda: torch.jit.script(models.load("distilled")), TypeError)

A trial returns what was seen, on one line, and raises an error if it is not as it should be. It
imports the tool itself, so that the other trials run where the tool is not installed.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TRIALS", "Models", "Refusal", "Trial", "compare", "refused", "trial"]


class Refusal(str):
    """The sentence with which a tool was refused."""


@dataclass(frozen=True)
class Models:
    """The models of a trial.

    Attributes:
        folder: a folder with the models `original` and `distilled` and their tokenizers, such as
            `make demo` makes.
        scratch: an empty folder for whatever a trial writes.
    """

    folder: Path
    scratch: Path

    def path(self, name: str) -> Path:
        """Return the folder of a model, `"original"` or `"distilled"`."""
        return self.folder / name

    def load(self, name: str) -> Any:
        """Load a model, in evaluation mode."""
        from gramian.models import load

        return load(self.path(name))

    def tokenizer(self) -> Any:
        """Load the models' tokenizer."""
        from transformers import AutoTokenizer

        import gramian.models  # noqa: F401 (else transformers asks whether to run the folder's code)

        return AutoTokenizer.from_pretrained(self.path("original"))


@dataclass(frozen=True)
class Trial:
    """A trial of a tool.

    Attributes:
        tool: name of the tool, as its users write it.
        tried: what is tried.
        run: the function that tries it.
        needs: names of the distributions that must be installed for it, the tool's first.
    """

    tool: str
    tried: str
    run: Callable[[Models], str]
    needs: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name of the trial's function, and of its file without the prefix."""
        return f"{self.run.__module__.rpartition('_trials_')[2]}.{self.run.__name__}"

    def missing(self) -> list[str]:
        """Return the needed distributions that are not installed."""
        return [name for name in self.needs if not _version(name)]

    def versions(self) -> dict[str, str]:
        """Return the versions of the needed distributions."""
        return {name: _version(name) for name in self.needs}


TRIALS: dict[str, Trial] = {}
"""The trials by their names."""


def trial(
    tool: str, tried: str, *, needs: tuple[str, ...] = ("transformers",)
) -> Callable[[Callable[[Models], str]], Callable[[Models], str]]:
    """Register the decorated function as a trial. The arguments are the fields of `Trial`."""

    def register(run: Callable[[Models], str]) -> Callable[[Models], str]:
        one = Trial(tool, tried, run, needs)
        if one.name in TRIALS:
            raise ValueError(f"there is a trial {one.name} already.")
        TRIALS[one.name] = one
        return run

    return register


def refused(call: Callable[[], Any], *kinds: type[Exception], names: str = "") -> str:
    """Return the sentence with which a call is refused.

    Args:
        call: the call, which must raise one of the errors.
        kinds: the errors.
        names: words that the sentence must contain, because they name another way.

    Raises:
        AssertionError: if the call is not refused, or not in one sentence with these words.
    """
    try:
        call()
    except kinds as error:
        sentence = str(error)
        assert "\n" not in sentence and sentence.endswith("."), sentence
        assert names in sentence, sentence
        return Refusal(sentence)
    raise AssertionError("the call was not refused.")


def compare(got: Tensor, expected: Tensor, tolerance: float = 1e-4) -> float:
    """Return the largest difference between two tensors, divided by the largest expected entry.

    Raises:
        AssertionError: if the shapes differ, or the difference is above the tolerance.
    """
    assert got.shape == expected.shape, (got.shape, expected.shape)
    error = float((got.double() - expected.double()).abs().max() / expected.double().abs().max())
    assert error <= tolerance, f"relative difference {error:.1e}"
    return error


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
