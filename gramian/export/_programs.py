"""Trace functions with explicit states, and save them as `torch.export` or ONNX programs."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gramian._json import to_json
from gramian.mixers import Mixer

__all__ = ["FORMATS", "Stateful", "check_format", "frozen_for_export", "save_programs"]

FORMATS = {"onnx": "onnx", "torch": "pt2"}
"""A mapping from the formats to the suffixes of their files."""

MANIFEST = "export.json"
WEIGHTS = "weights.bin"
_SMALL = 1024  # tensors of at most this number of bytes are not shared between the programs

_NEEDS = 'exporting to ONNX needs onnx, onnxscript and onnxruntime: pip install "gramian[export]".'


@dataclass(frozen=True)
class Stateful:
    """The two functions to export. Each maps an input and a state to an output and a next state.

    The functions of models and mixers have padding in `prefill`: `mask` then names their third
    argument. Padding leaves the state unchanged.

    Attributes:
        module: module that holds the parameters. The programs use their names in this module.
        constants: modules that hold tensors computed from the parameters.
        step: function that maps one token or sample and {name: state} to the output and
            {name: next state}.
        prefill: function that maps a chunk and {name: state} to the outputs and
            {name: next state}. If there is a mask, (batch, length), int64, it comes third.
        states: the zero state of one sequence, {name: (1, …)}.
        step_input: example of the input of `step`, with a batch of 2.
        prefill_input: example of the input of `prefill`, with a batch of 2.
        time: the dimension of `prefill_input` that is time. Its length may vary.
        input: name of the input in the programs.
        output: name of the output in the programs.
        description: further entries of `export.json`.
        mask: name of the mask of `prefill` in the programs. None if `prefill` takes no mask.
    """

    module: nn.Module
    constants: list[nn.Module]
    step: Callable[[Tensor, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]
    prefill: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    states: dict[str, Tensor]
    step_input: Tensor
    prefill_input: Tensor
    time: int
    input: str
    output: str
    description: dict[str, Any]
    mask: str | None = None


class _Program(nn.Module):
    """A module that runs a function and owns all tensors that the function reads.

    A function can be traced only in this form.
    """

    def __init__(self, what: Stateful, function: Callable[..., Any]) -> None:
        super().__init__()
        self.module = what.module
        self.constants = nn.ModuleList(what.constants)
        self._function = function

    def forward(
        self, input: Tensor, states: dict[str, Tensor], *mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self._function(input, states, *mask)


def check_format(format: str) -> None:
    """Check that a format is known, and that the packages that it needs are installed.

    Raises:
        ValueError: if the format is unknown.
        ImportError: if a package is missing.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {format!r}.")
    if format == "onnx":
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ImportError(_NEEDS) from error


@contextmanager
def frozen_for_export(module: nn.Module) -> Iterator[None]:
    """Set evaluation mode, and turn off gradients and compiled steps, until the context exits."""
    training = {part: part.training for part in module.modules()}
    mixers = [part for part in module.modules() if isinstance(part, Mixer)]
    compiled = [mixer.compiled_step for mixer in mixers]
    try:
        module.eval()
        for mixer in mixers:
            mixer.compiled_step = None
        with torch.no_grad():
            yield
    finally:
        for part, mode in training.items():
            part.training = mode
        for mixer, step in zip(mixers, compiled, strict=True):
            mixer.compiled_step = step


def save_programs(what: Stateful, folder: Path, format: str) -> dict[str, Any]:
    """Write both programs and their description into an empty folder.

    Args:
        what: The functions to trace.
        folder: The folder.
        format: "onnx" or "torch".

    Returns:
        The description, which is also written to `export.json`.
    """
    suffix = FORMATS[format]
    open_ = torch.export.Dim.DYNAMIC
    states = {
        name: value.expand(2, *value.shape[1:]).clone() for name, value in what.states.items()
    }
    length = what.prefill_input.shape[what.time]
    masks = () if what.mask is None else (torch.ones(2, length, dtype=torch.int64),)
    programs = {}
    for name, function, example, dims, others in (
        ("step", what.step, what.step_input, (0,), ()),
        ("prefill", what.prefill, what.prefill_input, (0, what.time), masks),
    ):
        shapes: list[Any] = [dict.fromkeys(dims, open_), {state: {0: open_} for state in states}]
        shapes += [tuple(dict.fromkeys((0, 1), open_) for _ in others)] if others else []
        programs[name] = torch.export.export(
            _Program(what, function), (example, states, *others), dynamic_shapes=tuple(shapes)
        )
    if format == "torch":
        for name, program in programs.items():
            torch.export.save(program, folder / f"{name}.{suffix}")
    else:
        _save_onnx(programs, folder, what)
    description = {
        **what.description,
        "format": format,
        "step": f"step.{suffix}",
        "prefill": f"prefill.{suffix}",
        "input": {
            "name": what.input,
            "dtype": _dtype(what.step_input),
            "step": _open(what.step_input),
            "prefill": _open(what.prefill_input, what.time),
        },
        "mask": _mask(what),
        "output": {"name": what.output},
        "states": [
            {
                "input": name,
                "output": f"next.{name}",
                "shape": _open(value),
                "dtype": _dtype(value),
                "initial": 0,
            }
            for name, value in what.states.items()
        ],
    }
    (folder / MANIFEST).write_text(to_json(description, indent=2) + "\n", encoding="utf-8")
    return description


def _save_onnx(programs: dict[str, Any], folder: Path, what: Stateful) -> None:
    """Write the two ONNX files, and one file with the weights that they share."""
    import onnx_ir

    models = {}
    with _quiet():
        for name, program in programs.items():
            exported = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=[what.input, *what.states, *_masks_of(name, what)],
                output_names=[what.output, *(f"next.{state}" for state in what.states)],
            )
            assert exported is not None
            models[name] = exported.model
    onnx_ir.save(models["prefill"], folder / "prefill.onnx", external_data=WEIGHTS)
    written = {}
    for value in onnx_ir.load(folder / "prefill.onnx").graph.initializers.values():
        if isinstance(value.const_value, onnx_ir.ExternalTensor):
            written[_content(value.const_value)] = value.const_value
    for name, value in models["step"].graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        same = written.get(_content(tensor)) if tensor.nbytes > _SMALL else None
        if same is not None:
            value.const_value = onnx_ir.ExternalTensor(
                same.location,
                same.offset,
                same.length,
                same.dtype,
                shape=same.shape,
                name=name,
                base_dir=folder,
            )
    onnx_ir.save(models["step"], folder / "step.onnx")


def _content(tensor: Any) -> tuple[Any, ...]:
    digest = hashlib.sha256(tensor.tobytes()).digest()
    return str(tensor.dtype), tuple(tensor.shape.numpy()), digest


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress messages and warnings of the exporter, for example about missing packages."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _masks_of(program: str, what: Stateful) -> list[str]:
    """Return the names of the masks that a program takes."""
    return [] if what.mask is None or program == "step" else [what.mask]


def _mask(what: Stateful) -> dict[str, Any] | None:
    """Return the description of the mask."""
    if what.mask is None:
        return None
    return {"name": what.mask, "dtype": "int64", "prefill": ["batch", "length"]}


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _open(tensor: Tensor, time: int | None = None) -> list[int | str]:
    """Return the shape of a tensor, with names in place of the sizes that may vary."""
    shape: list[int | str] = list(tensor.shape)
    shape[0] = "batch"
    if time is not None:
        shape[time] = "length"
    return shape
