"""Evaluate one model, or compare two, on held-out data, with standard errors.

    from gramian import evaluation

    score = evaluation.perplexity(model, tokenizer, text, window=1024, stride=512)
    measures = evaluation.evaluate_task(model, tasks.build("mqar"), split="test")
    measures = evaluation.evaluate_harness(model, tokenizer, ["arc_easy"], limit=100)
    report = evaluation.EvaluationReport("small", measures, against="original", before=others)

A model is a Gramian model or any causal language model of transformers. Tasks of `gramian.tasks`
need the extra `train`. Tasks of lm-evaluation-harness need the extra `evaluate`. The harness is
imported when it is first used.
"""

from gramian.evaluation._bigrams import RARE, BigramCounts, count_bigrams, repeated_bigrams
from gramian.evaluation._harness import HarnessError, evaluate_harness
from gramian.evaluation._measure import Measure
from gramian.evaluation._perplexity import Perplexity, perplexity
from gramian.evaluation._report import Comparison, EvaluationReport
from gramian.evaluation._rows import TaskRow, read_row
from gramian.evaluation._tasks import evaluate_task

__all__ = [
    "RARE",
    "BigramCounts",
    "Comparison",
    "EvaluationReport",
    "HarnessError",
    "Measure",
    "Perplexity",
    "TaskRow",
    "count_bigrams",
    "evaluate_harness",
    "evaluate_task",
    "perplexity",
    "read_row",
    "repeated_bigrams",
]
