"""Fit gated linear recurrences to attention layers on a text, while the model stays as it is.

The parameters of a layer begin at clusters of its keys (k-means): a key is stored in the state of
the nearest centres, and a query reads each state by its product with the centre. From there, Adam
reduces the mean over heads of the relative squared error of the outputs on single sequences. A
quarter of the sequences is kept to measure errors on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gramian._modules import in_mode
from gramian.analysis import Attended, AttentionCall, replace_attention
from gramian.hybrids._recurrence import (
    LEAST_DECAY,
    LayerRecurrence,
    check_causal,
    local_part,
    stored_tokens,
    tensors_of,
)
from gramian.hybrids._replacement import Fitted
from gramian.systems import working_dtype

__all__ = ["fit_recurrences"]

_BYTES = 2**30  # of what layers compute on the text; more layers are read in several passes
_RATE = 0.01  # of Adam
_DECAY_RATE = 10 * _RATE
_WARMUP = 10  # steps
_KEYS = 4096  # for the clusters
_ROUNDS = 8  # of k-means
_SLOWEST = 1e4  # tokens, the longest time scale at the beginning
_PLAIN = 2e-2  # largest relative difference of an output from that of a softmax, also in bfloat16
_DIGITS = 6
_MAPS = ("query_map", "query_bias", "key_map", "key_bias")


@dataclass
class _Seen:
    """What a layer computed on the sequences, one element for each."""

    queries: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    near: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    stored: list[Tensor] = field(default_factory=list)
    scale: float = 1.0

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        lists = (self.queries, self.keys, self.values, self.outputs, self.stored)
        kept = [*itertools.chain(*lists), *itertools.chain(*self.near)]
        return sum(x.nbytes for x in kept)


def fit_recurrences(
    model: nn.Module,
    rows: Tensor,
    paths: Sequence[str],
    *,
    window: int,
    sinks: int,
    state: int,
    steps: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Fitted:
    """Fit a recurrence to every head of some layers; see `Replacement.fit`.

    Raises:
        ValueError: if there is only one sequence, or if the sequences have fewer tokens beyond the
            window than there are states.
    """
    if len(rows) < 2:
        raise ValueError(
            "recurrences are fitted and measured on different sequences; the text gives only one."
        )
    held = max(1, len(rows) // 4)
    tokens = (len(rows) - held) * (rows.shape[1] - window - sinks)
    if tokens < state:
        raise ValueError(
            f"{state} states need at least as many tokens beyond the window in the sequences on "
            f"which recurrences are fitted; there are {max(tokens, 0)}."
        )
    parameters: dict[str, Tensor] = {}
    errors: dict[str, tuple[float, ...]] = {}
    sizes: dict[str, int] = {}
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, len(paths))

    listen = _Listener(model, window, sinks)
    for group in listen.groups(paths, rows):
        heard = listen(group, rows)
        for path in group:
            if path in heard:  # otherwise it is refused
                seen = heard.pop(path)
                layer, found = _fit(seen, held, window, state, steps, seed)
                parameters |= tensors_of(path, layer)
                errors[path] = tuple(float(f"{x:.{_DIGITS}g}") for x in found.tolist())
                columns = seen.values[0].shape[-1] + 1
                sizes[path] = layer.decay.numel() * columns * layer.decay.element_size()
            count()
    return Fitted(parameters, errors, sizes, listen.refused)


class _Listener:
    """Runs a model on sequences and keeps what some of its layers compute."""

    def __init__(self, model: nn.Module, window: int, sinks: int) -> None:
        self.model = model
        self.window = window
        self.sinks = sinks
        self.refused: dict[str, str] = {}

    def __call__(self, paths: Sequence[str], rows: Tensor) -> dict[str, _Seen]:
        """Return what the layers compute; those that cannot have a recurrence are refused."""
        heard = {path: _Seen() for path in paths if path not in self.refused}

        def attend(call: AttentionCall) -> Attended:
            result = call.run(call.mask)
            if call.path not in self.refused:
                try:
                    self._keep(call, result[0], heard[call.path])
                except ValueError as error:
                    self.refused[call.path] = str(error).partition(": ")[2]
                    del heard[call.path]
            return result

        device = next(self.model.parameters()).device
        with ExitStack() as stack, torch.no_grad():
            stack.enter_context(in_mode(self.model, training=False))
            stack.enter_context(replace_attention(self.model, dict.fromkeys(heard, attend)))
            for row in rows:
                self.model(row[None].to(device), use_cache=False)
        return heard

    def groups(self, paths: Sequence[str], rows: Tensor) -> Iterator[list[str]]:
        """Yield layers together of which all that is kept of the sequences has a bounded size."""
        sizes = {path: one.nbytes * len(rows) for path, one in self(paths, rows[:1]).items()}
        group: list[str] = []
        for path in paths:
            if group and sum(sizes.get(one, 0) for one in [*group, path]) > _BYTES:
                yield group
                group = []
            group.append(path)
        yield group

    def _keep(self, call: AttentionCall, output: Tensor, seen: _Seen) -> None:
        """Keep a call and its output (1, L, H, M).

        Raises:
            ValueError: if the layer is no plain causal attention.
        """
        check_causal(call)
        if not seen.queries:
            whole, _ = local_part(call, call.query.shape[-2], 0)
            expected = (whole[..., :-1] / whole[..., -1:]).transpose(1, 2)
            error = (output.to(expected) - expected).norm()
            if bool(error > _PLAIN * expected.norm()):
                raise ValueError(
                    f"{call.path} cannot have a recurrence: its attention is no softmax of scaled "
                    "products."
                )
        dtype = working_dtype(call.query)
        seen.queries.append(call.query.to(dtype))
        seen.keys.append(call.key.to(dtype))
        seen.values.append(call.value.to(dtype))
        seen.outputs.append(output.transpose(1, 2).to(dtype))
        seen.near.append(local_part(call, self.window, self.sinks))
        seen.stored.append(stored_tokens(call, self.sinks))
        seen.scale = call.scale


def _fit(
    seen: _Seen, held: int, window: int, state: int, steps: int, seed: int
) -> tuple[LayerRecurrence, Tensor]:
    """Return the recurrences of a layer and the error of each head on the last `held` sequences."""
    generator = torch.Generator().manual_seed(seed)
    fitted = len(seen.queries) - held
    start = _clustered(seen, fitted, window, state, generator)
    maps = [getattr(start, name).requires_grad_() for name in _MAPS]
    decays = torch.logit((start.decay - LEAST_DECAY) / (1 - LEAST_DECAY), 1e-5).requires_grad_()
    optimizer = torch.optim.Adam(
        [{"params": maps, "lr": _RATE}, {"params": [decays], "lr": _DECAY_RATE}]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(1, (i + 1) / _WARMUP) * (1 + math.cos(math.pi * i / max(steps, 1))) / 2,
    )
    energy = torch.stack([_energy(one) for one in seen.outputs[:fitted]]).mean(0)
    energy = energy.clamp_min(torch.finfo(energy.dtype).tiny)

    def layer() -> LayerRecurrence:
        decay = LEAST_DECAY + (1 - LEAST_DECAY) * decays.sigmoid()
        return LayerRecurrence(maps[0], maps[1], maps[2], maps[3], decay)

    def lost(number: int) -> Tensor:
        y = layer().read(
            seen.queries[number],
            seen.keys[number],
            seen.values[number],
            seen.near[number],
            seen.stored[number],
            window,
        )
        return _energy(y - seen.outputs[number])

    order: list[int] = []
    with torch.enable_grad():
        for _ in range(steps):
            order = order or torch.randperm(fitted, generator=generator).tolist()
            optimizer.zero_grad()
            (lost(order.pop()) / energy).mean().backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        numbers = range(fitted, len(seen.queries))
        whole = sum(_energy(seen.outputs[number]) for number in numbers)
        errors = sum(lost(number) for number in numbers)
        errors = torch.where(whole > 0, errors / whole, 0).sqrt()  # type: ignore[arg-type]
    found = layer()
    detached = {name: x.detach().cpu().contiguous() for name, x in vars(found).items()}
    return LayerRecurrence(**detached), errors.cpu()


def _clustered(
    seen: _Seen, fitted: int, window: int, state: int, generator: torch.Generator
) -> LayerRecurrence:
    """Return recurrences whose states are clusters of the keys that they store.

    A quadratic distance gives the scores of the keys, `-|k - c|² / 2 s²`, whose first term is the
    same for all states; s² is the mean squared distance from the nearest centre, for each feature.
    Half of the states have no decay, and the others have time scales up to 1,000 tokens.
    """
    keys = torch.cat(
        [k[:, :, x[0]] for k, x in zip(seen.keys[:fitted], seen.stored[:fitted], strict=True)], 2
    )[0]  # (groups, tokens, N)
    chosen = torch.randperm(keys.shape[1], generator=generator)[:_KEYS].to(keys.device)
    found = [_centres(one[chosen], state, generator) for one in keys]
    centres = torch.stack([centre for centre, _ in found])  # (groups, n, N)
    spread = torch.stack([distance for _, distance in found])[:, None, None]  # (groups, 1, 1)
    spread = spread.clamp_min(torch.finfo(spread.dtype).tiny) / centres.shape[-1]
    group = seen.queries[0].shape[1] // len(keys)
    slow = state - state // 2
    scales = torch.cat(
        [
            torch.full((slow,), _SLOWEST),
            torch.logspace(math.log10(max(window, 2)), 3, state - slow),
        ]
    )[torch.randperm(state, generator=generator)]
    query_map = (seen.scale * centres).repeat_interleave(group, 0)
    return LayerRecurrence(
        query_map,
        torch.zeros_like(query_map[..., 0]),
        centres / spread,
        -centres.square().sum(-1) / (2 * spread[..., 0]),
        (1 - 1 / scales).to(centres).expand(len(keys), state).clone(),
    )


def _centres(keys: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return clusters of keys (tokens, N) and the mean squared distance from the nearest, ()."""
    first = torch.randperm(len(keys), generator=generator)[:count]
    centres = keys[first.to(keys.device)].clone()
    for _ in range(_ROUNDS):
        nearest = torch.cdist(keys, centres).argmin(-1)
        sizes = torch.bincount(nearest, minlength=count)[:, None]
        means = torch.zeros_like(centres).index_add_(0, nearest, keys) / sizes.clamp_min(1)
        centres = torch.where(sizes > 0, means, centres)
    return centres, torch.cdist(keys, centres).square().amin(-1).mean()


def _energy(y: Tensor) -> Tensor:
    """Return the mean square of the outputs of each head, (H)."""
    return y.square().mean((0, 2, 3))
