"""What a model is worth on held-out data, and the difference to another's, with standard errors.

    from gramian import evaluation

    score = evaluation.perplexity(model, tokenizer, text, window=1024, stride=512)
    measures = evaluation.evaluate_task(model, tasks.build("mqar"), split="test")
    measures = evaluation.evaluate_harness(model, tokenizer, ["arc_easy"], limit=100)
    report = evaluation.EvaluationReport("small", measures, against="original", before=others)

Models are ours or any causal language model of transformers. Tasks of `gramian.tasks` need the
extra `train`, those of lm-evaluation-harness the extra `evaluate`, imported when it is used.
"""

from gramian.evaluation._harness import HarnessError, evaluate_harness
from gramian.evaluation._measure import Measure
from gramian.evaluation._perplexity import Perplexity, perplexity
from gramian.evaluation._report import Comparison, EvaluationReport
from gramian.evaluation._rows import TaskRow, read_row
from gramian.evaluation._tasks import evaluate_task

__all__ = [
    "Comparison",
    "EvaluationReport",
    "HarnessError",
    "Measure",
    "Perplexity",
    "TaskRow",
    "evaluate_harness",
    "evaluate_task",
    "perplexity",
    "read_row",
]
