"""Distil a model: replace its long filters by small recurrences.

`distill(model, tol=...)` reduces every long filter of a model, as in Laughing Hyena Distillery
(arXiv 2310.18780), but by balanced truncation in place of the paper's gradient descent. It returns
a model of the same class, and a `DistillationReport` of the orders and errors of its filters.
"""

from gramian.distillation._distill import distill
from gramian.distillation._foreign import ForeignFilter
from gramian.distillation._quality import (
    distill_to_budget,
    finetune,
    mean_loss,
    measure_quality,
)
from gramian.distillation._report import DistillationReport, LayerReport, Quality, Trial

__all__ = [
    "DistillationReport",
    "ForeignFilter",
    "LayerReport",
    "Quality",
    "Trial",
    "distill",
    "distill_to_budget",
    "finetune",
    "mean_loss",
    "measure_quality",
]
