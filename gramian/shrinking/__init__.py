"""Make the states of a model's recurrences smaller, by what a text needs of them.

`shrink(model, texts, keep=0.5)` drops the coordinates of every state whose absence changes the
layer's outputs on a text least, and folds the choice into the weights. The result is a model of the
same class with a smaller state in its configuration.
"""

from gramian.shrinking._projection import Projection
from gramian.shrinking._recovery import Recovery
from gramian.shrinking._report import LayerShrinkage, ShrinkRecovery, ShrinkReport, ShrinkTrial
from gramian.shrinking._shrink import shrink

__all__ = [
    "LayerShrinkage",
    "Projection",
    "Recovery",
    "ShrinkRecovery",
    "ShrinkReport",
    "ShrinkTrial",
    "shrink",
]
