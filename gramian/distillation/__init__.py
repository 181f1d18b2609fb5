"""Distillation: a model whose long filters become small recurrences.

`distill(model, tol=...)` reduces every filter of a model (Laughing Hyena Distillery,
arXiv 2310.18780, by balanced truncation in place of the paper's gradient descent) and returns a
model of the same class, together with a `DistillationReport` of what was reached.
"""

from gramian.distillation._distill import distill
from gramian.distillation._report import DistillationReport, LayerReport

__all__ = ["DistillationReport", "LayerReport", "distill"]
