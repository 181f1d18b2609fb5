"""Load checkpoints of published models as Gramian models.

`load(path)` recognizes a checkpoint by its keys, shapes and configuration. It returns a model that
computes the same outputs as the published implementation, and the model's tokenizer if one is
known. The model is a `GramianForCausalLM`, or a classifier if the checkpoint is a fine-tuned
HyenaDNA. `convert(path, folder)` writes the folder of this model layer by layer, so that a
checkpoint may be larger than the memory.

Each file of the package has related formats: safari's Hyena language models and HyenaDNA
(`hyena_lm.py`), the published Hyena-RTF (`hyena_rtf.py`), StripedHyena and Evo
(`striped_hyena.py`), and StripedHyena 2 and Evo 2 (`striped_hyena_2.py`).
"""

from gramian._extras import require

require("gramian.checkpoints", "models", "transformers", "safetensors")

from gramian.checkpoints import (  # noqa: F401
    hyena_lm,
    hyena_rtf,
    striped_hyena,
    striped_hyena_2,
)
from gramian.checkpoints._convert import ConversionReport, convert
from gramian.checkpoints._format import FORMATS, Format, register
from gramian.checkpoints._load import LoadedCheckpoint, load
from gramian.checkpoints.published import PUBLISHED
from gramian.checkpoints.tokenizers import DNATokenizer, EvoTokenizer

__all__ = [
    "FORMATS",
    "PUBLISHED",
    "ConversionReport",
    "DNATokenizer",
    "EvoTokenizer",
    "Format",
    "LoadedCheckpoint",
    "convert",
    "load",
    "register",
]
