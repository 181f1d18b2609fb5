"""Extend transformers' `Trainer` by parameter groups for filters, exact scores, safe checkpoints.

A checkpoint is valid once its last file, `complete`, exists. If a run was killed while it wrote a
checkpoint, it resumes from the checkpoint before. The best model so far is saved in `best/`, beside
the folder of checkpoints.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from gramian.filters import parameter_groups
from gramian.memory import MemoryLosses, truncate_modes
from gramian.tasks import Description, find_kind
from gramian.tasks.kinds import higher_is_better
from gramian.training.collation import Packer
from gramian.training.configuration import ConfigError
from gramian.training.starting import base_of, save_description
from gramian.training.teaching import Teaching

__all__ = ["DivergedError", "Goal", "GramianTrainer", "Patience", "complete_checkpoints"]

COMPLETE = "complete"


class DivergedError(FloatingPointError):
    """The error of a run that cannot go on because its loss or its weights are no longer finite.

    The message is one sentence that names the last good checkpoint. This checkpoint is kept.
    """


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, the oldest first."""
    found = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return sorted(found, key=lambda path: int(path.name.rsplit("-", 1)[1]))


class Patience(EarlyStoppingCallback):
    """Early stopping by transformers that does not load the best model at the end.

    Transformers demands that `load_best_model_at_end` is set. Here the best model is saved in the
    folder `best/` anyway.
    """

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        pass


class Goal(TrainerCallback):
    """Stop training after an evaluation whose metric is better than a given value.

    Args:
        metric: name of the metric.
        value: value that the metric has to pass.
    """

    def __init__(self, metric: str, value: float) -> None:
        self.metric = metric
        self.value = value

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Mapping[str, float], **kwargs: Any
    ) -> None:
        found = metrics[f"eval_{self.metric}"]
        if found > self.value if higher_is_better(self.metric) else found < self.value:
            control.should_training_stop = True


def total(prediction: Any, description: Description) -> dict[str, float]:
    """Compute metrics from the scores of all sequences, and return the first one as `loss` too.

    Raises:
        ConfigError: if no sequence has a label to score.
    """
    scores = np.asarray(prediction.predictions, dtype=np.float64)
    metrics = find_kind(description.kind).summarize(scores, description)
    if not metrics[0].defined:
        raise ConfigError("no answer is due in the rows that the model is evaluated on.")
    return {"loss": metrics[0].value()} | {metric.name: metric.value() for metric in metrics}


def _shard_this_process(state: AcceleratorState, plugin: FullyShardedDataParallelPlugin) -> None:
    """Switch accelerate's state of this process to sharding, in both objects that store it.

    The change affects every later trainer of the process, as if accelerate had made it.
    """
    state.distributed_type = DistributedType.FSDP
    PartialState().distributed_type = DistributedType.FSDP  # instances share their attributes
    state.fsdp_plugin = plugin


