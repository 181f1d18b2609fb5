"""Every kind of model on a device that is not the CPU: training, padding, generation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from gramian.models import GramianConfig, GramianForCausalLM
from gramian.testing import recorded_waits
from tests.devices.conftest import refuse_undocumented
from tests.models.conftest import FILTERS, KINDS, MAX_LENGTH, VOCABULARY


def make(kind: str, device: torch.device) -> tuple[GramianForCausalLM, GramianForCausalLM]:
    """The same model in double precision on the CPU and on the device."""
    torch.manual_seed(0)
    mixers = KINDS[kind]["mixers"]
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 6,
        "num_hidden_layers": len(mixers) if isinstance(mixers, list) else 1,
        "num_heads": 3,
        "filter": FILTERS["implicit"],
        "attention": {"kv_heads": 1, "window": 33},
        "max_position_embeddings": MAX_LENGTH,
        "initializer_range": 0.4,
        "dropout": 0.0,
    }
    model = GramianForCausalLM(GramianConfig(**(options | KINDS[kind]))).double()
    there = copy.deepcopy(model).to(device)
    there.tie_weights()  # to a device in Python, PyTorch moves every use of a weight by itself
    return model, there


def tokens(length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCABULARY, (2, length), generator=generator)


def train(model: GramianForCausalLM, ids: torch.Tensor) -> list[torch.Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loss = model(ids, labels=ids).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    return [loss.detach(), norm, *(one.detach() for one in model.parameters())]


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_waits_for_the_check_of_labels_only(
    kind: str, device: torch.device
) -> None:
    here, there = make(kind, device)
    expected = train(here, tokens(20))
    ids = tokens(20).to(device)
    with recorded_waits() as waits:
        actual = train(there, ids)
    refuse_undocumented("training", waits)
    for one, other in zip(actual, expected, strict=True):
        assert one.device == device
        torch.testing.assert_close(one.cpu(), other)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_generation_waits_for_no_token(kind: str, device: torch.device) -> None:
    here, there = (model.eval() for model in make(kind, device))
    ids = tokens(20)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    given = ids.to(device), mask.to(device)
    with recorded_waits() as waits:
        outputs = there(given[0][:, :17], attention_mask=given[1][:, :17])
    refuse_undocumented("cache", waits)
    cache = outputs.past_key_values
    pieces = [outputs.logits]
    with recorded_waits() as waits:
        for t in range(17, 20):
            token = given[0][:, t : t + 1]
            pieces.append(there(token, past_key_values=cache).logits)
    assert not waits
    actual, expected = torch.cat(pieces, 1).cpu(), here(ids, attention_mask=mask).logits
    real = mask.bool()
    torch.testing.assert_close(actual[real], expected[real])


@torch.no_grad()
def test_written_tokens_are_those_of_the_cpu(some_kind: str, device: torch.device) -> None:
    here, there = (model.eval() for model in make(some_kind, device))
    ids = tokens(9)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    given = ids.to(device)
    with recorded_waits() as waits:
        written = there.generate(given, **options)
    refuse_undocumented("generation", waits)
    assert torch.equal(written.cpu(), here.generate(ids, **options))


@pytest.fixture(params=["hyena/implicit", "multi_hyena/modal", "s6", "striped"])
def some_kind(request: pytest.FixtureRequest) -> str:
    return request.param
