"""Make the models known to transformers, and to tools that look for their classes there.

transformers' Auto classes have registries. Other tools, such as `transformers serve` and TRL, read
the class that `architectures` in `config.json` names from the package transformers itself. So the
classes are attributes of this package too.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import transformers

from gramian.models.backbone import GramianModel
from gramian.models.classification import GramianForSequenceClassification
from gramian.models.configuration import GramianConfig
from gramian.models.loading import CLASSES
from gramian.models.modeling import GramianForCausalLM
from gramian.models.signal import GramianForSignalRegression
from gramian.models.token_classification import GramianForTokenClassification
from gramian.models.tokenizer import ByteTokenizer

__all__ = ["register"]


def register() -> None:
    """Register the models with the Auto classes, and add all classes to the package transformers.

    `AutoTokenizer` finds `ByteTokenizer` in the package, and reads its files as this class.
    """
    transformers.AutoConfig.register(GramianConfig.model_type, GramianConfig, exist_ok=True)
    for auto, kind in (
        (transformers.AutoModel, GramianModel),
        (transformers.AutoModelForCausalLM, GramianForCausalLM),
        (transformers.AutoModelForSequenceClassification, GramianForSequenceClassification),
        (transformers.AutoModelForTokenClassification, GramianForTokenClassification),
        (transformers.AutoModelForTimeSeriesPrediction, GramianForSignalRegression),
    ):
        auto.register(GramianConfig, kind, exist_ok=True)
    found: tuple[type[Any], ...] = (GramianConfig, ByteTokenizer, *CLASSES.values())
    for package in _packages():
        for kind in found:
            setattr(package, kind.__name__, kind)


def _packages() -> list[ModuleType]:
    """Return the package transformers, and the copies of it that modules imported earlier.

    The package makes itself a second time when its `processing_utils` is imported. A module that
    imported the package before then keeps the first copy, in which tools may look for classes.
    """
    modules = [module for module in list(sys.modules.values()) if isinstance(module, ModuleType)]
    held = [sys.modules["transformers"], *(vars(one).get("transformers") for one in modules)]
    found = {id(one): one for one in held if isinstance(one, ModuleType)}
    return [one for one in found.values() if one.__name__ == "transformers"]
