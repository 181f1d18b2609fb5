"""Provide Hugging Face models. Importing this package registers them with transformers."""

from gramian._extras import require

require("gramian.models", "models", "transformers", "safetensors")

from gramian.models.alphabet import allowed_tokens, restrict_generation
from gramian.models.backbone import GramianModel
from gramian.models.blocks import (
    GramianBlock,
    GramianGLUBlock,
    GramianMixerBlock,
    GramianMLP,
    build_mixer,
)
from gramian.models.cache import GramianCache, GramianCacheLayer
from gramian.models.cards import write_card
from gramian.models.classification import GramianForSequenceClassification
from gramian.models.configuration import MIXERS, GramianConfig
from gramian.models.layers import BLOCKS, GramianLayer, register_block
from gramian.models.loading import load, load_any
from gramian.models.modeling import GramianForCausalLM
from gramian.models.pairs import GramianForPairClassification
from gramian.models.pretrained import GramianPreTrainedModel
from gramian.models.reconstruction import GramianForReconstruction
from gramian.models.registration import register
from gramian.models.signal import GramianForSignalRegression
from gramian.models.token_classification import GramianForTokenClassification
from gramian.models.tokenizer import ByteTokenizer

__all__ = [
    "BLOCKS",
    "MIXERS",
    "ByteTokenizer",
    "GramianBlock",
    "GramianCache",
    "GramianCacheLayer",
    "GramianConfig",
    "GramianForCausalLM",
    "GramianForPairClassification",
    "GramianForReconstruction",
    "GramianForSequenceClassification",
    "GramianForSignalRegression",
    "GramianForTokenClassification",
    "GramianGLUBlock",
    "GramianLayer",
    "GramianMLP",
    "GramianMixerBlock",
    "GramianModel",
    "GramianPreTrainedModel",
    "allowed_tokens",
    "build_mixer",
    "load",
    "load_any",
    "register_block",
    "restrict_generation",
    "write_card",
]

register()
