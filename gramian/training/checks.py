"""Check the values in a training configuration, with one function for each section.

Every function raises a `ConfigError` at the first value that is out of range.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from gramian._checks import check_sizes
from gramian._nearest import unknown
from gramian.tasks.kinds import metric_names
from gramian.training.sections import (
    DEVICES,
    SCHEDULES,
    Checkpoints,
    ConfigError,
    Evaluation,
    Hardware,
    Logging,
    Optimization,
    Regularization,
    Teacher,
)

__all__ = [
    "check_checkpoints",
    "check_combinations",
    "check_evaluation",
    "check_hardware",
    "check_optimization",
    "check_regularization",
    "check_teacher",
]


def check_optimization(section: Optimization) -> None:
    """Check the section `optimization`."""
    where = "optimization"
    if (section.steps is None) == (section.epochs is None):
        raise ConfigError("give optimization.steps or optimization.epochs, one of the two.")
    _check_sizes(where, section, "steps", "batch_size", "accumulation")
    _check_not_negative(where, section, "learning_rate", "weight_decay", "warmup", "clip_norm")
    if section.epochs is not None and not 0 < section.epochs < float("inf"):
        raise ConfigError(f"optimization.epochs must be above 0; got {section.epochs}.")
    if not 0 <= section.final_rate <= 1:
        raise ConfigError(
            f"optimization.final_rate must lie from 0 to 1; got {section.final_rate}."
        )
    if len(section.betas) != 2 or not all(0 <= beta < 1 for beta in section.betas):
        raise ConfigError(f"optimization.betas must be two numbers in [0, 1); got {section.betas}.")
    _check_choice(where, section, "schedule", SCHEDULES)


def check_teacher(section: Teacher) -> None:
    """Check the section `teacher`."""
    if not 0 <= section.weight <= 1:
        raise ConfigError(f"teacher.weight must lie from 0 to 1; got {section.weight}.")
    if not 0.01 <= section.temperature <= 100:  # beyond, the divergence is lost in rounding errors
        raise ConfigError(
            f"teacher.temperature must lie from 0.01 to 100; got {section.temperature}."
        )


def check_regularization(section: Regularization) -> None:
    """Check the section `regularization`."""
    penalty = section.ess
    _check_not_negative("regularization", section, "gates", "hankel")
    _check_not_negative("regularization.ess", penalty, "weight")
    _check_sizes("regularization.ess", penalty, "sequences", "channels")
    if not 0 <= section.truncation < 1:
        raise ConfigError(
            f"regularization.truncation must be at least 0 and below 1; got {section.truncation}."
        )
    if penalty.weight > 0 and (penalty.target is None) == (penalty.share is None):
        raise ConfigError("give regularization.ess.target or its share, one of the two.")
    if penalty.target is not None and not 0 < penalty.target < float("inf"):
        raise ConfigError(f"regularization.ess.target must be above 0; got {penalty.target}.")
    if penalty.share is not None and not 0 < penalty.share <= 1:
        raise ConfigError(f"regularization.ess.share must lie in (0, 1]; got {penalty.share}.")


def check_evaluation(section: Evaluation) -> None:
    """Check the section `evaluation`."""
    where = "evaluation"
    _check_sizes(where, section, "every", "examples", "batch_size", "patience", "sample_length")
    _check_not_negative(where, section, "samples")
    _check_choice(where, section, "metric", metric_names())
    if section.stop_at is not None and not math.isfinite(section.stop_at):
        raise ConfigError(f"evaluation.stop_at must be a finite number; got {section.stop_at}.")
    _check_sizes("evaluation.ess", section.ess, "every", "channels")
    _check_not_negative("evaluation.ess", section.ess, "rows")


def check_checkpoints(section: Checkpoints, logging: Logging) -> None:
    """Check the sections `checkpoints` and `logging`."""
    _check_sizes("checkpoints", section, "every")
    _check_sizes("logging", logging, "every")
    if section.keep < 2:
        raise ConfigError(
            "checkpoints.keep must be at least 2, as the last one may be incomplete; got "
            f"{section.keep}."
        )
    if section.every is not None and section.every % logging.every:
        raise ConfigError(
            "checkpoints.every must be a multiple of logging.every, so that a resumed run logs "
            f"the same lines as an uninterrupted run; got {section.every} and {logging.every}."
        )


def check_hardware(section: Hardware) -> None:
    """Check the section `hardware`."""
    _check_sizes("hardware", section, "threads")
    _check_not_negative("hardware", section, "workers")
    _check_choice("hardware", section, "device", DEVICES)


def check_combinations(
    optimization: Optimization, regularization: Regularization, hardware: Hardware
) -> None:
    """Check that losses on memory, packed rows and the hardware settings go together."""
    observed = regularization.gates > 0 or regularization.ess.weight > 0
    if (observed or regularization.hankel > 0) and hardware.fsdp:
        raise ConfigError(
            "regularization reads the parameters of layers outside of their forward passes, where "
            "hardware.fsdp has only shards of them."
        )
    if regularization.truncation > 0 and (hardware.fsdp or hardware.compile):
        raise ConfigError(
            "regularization.truncation changes the shapes of parameters, which is impossible with "
            "hardware.fsdp or hardware.compile."
        )
    if optimization.packing and observed:
        raise ConfigError(
            "regularization.gates and regularization.ess read rows of one sequence each, which "
            "optimization.packing packs."
        )
    if optimization.packing and hardware.compile:
        raise ConfigError(
            "packed rows cannot be compiled: give optimization.packing or hardware.compile."
        )


def _check_sizes(where: str, section: object, *keys: str) -> None:
    """Check that the values under `keys` are integers of at least 1, or None."""
    sizes = {f"{where}.{key}": getattr(section, key) for key in keys}
    try:
        check_sizes(**{name: size for name, size in sizes.items() if size is not None})
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_not_negative(where: str, section: object, *keys: str) -> None:
    """Check that the values under `keys` are finite and at least 0."""
    for key in keys:
        value = getattr(section, key)
        if not 0 <= value < float("inf"):
            raise ConfigError(f"{where}.{key} must be at least 0 and finite; got {value}.")


def _check_choice(where: str, section: object, key: str, accepted: Sequence[str]) -> None:
    """Check that the value under `key` is one of the accepted names."""
    given = getattr(section, key)
    if given not in accepted:
        raise ConfigError(unknown(f"{where}.{key}", given, accepted))
