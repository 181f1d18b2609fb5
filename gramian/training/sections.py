"""Define the sections of a training configuration, with the meanings and defaults of their keys."""

from __future__ import annotations

from dataclasses import dataclass, field

from gramian.training.keys import setting

__all__ = [
    "DEVICES",
    "SCHEDULES",
    "Checkpoints",
    "ConfigError",
    "Evaluation",
    "Hardware",
    "Logging",
    "Optimization",
    "Regularization",
    "StatePenalty",
    "StateSizes",
    "Teacher",
]

SCHEDULES = ("cosine", "linear", "constant")
DEVICES = ("auto", "cpu")


class ConfigError(ValueError):
    """An error in a configuration that its author can correct. The message is one sentence."""


@dataclass(frozen=True)
class Optimization:
    """Settings of AdamW and of its learning rate. The schedule of the rate begins with a warm-up.

    `gramian.parameter_groups` gives the parameters of filters the learning rates and weight decays
    that the filters request.
    """

    steps: int | None = setting("number of optimizer steps; or give `epochs` instead.", None)
    epochs: float | None = setting(
        "number of passes over the training set; or give `steps` instead.", None
    )
    batch_size: int = setting(
        "number of sequences in an optimizer step, over all processes and micro-batches. So a run "
        "does not depend on the number of processes, except that several processes fill up the "
        "last batch of an epoch with other rows.",
        32,
    )
    accumulation: int = setting(
        "number of micro-batches that each process reads in an optimizer step (gradient "
        "accumulation).",
        1,
    )
    packing: bool = setting(
        "whether to put the sequences of a micro-batch end to end, in rows no longer than the "
        "task's longest sequence, instead of padding each sequence; the losses stay the same.",
        False,
    )
    learning_rate: float = setting("learning rate at its peak.", 1e-3)
    weight_decay: float = setting(
        "weight decay of matrices other than embeddings and the parameters of filters.", 0.1
    )
    decay_all: bool = setting(
        "whether biases, norms and embeddings have this weight decay too, as in the published code "
        "of Hyena, RTF and Zoology.",
        False,
    )
    betas: list[float] = field(
        default_factory=lambda: [0.9, 0.98], metadata={"help": "the two betas of AdamW."}
    )
    epsilon: float = setting("the epsilon of AdamW.", 1e-8)
    warmup: float = setting(
        "length of the linear warm-up: a number of steps if at least 1, otherwise a share of all "
        "steps.",
        0.05,
    )
    schedule: str = setting(
        'schedule of the learning rate after the warm-up: `"cosine"`, `"linear"` or `"constant"`.',
        "cosine",
    )
    final_rate: float = setting(
        "learning rate at the end of the cosine schedule, as a share of the peak.", 0.05
    )
    clip_norm: float = setting(
        "largest norm of the gradient; a gradient of larger norm is scaled down. 0 turns this off.",
        1.0,
    )


@dataclass(frozen=True)
class Teacher:
    """Settings of knowledge distillation: the model learns the outputs of a trained one.

    If labels are classes, the divergence is `T² KL(teacher ‖ model)` at the temperature T (Hinton,
    Vinyals and Dean, arXiv 1503.02531). If they are numbers, it is the squared difference. It is
    computed where there are labels, like the task's loss, and logged as `divergence`.
    """

    path: str | None = setting(
        "folder of the teacher, a saved model with as many outputs as the model; None trains on "
        "the labels alone. For tasks whose answers are tokens, it may be a causal language model "
        "of transformers.",
        None,
    )
    weight: float = setting(
        "weight of the divergence from the teacher, from 0 to 1; the loss on the labels has the "
        "rest.",
        1.0,
    )
    temperature: float = setting(
        "temperature T of the distributions of both models, from 0.01 to 100; for classes only.",
        1.0,
    )


@dataclass(frozen=True)
class StatePenalty:
    """Settings of the loss on effective state-size that `gramian.memory.ess_penalty` computes."""

    weight: float = setting("weight of the loss; 0 turns it off.", 0.0)
    target: float | None = setting(
        "state-size towards which the loss pulls every head or channel; or give `share` instead.",
        None,
    )
    share: float | None = setting(
        "share of the available state towards which the loss pulls every head or channel, above 0 "
        "and at most 1; or give `target` instead.",
        None,
    )
    sequences: int = setting(
        "number of sequences in each process's batch whose state-sizes are measured.", 2
    )
    channels: int = setting(
        "number of heads or channels that are measured in a layer, different ones at each step.", 8
    )


