"""Make the arguments of transformers' `Trainer`, and check that they suit the machine."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from gramian._processes import world_size
from gramian.models import BLOCKS
from gramian.tasks.kinds import higher_is_better
from gramian.training.configuration import ConfigError, Hardware, TrainingConfig

__all__ = ["count_steps", "make_arguments"]


def count_steps(config: TrainingConfig, data: Any) -> int:
    """Return the number of optimizer steps of a run on the training set `data`.

    Raises:
        ConfigError: if the run is given in epochs and the length of the training set is unknown.
    """
    optimization = config.optimization
    if optimization.steps is not None:
        return optimization.steps
    if not hasattr(data, "__len__"):
        raise ConfigError("a streamed task has no known length: give optimization.steps.")
    assert optimization.epochs is not None
    an_epoch = math.ceil(len(data) / optimization.batch_size)
    return max(1, round(optimization.epochs * an_epoch))


def make_arguments(
    config: TrainingConfig, model: PreTrainedModel, steps: int, bar: bool = False
) -> TrainingArguments:
    """Translate a configuration into the arguments of transformers' `Trainer`.

    Args:
        config: configuration of the run.
        model: the model to train. If FSDP2 is requested, it shards the model's blocks.
        steps: number of optimizer steps.
        bar: whether transformers shows its progress bar.

    Raises:
        ConfigError: if the batch cannot be divided among the processes and micro-batches; if the
            number of processes does not suit the machine, the environment or FSDP; or if the model
            is to be sharded, but its block is not registered.
    """
    optimization, evaluation, hardware = config.optimization, config.evaluation, config.hardware
    processes, on_cpu = _processes(hardware)
    shares = processes * optimization.accumulation
    if optimization.batch_size % shares:
        raise ConfigError(
            f"optimization.batch_size must be divisible by processes × accumulation, here "
            f"{processes} × {optimization.accumulation}; got {optimization.batch_size}."
        )
    if hardware.fsdp and processes < 2:
        raise ConfigError("hardware.fsdp needs several processes: start it with torchrun.")
    share = optimization.batch_size // shares
    folder = Path(config.output)
    schedule, options = optimization.schedule, {}
    if schedule == "cosine":
        schedule, options = "cosine_with_min_lr", {"min_lr_rate": optimization.final_rate}
    elif schedule == "constant":
        schedule = "constant_with_warmup"
    warmup = optimization.warmup
    recomputing = {}
    if hardware.gradient_checkpointing and not hardware.fsdp:
        known = TrainingArguments.__dataclass_fields__
        name = "activation_checkpointing"  # its name in newer versions of transformers
        recomputing = {name if name in known else "gradient_checkpointing": True}
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=share,
        per_device_eval_batch_size=evaluation.batch_size or share,
        gradient_accumulation_steps=optimization.accumulation,
        learning_rate=optimization.learning_rate,
        weight_decay=optimization.weight_decay,
        adam_beta1=optimization.betas[0],
        adam_beta2=optimization.betas[1],
        adam_epsilon=optimization.epsilon,
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=options,
        warmup_steps=round(warmup * steps) if warmup < 1 else round(warmup),
        max_grad_norm=optimization.clip_norm,
        eval_strategy="steps",
        eval_steps=evaluation.every or steps,
        save_strategy="steps",
        save_steps=config.checkpoints.every or steps,
        save_total_limit=config.checkpoints.keep,
        metric_for_best_model=evaluation.metric,
        greater_is_better=higher_is_better(evaluation.metric),
        restore_callback_states_from_checkpoint=True,
        logging_strategy="steps",
        logging_steps=config.logging.every,
        logging_nan_inf_filter=False,
        report_to=config.logging.report_to or "none",
        disable_tqdm=not bar,
        seed=config.seed,
        use_cpu=on_cpu,
        bf16=hardware.bf16,
        torch_compile=hardware.compile,
        fsdp=hardware.fsdp or None,
        fsdp_config=_sharding(config, model) if hardware.fsdp else None,
        dataloader_num_workers=hardware.workers,
        dataloader_pin_memory=not on_cpu and torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        accelerator_config={"dispatch_batches": False},  # a stream's batches differ in length
        label_names=["labels"],
        **recomputing,
    )
    if arguments.world_size != processes:
        raise ConfigError(
            f"the environment says WORLD_SIZE={processes}, but {arguments.world_size} take part in "
            "this run: start them all with torchrun."
        )
    return arguments


def _sharding(config: TrainingConfig, model: PreTrainedModel) -> dict[str, Any]:
    """Return the options of FSDP2: one group of parameters for each of the model's blocks.

    Raises:
        ConfigError: if the model's class of blocks is not registered.
    """
    kind = getattr(model.config, "block", None)
    if kind not in BLOCKS:
        raise ConfigError(
            f"hardware.fsdp needs a model of registered blocks ({', '.join(BLOCKS)}); got a "
            f"{type(model).__name__} of block {kind!r}."
        )
    return {
        "version": 2,
        "transformer_layer_cls_to_wrap": [BLOCKS[kind].__name__],
        "activation_checkpointing": config.hardware.gradient_checkpointing,
    }


def _processes(hardware: Hardware) -> tuple[int, bool]:
    """Return the number of processes, and whether they train on CPUs.

    They train on CPUs if the configuration says so, or if the machine has no accelerator.
    """
    try:
        processes = world_size()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if hardware.device == "cpu" or not torch.accelerator.is_available():
        return processes, True
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    devices = torch.accelerator.device_count()
    if processes > 1 and here > devices:
        raise ConfigError(
            f"{here} processes of this machine need an accelerator each, and it has {devices}: "
            "start at most that many processes, or give hardware.device=cpu."
        )
    return processes, False