class GramianTrainer(Trainer):
    """The trainer of `gramian.training.train`.

    Args:
        description: description of the task.
        folder: folder of the run.
        tokenizer: tokenizer to save beside the best model, or None.
        losses: losses on the model's memory, which are added to the task's loss; None adds none.
        teaching: the teacher whose outputs the model learns; None learns from the labels alone.
        packer: collator that packs training batches; None uses `data_collator` for them too.
        truncation: share of every kernel's energy that is dropped before evaluations in training,
            by `gramian.memory.truncate_modes`; 0 drops nothing.
        decay_all: whether all parameters have weight decay, as in `gramian.parameter_groups`.
        kwargs: further arguments of `Trainer`.
    """

    data_collator: Any

    def __init__(
        self,
        description: Description,
        folder: Path,
        tokenizer: Any = None,
        losses: MemoryLosses | None = None,
        teaching: Teaching | None = None,
        packer: Packer | None = None,
        truncation: float = 0.0,
        decay_all: bool = False,
        **kwargs: Any,
    ) -> None:
        self.optimizer: torch.optim.Optimizer | None = None
        self.kind = kind = find_kind(description.kind)
        super().__init__(
            preprocess_logits_for_metrics=lambda outputs, labels: kind.score(
                outputs[0] if isinstance(outputs, tuple | list) else outputs, labels
            ),
            compute_metrics=lambda prediction: {},  # `evaluation_loop` computes them
            **kwargs,
        )
        self.description = description
        self.folder = folder
        self.tokenizer = tokenizer
        self.losses = losses
        self.teaching = teaching
        if teaching is not None:
            teaching.to(self.args.device)
        self.packer = packer
        self.truncation = truncation
        self.decay_all = decay_all
        self.modes: int | None = None
        self.logged: dict[str, list[float]] = {}
        # Losses are sums over the labels, divided by the number of labels in the whole batch,
        # so they do not depend on the division among processes and micro-batches.
        self.model_accepts_loss_kwargs = True

    def _get_num_items_in_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Count labels as transformers does, but return at least 1 to avoid a division by zero."""
        count = super()._get_num_items_in_batch(*args, **kwargs)
        return count.clamp_min(1) if isinstance(count, Tensor) else count

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Make transformers' data loader, with packed rows if there is a packer."""
        collator = self.data_collator
        try:
            self.data_collator = self.packer or collator
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def create_accelerator_and_postprocess(self) -> None:
        """Make transformers' accelerator, and let FSDP2 shard over CPUs too.

        Accelerate itself does not shard over CPUs.
        """
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and self.accelerator.distributed_type is DistributedType.MULTI_CPU:
            plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            _shard_this_process(self.accelerator.state, plugin)
            self.is_fsdp_enabled = True

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return AdamW for the parameter groups that `gramian.parameter_groups` makes."""
        if self.optimizer is None:
            arguments: TrainingArguments = self.args
            groups = parameter_groups(
                self.model if model is None else model,
                lr=arguments.learning_rate,
                weight_decay=arguments.weight_decay,
                decay_all=self.decay_all,
            )
            self.optimizer = torch.optim.AdamW(
                groups,
                lr=arguments.learning_rate,
                betas=(arguments.adam_beta1, arguments.adam_beta2),
                eps=arguments.adam_epsilon,
            )
        return self.optimizer

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Compute transformers' loss; in training, learn from the teacher and add losses on memory.

        In training, logits are computed at the labelled positions only, if that saves work.
        """
        if self.args.torch_compile:  # compiled code cannot read values, and its shapes are fixed
            shape = inputs["input_ids" if "input_ids" in inputs else "input_values"].shape
            due = self.kind.logits_shape(shape[0], shape[1], self.model.config)
            self.kind.check_labels(inputs["labels"], due)
        elif model.training:
            inputs = self.kind.select_due(inputs)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        items = kwargs.get("num_items_in_batch")
        if self.teaching is not None and model.training:
            loss = self._taught(self.teaching, loss, outputs.logits, inputs, items)
        if self.losses is not None and model.training:
            more, values = self.losses()
            # A loss that is summed over micro-batches is not divided by their number.
            parts = 1 if items is None else self.current_gradient_accumulation_steps
            loss = loss + more / parts
            for name, value in values.items():
                self.logged.setdefault(name, []).append(value)
        return (loss, outputs) if return_outputs else loss

    def _taught(
        self, teaching: Teaching, loss: Tensor, logits: Tensor, inputs: Any, items: Any
    ) -> Tensor:
        """Return the weighted mean of the loss on the labels and the divergence from the teacher.

        Args:
            teaching: the teacher and the weights.
            loss: loss on the labels.
            logits: logits of the model.
            inputs: the micro-batch.
            items: number of labels in the whole batch, by which sums over the micro-batch are
                divided; None divides by the number in the micro-batch.
        """
        total, count = teaching.divergence(logits, inputs)
        mean = total / count.clamp_min(1)
        self.logged.setdefault("divergence", []).append(mean.item())
        if items is not None:
            # Gradients are averaged over the processes, and `items` counts the labels of all.
            everywhere = self.args.average_tokens_across_devices
            mean = total / items * (self.accelerator.num_processes if everywhere else 1)
        return torch.lerp(loss, mean.to(loss.dtype), teaching.weight)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as transformers does, and add to training entries the mean losses on memory.

        The means are over the steps since the previous training entry.

        Raises:
            DivergedError: if the loss is not finite. The entry is written first. A checkpoint is
                written only after the entry of its step, so no checkpoint holds a diverged model.
        """
        if "loss" in logs:
            logs |= {name: sum(values) / len(values) for name, values in self.logged.items()}
            self.logged = {}
        super().log(logs, *args, **kwargs)
        for key in ("loss", "eval_loss", f"eval_{self.args.metric_for_best_model}"):
            if key in logs and not math.isfinite(logs[key]):
                name = f"held-out {key.removeprefix('eval_')}" if "_" in key else key
                raise self._diverged(f"the {name} is {logs[key]}")

    def _diverged(self, what: str) -> DivergedError:
        good = complete_checkpoints(Path(self.args.output_dir))
        kept = f"the last good checkpoint is {good[-1]}" if good else "no checkpoint is before it"
        return DivergedError(f"{what} at step {self.state.global_step}; {kept}.")

    def _check_weights(self) -> None:
        """Raise a `DivergedError` if a weight is not finite.

        Every process must call this method.
        """
        wrong = torch.zeros((), device=self.args.device)
        for parameter in self.model.parameters():
            shard = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            wrong += (~shard.detach().isfinite()).any()
        if bool(self.accelerator.reduce(wrong) > 0):
            raise self._diverged("a weight is no longer finite")

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as transformers does. In training, drop weak modes of filters before."""
        if self.truncation and self.is_in_train:
            dropped = truncate_modes(self.model, self.truncation, self.optimizer)
            self.modes = sum(one.after for one in dropped)
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        return metrics

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate as transformers does, but compute metrics over all labels.

        Transformers would compute the loss as a mean over batches.
        """
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        exact = total(output, self.description)
        if self.args.metric_for_best_model not in exact:
            raise ConfigError(
                f"evaluation.metric is {self.args.metric_for_best_model}, which has no value where "
                "every target is 0."
            )
        output.metrics.update({f"{metric_key_prefix}_{key}": exact[key] for key in exact})
        if self.modes is not None:
            output.metrics[f"{metric_key_prefix}_modes"] = self.modes
        return output

    def save_as(self, name: str) -> None:
        """Write the model and its tokenizer to the folder `name` inside the run's folder.

        The folder is written completely or not at all. Every process must call this method.

        Raises:
            DivergedError: if a weight is not finite.
        """
        self._check_weights()
        stage, target = self.folder / f".{name}-new", self.folder / name
        if self.is_world_process_zero():
            shutil.rmtree(stage, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        caching, self.model.config.use_cache = self.model.config.use_cache, True
        self.save_model(str(stage), _internal_call=True)
        self.model.config.use_cache = caching
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            (stage / "training_args.bin").unlink(missing_ok=True)  # a pickle that names the machine
            if base_of(self.model) is not self.model:
                save_description(self.model, stage)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(stage)
            old = self.folder / f".{name}-old"
            shutil.rmtree(old, ignore_errors=True)
            if target.exists():
                target.rename(old)
            stage.rename(target)
            shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _determine_best_metric(self, metrics: Mapping[str, float], trial: Any) -> bool:
        better = super()._determine_best_metric(metrics, trial)
        if better:
            self.save_as("best")
        return better

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Warn as transformers does, but not of tied weights, which a checkpoint has only once."""
        tied = base_of(self.model).all_tied_weights_keys
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._check_weights()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            if base_of(self.model) is not self.model:
                save_description(self.model, folder)
            (folder / COMPLETE).touch()
