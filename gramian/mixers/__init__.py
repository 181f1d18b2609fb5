"""Provide mixers, the modules of a model that combine the positions of a sequence."""

from __future__ import annotations

import importlib
from typing import Any

from gramian.mixers._call import MixerCall
from gramian.mixers.block import Block
from gramian.mixers.convolution_mixer import ConvolutionMixer
from gramian.mixers.gated_delta_net import GatedDeltaNet
from gramian.mixers.gated_linear_attention import GatedLinearAttention
from gramian.mixers.gla_s6 import GLAS6
from gramian.mixers.hyena import Hyena, HyenaState
from gramian.mixers.linear_attention import LinearAttention
from gramian.mixers.linear_recurrence import LinearRecurrence, LinearRecurrenceState
from gramian.mixers.long_convolution import LongConvolution, LongConvolutionState
from gramian.mixers.mixer import Mixer, MixerRecurrence
from gramian.mixers.multi_hyena import MultiHyena, MultiHyenaState
from gramian.mixers.registry import MIXERS, build, register
from gramian.mixers.s6 import S6
from gramian.mixers.segments import Segments
from gramian.mixers.short_convolution import ShortConvolution
from gramian.mixers.softmax_attention import SoftmaxAttention, SoftmaxAttentionState
from gramian.mixers.weighted_linear_attention import WeightedLinearAttention

__all__ = [
    "GLAS6",
    "MIXERS",
    "S6",
    "Block",
    "ConvolutionMixer",
    "GatedDeltaNet",
    "GatedLinearAttention",
    "Hyena",
    "HyenaState",
    "LinearAttention",
    "LinearRecurrence",
    "LinearRecurrenceState",
    "LongConvolution",
    "LongConvolutionState",
    "Mixer",
    "MixerCall",
    "MixerRecurrence",
    "MultiHyena",
    "MultiHyenaState",
    "Segments",
    "ShortConvolution",
    "SoftmaxAttention",
    "SoftmaxAttentionState",
    "WeightedLinearAttention",
    "build",
    "register",
]

_MOVED = ("GateInitialization", "InitializedGates", "Observer", "initialize_gates")


def __getattr__(name: str) -> Any:
    if name in _MOVED:  # these names moved to gramian.memory
        return getattr(importlib.import_module("gramian.memory"), name)
    raise AttributeError(f"module 'gramian.mixers' has no attribute {name!r}")
