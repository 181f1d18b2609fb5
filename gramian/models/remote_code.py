"""What a saved folder needs so that others load it with `trust_remote_code=True`.

transformers looks in `config.json` under `auto_map` for the module that defines a model of a type
it does not know, and runs that module from the folder. Ours holds no model: it imports this
package, and says how to install it where it is missing.
"""

from __future__ import annotations

from pathlib import Path

MODULE = "modeling_gramian"

AUTO_MAP = {
    "AutoConfig": f"{MODULE}.GramianConfig",
    "AutoModel": f"{MODULE}.GramianModel",
    "AutoModelForCausalLM": f"{MODULE}.GramianForCausalLM",
    "AutoModelForSequenceClassification": f"{MODULE}.GramianForSequenceClassification",
    "AutoModelForTimeSeriesPrediction": f"{MODULE}.GramianForSignalRegression",
}

SOURCE = '''\
"""The classes of this model, for transformers' Auto classes with `trust_remote_code=True`."""

try:
    from gramian.models import (
        GramianConfig,
        GramianForCausalLM,
        GramianForPairClassification,
        GramianForReconstruction,
        GramianForSequenceClassification,
        GramianForSignalRegression,
        GramianModel,
    )
except ModuleNotFoundError as error:
    if error.name != "gramian":
        raise
    raise ImportError(
        "this model needs the package gramian: install it with `pip install gramian[models]`."
    ) from None

__all__ = [
    "GramianConfig",
    "GramianForCausalLM",
    "GramianForPairClassification",
    "GramianForReconstruction",
    "GramianForSequenceClassification",
    "GramianForSignalRegression",
    "GramianModel",
]
'''


def write_module(folder: Path) -> None:
    """Put the module that `AUTO_MAP` names into `folder`."""
    (folder / f"{MODULE}.py").write_text(SOURCE, encoding="utf-8")
