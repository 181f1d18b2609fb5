"""How much memory distilling takes: what it holds beside the model, counted in living storages."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from gramian.distillation import _distill, _foreign, _quality, distill, distill_to_budget
from gramian.models import GramianConfig, GramianForCausalLM, load

LAYERS, WIDTH, TAPS = 6, 24, 257


def make() -> GramianForCausalLM:
    torch.manual_seed(0)
    return GramianForCausalLM(
        GramianConfig(
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_heads=3,
            filter={"type": "implicit", "frequency": 1.0},
            max_position_embeddings=TAPS,
        )
    ).eval()


def living() -> int:
    """Bytes of the storages of all tensors of this process."""
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What lives whenever a layer is reduced, in bytes."""
    found: list[int] = []
    for place in (_distill, _foreign):

        def spied(*args: Any, reduce_filter: Any = place.reduce_filter, **options: Any) -> Any:
            gc.collect()
            found.append(living())
            return reduce_filter(*args, **options)

        monkeypatch.setattr(place, "reduce_filter", spied)
    return found


def layer_bytes(model: GramianForCausalLM) -> int:
    return sum(weight.nbytes for weight in model.model.layers[0].parameters())


def test_at_most_one_layer_is_held_beside_the_model(held: list[int]) -> None:
    model = make()
    before, layer = living(), layer_bytes(model)
    small, _ = distill(model, order=2, inplace=True)
    assert small is model
    kernel = 4 * WIDTH * TAPS
    modes = sum(weight.nbytes for weight in model.model.layers[0].mixer.filter.parameters())
    assert len(held) == LAYERS
    assert max(held) - before <= 2 * kernel + LAYERS * 4 * modes < layer + 2 * kernel
    gc.collect()
    assert living() - before < layer


def test_other_modules_are_read_one_at_a_time(held: list[int]) -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(9)))
    taps = torch.exp(-0.05 * torch.arange(1000.0))

    def kernel(module: nn.Module) -> torch.Tensor:
        return module.weight[0, :, None] * taps  # (8, 1000)

    before = living()
    paths = {str(index): kernel for index in range(9)}
    small, report = distill(model, order=2, filters=paths, inplace=True)
    assert small is model and len(report.layers) == 9
    assert max(held) - before < 3 * 4 * 8 * 1000


def test_in_place_gives_the_same_model() -> None:
    model, tokens = make(), torch.arange(30)[None]
    copy, report = distill(model, order=2)
    assert copy is not model
    with torch.no_grad():
        expected = copy(tokens).logits
        original = model(tokens).logits
    same, other = distill(model, order=2, inplace=True)
    assert other.layers == report.layers
    assert (other.original_state_bytes, other.distilled_state_bytes) == (
        report.original_state_bytes,
        report.distilled_state_bytes,
    )
    assert same.config.to_dict() == copy.config.to_dict()
    with torch.no_grad():
        torch.testing.assert_close(same(tokens).logits, expected, rtol=0, atol=0)
    assert not torch.equal(original, expected)


def test_an_error_leaves_the_model_as_it_was() -> None:
    model, tokens = make(), torch.arange(30)[None]
    with torch.no_grad():
        before = model(tokens).logits
    last = model.model.layers[-1].mixer.filter
    weight = next(iter(last.parameters()))
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="layer 5 cannot be distilled"):
        distill(model, order=2, inplace=True)
    with torch.no_grad():
        weight.copy_(kept)
        torch.testing.assert_close(model(tokens).logits, before, rtol=0, atol=0)


def test_a_search_tries_filters_in_one_model() -> None:
    model, tokens = make(), torch.arange(60).reshape(2, 30)
    kept = make().state_dict()
    copy, report = distill_to_budget(model, tokens, 0.5)
    assert all(torch.equal(model.state_dict()[name], kept[name]) for name in kept)
    same, other = distill_to_budget(model, tokens, 0.5, inplace=True)
    assert same is model
    assert report.quality is not None and other.quality is not None
    assert other.quality.trials == report.quality.trials
    first, second = copy.state_dict(), same.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_search_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = make(), torch.arange(60).reshape(2, 30)
    kept, config = make().state_dict(), model.config.to_dict()
    losses = iter([1.0])
    monkeypatch.setattr(_quality, "mean_loss", lambda *_: next(losses))
    with pytest.raises(StopIteration):
        distill_to_budget(model, tokens, 0.5, max_order=1, inplace=True)
    assert all(torch.equal(model.state_dict()[name], kept[name]) for name in kept)
    assert model.config.to_dict() == config


def test_saved_weights_are_mapped_and_not_copied(tmp_path: Path) -> None:
    """So a model that is larger than the memory is read as its layers need it."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("the system does not list what is mapped")
    make().save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    model = load(tmp_path)
    files = []
    for line in maps.read_text(encoding="utf-8").splitlines():
        begin, end = (int(place, 16) for place in line.split()[0].split("-"))
        if line.endswith(".safetensors"):
            files.append((begin, end))
    for name, weight in model.named_parameters():
        place = weight.data_ptr()
        assert any(begin <= place < end for begin, end in files), name
