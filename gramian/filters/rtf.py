r"""RTF: the coefficients of a rational transfer function as parameters.

`H(z) = h_0 + (b_1 z^-1 + … + b_n z^-n) / (1 + a_1 z^-1 + … + a_n z^-n)` is evaluated on roots of
unity by FFT, in time and memory that do not grow with n (RTF, Parnichkun et al. 2024, section 3).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import Self

from gramian._checks import check_choice, check_not_negative, check_positive
from gramian.filters._filter import check_lr, register
from gramian.filters._rational import RationalFilter
from gramian.ops import rational_impulse_response
from gramian.ops.devices import has_float64
from gramian.ops.lengths import at_most
from gramian.ops.polynomial import single_precision_error
from gramian.ops.reflection import step_down, step_up
from gramian.reduction import find_modal_form
from gramian.systems import TransferFunction, to_modal

__all__ = ["RTF"]

_NUMERATORS = ("truncated", "exact")
_STABILITIES = ("none", "montel", "schur")
_PRECISIONS = ("auto", "double", "single")
_INITIALIZATIONS = ("zeros", "xavier", "montel", "schur", "uniform")
_DIRECT = ("normal", "one")
_SCOPES = ("denominators", "all")
_SLACKS = ("one", "uniform")

_REFLECTION_LIMIT = 1 - 1e-6
"""Reflection coefficients stay below this, so that rounding does not make them 1."""

_RESAMPLED = 1e-3
"""The largest relative l2 error of the taps of a resampled filter."""

_REAL = 1e-8
"""Coefficients with relative imaginary parts up to this are real up to rounding."""

_SLACK = 1e-6
"""The slack that keeps the l1 norm of a Montel-bounded denominator below 1 if the trained slack is
0."""


@register("rtf")
class RTF(RationalFilter):
    """Filters with a rational transfer function, whose coefficients are the parameters.

    By default coefficients are transformed and divided in float64, since in float32 the spectrum
    itself is off by more than 1e-4 for most stable systems beyond n = 16. `kernel_error` says how
    far the taps in float32 are from those in float64. The system that `forward` returns has
    the exact numerator, so its recurrence computes the convolution that was learned. The attributes
    `form` and `error` of the recurrence say which form it has, and how close it is to the
    convolution.

    The paper and its code differ. The paper starts from the impulse, `a = b = 0` and `h_0 = 1`
    (sections 3.4 and B.2), and its code from `a = b = 0` and a normal h_0, as this class does by
    default. The code gives one learning rate and one weight decay to all coefficients of a filter,
    for which `optimizer_scope` must be "all". By default, `lr` is that of the denominators, which
    have no weight decay, and the other parameters are trained as the rest of the model.

    Args:
        channels: The number of filters.
        state_size: The degree n of the denominators.
        max_length: The number of taps, greater than `state_size`. The transfer function is sampled
            at `max_length + max_length % 2` roots of unity, for inputs of any length.
        numerator: "truncated" is the published parametrization: b is the numerator of the kernel
            truncated to the grid, and the kernel is the inverse FFT of b / a (section 3.2). With
            "exact", b is the numerator itself, and its kernel continues beyond `max_length`. Use
            "exact" to train on sequences that continue from chunk to chunk. The kernel then takes
            about twice as long to compute.
        stability: With "none", denominators are free. "montel" keeps `‖a‖₁ < 1`, which keeps all
            poles inside the unit circle but excludes many stable denominators (section 3.4). With
            "schur", the parameters are `atanh` of the reflection coefficients, which reach every
            stable denominator and no other. The recurrence can then step by these coefficients.
        num_denominators: The number of denominators, each of which `channels / num_denominators`
            neighboring channels share. By default every channel has its own.
        initialization: How a and b are drawn. "zeros" sets them to zero. "xavier" draws them
            uniformly within ±1/√n, which can be unstable (not available with "schur"). "montel"
            draws them uniformly within ±1/n, where Montel's bound keeps all poles inside the unit
            circle. "schur" takes the reflection coefficients tanh θ with θ normal of variance 1/n,
            and b as in "montel". "uniform" is that of the paper's Copying task (section C.3.1): θ,
            b and a slack s are drawn uniformly from 0 to 1, and `a = θ / (‖θ‖₁ + s)` satisfies
            Montel's bound.
        lr: The learning rate of the parameters in `optimizer_scope`; by default that of the model.
        precision: The precision of the transforms. "double" is float64, "single" is float32, and
            "auto" is float64 on devices that have it and float32 on others. Many GPUs compute in
            float64 at a small part of their speed. "single" needs a truncated numerator.
        direct: How the direct term h_0 is drawn: "normal" draws it from a standard normal
            distribution, as the published code does, and "one" sets it to 1, as the paper does.
        weight_decay: The weight decay of the parameters in `optimizer_scope`, whatever that of the
            model. By default it is 0, since weight decay moves poles.
        optimizer_scope: The parameters to which `lr` and `weight_decay` apply: those of the
            "denominators", or "all" coefficients, with the numerators and the direct terms. A slack
            belongs to the former only; with "all" it is trained as the rest of the model.
        direct_scale: A constant c, above 0. The direct term is `c h_0`. The published Hyena-RTF has
            c = 2: Hyena adds `h_0 u` to the output of a convolution whose kernel has h_0 already.
        slack_initialization: How the slack s of "montel" starts. "one" sets it to 1, with θ for
            which `a = θ / (‖θ‖₁ + s)` are the drawn coefficients wherever Montel's bound admits
            them. "uniform" draws it uniformly from 0 to 1 and takes the drawn coefficients for θ,
            as the published code does.

    Raises:
        ValueError: if an argument does not have one of the values described here, or if
            `slack_initialization` is "uniform" without the stability "montel".
    """

    def __init__(
        self,
        channels: int,
        state_size: int,
        max_length: int,
        numerator: str = "truncated",
        stability: str = "none",
        num_denominators: int | None = None,
        initialization: str = "zeros",
        lr: float | None = None,
        precision: str = "auto",
        direct: str = "normal",
        weight_decay: float = 0.0,
        optimizer_scope: str = "denominators",
        direct_scale: float = 1.0,
        slack_initialization: str = "one",
    ) -> None:
        super().__init__(channels, max_length)
        if not 1 <= state_size < max_length:
            raise ValueError(
                f"state_size must lie in 1 … max_length - 1 = {max_length - 1}; got {state_size}."
            )
        for name, value, accepted in (
            ("numerator", numerator, _NUMERATORS),
            ("stability", stability, _STABILITIES),
            ("initialization", initialization, _INITIALIZATIONS),
            ("precision", precision, _PRECISIONS),
            ("direct", direct, _DIRECT),
            ("optimizer_scope", optimizer_scope, _SCOPES),
            ("slack_initialization", slack_initialization, _SLACKS),
        ):
            check_choice(name, value, accepted)
        check_not_negative(weight_decay=weight_decay)
        check_positive(direct_scale=direct_scale)
        if slack_initialization == "uniform" and stability != "montel":
            raise ValueError(
                'only stability "montel" has a slack; got slack_initialization "uniform" with '
                f'stability "{stability}".'
            )
        if stability == "schur" and initialization == "xavier":
            raise ValueError(
                'the initialization "xavier" can be unstable, which stability "schur" cannot hold; '
                'take "zeros", "montel", "schur" or "uniform".'
            )
        if precision == "single" and numerator == "exact":
            raise ValueError(
                'an "exact" numerator is computed in double precision; got the precision "single", '
                'which needs the numerator "truncated".'
            )
        num_denominators = channels if num_denominators is None else num_denominators
        if num_denominators < 1 or channels % num_denominators:
            raise ValueError(
                f"num_denominators must divide the {channels} channels; got {num_denominators}."
            )
        self.state_size = state_size
        self.numerator = numerator
        self.stability = stability
        self.num_denominators = num_denominators
        self.initialization = initialization
        self.lr = check_lr(lr)
        self.precision = precision
        self.direct = direct
        self.weight_decay = weight_decay
        self.optimizer_scope = optimizer_scope
        self.direct_scale = float(direct_scale)
        self.slack_initialization = slack_initialization
        coefficients = nn.Parameter(torch.empty(num_denominators, state_size))
        if stability == "schur":
            self.theta = coefficients
        else:
            self.a = coefficients
        if stability == "montel":
            self.slack = nn.Parameter(torch.empty(num_denominators))
        self.b = nn.Parameter(torch.empty(channels, state_size))
        self.d = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the coefficients as `initialization` says, and the direct terms as `direct` says."""
        inside = 1 / self.state_size
        bounds = {"zeros": 0.0, "xavier": math.sqrt(inside), "uniform": 1.0}
        high = bounds.get(self.initialization, inside)
        low = 0.0 if self.initialization == "uniform" else -high
        drawn = torch.empty_like(self.theta if self.stability == "schur" else self.a)
        if self.initialization != "schur":
            nn.init.uniform_(drawn, low, high)
            if "uniform" in (self.initialization, self.slack_initialization):
                self._set_bounded(drawn, nn.init.uniform_(drawn.new_empty(len(drawn))))
            else:
                self._set(drawn)
        else:
            nn.init.normal_(drawn, std=math.sqrt(inside))
            if self.stability == "schur":
                with torch.no_grad():
                    self.theta.copy_(drawn)
            else:
                self._set(step_up(torch.tanh(drawn.double())))
        nn.init.uniform_(self.b, low, high)
        if self.direct == "normal":
            nn.init.normal_(self.d)
        else:
            nn.init.ones_(self.d)

    def _set_bounded(self, theta: Tensor, slack: Tensor) -> None:
        """Set the denominators to those that Montel's bound makes of θ and a slack."""
        if self.stability == "montel":
            with torch.no_grad():
                self.a.copy_(theta)
                self.slack.copy_(slack)
        else:
            self._set(_bounded(theta.double(), slack))

    def _set(self, a: Tensor) -> None:
        """Set the parameters to those of the denominators `a` (num_denominators, n)."""
        a = a.double()
        with torch.no_grad():
            if self.stability == "schur":
                k = step_down(a) / _REFLECTION_LIMIT
                limit = 1 - torch.finfo(torch.float32).eps
                self.theta.copy_(torch.atanh(k.clamp(-limit, limit)))
            elif self.stability == "montel":
                # a = θ / (‖θ‖₁ + slack + ε), with a slack of 1 where that is possible.
                norm = a.abs().sum(-1, keepdim=True)
                self.slack.fill_(1.0)
                room = torch.where(norm < 1, 1 - norm, 1.0)
                self.a.copy_(torch.where(norm < 1, a * (1 + _SLACK) / room, a))
            else:
                self.a.copy_(a)

    def load_denominator(self, a: Tensor) -> None:
        """Load denominators `a_1 … a_n`, exactly up to the rounding of the parameters.

        Args:
            a: (num_denominators, n), real: the coefficients of every denominator.

        Raises:
            ValueError: if `a` has another shape, or if `stability` excludes a denominator. "schur"
                excludes denominators with a pole on or outside the unit circle, and "montel" those
                with an l1 norm of 1 or more.
        """
        shape = (self.num_denominators, self.state_size)
        if tuple(a.shape) != shape:
            raise ValueError(f"the denominators must have shape {shape}; got {tuple(a.shape)}.")
        if self.stability == "schur":
            wrong = ~(step_down(a).abs() < 1).all(-1)
            reason = "has a pole on or outside of the unit circle"
        elif self.stability == "montel":
            wrong = ~(a.double().abs().sum(-1) < 1)
            reason = "has an l1 norm of 1 or more"
        else:
            wrong = ~a.isfinite().all(-1)
            reason = "is not finite"
        if bool(wrong.any()):
            raise ValueError(
                f'denominator {int(wrong.nonzero()[0])} {reason}, which stability "'
                f'{self.stability}" cannot hold.'
            )
        self._set(a)

    def reflection(self) -> Tensor:
        """Return the reflection coefficients of the denominators, (num_denominators, n).

        With the stability "schur", the parameters determine them, in the filter's precision.
        Otherwise they are computed from the denominators in float64, and a coefficient outside of
        (-1, 1) shows that a pole is outside the unit circle.
        """
        if self.stability == "schur":
            return _REFLECTION_LIMIT * torch.tanh(self.theta.to(self._dtype))
        return step_down(self.denominator())

    def denominator(self) -> Tensor:
        """Return `a_1 … a_n`, (num_denominators, n), in the filter's precision.

        With the stability "none", they are the parameters, in their own precision.
        """
        if self.stability == "schur":
            return step_up(self.reflection(), self._dtype)
        if self.stability == "montel":
            return _bounded(self.a.to(self._dtype), self.slack)
        return self.a.clone()

    def direct_term(self) -> Tensor:
        """Return tap 0 of the kernels, `direct_scale` times the parameters h_0: (channels,)."""
        return self.direct_scale * self.d

    @torch.no_grad()
    def poles(self) -> Tensor:
        """Return the zeros of the denominators: (num_denominators, n), complex128."""
        a = self.denominator()
        none = torch.zeros_like(a)
        return TransferFunction(none, a, none[:, 0]).poles()

    @property
    def grid(self) -> int:
        """Return the number of roots of unity at which the transfer function is sampled."""
        return self.max_length + self.max_length % 2

    @property
    def needs_float64(self) -> bool:
        return self.numerator == "exact" or self.precision == "double"

    @property
    def _dtype(self) -> torch.dtype:
        """The precision in which coefficients are transformed and divided."""
        if self.precision == "auto" and self.numerator == "truncated":
            return torch.float64 if has_float64(self.d.device) else torch.float32
        return torch.float32 if self.precision == "single" else torch.float64

    @torch.no_grad()
    def kernel_error(self) -> Tensor:
        """Bound the relative error of each channel's taps in float32, to first order: (channels,).

        The bound is `gramian.ops.polynomial.single_precision_error`. It needs a truncated
        numerator, whose taps alone can be computed in float32.

        Raises:
            ValueError: if the numerator is "exact".
        """
        if self.numerator == "exact":
            raise ValueError(
                'only the taps of a "truncated" numerator can be computed in float32; this one is '
                '"exact".'
            )
        a = self.denominator().repeat_interleave(self.channels // self.num_denominators, 0)
        return single_precision_error(self.b, a, self.direct_term(), self.grid)

    def forward(self, length: int | None = None) -> TransferFunction:
        shared = (self.num_denominators, self.channels // self.num_denominators)
        length = at_most(length, self.max_length)
        # These are copies, because a sharded parameter is whole only until this function returns.
        b, d = self.b.clone().reshape(*shared, -1), self.direct_term().reshape(shared)
        a = self.denominator().unsqueeze(1)
        reflection = self.reflection().unsqueeze(1) if self.stability == "schur" else None
        if self.numerator == "truncated":
            system = TransferFunction.from_truncated(
                b, a, d, self.grid, length, self._dtype, reflection, find_modal_form
            )
        else:
            b, d, a = b.double(), d.double(), a.double()
            if self.stability == "none":  # no circle is large enough for every pole
                taps = TransferFunction(b, a.expand(b.shape), d).impulse_response(length)
            else:
                taps = rational_impulse_response(b, a, d, length)
            known = reflection if reflection is None else reflection.expand(b.shape)
            system = TransferFunction(
                b, a.expand(b.shape), d, taps=taps, reflection=known, reducer=find_modal_form
            )
        return system.reshape_channels(self.channels)

    @torch.no_grad()
    def resample(self, step: float) -> None:
        check_positive(step=step)
        taps = _held_taps(self(), step, self.grid)
        a = _powers(self.poles(), step)
        before = copy.deepcopy(self.state_dict())
        self.load_denominator(a)
        self._load_numerator(taps)
        taps = taps[:, : self.max_length]
        error = (self().impulse_response(self.max_length).double() - taps).norm(dim=-1)
        error = float((error / taps.norm(dim=-1).clamp_min(torch.finfo(taps.dtype).tiny)).max())
        if not error <= _RESAMPLED:
            self.load_state_dict(before)
            raise ValueError(
                f"coefficients in {self.d.dtype} miss the taps of the resampled filter by "
                f"{error:.1e}; gramian.reduce and ModalFilter.from_system make a filter of poles, "
                "which can be resampled."
            )

    def _load_numerator(self, taps: Tensor) -> None:
        """Load the numerators and direct terms of rational filters with the present denominators.

        Args:
            taps: (channels, grid), float64: the first taps.
        """
        a = self.denominator().double().repeat_interleave(self.channels // self.num_denominators, 0)
        # Taps on the grid are sums over its multiples, so their product with a is cyclic.
        size = self.grid if self.numerator == "truncated" else 2 * self.grid
        spectrum = torch.fft.rfft(nn.functional.pad(a, (1, 0), value=1.0), size)
        product = torch.fft.irfft(spectrum * torch.fft.rfft(taps, size), size)
        self.d.copy_(product[:, 0] / self.direct_scale)
        self.b.copy_(product[:, 1 : self.state_size + 1] - product[:, :1] * a)

    def config(self) -> dict[str, Any]:
        return {
            **super().config(),
            "state_size": self.state_size,
            "numerator": self.numerator,
            "stability": self.stability,
            "num_denominators": self.num_denominators,
            "initialization": self.initialization,
            "lr": self.lr,
            "precision": self.precision,
            "direct": self.direct,
            "weight_decay": self.weight_decay,
            "optimizer_scope": self.optimizer_scope,
            "direct_scale": self.direct_scale,
            "slack_initialization": self.slack_initialization,
        }

    def optimizer_hints(self) -> dict[str, dict[str, float]]:
        """Return `weight_decay`, and `lr` if given, for the parameters in `optimizer_scope`."""
        options = {"weight_decay": self.weight_decay}
        options |= {} if self.lr is None else {"lr": self.lr}
        others = ("slack",) if self.optimizer_scope == "all" else ("b", "d")
        return {name: dict(options) for name, _ in self.named_parameters() if name not in others}

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Tensor], max_length: int) -> Self:
        """Make the filter of a published RTF layer (github.com/ruke1ire/RTF).

        A bidirectional layer of D channels becomes a filter of 2 D channels: first the forward
        kernels, then the backward kernels, as `LongConvolution(filter, bidirectional=True)`
        expects.

        Args:
            state_dict: The state dict of the layer. `ab` (denominators + channels, n) holds first
                the denominators and then the truncated numerators. `h_0` (channels) holds the
                direct terms. If the layer has its l1 constraint, `scalar` (denominators) exists,
                and the filter gets the stability "montel". The number of denominators follows from
                the numbers of rows of `ab` and `h_0`.
            max_length: The layer's `trunc_len`, which its state dict does not contain.

        Raises:
            ValueError: if there are other keys, or if the shapes do not fit together.
        """
        required, optional = {"ab", "h_0"}, {"scalar"}
        missing = sorted(required - state_dict.keys())
        others = sorted(state_dict.keys() - required - optional)
        if missing or others:
            kinds = (("lacks", missing), ("also has", others))
            found = " and ".join(f"{kind} {', '.join(keys)}" for kind, keys in kinds if keys)
            raise ValueError(
                "the state dict of a published RTF layer has the keys ab and h_0, and scalar if it "
                f"is constrained; this one {found}."
            )
        ab, h_0, scalar = state_dict["ab"], state_dict["h_0"], state_dict.get("scalar")
        channels = len(h_0) if h_0.ndim == 1 else 0
        denominators = len(ab) - channels if ab.ndim == 2 else 0
        fits = channels > 0 and denominators > 0 and channels % denominators == 0
        if not fits or (scalar is not None and scalar.shape != (denominators,)):
            shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
            raise ValueError(
                "a published RTF layer has h_0 (channels), ab (denominators + channels, state "
                "size) and scalar (denominators), if any, the denominators dividing the channels; "
                f"got {', '.join(f'{name} {shape}' for name, shape in shapes.items())}."
            )
        made = cls(
            channels,
            ab.shape[1],
            max_length,
            stability="none" if scalar is None else "montel",
            num_denominators=denominators,
        )
        made.to(device=ab.device, dtype=ab.dtype)
        with torch.no_grad():
            made.a.copy_(ab[:denominators])
            made.b.copy_(ab[denominators:])
            made.d.copy_(h_0)
            if scalar is not None:
                made.slack.copy_(scalar)
        return made


def _held_taps(system: TransferFunction, step: float, length: int) -> Tensor:
    """Return taps (*C, length), float64, for an input that is held over `step` samples."""
    if step == int(step):
        taps = system.impulse_response(int(step) * length).double()
        return taps.unflatten(-1, (length, int(step))).sum(-1)
    return to_modal(system).resample(step).impulse_response(length)


def _powers(poles: Tensor, step: float) -> Tensor:
    """Return the denominators (K, n), float64, whose poles are powers of poles (K, n)."""
    powers = torch.where(poles == 0, 0, torch.exp(step * poles.log())).cpu().numpy()
    a = torch.from_numpy(np.stack([np.poly(row)[1:] for row in powers]))
    if a.is_complex() and bool((a.imag.abs() > _REAL * a.abs().amax()).any()):
        raise ValueError(
            f"a pole on the negative real axis has real powers for integer steps only; got {step}."
        )
    return (a.real if a.is_complex() else a).to(poles.device)


def _bounded(theta: Tensor, slack: Tensor) -> Tensor:
    """Return `θ / (‖θ‖₁ + |slack|)`, denominators (num_denominators, n) of an l1 norm below 1."""
    norm = theta.abs().sum(-1, keepdim=True)
    return theta / (norm + slack.to(theta).abs().unsqueeze(-1) + _SLACK)