@dataclass(frozen=True)
class Regularization:
    """Settings of losses on memory, and of the truncation of filters.

    The losses are added to the task's loss and logged separately.
    """

    gates: float = setting(
        "weight of `gramian.memory.gate_regularizer`, which pulls the gates of linear "
        "recurrences towards 1; 0 turns it off.",
        0.0,
    )
    normalize_gates: bool = setting(
        "whether that loss is divided by the square root of the number of its terms. If not, it is "
        "the Frobenius norm `‖A - I‖_F` over the batch, as published.",
        True,
    )
    gate_layers: list[int] | None = field(
        default=None,
        metadata={
            "help": "numbers of the layers whose gates that loss reads, counted from 0; None reads "
            "those of all linear recurrences."
        },
    )
    ess: StatePenalty = field(default_factory=StatePenalty)
    hankel: float = setting(
        "weight of `gramian.memory.hankel_penalty`, which makes the Hankel singular values of "
        "filters decay, so that they can be reduced further; 0 turns it off. Each step measures "
        "up to 16 channels of every filter.",
        0.0,
    )
    truncation: float = setting(
        "share of a kernel's energy; before each evaluation, the weakest modes of every channel "
        "of modal filters and S4Ds that together hold at most this share are dropped, as "
        "`gramian.memory.truncate_modes` does. 0 drops none.",
        0.0,
    )


@dataclass(frozen=True)
class StateSizes:
    """Settings of the effective state-sizes that `StateSizeCallback` measures at evaluations."""

    rows: int = setting(
        "number of held-out rows on which state-sizes are measured; 0 measures none.", 0
    )
    every: int = setting("number of positions from one measurement to the next.", 16)
    channels: int = setting("largest number of heads or channels of a layer that are measured.", 16)


@dataclass(frozen=True)
class Evaluation:
    """Settings of evaluation. An evaluation always takes place at the end of training."""

    every: int | None = setting(
        "optimizer steps from one evaluation to the next; None evaluates at the end only.", None
    )
    split: str = setting("split of the task to evaluate on.", "validation")
    examples: int | None = setting("largest number of rows to evaluate; None uses all.", None)
    batch_size: int | None = setting(
        "number of sequences in a batch of each process; None uses the number in a training "
        "micro-batch.",
        None,
    )
    metric: str = setting(
        'metric by which the best model is chosen: `"loss"` or `"accuracy"`. For labels that are '
        'numbers: `"loss"`, which is the same as `"mse"`, or `"relative_error"`, the RMSE divided '
        "by the RMS of the targets.",
        "loss",
    )
    stop_at: float | None = setting(
        "value of the metric after which training stops, once an evaluation finds a better one "
        "(above it for accuracy, below it for a loss); None never stops it.",
        None,
    )
    patience: int | None = setting(
        "number of evaluations without a better metric after which training stops; None never "
        "stops it.",
        None,
    )
    samples: int = setting(
        "number of held-out rows whose predictions, or continuations of text, are recorded.", 2
    )
    sample_length: int = setting(
        "number of tokens in a recorded continuation, or of last steps in a recorded signal.", 128
    )
    ess: StateSizes = field(default_factory=StateSizes)


@dataclass(frozen=True)
class Checkpoints:
    """Settings of checkpoints, from which an interrupted run resumes."""

    every: int | None = setting(
        "optimizer steps from one checkpoint to the next; None writes one at the end only.", None
    )
    keep: int = setting(
        "number of checkpoints to keep, at least 2, because the last one may be incomplete.", 2
    )


@dataclass(frozen=True)
class Logging:
    """Settings of the log of metrics. The log is always written to `metrics.jsonl`."""

    every: int = setting("optimizer steps from one log entry to the next.", 10)
    report_to: list[str] = field(
        default_factory=list,
        metadata={
            "help": 'further places for the log: `"tensorboard"`, or others that the `Trainer` of '
            "transformers knows."
        },
    )


@dataclass(frozen=True)
class Hardware:
    """Settings of the computation. They change the trained model by rounding errors only."""

    device: str = setting(
        '`"auto"` trains on accelerators if there are any; `"cpu"` trains on the processor.', "auto"
    )
    bf16: bool = setting(
        "whether to train in mixed precision with bfloat16; filters stay in float32.", False
    )
    compile: bool = setting("whether to use `torch.compile`.", False)
    gradient_checkpointing: bool = setting(
        "whether to store only the input of each block, and to compute the rest again in the "
        "backward pass.",
        False,
    )
    fsdp: bool = setting("whether to shard parameters over the processes (FSDP2).", False)
    workers: int = setting(
        "number of processes that load data for each training process; 0 loads in that process.", 0
    )
    threads: int | None = setting(
        "number of threads that PyTorch uses on the processor; None keeps PyTorch's own choice.",
        None,
    )
