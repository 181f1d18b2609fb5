"""Small models of every mixer and filter, seeded, their weights large enough to matter."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from gramian.mixers import MIXERS
from gramian.models import GramianConfig, GramianForCausalLM

CONVOLUTIONS = ["multi_hyena", "hyena", "long_convolution"]
LINEAR_RECURRENCES = [name for name, kind in MIXERS.items() if kind.family == "recurrence"]

FILTERS: dict[str, dict[str, Any]] = {
    "implicit": {"type": "implicit", "hidden": 16, "embedding_features": 5},
    "modal": {"type": "modal", "orders": 3},
    "rtf": {"type": "rtf", "state_size": 4, "initialization": "montel"},
}
MAX_LENGTH = 40
VOCABULARY = 50

KINDS: dict[str, dict[str, Any]] = {
    **{
        f"{mixer}/{name}": {"mixers": mixer, "filter": filter_config}
        for (mixer, (name, filter_config)) in itertools.product(CONVOLUTIONS, FILTERS.items())
    },
    **{name: {"mixers": name} for name in LINEAR_RECURRENCES},
    "attention": {"mixers": "softmax_attention"},
    "striped": {"mixers": ["hyena", "softmax_attention"]},
    "delta_hybrid": {"mixers": ["gated_delta_net", "softmax_attention"]},
    "glu": {"mixers": "long_convolution", "block": "glu"},
    "mixer": {"mixers": "multi_hyena", "block": "mixer"},
}

# Of them, one of each sort of state.
SOME_KINDS = ("hyena/implicit", "multi_hyena/modal", "s6", "striped")

MakeModel = Callable[..., GramianForCausalLM]


@pytest.fixture(autouse=True, scope="session")
def quiet() -> None:
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(
    params=[
        *CONVOLUTIONS,
        pytest.param(["hyena", "softmax_attention"], id="hybrid"),
        pytest.param(["long_convolution", "gated_linear_attention"], id="gated_hybrid"),
        pytest.param(["multi_hyena", "gated_delta_net"], id="delta_hybrid"),
    ]
)
def mixer(request: pytest.FixtureRequest) -> Any:
    """What `mixers` says: what has no filter beside a convolution, so that every filter meets it.

    All linear recurrences by themselves are in `test_recurrent_models.py`.
    """
    return request.param


@pytest.fixture(params=FILTERS)
def filter_config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return FILTERS[request.param]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What makes a model of every kind: each mixer with each filter, hybrids, blocks."""
    return KINDS[request.param]


@pytest.fixture(
    params=[
        kind if kind in SOME_KINDS else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS
    ]
)
def every_kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What makes a model of every kind. All but one of each sort of state are slow."""
    return KINDS[request.param]


@pytest.fixture(params=SOME_KINDS)
def some_kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What makes a model of one kind of each sort of state."""
    return KINDS[request.param]


@pytest.fixture
def make_config() -> Callable[..., GramianConfig]:
    def make(**kwargs: Any) -> GramianConfig:
        defaults = {
            "vocab_size": VOCABULARY,
            "hidden_size": 12,
            "num_hidden_layers": 2,
            "num_heads": 3,
            "filter": FILTERS["implicit"],
            "attention": {"kv_heads": 1, "window": 33},
            "max_position_embeddings": MAX_LENGTH,
            "initializer_range": 0.4,
        }
        return GramianConfig(**(defaults | kwargs))

    return make


@pytest.fixture
def make_model(make_config: Callable[..., GramianConfig]) -> MakeModel:
    """Makes a float64 model in evaluation mode."""

    def make(**kwargs: Any) -> GramianForCausalLM:
        torch.manual_seed(7)
        return GramianForCausalLM(make_config(**kwargs)).double().eval()

    return make


@pytest.fixture
def model(make_model: MakeModel) -> GramianForCausalLM:
    return make_model()


@pytest.fixture
def make_tokens() -> Callable[[int, int], torch.Tensor]:
    generator = torch.Generator().manual_seed(11)

    def make(batch: int, length: int) -> torch.Tensor:
        return torch.randint(VOCABULARY, (batch, length), generator=generator)

    return make
