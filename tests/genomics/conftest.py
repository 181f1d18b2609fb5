"""Small models of every kind of layer, and genomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from gramian.checkpoints import DNATokenizer
from gramian.models import GramianConfig, GramianForCausalLM

FILTERS: dict[str, dict[str, Any]] = {
    "implicit": {"type": "implicit", "hidden": 16, "embedding_features": 5},
    "modal": {"type": "modal", "orders": 3},
    "explicit": {"type": "explicit", "taps": 29},
}
MAX_LENGTH = 64

KINDS: dict[str, dict[str, Any]] = {
    "hyena/modal": {"mixers": "hyena", "filter": FILTERS["modal"]},
    "hyena/implicit": {"mixers": "hyena", "filter": FILTERS["implicit"]},
    "multi_hyena": {"mixers": "multi_hyena", "filter": FILTERS["modal"]},
    "long_convolution/explicit": {"mixers": "long_convolution", "filter": FILTERS["explicit"]},
    "striped": {"mixers": ["hyena", "softmax_attention"], "filter": FILTERS["modal"]},
    "s6": {"mixers": "s6"},
    "gated_delta_net": {"mixers": "gated_delta_net"},
}

MakeModel = Callable[..., GramianForCausalLM]


@pytest.fixture(autouse=True, scope="session")
def quiet() -> None:
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """The name of a model of every kind of layer."""
    return request.param


_MADE: dict[str, GramianForCausalLM] = {}


@pytest.fixture
def make_model() -> MakeModel:
    """Makes a model of a kind in float32 and evaluation mode, with weights that matter."""

    def make(kind: str = "hyena/modal") -> GramianForCausalLM:
        if kind not in _MADE:
            torch.manual_seed(7)
            config = GramianConfig(
                **KINDS[kind],
                vocab_size=16,
                hidden_size=12,
                num_hidden_layers=2,
                num_heads=3,
                attention={"kv_heads": 1},
                max_position_embeddings=MAX_LENGTH,
                initializer_range=0.4,
            )
            _MADE[kind] = GramianForCausalLM(config).eval()
        return _MADE[kind]

    return make


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return DNATokenizer()


def drawn(length: int, seed: int = 0, letters: str = "ACGT") -> str:
    """A sequence at random."""
    return "".join(np.random.default_rng(seed).choice([*letters], size=length))
