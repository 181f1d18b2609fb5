"""Plan which attention of a model a window or a fitted recurrence can replace, and try the plan.

    from gramian import hybrids

    plan = hybrids.plan_hybrid(model, text, tokenizer, replace=6)
    plan.save("plan.yaml")
    trial = hybrids.try_hybrid(model, plan, other_text, tokenizer)

A hybrid keeps attention in some layers and has a state of fixed size in the others. The plan says
what each head needs of the past: its effective state-size, the error of a recurrence of n states
in its place, and the error of a window of w tokens. With `kind="recurrence"`, a gated linear
recurrence is fitted to every head on the text, beside a window.
"""

from gramian.hybrids._measuring import plan_hybrid
from gramian.hybrids._plan import CRITERIA, HybridPlan, PlannedLayer
from gramian.hybrids._recurrence import LayerRecurrence, Recurrence
from gramian.hybrids._replacement import KINDS, Fitted, Replacement, register
from gramian.hybrids._trying import HybridTrial, TriedChoice, try_hybrid
from gramian.hybrids._window import SlidingWindow

__all__ = [
    "CRITERIA",
    "KINDS",
    "Fitted",
    "HybridPlan",
    "HybridTrial",
    "LayerRecurrence",
    "PlannedLayer",
    "Recurrence",
    "Replacement",
    "SlidingWindow",
    "TriedChoice",
    "plan_hybrid",
    "register",
    "try_hybrid",
]
