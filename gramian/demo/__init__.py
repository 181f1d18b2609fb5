"""Run the demo: train on real English, distil, generate in constant memory, measure each step.

`run_demo` trains a MultiHyena language model on the text behind Python's `help()`, reduces its long
filters to small recurrences, and checks every claim during the run. It needs the extra `cli`.
"""

from gramian._extras import require

require("gramian.demo", "cli", "transformers", "rich", "matplotlib")

from gramian.demo._report import Check, DemoReport, DemoSettings
from gramian.demo._run import run_demo
from gramian.demo.training import TrainingSettings

__all__ = ["Check", "DemoReport", "DemoSettings", "TrainingSettings", "run_demo"]
