"""Test that mixers compute one map in every mode, with any padding and packing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from gramian.mixers import Mixer, Segments, build
from gramian.systems import System, TimeInvariantSystem
from gramian.testing.comparison import (
    nudge,
    require,
    require_close,
    require_gradients,
    require_json,
    stopped,
)

__all__ = ["check_mixer"]

_HALF = 5e-2
"""Largest relative l2 difference accepted between outputs in bfloat16 and in full precision."""

Rebuild = Callable[[Mixer, Tensor, System], Tensor]


def check_mixer(
    mixer: Mixer,
    *,
    length: int = 40,
    rebuild: Rebuild | None = None,
    tolerance: float | None = None,
    seed: int = 0,
) -> None:
    """Check that a mixer computes the same map in every mode.

    - Whole sequences of 1, 2, 3 and `length` tokens, chunks, prefill and steps give the same
      outputs. These do not depend on later inputs.
    - Padding on the left, on the right and between tokens changes neither outputs nor states.
    - Sequences that are packed into one row have the outputs that they have alone.
    - Outputs in bfloat16 stay close to those in full precision.
    - Gradients reach every trainable parameter, and do not change if a sequence is processed in
      chunks.
    - The operator is causal and zero at padding. With `rebuild`, it also gives the mixer's outputs
      when it is applied to the values.
    - A registered mixer can be built again from `mixer.config()`.

    For a mixer that is not causal, the checks of causality, states and operators are skipped.

    Args:
        mixer: the mixer. It is not modified: a copy is run in evaluation mode.
        length: number of tokens in the longest sequence, at least 8.
        rebuild: function that computes the mixer's output (batch, length, width) from the mixer,
            its input `x` (batch, length, width) and `mixer.operator(x)`. By default the operator is
            not compared with the output.
        tolerance: largest relative error accepted; by default 1e-8 for a mixer in double precision
            and 2e-5 for others.
        seed: seed of the random inputs.

    Raises:
        AssertionError: if a property fails. The message names the property.
        TypeError: if `mixer` is not a `Mixer`.
        ValueError: if `length` is below 8.
    """
    if not isinstance(mixer, Mixer):
        raise TypeError(f"check_mixer takes a Mixer; got {type(mixer).__name__}.")
    if length < 8:
        raise ValueError(f"length must be at least 8; got {length}.")
    mixer = copy.deepcopy(mixer).eval()
    dtype = next(mixer.parameters()).dtype
    if tolerance is None:
        tolerance = 1e-8 if dtype == torch.float64 else 2e-5
    suite = _Suite(mixer, length, tolerance, seed)
    with torch.no_grad():
        suite.check_config()
        suite.check_whole()
        suite.check_padding()
        suite.check_packing()
        if mixer.causal:
            suite.check_modes()
            suite.check_padded_states()
            suite.check_operator(rebuild)
        suite.check_half_precision()
    suite.check_gradients()


class _Suite:
    """The checks of one mixer on one random input."""

    def __init__(self, mixer: Mixer, length: int, tolerance: float, seed: int) -> None:
        self.mixer, self.length, self.tolerance = mixer, length, tolerance
        self.name = f"the mixer {type(mixer).__name__}"
        self.like = next(mixer.parameters())
        self.random = torch.Generator().manual_seed(seed)
        self.x = self.draw(2, length)

    def draw(self, batch: int, length: int) -> Tensor:
        """Draw a random input, (batch, length, width)."""
        shape = (batch, length, self.mixer.width)
        return torch.randn(shape, generator=self.random, dtype=torch.float64).to(self.like)

    def require_close(self, claim: str, actual: Tensor, expected: Tensor) -> None:
        """Raise an AssertionError unless two tensors agree within the suite's tolerance."""
        require_close(f"{self.name}: {claim}", actual, expected, self.tolerance)

    def check_config(self) -> None:
        """Check that a registered mixer can be built again from its configuration."""
        if not hasattr(self.mixer, "kind"):
            return
        config = require_json(self.name, self.mixer.config())
        again = build(config).to(self.like).eval()
        require(
            type(again) is type(self.mixer) and again.config() == config,
            f"{self.name}: build(config()) must make the same mixer again; got "
            f"{again.config()!r} from {config!r}.",
        )
        again.load_state_dict(self.mixer.state_dict())
        require(
            torch.equal(again(self.x), self.mixer(self.x)),
            f"{self.name}: build(config()) with the same weights must give the same outputs.",
        )

    def check_whole(self) -> None:
        """Check that outputs have the inputs' shape and dtype, and ignore later inputs."""
        y = self.mixer(self.x)
        require(
            y.shape == self.x.shape and y.dtype == self.x.dtype,
            f"{self.name}: an input {tuple(self.x.shape)} in {self.x.dtype} must give an output "
            f"of its shape and dtype; got {tuple(y.shape)} in {y.dtype}.",
        )
        require(y.isfinite().all(), f"{self.name}: outputs must be finite.")
        if not self.mixer.causal:
            return
        changed = self.x.clone()
        changed[:, self.length // 2 :] += 1
        claim = f"the first {self.length // 2} outputs must not depend on later inputs"
        half = slice(self.length // 2)
        self.require_close(claim, self.mixer(changed)[:, half], y[:, half])

    def check_modes(self) -> None:
        """Check that whole sequences, chunks, prefill and steps give the same outputs."""
        recurrence = self.mixer.recurrence()
        state = recurrence.initial_state(2)
        require(
            recurrence.state_bytes(2) == recurrence.mixer.reserve(state, 1).nbytes,
            f"{self.name}: state_bytes(2) must count the state: {recurrence.state_bytes(2)} is "
            f"not {state.nbytes}.",
        )
        for length in (1, 2, 3, self.length):
            x = self.x[:, :length]
            expected, at = self.mixer(x), f"of {length} tokens"
            y, _ = recurrence.prefill(x)
            self.require_close(f"prefill {at} must give the outputs of the whole", y, expected)
            state, outputs = recurrence.initial_state(2), []
            for token in x.unbind(1):
                y, state = recurrence.step(token, state)
                outputs.append(y)
            y = torch.stack(outputs, 1)
            self.require_close(f"steps {at} must give the outputs of the whole", y, expected)
            for first in {length // 3, length // 2} - {0}:
                _, state = recurrence.prefill(x[:, :first])
                y, _ = self.mixer(x[:, first:], state)
                claim = f"a chunk after a prefill, {first} {at}, must give the outputs of the whole"
                self.require_close(claim, y, expected[:, first:])
                _, state = self.mixer(x[:, :first], recurrence.initial_state(2))
                y, _ = recurrence.step(x[:, first], state)
                claim = f"a step after a chunk, {first} {at}, must give the output of the whole"
                self.require_close(claim, y, expected[:, first])

    def masks(self, length: int) -> dict[str, Tensor]:
        """Return a mask (3, length) for each place of padding: left, right and between tokens.

        The rows have `length`, `length // 2` and one token. In the mask with padding between
        tokens, every other position of row 1 is a token.
        """
        counts = (length, length // 2, 1)
        masks = {side: torch.zeros(3, length, dtype=torch.bool) for side in ("left", "right")}
        for row, count in enumerate(counts):
            masks["left"][row, length - count :] = True
            masks["right"][row, :count] = True
        masks["gap"] = masks["right"].clone()
        masks["gap"][1] = torch.arange(length) % 2 == 0
        masks["gap"][2] = torch.arange(length) == length // 2
        return {side: mask.to(self.like.device) for side, mask in masks.items()}

    def check_padding(self) -> None:
        """Check that no values in the padding change a row's outputs."""
        x = self.draw(3, self.length)
        for side, mask in self.masks(self.length).items():
            alone = [self.mixer(x[row, real][None])[0] for row, real in enumerate(mask)]
            for junk in (torch.nan, 1e4):
                padded = x.masked_fill(~mask.unsqueeze(-1), junk)
                y = self.mixer(padded, mask=mask)
                for row, real in enumerate(mask):
                    claim = f"padding ({side}) must leave no trace in outputs, row {row}"
                    self.require_close(claim, y[row, real], alone[row])
            expected = self.mixer(x, mask=mask)
            for kind in (torch.int64, torch.float32):
                y = self.mixer(x, mask=mask.to(kind))
                claim = f"a mask in {kind} must be as one of booleans"
                self.require_close(claim, y[mask], expected[mask])

    def check_padded_states(self) -> None:
        """Check that padding changes no state, in a prefill and in a chunk after it."""
        recurrence = self.mixer.recurrence()
        x, z, token = self.draw(3, self.length), self.draw(3, 8), self.draw(3, 1)[:, 0]
        second = self.masks(8)["gap"]
        second[2] = False  # a row without a token
        for side, mask in self.masks(self.length).items():
            junk = x.masked_fill(~mask.unsqueeze(-1), 1e4)
            made, state = recurrence.prefill(junk, mask=mask)
            carried, later = self.mixer(z, state.clone(), mask=second)
            frozen, after = recurrence.prefill(z, state, mask=second)
            steps = [recurrence.step(token, one)[0] for one in (later, after)]
            for row, (real, then) in enumerate(zip(mask, second, strict=True)):
                where = f"({side}) must leave no trace in"
                y, state = recurrence.prefill(x[row, real][None])
                claim = f"padding {where} a prefill, row {row}"
                self.require_close(claim, made[row, real], y[0])
                if then.any():
                    y, state = recurrence.prefill(z[row, then][None], state)
                    claim = f"padding {where} a chunk from a warm state, row {row}"
                    self.require_close(claim, carried[row, then], y[0])
                    self.require_close(claim, frozen[row, then], y[0])
                y, _ = recurrence.step(token[row][None], state)
                claim = f"padding {where} the state, row {row}"
                for step in steps:
                    self.require_close(claim, step[row], y[0])

    def check_packing(self) -> None:
        """Check that sequences in a shared row have the outputs that they have alone."""
        numbers = torch.zeros(2, self.length, dtype=torch.int64)
        numbers[0, 3:], numbers[0, self.length // 2 :], numbers[1, 1:] = 4, 7, 1
        real = torch.ones(2, self.length, dtype=torch.bool)
        real[0, 1] = real[1, -2:] = False
        numbers, real = numbers.to(self.like.device), real.to(self.like.device)
        y = self.mixer(self.x, mask=Segments(real, numbers))
        for row in range(2):
            for number in numbers[row].unique():
                chosen = real[row] & (numbers[row] == number)
                claim = f"a sequence must not see the others of its row, row {row}"
                alone = self.mixer(self.x[row, chosen][None])[0]
                self.require_close(claim, y[row, chosen], alone)

    def check_operator(self, rebuild: Rebuild | None) -> None:
        """Check that the operator is causal and ignores padding.

        With `rebuild`, also check that the operator gives the mixer's outputs.
        """
        length, half = self.length, self.length // 2
        system = self.mixer.operator(self.x)
        matrix = system.matrix(length)
        fixed = isinstance(system, TimeInvariantSystem)
        channels = (self.mixer.channels,) if fixed else (2, self.mixer.channels)
        require(
            tuple(system.channel_shape) == channels,
            f"{self.name}: operator(x) must have the channels {channels}; got "
            f"{tuple(system.channel_shape)}.",
        )
        require(not matrix.triu(1).any(), f"{self.name}: operator(x) must be causal.")
        start = self.mixer.operator(self.x[:, :half]).matrix(half)
        claim = f"operator(x) of the first {half} tokens must be the first block of the whole's"
        self.require_close(claim, start, matrix[..., :half, :half])
        part = self.mixer.operator(self.x, slice(0, 1)).matrix(length)
        claim = "operator(x, channels) must pick channels of operator(x)"
        self.require_close(claim, part, matrix[..., :1, :, :])
        if not fixed:
            mask = torch.ones(2, length, dtype=torch.bool, device=self.like.device)
            mask[1, :half] = False
            padded = self.mixer.operator(self.x, mask=mask).matrix(length)[1]
            alone = self.mixer.operator(self.x[1:, half:]).matrix(length - half)[0]
            claim = "operator(x, mask=mask) must be that of the tokens alone"
            self.require_close(claim, padded[..., half:, half:], alone)
            silent = not padded[..., :half].any() and not padded[..., :half, :].any()
            require(silent, f"{self.name}: operator(x, mask=mask) must be zero at padding.")
        if rebuild is not None:
            claim = "operator(x), applied to the values, must give the outputs"
            self.require_close(claim, rebuild(self.mixer, self.x, system), self.mixer(self.x))

    def check_half_precision(self) -> None:
        """Check that outputs in bfloat16 have that dtype and stay close to full precision."""
        expected = self.mixer(self.x).double()
        half, x = copy.deepcopy(self.mixer).to(torch.bfloat16), self.x.to(torch.bfloat16)
        outputs = {"whole": half(x)}
        if half.causal:
            recurrence = half.recurrence()
            y, state = recurrence.prefill(x[:, :-1])
            last, _ = recurrence.step(x[:, -1], state)
            outputs["prefill and step"] = torch.cat([y, last.unsqueeze(1)], 1)
        for mode, y in outputs.items():
            require(
                y.dtype == torch.bfloat16,
                f"{self.name}: outputs ({mode}) of an input in bfloat16 must be in bfloat16; got "
                f"{y.dtype}.",
            )
            error = float((y.double() - expected).norm() / expected.norm())
            require(
                error <= _HALF,
                f"{self.name}: outputs ({mode}) in bfloat16 must be near those in full "
                f"precision: the relative error is {error:.1e}, more than {_HALF:.0e}.",
            )

    def check_gradients(self) -> None:
        """Check that gradients reach every parameter, and are equal with chunks and without."""
        mixer = copy.deepcopy(self.mixer).double()
        trained = {key: one for key, one in mixer.named_parameters() if one.requires_grad}
        x = self.x.double().requires_grad_()
        weight = x.detach().flip(0, 1)

        def gradients(outputs: Iterable[Tensor]) -> tuple[Tensor | None, ...]:
            loss = (torch.cat([*outputs], 1) * weight).sum()
            return torch.autograd.grad(loss, [x, *trained.values()], allow_unused=True)

        expected = gradients([mixer(x)])
        if stopped(expected):
            nudge(trained.values(), self.random)
            expected = gradients([mixer(x)])
        require_gradients(self.name, ["(the input)", *trained], expected)
        if not mixer.causal:
            return
        state, outputs = mixer.recurrence().initial_state(2), []
        for chunk in x.tensor_split([self.length // 3, self.length // 3 + 1], 1):
            y, state = mixer(chunk, state)
            outputs.append(y)
        found = gradients(outputs)
        for key, one, other in zip(("(the input)", *trained), found, expected, strict=True):
            claim = f"{self.name}: the gradient of {key} through chunks must be that of the whole"
            require(one is not None, f"{claim}: none arrives.")
            assert one is not None and other is not None
            require_close(claim, one, other, 1e-6)
