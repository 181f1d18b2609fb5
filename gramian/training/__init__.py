"""Training from one YAML file: a thin layer over transformers' `Trainer` and accelerate.

    config = gramian.training.load_config("recipes/mqar_multi_hyena.yaml", ["seed=1"])
    report = gramian.training.train(config)

One process, `torchrun` on many devices and FSDP2 take the same file. A run that was killed goes on
from its last complete checkpoint to the losses that it would have had.

Needs the extra `train` (`pip install "gramian[train]"`).
"""

from gramian.training._run import TrainingReport, train
from gramian.training.configuration import (
    Checkpoints,
    ConfigError,
    Evaluation,
    Hardware,
    Logging,
    Optimization,
    TrainingConfig,
    load_config,
    parse_config,
)

__all__ = [
    "Checkpoints",
    "ConfigError",
    "Evaluation",
    "Hardware",
    "Logging",
    "Optimization",
    "TrainingConfig",
    "TrainingReport",
    "load_config",
    "parse_config",
    "train",
]
