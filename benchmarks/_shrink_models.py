"""The models and tasks of `benchmarks/shrink.py`: built, trained, and scored."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gramian._labels import IGNORED
from gramian.demo.text import python_documentation
from gramian.models import GramianConfig, GramianForCausalLM
from gramian.shrinking._passes import window_scores
from gramian.shrinking._texts import Windows
from gramian.tasks.mqar import MQAR

__all__ = ["MODELS", "STATES", "TASKS", "Task", "build", "score", "train"]

STATES = 32
WIDTH = 64
MODELS = ("Mamba2", "Gated DeltaNet", "GLA")


@dataclass(frozen=True)
class Task:
    """How a task is trained and measured.

    Attributes:
        name: "text", bytes of the text behind Python's `help()`, or "recall".
        vocabulary: number of token ids.
        length: tokens of a window.
        layers: layers of a model.
        batch: windows in a step.
        steps: steps of training.
        rate: peak of the learning rate.
        windows: windows that `shrink` is given.
        scored: other windows, on which results are measured.
        measure: "loss" or "accuracy", by which criteria are chosen.
        recovery_batch: windows in a step of the recovery.
        recovery_rate: peak of its learning rate.
    """

    name: str
    vocabulary: int
    length: int
    layers: int
    batch: int
    steps: int
    rate: float
    windows: int
    scored: int
    measure: str
    recovery_batch: int
    recovery_rate: float

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield endless batches of token ids and labels, each (batch, length)."""
        number = 0
        while True:
            windows = self.draw(self.batch, "train", (seed, number))
            yield windows.ids, windows.answers
            number += 1

    def draw(self, count: int, split: str, seed: tuple[int, ...]) -> Windows:
        """Return some windows.

        In recall, each answer follows its query, as in a text, so that the loss of a language model
        contains the recall. The labels are the answers alone.
        """
        random = np.random.default_rng([split == "train", *seed])
        if self.name == "text":
            data = getattr(python_documentation(), split)
            starts = random.integers(len(data) - self.length, size=count)
            ids = torch.stack([data[start : start + self.length] for start in starts]).long()
            return Windows.of(ids)
        task = MQAR(
            vocab_size=self.vocabulary, length=self.length, pairs=6, random_non_queries=False
        )
        rows = [task.row(random, split) for _ in range(count)]
        ids = torch.from_numpy(np.stack([row["input_ids"] for row in rows]))
        labels = torch.from_numpy(np.stack([row["labels"] for row in rows]))
        answers = (labels != IGNORED).roll(1, 1)
        ids[answers] = labels.roll(1, 1)[answers]
        return Windows(ids, labels, labelled=True)


TASKS = {
    "text": Task("text", 256, 128, 2, 8, 300, 5e-3, 256, 96, "loss", 64, 3e-3),
    "recall": Task("recall", 26, 24, 1, 64, 300, 5e-3, 1024, 512, "accuracy", 64, 5e-3),
}


def build(kind: str, task: Task, seed: int) -> Any:
    """Return a model with random weights."""
    torch.manual_seed(seed)
    shared = {
        "vocab_size": task.vocabulary,
        "hidden_size": WIDTH,
        "num_hidden_layers": task.layers,
        "initializer_range": 0.1,
    }
    if kind == "GLA":
        config = GramianConfig(
            **shared,
            num_heads=2,
            mixers="gated_linear_attention",
            linear_recurrence={"state_size": STATES},
        )
        return GramianForCausalLM(config)
    if kind == "Mamba2":
        size = {"num_heads": 4, "head_dim": WIDTH // 2, "state_size": STATES, "n_groups": 1}
        return transformers.Mamba2ForCausalLM(
            transformers.Mamba2Config(**shared, **size, chunk_size=64)
        )
    config = transformers.Qwen3_5TextConfig(
        **shared,
        intermediate_size=2 * WIDTH,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=WIDTH // 2,
        layer_types=["linear_attention"] * task.layers,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=STATES,
        linear_value_head_dim=WIDTH // 2,
    )
    model = transformers.Qwen3_5ForCausalLM(config)
    for module in model.modules():
        bias = getattr(module, "dt_bias", None)
        if bias is not None:  # transformers leaves them at values with which nothing is remembered
            step = torch.empty_like(bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
            bias.data = step + torch.log(-torch.expm1(-step))
            module.A_log.data.uniform_(0.1, 1.0).log_()
    return model


def train(kind: str, task: Task, seed: int, weights: Path) -> Any:
    """Return a trained model, from its file of weights if there is one."""
    model = build(kind, task, seed)
    if weights.is_file():
        model.load_state_dict(torch.load(weights))
        return model.eval()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=task.rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    warm_up = max(1, task.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / warm_up, 0.05 + 0.475 * (1 + math.cos(math.pi * step / task.steps))
        ),
    )
    model.train()
    for _, (ids, labels) in zip(range(task.steps), task.batches(seed), strict=False):
        logits = model(ids, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        if task.name == "recall":  # answers are a quarter of the tokens
            loss = loss + cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    weights.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), weights)
    return model.eval()


def score(model: Any, windows: Windows) -> dict[str, float]:
    """Return the loss of a model in nats per answer, and the share of the right answers."""
    scores = window_scores(model, windows)
    return {"loss": float(scores.losses.mean()), "accuracy": float(scores.accuracies.mean())}
