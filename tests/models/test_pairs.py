"""Classification of pairs: the head by its definition, padding, saving, training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from gramian.models import GramianConfig, GramianForPairClassification

MakeConfig = Callable[..., GramianConfig]
MakeTokens = Callable[[int, int], torch.Tensor]
Make = Callable[..., GramianForPairClassification]

ENCODERS: dict[str, dict[str, Any]] = {
    "bidirectional": {"mixers": "long_convolution", "bidirectional": True},
    "glu": {"mixers": "long_convolution", "block": "glu", "norm": "batch"},
    "hyena": {"mixers": "hyena", "pooling": "last"},
}


@pytest.fixture(params=ENCODERS)
def encoder(request: pytest.FixtureRequest) -> dict[str, Any]:
    return ENCODERS[request.param]


@pytest.fixture
def make(make_config: MakeConfig) -> Make:
    """Makes a float64 model in evaluation mode."""

    def build(**kwargs: Any) -> GramianForPairClassification:
        torch.manual_seed(3)
        config = make_config(**({"num_labels": 3} | kwargs))
        return GramianForPairClassification(config).double().eval()

    return build


@torch.no_grad()
def test_the_head_compares_what_each_sequence_gives_alone(
    make: Make, make_tokens: MakeTokens, encoder: dict[str, Any]
) -> None:
    model, first, second = make(**encoder), make_tokens(4, 12), make_tokens(4, 7)
    vectors = []
    for tokens in (first, second):
        hidden = model.model(tokens, use_cache=False).last_hidden_state
        vectors.append(hidden[:, -1] if model.config.pooling == "last" else hidden.mean(1))
    x, y = vectors
    inner, _, outer = model.head
    features = torch.cat([x, y, x - y, x * y], -1)
    expected = outer(torch.nn.functional.gelu(inner(features)))
    outputs = model(input_ids=first, input_ids_2=second, labels=torch.tensor([0, 1, 2, 1]))
    assert outputs.logits.shape == (4, 3)
    assert_close(outputs.logits, expected)
    wanted = torch.nn.functional.cross_entropy(expected, torch.tensor([0, 1, 2, 1]))
    assert_close(outputs.loss, wanted)
    swapped = model(input_ids=second, input_ids_2=first).logits
    assert (swapped - expected).abs().max() > 1e-4


@pytest.mark.each
@pytest.mark.parametrize("sides", [(0, 3), (2, 0), (4, 4)])
@torch.no_grad()
def test_padding_leaves_no_trace(
    make: Make, make_tokens: MakeTokens, encoder: dict[str, Any], sides: tuple[int, int]
) -> None:
    model, first, second = make(**encoder), make_tokens(2, 9), make_tokens(2, 9)
    expected = model(input_ids=first, input_ids_2=second).logits
    given: dict[str, torch.Tensor] = {}
    for suffix, tokens, padding in (("", first, sides[0]), ("_2", second, sides[1])):
        given[f"input_ids{suffix}"] = torch.cat([make_tokens(2, padding), tokens], 1)
        if padding:
            mask = torch.ones(2, 9 + padding)
            mask[:, :padding] = 0
            given[f"attention_mask{suffix}"] = mask
    assert_close(model(**given).logits, expected)


@torch.no_grad()
def test_pairs_of_signals(make: Make, encoder: dict[str, Any]) -> None:
    model = make(input_size=2, num_labels=1, **encoder)
    first, second = (torch.randn(2, n, 2, dtype=torch.float64) for n in (9, 13))
    outputs = model(input_values=first, input_values_2=second, labels=torch.tensor([0.5, -1]))
    assert_close(outputs.loss, (outputs.logits[:, 0] - torch.tensor([0.5, -1])).square().mean())


def test_every_parameter_learns(
    make: Make, make_tokens: MakeTokens, encoder: dict[str, Any]
) -> None:
    model = make(**encoder).train()
    pair = {"input_ids": make_tokens(3, 30), "input_ids_2": make_tokens(3, 20)}
    model(**pair, labels=torch.tensor([0, 1, 2])).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_written_and_read(
    make: Make, make_tokens: MakeTokens, encoder: dict[str, Any], tmp_path: Path
) -> None:
    model = make(**encoder).float()
    model.save_pretrained(tmp_path)
    pair = {"input_ids": make_tokens(2, 9), "input_ids_2": make_tokens(2, 7)}
    read = GramianForPairClassification.from_pretrained(tmp_path)
    assert torch.equal(read(**pair).logits, model(**pair).logits)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"input_ids_2": None}, "give input_ids and input_ids_2"),
        ({"input_ids_2": torch.ones(3, 5).long()}, "as many sequences; got 2 and 3"),
        ({"attention_mask_2": torch.ones(2, 4)}, r"must be \(2, 6\) here; got \(2, 4\)"),
        ({"attention_mask": torch.zeros(2, 5)}, "must leave a real token in every sequence"),
        ({"labels": torch.ones(3).long()}, r"labels must be \(2,\) for single_label"),
    ],
)
def test_wrong_pairs_are_refused_in_one_sentence(
    make: Make, changes: dict[str, Any], sentence: str
) -> None:
    given = {"input_ids": torch.ones(2, 5).long(), "input_ids_2": torch.ones(2, 6).long()}
    with pytest.raises(ValueError, match=sentence) as caught:
        make()(**{**given, **changes})
    assert "\n" not in str(caught.value)
