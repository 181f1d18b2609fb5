"""Write records during a run: metrics, samples, and a description of the machine."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from gramian._json import to_json
from gramian._modules import in_mode
from gramian._staging import staged_file
from gramian.tasks import Description, find_kind
from gramian.training.collation import Collator

__all__ = ["Recorder", "Sampler", "cut_after", "environment", "read_lines", "write_json"]

PACKAGES = ("gramian", "torch", "transformers", "accelerate", "datasets", "numpy")
LEFT_OUT = ("total_flos",)


class Recorder(TrainerCallback):
    """A callback that writes every log entry as a line of JSON, with its step and its time.

    The time is in seconds since the start of this process's training. Numbers that are not finite
    become null.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.began = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        line: dict[str, Any] = {"step": state.global_step}
        line |= {key: value for key, value in logs.items() if key not in LEFT_OUT}
        line["seconds"] = round(time.perf_counter() - self.began, 3)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(to_json(line) + "\n")


class Sampler(TrainerCallback):
    """A callback that records the model's outputs on some rows after each evaluation.

    The callback uses no random numbers, so it does not change the course of training. For tasks of
    text, the model continues the first half of a row greedily. For other tasks, the predictions are
    recorded beside the targets.
    """

    def __init__(
        self, path: Path, rows: list[dict[str, Any]], description: Description, length: int
    ) -> None:
        self.path = path
        self.rows = rows
        self.description = description
        self.length = length

    @torch.no_grad()
    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not self.rows:
            return
        model: nn.Module = kwargs["model"]
        device = next(model.parameters()).device
        lines = []
        with in_mode(model, training=False):
            for row in self.rows:
                if self.description.text:
                    line = self._continuation(model, row, device)
                else:
                    line = self._prediction(model, row, device)
                lines.append(to_json({"step": state.global_step, **line}) + "\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(lines)

    def _continuation(self, model: Any, row: dict[str, Any], device: torch.device) -> Any:
        ids = torch.as_tensor(row["input_ids"]).long()[: max(1, len(row["input_ids"]) // 2)]
        prompt = ids[None].to(device)
        try:
            written = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=self.length,
                do_sample=False,
                use_cache=True,
                pad_token_id=self.description.pad_token_id,
            )[0, len(ids) :]
        except FloatingPointError:  # steps can overflow although the convolution does not
            return {"prompt": _text(ids), "text": None}
        return {"prompt": _text(ids), "text": _text(written)}

    def _prediction(self, model: Any, row: dict[str, Any], device: torch.device) -> Any:
        batch = {key: value.to(device) for key, value in Collator(self.description)([row]).items()}
        due = batch.pop("labels")[0]
        batch.pop("shift_labels", None)
        logits = model(**batch).logits[0]
        return find_kind(self.description.kind).show(logits, due, self.length)


def _text(ids: torch.Tensor) -> str:
    return bytes(value for value in ids.tolist() if value < 256).decode("utf-8", errors="replace")


def cut_after(path: Path, step: int) -> None:
    """Remove the lines of later steps from a file of JSON lines, and an incomplete last line."""
    if path.is_file():
        kept = [line for line in read_lines(path) if line["step"] <= step]
        with staged_file(path) as stage:
            stage.write_text("".join(to_json(line) + "\n" for line in kept), encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the objects in a file of JSON lines, up to the first line that is not valid JSON."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def write_json(path: Path, values: Any) -> None:
    """Write a file of JSON, completely or not at all."""
    with staged_file(path) as stage:
        stage.write_text(to_json(values, indent=2) + "\n", encoding="utf-8")


def environment(processes: int) -> dict[str, Any]:
    """Describe the machine, the versions of packages and the command."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": devices,
        "processes": processes,
        "versions": versions,
    }
