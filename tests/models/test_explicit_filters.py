"""Models of explicit filters and of real modes do all that other models do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import gramian
from gramian import checkpoints
from gramian.checkpoints.files import read_tensors
from gramian.filters import ExplicitFilter
from gramian.models import GramianConfig, GramianForCausalLM, load

DATA = Path(__file__).parents[1] / "data"
FILTERS: dict[str, dict[str, Any]] = {
    "short": {"type": "explicit", "taps": 7, "groups": 3},
    "medium": {"type": "explicit", "taps": 100, "groups": 4, "skip": True, "lr": 1e-4},
    "long": {"type": "explicit", "taps": 150, "lr": 1e-4},
    "real": {"type": "modal", "orders": 4, "real": True},
}


def make(filter: Any, **changes: Any) -> GramianForCausalLM:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_heads": 3,
        "mixers": "hyena",
        "filter": filter,
        "max_position_embeddings": 160,
    }
    return GramianForCausalLM(GramianConfig(**(settings | changes)))


@pytest.mark.parametrize("name", FILTERS)
def test_they_train_save_load_distil_and_are_measured(name: str, tmp_path: Path) -> None:
    model = make(FILTERS[name])
    for layer in model.model.layers:  # smooth, so that there are smaller recurrences
        if isinstance(layer.mixer.filter, ExplicitFilter):
            kernel = layer.mixer.filter.kernel
            rates = torch.linspace(0.1, 0.3, len(kernel))[:, None]
            kernel.data = torch.exp(-rates * torch.arange(kernel.shape[1]))
    ids = torch.randint(50, (2, 200))  # longer than any filter
    optimizer = torch.optim.AdamW(gramian.parameter_groups(model, lr=0.01, weight_decay=0.0))
    losses = []
    for _ in range(16):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.3
    model.eval().save_pretrained(tmp_path)
    again = load(tmp_path)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        assert torch.equal(again(ids, use_cache=False).logits, whole)
        output = model(ids[:, :100], use_cache=True)
        last = model(ids[:, 100:], past_key_values=output.past_key_values).logits
    torch.testing.assert_close(last, whole[:, 100:], rtol=1e-3, atol=2e-4)
    report = gramian.analyze(model, ids[:1, :60], every=20)
    assert len(report.main.layers) == 2
    if name != "real":
        small, distilled = gramian.distill(model, order=8)
        assert distilled.max_relative_error < 0.3
        assert distilled.distilled_state_bytes <= distilled.original_state_bytes
        assert all(layer.kept == (name == "short") for layer in distilled.layers)
        with torch.no_grad():
            assert small(ids, use_cache=False).logits.isfinite().all()


@pytest.mark.parametrize("mixer", ["multi_hyena", "long_convolution"])
def test_channels_that_share_taps_are_those_of_repeated_ones(mixer: str) -> None:
    heads = 3 if mixer == "multi_hyena" else 12
    model = make({"type": "explicit", "taps": 9, "groups": 3}, mixers=mixer).eval()
    repeated = make({"type": "explicit", "taps": 9}, mixers=mixer).eval()
    repeated.load_state_dict(
        {
            name: value.repeat_interleave(heads // 3, dim=0) if "kernel" in name else value
            for name, value in model.state_dict().items()
        }
    )
    ids = torch.randint(50, (2, 40))
    torch.testing.assert_close(model(ids).logits, repeated(ids).logits)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="groups must divide the 12 channels; got 5"):
        make({"type": "explicit", "taps": 9, "groups": 5})
    with pytest.raises(ValueError, match="taps must be an integer of at least 1; got 0"):
        make({"type": "explicit", "taps": 0})
    with pytest.raises(ValueError, match=r"at least one tap; got torch\.float32 of shape \(3,\)"):
        ExplicitFilter.from_kernel(torch.zeros(3))
    with pytest.raises(ValueError, match="one activation for each of the 2 layers; got 1"):
        make(FILTERS["short"], hidden_act=["silu"])
    with pytest.raises(ValueError, match=r"two positive normal.*got \[1\.0\]"):
        make(FILTERS["short"], mixers={"type": "hyena", "fp8_scales": [1.0]})
    with pytest.raises(ValueError, match=r"must be 2 finite numbers, half of the rotated.*got 3"):
        make(
            FILTERS["short"],
            mixers={"type": "softmax_attention", "rotary_frequencies": [1.0, 0.1, 0.01]},
        )


@pytest.mark.parametrize("name", ["hidden_act", "mixers", "filter"])
def test_layers_added_later_need_entries_of_their_own(name: str) -> None:
    entry = {"hidden_act": "gelu", "mixers": "hyena", "filter": FILTERS["short"]}[name]
    changes: dict[str, Any] = {"filter": FILTERS["short"], name: [entry, entry]}
    config = make(**changes).config
    config.num_hidden_layers = 3
    with pytest.raises(ValueError, match=f"{name} must have one entry for each of the 3 layers; g"):
        GramianForCausalLM(config)


def test_a_filter_of_given_taps_has_them() -> None:
    kernel = torch.randn(2, 5)
    filter = ExplicitFilter.from_kernel(kernel, max_length=20, channels=4)
    expected = torch.nn.functional.pad(kernel.repeat_interleave(2, 0), (0, 15))
    assert torch.equal(filter().impulse_response(20), expected)
    assert torch.equal(filter(3).impulse_response(3), expected[:, :3])


@torch.no_grad()
def test_the_first_striped_hyena_takes_stored_frequencies_too(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    file = DATA / "stripedhyena_gqa.safetensors"
    tensors = read_tensors(file)
    names = [name for name in tensors if name.endswith("inv_freq")]
    assert names
    for name in names:
        tensors[name] = (1.01 * tensors[name]).bfloat16()
    save_file(tensors, tmp_path / "stripedhyena_gqa.safetensors")
    config = file.with_suffix(".json")
    (tmp_path / config.name).write_text(config.read_text())
    model = checkpoints.load(tmp_path / "stripedhyena_gqa.safetensors").model
    held = [
        list(layer.mixer.rotary_frequencies)
        for layer in model.model.layers
        if hasattr(layer.mixer, "rotary_frequencies")
    ]
    assert held == [tensors[name].tolist() for name in sorted(names)]
    original = checkpoints.load(file).model
    ids = torch.randint(model.config.vocab_size, (1, 30))
    assert (model(ids).logits - original(ids).logits).abs().max() > 1e-4
