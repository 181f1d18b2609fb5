"""Define the kinds of blocks. A block adds norms and residual connections to a layer's mixer.

A block of the kind "mlp" computes `h ← h + mixer(norm(h))`, and then `h ← h + mlp(norm(h))`. A
block of the kind "glu" is a `gramian.mixers.Block`. A block of the kind "mixer" computes
`h ← mixer(h)`. Each kind is a class that `gramian.models.layers` registers under its name.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers.activations import ACT2FN

from gramian.mixers import Block, Mixer, MixerCall, build
from gramian.models.configuration import GramianConfig
from gramian.models.layers import GramianLayer, register_block
from gramian.models.norms import apply_norm, make_norm
from gramian.ops.packed import Linear

__all__ = ["GramianBlock", "GramianGLUBlock", "GramianMLP", "GramianMixerBlock", "build_mixer"]


def build_mixer(config: GramianConfig, layer: int) -> Mixer:
    """Build the mixer of a layer, which maps (batch, length, hidden_size) to the same shape."""
    return build(
        config.mixer_config(layer),
        width=config.hidden_size,
        heads=config.num_heads,
        filter=config.filter_of(layer),
        max_length=config.max_position_embeddings,
        short_kernel=config.short_kernel,
        kernel_dropout=config.kernel_dropout,
        bidirectional=config.bidirectional,
    )


class GramianMLP(nn.Module):
    """An MLP, `W₃ (act(W₁ x) ∘ W₂ x)` if gated and `W₃ act(W₁ x)` if not, with optional biases."""

    def __init__(self, config: GramianConfig, layer: int = 0) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        width, inner = config.hidden_size, config.intermediate_size
        bias = config.mlp_bias
        self.gate_proj = Linear(width, inner, bias=bias) if config.gated_mlp else None
        self.up_proj = Linear(width, inner, bias=bias)
        self.down_proj = Linear(inner, width, bias=bias)
        self.activation = ACT2FN[config.activation_of(layer)]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (batch, length, hidden_size) to the same shape."""
        inner = self.up_proj(hidden_states)
        if self.gate_proj is None:
            return self.down_proj(self.activation(inner))
        return self.down_proj(self.activation(self.gate_proj(hidden_states)) * inner)


@register_block("mlp")
class GramianBlock(GramianLayer):
    """A layer with a mixer and an MLP. Each has a norm before it and a residual connection."""

    options = ("mlp_bias", "residual_in_fp32")

    def __init__(self, config: GramianConfig, layer: int) -> None:
        super().__init__(layer)
        self.mixer_norm = make_norm(config.norm, config.hidden_size, config.rms_norm_eps)
        self.mixer = build_mixer(config, layer)
        self.mlp_norm = make_norm(config.norm, config.hidden_size, config.rms_norm_eps)
        self.mlp = GramianMLP(config, layer)
        self.dropout = nn.Dropout(config.dropout)

    @classmethod
    def default_final_norm(cls, norm: str) -> str:
        return norm

    def mix(self, hidden_states: Tensor, call: MixerCall) -> Tensor:
        mixed = call(apply_norm(self.mixer_norm, hidden_states))
        hidden_states = hidden_states + self.dropout(mixed)
        return hidden_states + self.dropout(self.mlp(apply_norm(self.mlp_norm, hidden_states)))


@register_block("glu")
class GramianGLUBlock(GramianLayer):
    """A layer that is a `gramian.mixers.Block`, built from the configuration."""

    norms = ("rms", "layer", "batch")
    options = ("prenorm", "tied_dropout")

    def __init__(self, config: GramianConfig, layer: int) -> None:
        super().__init__(layer)
        self.block = Block(
            config.hidden_size,
            build_mixer(config, layer),
            norm=config.norm,
            eps=config.rms_norm_eps,
            prenorm=config.prenorm,
            dropout=config.dropout,
            tied_dropout=config.tied_dropout,
        )

    @property
    def mixer(self) -> Mixer:  # type: ignore[override]  # it never changes
        """The mixer inside the block."""
        return self.block.mixer

    def mix(self, hidden_states: Tensor, call: MixerCall) -> Tensor:
        return self.block.mix(hidden_states, call)


@register_block("mixer")
class GramianMixerBlock(GramianLayer):
    """A layer with a mixer and dropout, without a norm or a residual connection."""

    def __init__(self, config: GramianConfig, layer: int) -> None:
        super().__init__(layer)
        self.mixer = build_mixer(config, layer)
        self.dropout = nn.Dropout(config.dropout)

    @classmethod
    def default_final_norm(cls, norm: str) -> str:
        return "none"

    def mix(self, hidden_states: Tensor, call: MixerCall) -> Tensor:
        return self.dropout(call(hidden_states))
