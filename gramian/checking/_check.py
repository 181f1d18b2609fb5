"""Compare all ways of running a model, for every layer and the whole model, in every precision.

A mixer computes one causal map, and so does a model of mixers. So the output must not depend on how
the mixer or the model runs. The inputs of a layer come from the model's parallel pass. So the
differences of one layer do not add to the differences of the next layer. The whole model reads
tokens, and its logits are compared.
"""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gramian.checking._report import CheckReport, CheckRow
from gramian.distillation import distill
from gramian.filters import ModalFilter
from gramian.mixers import Mixer, Segments
from gramian.ops.precision import full_precision
from gramian.systems import Modal

if TYPE_CHECKING:
    from gramian.mixers import Mixer
    from gramian.models import GramianForCausalLM, GramianForTokenClassification

__all__ = ["check"]

_ACCEPTED = {
    torch.float64: 1e-10,
    torch.float32: 1.5e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 6e-2,
}
"""For each dtype, the accepted relative difference of a layer.

In half precision, the accepted difference is a few units in the last place. In higher precisions,
it is more units, because a convolution sums many products, one for each tap.
"""

_ADD_UP, _ADD_UP_DEEP = 4, 1.5
"""The accepted difference of a whole model, in multiples of the accepted difference of a layer: the
first number, or the second one times the root of the number of layers if that is more."""

_WRITTEN = 8
"""The number of generated tokens."""

_CHUNKS = (1, 7, 2, 31, 64)
"""The lengths of successive chunks. They are repeated until the sequence ends."""


