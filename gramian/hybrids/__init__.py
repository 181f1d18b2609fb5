"""Plan which attention layers of a model a sliding window can replace, and try the plan.

    from gramian import hybrids

    plan = hybrids.plan_hybrid(model, text, tokenizer, replace=6)
    plan.save("plan.yaml")
    trial = hybrids.try_hybrid(model, plan, other_text, tokenizer)

A hybrid keeps attention in some layers and has a state of fixed size in the others. The plan says
what each head needs of the past: its effective state-size, the error of a recurrence of n states
in its place, and the error of a window of w tokens.
"""

from gramian.hybrids._measuring import plan_hybrid
from gramian.hybrids._plan import CRITERIA, HybridPlan, PlannedLayer
from gramian.hybrids._trying import HybridTrial, TriedChoice, try_hybrid

__all__ = [
    "CRITERIA",
    "HybridPlan",
    "HybridTrial",
    "PlannedLayer",
    "TriedChoice",
    "plan_hybrid",
    "try_hybrid",
]
