"""Train from one YAML file, through a thin layer over transformers' `Trainer` and accelerate.

    config = gramian.training.load_config("recipes/mqar_multi_hyena.yaml", ["seed=1"])
    report = gramian.training.train(config)

The same file works for one process, for `torchrun` on many devices, and for FSDP2. If a run was
killed, the same call resumes it from its last complete checkpoint. The run then reaches the same
losses as an uninterrupted run.

    report = gramian.training.sweep(gramian.training.load_sweep("recipes/sweeps/mqar.yaml"), jobs=2)

This call runs a grid of configurations, each in its own process, and gathers the results in one
table and one figure.

This package needs the extra `train` (`pip install "gramian[train]"`).
"""

from gramian._extras import require

require("gramian.training", "train", "transformers", "accelerate", "datasets", "yaml", "matplotlib")

from gramian.memory.callbacks import StateSizeCallback
from gramian.training._run import TrainingReport, train
from gramian.training._sweep import sweep
from gramian.training.configuration import (
    Checkpoints,
    ConfigError,
    Evaluation,
    Hardware,
    Logging,
    Optimization,
    Regularization,
    StatePenalty,
    StateSizes,
    Teacher,
    TrainingConfig,
    load_config,
    parse_config,
)
from gramian.training.plots import plot_sweep, plot_training
from gramian.training.sweep_configuration import SweepConfig, SweepPoint, load_sweep, parse_sweep
from gramian.training.sweep_report import PointReport, Spread, SweepReport, SweepRow
from gramian.training.trainer import DivergedError

__all__ = [
    "Checkpoints",
    "ConfigError",
    "DivergedError",
    "Evaluation",
    "Hardware",
    "Logging",
    "Optimization",
    "PointReport",
    "Regularization",
    "Spread",
    "StatePenalty",
    "StateSizeCallback",
    "StateSizes",
    "SweepConfig",
    "SweepPoint",
    "SweepReport",
    "SweepRow",
    "Teacher",
    "TrainingConfig",
    "TrainingReport",
    "load_config",
    "load_sweep",
    "parse_config",
    "parse_sweep",
    "plot_sweep",
    "plot_training",
    "sweep",
    "train",
]
