"""Mixers: modules that mix a sequence."""

from gramian.mixers._mixer import Mixer, MixerRecurrence, ShortConvolution
from gramian.mixers.block import Block
from gramian.mixers.hyena import Hyena, HyenaState
from gramian.mixers.long_convolution import LongConvolution, LongConvolutionState
from gramian.mixers.multi_hyena import MultiHyena, MultiHyenaState
from gramian.mixers.softmax_attention import SoftmaxAttention, SoftmaxAttentionState

__all__ = [
    "Block",
    "Hyena",
    "HyenaState",
    "LongConvolution",
    "LongConvolutionState",
    "Mixer",
    "MixerRecurrence",
    "MultiHyena",
    "MultiHyenaState",
    "ShortConvolution",
    "SoftmaxAttention",
    "SoftmaxAttentionState",
]
