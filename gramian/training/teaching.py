"""Load a teacher, and mix the loss on the labels with the divergence from the teacher's outputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gramian.analysis import open_model
from gramian.models import GramianForCausalLM, GramianPreTrainedModel
from gramian.tasks import IGNORED, Description, Kind, find_kind
from gramian.training.configuration import ConfigError, TrainingConfig
from gramian.training.starting import base_of, check_fit

__all__ = ["Teaching", "load_teaching"]

_LABELS = ("labels", "shift_labels")
_POSITIONS = "logits_to_keep"


class Teaching:
    """A teacher and the share of the loss that its outputs determine.

    Args:
        teacher: a model of Gramian; or, for tasks whose answers are tokens, a causal language model
            of transformers. It is never trained.
        kind: kind of the task.
        weight: weight of the divergence, from 0 to 1. The loss on the labels has the rest.
        temperature: temperature of the distributions.
    """

    def __init__(self, teacher: Any, kind: Kind, weight: float, temperature: float) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.kind, self.weight, self.temperature = kind, weight, temperature

    def to(self, device: torch.device) -> None:
        """Move the teacher to a device."""
        self.teacher.to(device)

    @torch.no_grad()
    def targets(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the teacher's logits for a batch, where the model has logits."""
        wanted = {name: value for name, value in inputs.items() if name not in _LABELS}
        ours = isinstance(self.teacher, GramianPreTrainedModel)
        due = None if ours else wanted.pop(_POSITIONS, None)  # transformers takes no mask there
        logits: Tensor = self.teacher(**wanted, **self.kind.call_options).logits
        return logits if due is None else logits[due]

    def divergence(self, logits: Tensor, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the divergence of a model's logits, summed over the labels, and their number."""
        labels = inputs.get("shift_labels", inputs["labels"])
        total = self.kind.divergence(logits, self.targets(inputs), labels, self.temperature)
        return total, (labels != IGNORED).sum()


def load_teaching(config: TrainingConfig, model: Any, description: Description) -> Teaching | None:
    """Load the teacher of a run, or return None if the run has none.

    Args:
        config: configuration of the run.
        model: the model to train. Only its configuration is read.
        description: description of the task.

    Raises:
        FileNotFoundError: if the teacher's folder does not exist.
        ConfigError: if the teacher cannot be read, or does not fit the task or the model.
    """
    section, kind = config.teacher, find_kind(description.kind)
    if section.path is None:
        return None
    if not Path(section.path).is_dir():
        raise FileNotFoundError(f"there is no model folder {section.path}.")
    try:
        kind.check_teaching(section.temperature)
    except ValueError as error:
        raise ConfigError(f"teacher: the task {config.task['name']} {error}") from error
    try:
        teacher, _ = open_model(section.path)
    except (ImportError, OSError, ValueError) as error:
        raise ConfigError(f"teacher.path: {error}") from error
    if isinstance(teacher, GramianPreTrainedModel):
        check_fit(teacher, "teacher.path", section.path, kind, description)
    elif not issubclass(kind.model_class(), GramianForCausalLM):
        raise ConfigError(
            f"teacher.path must hold a {kind.model_class().__name__} for this task; {section.path} "
            f"holds a {type(teacher).__name__}."
        )
    elif config.optimization.packing:
        raise ConfigError(
            "optimization.packing needs a teacher of Gramian, which keeps packed sequences apart; "
            f"{section.path} holds a {type(teacher).__name__}."
        )
    wanted, outputs = (
        kind.logits_shape(1, 1, one)[-1] for one in (base_of(model).config, teacher.config)
    )
    if outputs != wanted:
        raise ConfigError(
            f"teacher.path must hold a model with as many outputs as the model, {wanted}; "
            f"{section.path} has {outputs}."
        )
    return Teaching(teacher, kind, section.weight, section.temperature)
