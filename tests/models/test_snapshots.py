"""A generation state on disk: read back it goes on as if nothing had happened, or it is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gramian.models import GramianCache, GramianForCausalLM

MakeModel = Callable[..., GramianForCausalLM]
MakeTokens = Callable[[int, int], torch.Tensor]


@pytest.mark.each
@pytest.mark.parametrize("length", [1, 9, 70])
@torch.no_grad()
def test_a_state_read_back_goes_on(
    make_model: MakeModel,
    make_tokens: MakeTokens,
    mixer: Any,
    filter_config: dict[str, Any],
    length: int,
    tmp_path: Path,
) -> None:
    model, tokens, more = (
        make_model(mixers=mixer, filter=filter_config),
        make_tokens(3, length),
        make_tokens(3, 5),
    )
    cache = model(tokens, use_cache=True).past_key_values
    cache.save(tmp_path / "state.safetensors", model)
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]
    again = GramianCache.load(tmp_path / "state.safetensors", model)
    assert again.nbytes == cache.nbytes
    assert (again.batch_size, again.get_seq_length()) == (3, length)
    for t in range(5):
        step = more[:, t : t + 1]
        expected = model(step, past_key_values=cache).logits
        assert torch.equal(model(step, past_key_values=again).logits, expected)


def test_generation_goes_on_from_a_file(
    make_model: MakeModel, make_tokens: MakeTokens, tmp_path: Path
) -> None:
    model, tokens = make_model(mixers=["hyena", "softmax_attention"]), make_tokens(2, 20)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(tokens, **settings)
    model.prefill(tokens[:, :-1]).past_key_values.save(tmp_path / "state", model)
    mask = torch.ones_like(tokens)
    for given in (tokens, tokens[:, -1:]):  # the whole sequence, or the new token alone
        cache = GramianCache.load(tmp_path / "state", model)
        written = model.generate(given, attention_mask=mask, past_key_values=cache, **settings)
        assert torch.equal(written[:, given.shape[1] :], expected[:, 20:])


def test_what_is_not_this_models_is_refused(
    make_model: MakeModel, make_tokens: MakeTokens, tmp_path: Path
) -> None:
    model, file = make_model(), tmp_path / "state"
    cache = GramianCache(model.config)
    with pytest.raises(ValueError, match="an empty cache"):
        cache.save(file, model)
    with torch.no_grad():
        model(make_tokens(1, 4), past_key_values=cache)
    with pytest.raises(ValueError, match=r"a cache of 2 layers.*model of 3"):
        cache.save(file, make_model(num_hidden_layers=3))
    cache.save(file, model)

    other = make_model()
    with torch.no_grad():
        other.model.layers[1].mixer.out_proj.weight[0, 0] += 1e-3
    for stranger in (other, make_model(mixers="hyena"), make_model().float()):
        with pytest.raises(ValueError, match="of another model, or other weights"):
            GramianCache.load(file, stranger)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        GramianCache.load(tmp_path / "none", model)
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="cannot be read"):
        GramianCache.load(tmp_path / "text", model)
    save_file({"x": torch.zeros(2)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="holds no generation state"):
        GramianCache.load(tmp_path / "weights", model)
