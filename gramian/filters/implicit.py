r"""Hyena's implicit filter: a sine MLP of time, multiplied by an exponential window.

The taps are `h_t = MLP(z_t) · (exp(-|α| t) + shift)`, where `z_t` are features of time (Hyena, Poli
et al. 2023, section 3.3 and appendix D.3). At tap 0, `bias` is added.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from gramian.filters._filter import Filter, check_lr, register
from gramian.ops.lengths import at_most
from gramian.systems import FIR

__all__ = ["ImplicitFilter"]


@register("implicit")
class ImplicitFilter(Filter):
    """A filter of `max_length` taps, which a small network computes from time.

    Args:
        channels: The number of filters.
        max_length: The number of taps. Over these taps, time runs from 0 to 1.
        embedding_features: The number of features of time: time itself and pairs of a cosine and a
            sine. It is odd and at least 3.
        hidden: The width of the MLP.
        inner_layers: The number of hidden layers between the first and the last.
        frequency: The initial frequency ω of the sine activations `sin(ω x)`.
        train_frequency: Whether ω is trained.
        fast_decay: The fraction of the kernel after which the fastest window has fallen to
            `decay_target`.
        slow_decay: The fraction of the kernel after which the slowest window has fallen to
            `decay_target`. The windows of the channels are spread evenly between the fastest and
            the slowest.
        decay_target: The value of a window at the end of its decay.
        shift: A number that is added to the window, so that it does not fall to zero.
        modulate: Whether to apply the window at all.
        normalized: Whether to divide every tap by its l1 norm over the *channels*, as the published
            code does.
        bias: Whether to add a trainable direct term at tap 0.
        trainable_time: Whether the time features are parameters, with the learning rate `time_lr`,
            or fixed.
        stored_time: Whether fixed time features are saved with the weights and loaded with them. By
            default they are computed again. Only its stored features reproduce a published model
            exactly. Other rounding changes the kernel, since the MLP multiplies differences by ω in
            every layer.
        lr: The learning rate of the MLP; by default that of the model. The direct term has the
            learning rate and the weight decay of the model, as in the published code.
        time_lr: The learning rate of trained time features. The default is that of the published
            layer; its configuration for the Pile has the learning rate of the model.

    Raises:
        ValueError: if `embedding_features` is even or below 3, or if a learning rate is negative.
    """

    def __init__(
        self,
        channels: int,
        max_length: int,
        embedding_features: int = 33,
        hidden: int = 64,
        inner_layers: int = 2,
        frequency: float = 10.0,
        train_frequency: bool = True,
        fast_decay: float = 0.3,
        slow_decay: float = 1.5,
        decay_target: float = 1e-2,
        shift: float = 0.0,
        modulate: bool = True,
        normalized: bool = False,
        bias: bool = True,
        trainable_time: bool = False,
        stored_time: bool = False,
        lr: float | None = None,
        time_lr: float | None = 1e-5,
    ) -> None:
        super().__init__(channels, max_length)
        if embedding_features < 3 or embedding_features % 2 == 0:
            raise ValueError(
                f"embedding_features must be odd and at least 3; got {embedding_features}."
            )
        if inner_layers < 0 or hidden < 1:
            raise ValueError(
                "hidden must be at least 1 and inner_layers at least 0; got "
                f"{hidden} and {inner_layers}."
            )
        self.embedding_features = embedding_features
        self.hidden = hidden
        self.inner_layers = inner_layers
        self.initial_frequency = float(frequency)
        self.train_frequency = train_frequency
        self.fast_decay = fast_decay
        self.slow_decay = slow_decay
        self.decay_target = decay_target
        self.shift = shift
        self.modulate = modulate
        self.normalized = normalized
        self.trainable_time = trainable_time
        self.stored_time = stored_time
        self.lr = check_lr(lr)
        self.time_lr = check_lr(time_lr, "time_lr")

        widths = [embedding_features] + [hidden] * (inner_layers + 1)
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(widths))
        self.output = nn.Linear(hidden, channels, bias=False)
        frequency_value = torch.empty(hidden)
        if train_frequency:
            self.frequency = nn.Parameter(frequency_value)
        else:
            self.register_buffer("frequency", frequency_value)
        features = torch.empty(max_length, embedding_features)
        if trainable_time:
            self.features = nn.Parameter(features)
        else:
            self.register_buffer("features", features, persistent=stored_time)
        self.register_buffer("decay", torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    features: Tensor
    frequency: Tensor
    decay: Tensor

    def reset_parameters(self) -> None:
        """Draw the linear layers as PyTorch does, draw a standard normal bias, and set ω.

        `reset_buffers` fills the buffers.
        """
        for layer in [*self.layers, self.output]:
            assert isinstance(layer, nn.Linear)
            layer.reset_parameters()
        nn.init.constant_(self.frequency, self.initial_frequency)
        if self.bias is not None:
            nn.init.normal_(self.bias)
        self.reset_buffers()

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """Compute the features of time and the decay rates from the configuration."""
        like: dict[str, Any] = {"dtype": torch.float64, "device": self.features.device}
        length = self.max_length
        bands = (self.embedding_features - 1) // 2
        time = torch.linspace(0, 1, length, **like).unsqueeze(-1)
        bands_f = torch.linspace(1e-4, bands - 1, bands, **like)
        angle = 2 * math.pi / length * torch.arange(length, **like).unsqueeze(-1) * bands_f
        self.features.copy_(torch.cat([time, angle.cos(), -angle.sin()], dim=-1))
        quick = math.log(self.decay_target) / self.fast_decay
        slow = math.log(self.decay_target) / self.slow_decay
        self.decay.copy_(torch.linspace(slow, quick, self.channels, **like).abs())

    def forward(self, length: int | None = None) -> FIR:
        count = at_most(length, self.max_length)
        hidden = self.features[:count]
        for layer in self.layers:
            hidden = torch.sin(self.frequency * layer(hidden))
        taps = self.output(hidden)  # (length, channels)
        if self.modulate:
            time = torch.linspace(0, 1, self.max_length, dtype=taps.dtype, device=taps.device)
            window = torch.exp(-time[:count].unsqueeze(-1) * self.decay.to(taps.dtype))
            taps = taps * (window + self.shift)
        if self.normalized:
            taps = taps / taps.abs().sum(-1, keepdim=True)
        kernel = taps.mT
        if self.bias is not None:
            first = kernel[:, :1] + self.bias.unsqueeze(-1)
            kernel = torch.cat([first, kernel[:, 1:]], dim=-1)
        return FIR(kernel)

    def config(self) -> dict[str, Any]:
        return {
            **super().config(),
            "embedding_features": self.embedding_features,
            "hidden": self.hidden,
            "inner_layers": self.inner_layers,
            "frequency": self.initial_frequency,
            "train_frequency": self.train_frequency,
            "fast_decay": self.fast_decay,
            "slow_decay": self.slow_decay,
            "decay_target": self.decay_target,
            "shift": self.shift,
            "modulate": self.modulate,
            "normalized": self.normalized,
            "bias": self.bias is not None,
            "trainable_time": self.trainable_time,
            "stored_time": self.stored_time,
            "lr": self.lr,
            "time_lr": self.time_lr,
        }

    def optimizer_hints(self) -> dict[str, dict[str, float]]:
        """Return no weight decay and the learning rates, for all parameters but the direct term."""
        hints: dict[str, dict[str, float]] = {}
        for name, _ in self.named_parameters():
            rate = self.time_lr if name == "features" else self.lr
            if name != "bias":
                hints[name] = {"weight_decay": 0.0} | ({} if rate is None else {"lr": rate})
        return hints
