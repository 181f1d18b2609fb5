"""Write the module with which `trust_remote_code=True` loads a saved folder.

If transformers does not know the type of a model, it looks under `auto_map` in `config.json`. There
it finds the name of a module in the folder, which it runs to define the model. The module that is
written here does not define a model. It imports the package gramian, or says how to install the
package if it is missing.
"""

from __future__ import annotations

from pathlib import Path

MODULE = "modeling_gramian"

AUTO_MAP = {
    "AutoConfig": f"{MODULE}.GramianConfig",
    "AutoModel": f"{MODULE}.GramianModel",
    "AutoModelForCausalLM": f"{MODULE}.GramianForCausalLM",
    "AutoModelForSequenceClassification": f"{MODULE}.GramianForSequenceClassification",
    "AutoModelForTokenClassification": f"{MODULE}.GramianForTokenClassification",
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
        GramianForTokenClassification,
        GramianModel,
    )
except ModuleNotFoundError as error:
    if error.name != "gramian":
        raise
    raise ImportError(
        'this model needs the package gramian: pip install "gramian[models]".'
    ) from None

__all__ = [
    "GramianConfig",
    "GramianForCausalLM",
    "GramianForPairClassification",
    "GramianForReconstruction",
    "GramianForSequenceClassification",
    "GramianForSignalRegression",
    "GramianForTokenClassification",
    "GramianModel",
]
'''


def write_module(folder: Path) -> None:
    """Write the module that `AUTO_MAP` names into `folder`."""
    (folder / f"{MODULE}.py").write_text(SOURCE, encoding="utf-8")
