"""Export models, mixers and systems as two programs: for single steps and for whole chunks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gramian import __version__
from gramian._staging import staged_directory
from gramian.export._blocks import trace_recurrence
from gramian.export._generation import describe
from gramian.export._mixers import MixerProgram, fill, make_program, named_tensors
from gramian.export._programs import Stateful, check_format, frozen_for_export, save_programs
from gramian.export._report import ExportReport
from gramian.export._runtime import ExportedModel, ExportedRecurrence
from gramian.export._verify import verify_model, verify_recurrence
from gramian.mixers import Mixer, MixerCall, Segments
from gramian.mixers.mixer import apply_mask
from gramian.systems import DenseOperator, State, System, TimeInvariantSystem, TimeVarying

if TYPE_CHECKING:
    from gramian.models import GramianForCausalLM

__all__ = ["export_model", "export_recurrence"]

_EXAMPLE = 37  # the length of the traced example, which is not a multiple of a block


def export_model(
    model: GramianForCausalLM,
    folder: str | Path,
    format: str = "onnx",
    *,
    context: int | None = None,
    tokenizer: Any = None,
    verify: int = 100,
    threads: int | None = None,
    seed: int = 0,
) -> ExportReport:
    """Write a language model as two programs, `step` and `prefill`, that carry its state.

    `step` takes token ids (batch, 1), and `prefill` takes token ids (batch, length), in int64. Both
    also take the tensors of the state, and return next-token logits (batch, vocab_size) and the
    next state. The batch and the length may have any size. `folder` also holds the model's
    configuration, the tokenizer and `export.json`. This file describes the states, which begin with
    zeros, and how the next token is chosen.

    `prefill` also takes `attention_mask`, (batch, length), int64: 1 for a token, 0 for padding.
    Padding may be anywhere in a row. The logits are those after the last token of each row, and a
    row has the logits and the state that it would have without padding. So a step needs no mask.
    The logits of a row without tokens are meaningless. If there are more tokens than attention has
    room for, the logits are NaN.

    The exported files are loaded and run before they appear in `folder`. They appear only if they
    choose the same tokens as the recurrence in PyTorch and generate the same text as
    `model.generate`.

    Args:
        model: A model on the CPU, in float32 or float64. Every long convolution must have a
            recurrence of fixed size, as distilled and state-space filters do.
        folder: Path of the new folder.
        format: "onnx", for onnxruntime and other runtimes, or "torch", for `torch.export.load`.
        context: Number of tokens, of prompt and generated text together, for which attention
            without a window has room; by default `model.config.max_position_embeddings`.
        tokenizer: A tokenizer to save with the programs. It may be left out.
        verify: Number of greedy tokens to compare in each of two sequences, at least 1.
        threads: Number of threads of onnxruntime in the comparison; by default, onnxruntime
            chooses the number.
        seed: Seed of the prompts in the comparison.

    Returns:
        A report of the comparison.

    Raises:
        FileExistsError: if `folder` exists.
        ImportError: if a package that the format needs is missing.
        TypeError: if `model` is not a `GramianForCausalLM`.
        ValueError: if the format is unknown; if the model is quantized, in half precision or not on
            the CPU; if a layer has no recurrence of fixed size; or if a setting of
            `model.generation_config`, such as beams, changes the generated text and is not
            supported. The message says what to do.
        RuntimeError: if the exported programs choose other tokens.
    """
    from gramian.models import GramianForCausalLM
    from gramian.models.quantization import refuse_quantized

    check_format(format)
    if not isinstance(model, GramianForCausalLM):
        raise TypeError(
            f"a GramianForCausalLM is exported; got {type(model).__name__}; a single mixer or "
            "system is exported by export_recurrence."
        )
    refuse_quantized(model, "export", "quantize the exported ONNX files instead")
    if model.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"models are exported in float32 or float64; got {model.dtype}: call model.float() or "
            "load it with dtype=torch.float32."
        )
    _check_device(model.device)
    if verify < 1:
        raise ValueError(f"verify must be at least 1 token; got {verify}.")
    describe(model.generation_config)  # raises its errors before the export
    context = model.config.max_position_embeddings if context is None else context
    with staged_directory(Path(folder)) as stage, frozen_for_export(model):
        exported = _language_model(model, context)
        description = save_programs(exported, stage, format)
        model.config.to_json_file(stage / "config.json")
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)
        run = ExportedModel(stage, threads=threads)
        return verify_model(model, run, description, tokens=verify, seed=seed)


def export_recurrence(
    target: Mixer | System,
    folder: str | Path,
    format: str = "onnx",
    *,
    form: str | None = None,
    context: int | None = None,
    verify: int = 100,
    threads: int | None = None,
    seed: int = 0,
) -> ExportReport:
    """Write one layer or system as two programs, `step` and `prefill`, that carry its state.

    The `step` of a mixer takes (batch, width), and its `prefill` takes (batch, length, width). For
    a system with channels (*C), `step` takes (batch, *C), and `prefill` takes (batch, *C, length).
    Both programs also take the tensors of the state, and return the output, in the shape of the
    input, and the next state. The batch and the length may have any size. `export.json` describes
    the states. The `prefill` of a mixer also takes `mask`, (batch, length), int64: 1 for a sample,
    0 for padding, which may be anywhere and leaves the state unchanged.

    Args:
        target: A mixer in float32 or float64, or a time-invariant system, on the CPU. A long `FIR`
            system needs `form="window"`.
        folder: Path of the new folder.
        format: "onnx" or "torch", as for `export_model`.
        form: Form of a system's recurrence, as in `system.recurrence(form)`. With "lattice" and
            "modal", the state of a transfer function is in single precision.
        context: Number of samples for which attention has room; required for attention without a
            window.
        verify: Number of random samples to compare in each of two sequences, at least 1.
        threads: Number of threads of onnxruntime in the comparison; by default, onnxruntime
            chooses the number.
        seed: Seed of the random samples.

    Returns:
        A report of the comparison.

    Raises:
        FileExistsError: if `folder` exists.
        ImportError: if a package that the format needs is missing.
        TypeError: if `target` is neither a mixer nor a system.
        ValueError: if the format is unknown, or if `target` has no recurrence of fixed size, is in
            half precision, or is not on the CPU.
        RuntimeError: if the exported programs compute other outputs.
    """
    check_format(format)
    if verify < 1:
        raise ValueError(f"verify must be at least 1 sample; got {verify}.")
    if isinstance(target, Mixer):
        if form is not None:
            raise ValueError(
                f"a mixer picks the form of its recurrences itself; got form={form!r}."
            )
        module: nn.Module = target
        with frozen_for_export(module):
            exported = _mixer(target, context)
    elif isinstance(target, System):
        module = nn.Module()
        with torch.no_grad():
            exported = _system(target, module, form)
    else:
        raise TypeError(f"a mixer or a system is exported; got {type(target).__name__}.")
    with staged_directory(Path(folder)) as stage, frozen_for_export(module):
        description = save_programs(exported, stage, format)
        run = ExportedRecurrence(stage, threads=threads)
        recurrence = target.recurrence() if isinstance(target, Mixer) else target.recurrence(form)
        return verify_recurrence(recurrence, run, description, samples=verify, seed=seed)


def _check_device(device: torch.device) -> None:
    if device.type != "cpu":
        raise ValueError(f"what is exported must be on the CPU; got {device}: call .cpu() first.")


def _language_model(model: GramianForCausalLM, context: int) -> Stateful:
    from gramian.models.norms import apply_norm

    blocks: list[Any] = list(model.model.layers)
    layers = [
        make_program(block.mixer, f"layer {index} ({type(block.mixer).__name__})", context)
        for index, block in enumerate(blocks)
    ]
    prefixes = [f"layers.{index}.mixer.state" for index in range(len(layers))]

    def run(
        ids: Tensor, states: dict[str, Tensor], mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rows = None
        if mask is not None:  # the last column then holds the last token of every row
            (part,) = Segments(mask).parts
            ids, rows = part.take(ids), Segments(part.real)
        hidden = model.model.embed(ids)
        tensors = iter(states.values())
        after: dict[str, Tensor] = {}
        for prefix, block, layer in zip(prefixes, blocks, layers, strict=True):
            carried = _Carried(layer, fill(layer.template, tensors), rows)
            hidden = block.mix(hidden, MixerCall(carried, rows, carries_state=True))
            after.update(named_tensors(carried.state, prefix))
        hidden = apply_norm(model.model.norm, hidden[:, -1])
        return model.lm_head(hidden), after

    states: dict[str, Tensor] = {}
    for prefix, layer in zip(prefixes, layers, strict=True):
        states.update(named_tensors(layer.template, prefix))
    rooms = [layer.context for layer in layers if layer.context is not None]
    return Stateful(
        module=model,
        constants=[part for layer in layers for part in layer.constants],
        step=run,
        prefill=run,
        states=states,
        step_input=torch.zeros(2, 1, dtype=torch.int64),
        prefill_input=torch.zeros(2, _EXAMPLE, dtype=torch.int64),
        time=1,
        input="input_ids",
        output="logits",
        mask="attention_mask",
        description={
            "gramian": __version__,
            "kind": "language model",
            "vocab_size": model.config.vocab_size,
            "context": min(rooms, default=None),
            "generation": describe(model.generation_config),
        },
    )


class _Carried:
    """A function that runs a layer's mixer on (batch, length, width) and keeps the next state.

    Args:
        layer: The program of the mixer.
        state: The state before these tokens.
        rows: The positions of the tokens of a chunk, which end at the last column. None for a step.
    """

    def __init__(self, layer: MixerProgram, state: State, rows: Segments | None) -> None:
        self.layer = layer
        self.state = state
        self.rows = rows

    def __call__(self, x: Tensor) -> Tensor:
        if self.rows is not None:
            real = self.rows.real
            assert real is not None
            y, self.state = self.layer.prefill(apply_mask(x, real), self.state, real)
            return y
        y, self.state = self.layer.step(x[:, 0], self.state)
        return y[:, None]


def _mixer(mixer: Mixer, context: int | None) -> Stateful:
    like = next(mixer.parameters())
    _check_device(like.device)
    layer = make_program(mixer, f"this {type(mixer).__name__}", context)
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    halves = [p.dtype for p in mixer.parameters() if p.is_floating_point() and p.itemsize < 4]
    if halves:
        raise ValueError(f"mixers are exported in float32 or float64; got {halves[0]}.")

    def step(x_t: Tensor, states: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        y, state = layer.step(x_t, fill(layer.template, iter(states.values())))
        return y, dict(named_tensors(state, "state"))

    def prefill(
        x: Tensor, states: dict[str, Tensor], mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rows = Segments(mask)
        (part,) = rows.parts
        assert part.real is not None
        before = fill(layer.template, iter(states.values()))
        y, state = layer.prefill(part.take(x), before, part.real)
        return rows.restore([y]), dict(named_tensors(state, "state"))

    return Stateful(
        module=mixer,
        constants=list(layer.constants),
        step=step,
        prefill=prefill,
        states=dict(named_tensors(layer.template, "state")),
        step_input=like.new_zeros(2, mixer.width, dtype=dtype),
        prefill_input=like.new_zeros(2, _EXAMPLE, mixer.width, dtype=dtype),
        time=1,
        input="x",
        output="y",
        mask="mask",
        description={
            "gramian": __version__,
            "kind": "mixer",
            "name": type(mixer).__name__,
            "context": layer.context,
        },
    )


def _system(system: System, module: nn.Module, form: str | None) -> Stateful:
    if isinstance(system, TimeVarying | DenseOperator) or not isinstance(
        system, TimeInvariantSystem
    ):
        raise ValueError(
            f"a {type(system).__name__} has other coefficients at every step; the mixer that makes "
            "them is what can be exported."
        )
    _check_device(system.device)
    recurrence = system.recurrence(form)
    if recurrence.form == "online":
        raise ValueError(
            "this system is stepped by exact online convolution, whose state is a buffer with a "
            'counted place; give form="window" for an FIR system, or reduce it first: '
            "gramian.reduce(kernel, tol=…).system."
        )
    blocked = trace_recurrence(recurrence)
    template = recurrence.initial_state((1, *system.channel_shape))
    dtype = torch.float64 if system.dtype == torch.float64 else torch.float32

    def wrap(function: Any) -> Any:
        def run(u: Tensor, states: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            y, state = function(u, fill(template, iter(states.values())))
            return y, dict(named_tensors(state, "state"))

        return run

    shape = (2, *system.channel_shape)
    return Stateful(
        module=module,
        constants=[blocked],
        step=wrap(blocked.step),
        prefill=wrap(blocked.prefill),
        states=dict(named_tensors(template, "state")),
        step_input=torch.zeros(shape, dtype=dtype),
        prefill_input=torch.zeros(*shape, _EXAMPLE, dtype=dtype),
        time=len(shape),
        input="u",
        output="y",
        description={
            "gramian": __version__,
            "kind": "system",
            "name": type(system).__name__,
            "form": recurrence.form,
            "context": None,
        },
    )