@full_precision()
@torch.no_grad()
def check(
    model: GramianForCausalLM | GramianForTokenClassification,
    input_ids: Tensor | None = None,
    *,
    batch: int = 3,
    length: int = 200,
    dtypes: Sequence[torch.dtype] | None = None,
    tolerance: float | None = None,
    distill_order: int | None = 16,
    reference: bool = True,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Run a model in every way in which it can run, and compare the outputs.

    Args:
        model: a Gramian causal language model, or a token classifier that is not bidirectional
            and reads tokens. The model stays unchanged.
        input_ids: tokens that the model reads, (batch, length); by default, random tokens of the
            shape (`batch`, `length`). Steps are made one by one, so the time grows with the length.
            Filters are tested past their last tap only if the length exceeds
            `max_position_embeddings`.
        batch: number of random sequences, at least 2.
        length: number of random tokens in each sequence, at least 2.
        dtypes: dtypes of the weights; by default float32 and bfloat16. Filters stay float32.
        tolerance: accepted relative difference of a layer in every precision. By default, it is
            1.5e-5 in float32, 6e-2 in bfloat16, 1e-10 in float64 and 1e-2 in float16. The default
            is larger in two cases. If a state is carried, it is at least twice the error that a
            converted recurrence reports. For steps of the distilled copy, it is also at least twice
            the rounding error of modes that cancel each other. The whole model may differ by four
            times as much or, if it has n > 7 layers, by 1.5 √n times.
        distill_order: order of the filters of a distilled copy, which is also checked. If it is
            None, no distilled copy is made.
        reference: whether to compare with a second copy of the model in float64.
        seed: seed of the random tokens and of the random inputs at padding.
        progress: a function that is called as `progress(rows done, all rows)` before the first row
            of the report and after every row.

    Returns:
        The report, which prints as a table. Its `passed` says whether all differences are accepted.

    Raises:
        TypeError: if the model is neither a `GramianForCausalLM` nor a
            `GramianForTokenClassification`.
        ValueError: if the model is quantized, is bidirectional or reads numbers; if there are fewer
            than 2 sequences, or fewer than 2 tokens in each; if tokens are outside of the
            vocabulary; if the tolerance is not positive; or if a dtype is not float64, float32,
            float16 or bfloat16.
    """
    dtypes = (torch.float32, torch.bfloat16) if dtypes is None else tuple(dtypes)
    ids = _checked(model, input_ids, batch, length, dtypes, tolerance, seed)
    rows = len(model.model.layers) + 1
    total, done = len(dtypes) * rows, 0
    started = time.perf_counter()

    def advance() -> None:
        nonlocal done
        if progress is not None:
            progress(done, total)
        done += 1

    advance()
    small, words = _distilled(model, distill_order)
    exact = _Run(_copy(model, torch.float64), ids) if reference else None
    found: list[CheckRow] = []
    for dtype in dtypes:
        run = _Run(_copy(model, dtype), ids)
        reduced = None if small is None else _copy(small, dtype)
        with _reloaded(run.model) as again:
            for layer in range(rows - 1):
                found.append(_check_layer(run, layer, exact, again, reduced, tolerance, seed))
                advance()
            found.append(_check_model(run, found[1 - rows :], exact, again, reduced))
            advance()
    batch, length = ids.shape
    return CheckReport(tuple(found), batch, length, words, time.perf_counter() - started)


def _checked(
    model: Any,
    input_ids: Tensor | None,
    batch: int,
    length: int,
    dtypes: tuple[torch.dtype, ...],
    tolerance: float | None,
    seed: int,
) -> Tensor:
    """Check the arguments of `check`, and return the tokens, on the device of the model."""
    from gramian.models import GramianForCausalLM, GramianForTokenClassification
    from gramian.models.quantization import refuse_quantized

    if not isinstance(model, GramianForCausalLM | GramianForTokenClassification):
        raise TypeError(
            "check takes a GramianForCausalLM or a GramianForTokenClassification; got a "
            f"{type(model).__name__}."
        )
    refuse_quantized(model, "check", "check the model that was quantized")
    if model.config.bidirectional or model.config.input_size is not None:
        kind = "bidirectional model" if model.config.bidirectional else "model of numbers"
        raise ValueError(f"check takes a causal model of tokens; got a {kind}.")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"the tolerance must be positive; got {tolerance!r}.")
    for dtype in dtypes:
        if dtype not in _ACCEPTED:
            accepted = ", ".join(map(_name, _ACCEPTED))
            raise ValueError(f"the precisions to check are {accepted}; got {dtype}.")
    vocabulary = model.config.vocab_size
    if input_ids is None:
        generator = torch.Generator().manual_seed(seed)
        input_ids = torch.randint(vocabulary, (batch, length), generator=generator)
    if input_ids.ndim != 2 or min(input_ids.shape) < 2 or input_ids.is_floating_point():
        raise ValueError(
            "check runs at least 2 sequences of at least 2 tokens, integers (batch, length); got "
            f"{tuple(input_ids.shape)} of {input_ids.dtype}."
        )
    if not 0 <= int(input_ids.min()) <= int(input_ids.max()) < vocabulary:
        raise ValueError(f"the tokens must lie in 0 … {vocabulary - 1}, the model's vocabulary.")
    return input_ids.to(model.device)


def _copy(model: Any, dtype: torch.dtype) -> Any:
    return copy.deepcopy(model).to(dtype).eval()


def _distilled(model: Any, order: int | None) -> tuple[Any, str | None]:
    """Return a distilled copy and its summary, or (None, None) if there is nothing to distil."""
    filters = [getattr(block.mixer, "filter", None) for block in model.model.layers]
    long = [f.max_length for f in filters if f is not None and not isinstance(f, ModalFilter)]
    if order is None or not long:
        return None, None
    small, report = distill(model, order=min(order, min(long) - 1))
    return small, report.summary


@contextmanager
def _reloaded(model: Any) -> Iterator[Any]:
    """Save the model to a temporary folder, and yield the model that is loaded from there."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder, dtype="auto", local_files_only=True)
        yield again.to(model.device).eval()


class _Run:
    """The parallel pass of a model: its logits, and the input and output of each mixer."""

    def __init__(self, model: Any, ids: Tensor) -> None:
        self.model, self.ids = model, ids
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        hooks = [mixer.register_forward_hook(self._note, with_kwargs=True) for mixer in self.mixers]
        try:
            self.logits = model(ids, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def mixers(self) -> list[Mixer]:
        return [block.mixer for block in self.model.model.layers]

    def _note(self, module: Any, args: tuple[Any, ...], kwargs: Any, output: Tensor) -> None:
        self.inputs.append(args[0])
        self.outputs.append(output)


def _difference(y: Tensor, expected: Tensor) -> float:
    """Return the largest difference between numbers of two outputs.

    A difference is relative to the largest expected number of the same sequence.
    """
    y, expected = y.double().flatten(1), expected.double().flatten(1)
    scale = expected.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)
    relative = (y - expected).abs().amax(1) / scale
    return float(relative.nan_to_num(torch.inf, torch.inf).max())


def _chunks(length: int) -> Iterator[slice]:
    begin = 0
    while begin < length:
        for size in _CHUNKS:
            if begin < length:
                yield slice(begin, min(begin + size, length))
            begin += size


def _check_layer(
    run: _Run,
    layer: int,
    exact: _Run | None,
    again: Any,
    small: Any,
    tolerance: float | None,
    seed: int,
) -> CheckRow:
    mixer, x, y = run.mixers[layer], run.inputs[layer], run.outputs[layer]
    recurrence = mixer.recurrence()
    differences: dict[str, float] = {}
    if exact is not None:
        double = exact.mixers[layer](x.double())
        differences["parallel"] = _difference(y, double)
    differences["recurrent"] = _difference(_stepped(recurrence, x), y)
    parts, state = [], recurrence.initial_state(len(x), dtype=x.dtype, device=x.device)
    for part in _chunks(x.shape[1]):
        made, state = mixer(x[:, part], state)
        parts.append(made)
    differences["chunked"] = _difference(torch.cat(parts, 1), y)

    for mode, turns in layouts(*x.shape[:2]).items():
        differences[mode] = _laid_out(mixer, recurrence, x, y, turns, seed)
    differences["packed"] = _difference(mixer(*_packed(x)).view_as(y), y)
    differences["batched"] = _difference(torch.cat([mixer(one) for one in x.split(1)]), y)
    differences["reloaded"] = _difference(again.model.layers[layer].mixer(x), y)
    if small is not None:
        reduced = small.model.layers[layer].mixer
        made = reduced(x)
        differences["distilled"] = _difference(made, y)
        differences["stepped"] = _difference(_stepped(reduced.recurrence(), x), made)
    reported = max((long.error for long in recurrence.long), default=0.0)
    own = _ACCEPTED[x.dtype] if tolerance is None else tolerance
    limits = _limits(own, max(own, 2 * reported) if tolerance is None else own)
    if small is not None and tolerance is None:
        amplified = _rounding(small.model.layers[layer].mixer, x.shape[1])
        limits["stepped"] = max(limits["stepped"], 2 * amplified)
    name = type(mixer).__name__
    return CheckRow(_name(x.dtype), layer, name, recurrence.forms, differences, limits)


def _rounding(mixer: Mixer, length: int) -> float:
    """Return how large the rounding error in steps of modal filters may be, relative to the taps.

    The rounding errors of single precision are relative to the sum of the moduli of the modes. If
    modes cancel each other, the impulse response is smaller than this sum. So the errors relative
    to the impulse response are larger. If the filter is not modal, the result is 0.
    """
    filter = getattr(mixer, "filter", None)
    if not isinstance(filter, ModalFilter):
        return 0.0
    system = filter(length).to(dtype=torch.float64)
    moduli = Modal(system.poles.abs() + 0j, system.residues.abs() + 0j, system.d.abs())
    sums, taps = (one.impulse_response(length).norm(dim=-1) for one in (moduli, system))
    largest = torch.where(taps > 0, sums / taps.clamp_min(1e-300), 0.0).max()
    return torch.finfo(torch.float32).eps * float(largest)


def layouts(batch: int, length: int) -> dict[str, list[Tensor]]:
    """Return the columns of the tokens of every sequence, for each mode of padding.

    Returns:
        The turns of each mode. A mode has one turn, or two turns; the second turn then continues
        from the state after the first. A turn is (batch, columns), int64. It has the index of the
        token in every column, or -1 for padding.
    """
    padding = max(1, length // 5)
    found: dict[str, list[list[list[int]]]] = {"padded": [[]], "right": [[]], "gap": [[]]}
    found["turn"] = [[], []]
    most = length - length // 2 + 2
    for row in range(batch):
        tokens, silence = list(range(length)), [-1] * padding
        found["padded"][0].append(silence + tokens)
        found["right"][0].append(tokens + silence)
        at = 1 + (length // 3 + 7 * row) % max(1, length - 1)
        found["gap"][0].append(tokens[:at] + silence + tokens[at:])
        first = length // 2 - row % min(3, length // 2)  # turns of unequal lengths
        found["turn"][0].append(tokens[:first] + [-1] * (length // 2 - first))
        rest, more = tokens[first:], [-1] * (most - length + first)
        found["turn"][1].append(rest[:row] + more + rest[row:])
    return {mode: [torch.tensor(turn) for turn in turns] for mode, turns in found.items()}


def _laid_out(
    mixer: Mixer,
    recurrence: Any,
    x: Tensor,
    y: Tensor,
    turns: list[Tensor],
    seed: int,
) -> float:
    """Return the largest difference that padding causes in the outputs of a mixer.

    The mixer runs on whole sequences, continues from a state, and makes a step from the last state.

    Args:
        mixer: the mixer.
        recurrence: the recurrence of the mixer.
        x: inputs without padding, (batch, length, width).
        y: outputs without padding, (batch, length, width).
        turns: the turns of a mode, from `layouts`.
        seed: seed of the random inputs at padding.
    """
    generator = torch.Generator().manual_seed(seed)
    # The output after the last turn depends on the state at its end.
    ending = torch.randn(len(x), 1, x.shape[2], generator=generator).to(x)
    after = mixer(torch.cat([x, ending], 1))[:, -1]
    worst = 0.0
    for carried in (False, True):
        made, state = [], None
        for turn in turns:
            noise = torch.randn(*turn.shape, x.shape[2], generator=generator).to(x)
            part, mask = _placed(x, noise, turn)
            if carried and state is not None:
                out, state = mixer(part, state, mask=mask)
            else:
                out, state = recurrence.prefill(part, state, mask=mask)
            made.append(out)
            if len(turns) == 1:
                worst = max(worst, _difference(_collected([mixer(part, mask=mask)], turns), y))
        worst = max(worst, _difference(_collected(made, turns), y))
        worst = max(worst, _difference(recurrence.step(ending[:, 0], state)[0], after))
    return worst


def _placed(x: Tensor, padding: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    """Move the entries of x to the columns of a turn.

    Args:
        x: the entries at the tokens, (batch, length, …).
        padding: the entries at padding, (batch, columns, …).
        turn: the index of the token in every column, (batch, columns), or -1 for padding.

    Returns:
        The padded rows, (batch, columns, …), and their mask, (batch, columns).
    """
    mask = (turn >= 0).to(x.device)
    rows = torch.arange(len(x), device=x.device)[:, None]
    chosen = x[rows, turn.to(x.device).clamp_min(0)]
    return torch.where(mask.reshape(*mask.shape, *(1,) * (x.ndim - 2)), chosen, padding), mask


def _collected(made: list[Tensor], turns: list[Tensor]) -> Tensor:
    """Return the outputs at the tokens, (batch, length, …), from the outputs of all turns."""
    order = torch.cat(turns, 1).to(made[0].device)
    outputs = torch.cat(made, 1)
    return torch.stack([row[at >= 0] for row, at in zip(outputs, order, strict=True)])


def _packed(x: Tensor) -> tuple[Tensor, None, Segments]:
    """Return the arguments of a mixer for one row that holds all sequences of x."""
    batch, length = x.shape[:2]
    numbers = torch.arange(batch, device=x.device).repeat_interleave(length)
    return x.flatten(0, 1)[None], None, Segments(None, numbers[None])


def _stepped(recurrence: Any, x: Tensor) -> Tensor:
    state = recurrence.initial_state(len(x), dtype=x.dtype, device=x.device)
    made = []
    for x_t in x.unbind(1):
        y_t, state = recurrence.step(x_t, state)
        made.append(y_t)
    return torch.stack(made, 1)


def _check_model(
    run: _Run,
    layers: Sequence[CheckRow],
    exact: _Run | None,
    again: Any,
    small: Any,
) -> CheckRow:
    from gramian.models.cache import CACHE

    model, ids, logits = run.model, run.ids, run.logits
    length = ids.shape[1]
    one_by_one = [slice(t, t + 1) for t in range(length)]
    differences: dict[str, float] = {}
    if exact is not None:
        differences["parallel"] = _difference(logits, exact.logits)
    differences["recurrent"] = _difference(_continued(model, ids, one_by_one), logits)
    differences["chunked"] = _difference(_continued(model, ids, list(_chunks(length))), logits)

    generator = torch.Generator().manual_seed(0)
    for mode, turns in layouts(*ids.shape).items():
        worst, made, cache = 0.0, [], None
        seen = ids[:, :0]
        for turn in turns:
            noise = torch.randint(model.config.vocab_size, turn.shape, generator=generator)
            part, mask = _placed(ids, noise.to(ids), turn)
            seen = torch.cat([seen, mask.to(ids)], 1)
            if len(turns) == 1:
                at_once = model(part, attention_mask=seen, use_cache=False).logits
                worst = _difference(_collected([at_once], turns), logits)
                half = part.shape[1] // 2
                parts = [slice(0, half), slice(half, part.shape[1])]
                made.append(_continued(model, part, parts, seen))
            else:
                output = model(part, attention_mask=seen, past_key_values=cache, use_cache=True)
                cache = output[CACHE]
                made.append(output.logits)
        differences[mode] = max(worst, _difference(_collected(made, turns), logits))
    positions = torch.arange(length, device=ids.device).repeat(len(ids))[None]
    in_one = model(ids.flatten()[None], position_ids=positions, use_cache=False).logits
    differences["packed"] = _difference(in_one.view_as(logits), logits)
    if model.can_generate():
        differences["generated"] = _generated(model, ids)
    alone = torch.cat([model(one, use_cache=False).logits for one in ids.split(1)])
    differences["batched"] = _difference(alone, logits)
    differences["reloaded"] = _difference(again(ids, use_cache=False).logits, logits)
    if small is not None:
        made = small(ids, use_cache=False).logits
        differences["distilled"] = _difference(made, logits)
        stepped = _continued(small, ids, one_by_one)
        differences["stepped"] = _difference(stepped, made)
    times = max(_ADD_UP, _ADD_UP_DEEP * math.sqrt(len(layers)))
    own, carried = (
        times * max(row.limits[mode] for row in layers) for mode in ("batched", "recurrent")
    )
    limits = _limits(own, carried)
    limits["stepped"] = max(carried, times * max(row.limits["stepped"] for row in layers))
    dtype = layers[0].dtype
    return CheckRow(dtype, None, type(model).__name__, (), differences, limits)


def _generated(model: Any, ids: Tensor) -> float:
    """Return the difference between the logits of `generate` and of a pass over the same text."""
    prompt = ids[:, : max(1, ids.shape[1] // 2)]
    try:
        written = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=_WRITTEN,
            min_new_tokens=_WRITTEN,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            output_logits=True,
            return_dict_in_generate=True,
        )
    except FloatingPointError:  # the logits are not finite
        return torch.inf
    made = torch.stack(written.logits, 1)
    again = model(written.sequences, use_cache=False).logits
    begin = prompt.shape[1] - 1
    return _difference(made, again[:, begin : begin + made.shape[1]])


def _continued(
    model: Any, ids: Tensor, parts: Sequence[slice], mask: Tensor | None = None
) -> Tensor:
    """Return the logits of tokens that the model reads in parts, with a cache."""
    from gramian.models.cache import CACHE

    cache, made = None, []
    for part in parts:
        seen = None if mask is None else mask[:, : part.stop]
        output = model(ids[:, part], attention_mask=seen, past_key_values=cache, use_cache=True)
        cache = output[CACHE]
        made.append(output.logits)
    return torch.cat(made, 1)


def _limits(own: float, carried: float) -> dict[str, float]:
    """Return the accepted difference of every mode that can fail.

    Args:
        own: the accepted difference of modes that carry no state.
        carried: the accepted difference of modes that carry a state.
    """
    limits = dict.fromkeys(("batched", "reloaded", "packed"), own)
    modes = ("recurrent", "chunked", "stepped", "padded", "right", "gap", "turn")
    limits |= dict.fromkeys(modes, carried)
    # `generate` returns its logits in float32, so rounding to float32 must be accepted.
    return limits | {"generated": max(carried, _ACCEPTED[torch.float32])}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
