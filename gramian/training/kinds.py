"""Which class of models a kind of task trains."""

from gramian.models import (
    GramianForCausalLM,
    GramianForPairClassification,
    GramianForReconstruction,
    GramianForSequenceClassification,
    GramianForSignalRegression,
    GramianPreTrainedModel,
)

__all__ = ["MODELS"]

MODELS: dict[str, type[GramianPreTrainedModel]] = {
    "tokens": GramianForCausalLM,
    "classification": GramianForSequenceClassification,
    "pairs": GramianForPairClassification,
    "signal": GramianForSignalRegression,
    "reconstruction": GramianForReconstruction,
}
