"""Generation from logits that are not finite: no token, one sentence."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import TextStreamer, pipeline

from gramian.models import ByteTokenizer, GramianConfig, GramianForCausalLM
from gramian.models.generation import FiniteLogits, StopAtNaN

MakeConfig = Callable[..., GramianConfig]
IDS = torch.arange(10).reshape(2, 5)
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "top": {"do_sample": True, "top_k": 3, "top_p": 0.5, "min_p": 0.1},
    "beams": {"num_beams": 2},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "without a cache": {"use_cache": False},
    "in chunks": {"prefill_chunk_size": 2},
    "penalty": {"repetition_penalty": 1.3},
    "scores": {"return_dict_in_generate": True, "output_scores": True},
}
PLACES = {
    "everything": lambda model: list(model.parameters()),
    "a row of the head": lambda model: [model.lm_head.weight[7]],
    "the last norm": lambda model: [model.model.norm.weight[:1]],
    "one weight": lambda model: [model.model.layers[1].mlp.down_proj.weight[:1, :1]],
    "a token of the prompt": lambda model: [model.model.embed_tokens.weight[4]],
}


@pytest.fixture
def model(make_config: MakeConfig) -> GramianForCausalLM:
    torch.manual_seed(0)
    return GramianForCausalLM(make_config(tie_word_embeddings=False)).eval()


def spoil(model: GramianForCausalLM, place: str, value: float) -> None:
    with torch.no_grad():
        for weight in PLACES[place](model):
            weight.fill_(value)


@pytest.mark.parametrize(  # the n-th way with the n-th place, which every way checks alike
    ("place", "way"),
    [
        pytest.param(place, way, marks=[pytest.mark.slow] * ((i - j) % len(PLACES) != 0))
        for i, place in enumerate(PLACES)
        for j, way in enumerate(WAYS)
    ],
)
def test_nothing_follows_from_nan(model: GramianForCausalLM, place: str, way: str) -> None:
    spoil(model, place, math.nan)
    with pytest.raises(FloatingPointError, match="logits are not finite, so no token") as caught:
        model.generate(IDS, max_new_tokens=4, **WAYS[way])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_nothing_follows_from_infinity(model: GramianForCausalLM, value: float) -> None:
    spoil(model, "the last norm", value)
    with pytest.raises(FloatingPointError):
        model.generate(IDS, max_new_tokens=4, do_sample=True)


def test_a_nan_that_comes_later(model: GramianForCausalLM) -> None:
    """The first token whose input is NaN: nothing of the continuation is returned."""
    first = model.generate(IDS[:1], max_new_tokens=1)[0, -1]
    spoil(model, "a row of the head", 0.0)
    with torch.no_grad():
        model.model.embed_tokens.weight[first] = math.nan
    assert model.generate(IDS[:1], max_new_tokens=1).shape == (1, 6)
    with pytest.raises(FloatingPointError):
        model.generate(IDS[:1], max_new_tokens=2)


@pytest.mark.parametrize("way", WAYS)
def test_finite_logits_go_on_as_ever(
    model: GramianForCausalLM, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write() -> torch.Tensor:
        torch.manual_seed(1)
        written: Any = model.generate(IDS, max_new_tokens=4, **WAYS[way])
        return written if isinstance(written, torch.Tensor) else written.sequences

    checked = write()
    monkeypatch.setattr(FiniteLogits, "__call__", lambda self, ids, scores: scores)
    assert torch.equal(write(), checked)


def test_tokens_that_are_ruled_out_may_be_anything(model: GramianForCausalLM) -> None:
    spoil(model, "a row of the head", math.nan)
    assert model.generate(IDS, max_new_tokens=2, suppress_tokens=[7]).shape == (2, 7)


def test_processors_and_criteria_of_the_caller_still_run(model: GramianForCausalLM) -> None:
    seen = []

    def keep(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(scores)
        return scores

    def stop(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(ids),), len(seen) == 2)

    written = model.generate(
        IDS, max_new_tokens=9, logits_processor=[keep], stopping_criteria=[stop]
    )
    assert len(seen) == 2 and written.shape == (2, 7)


def test_a_streamer_is_handed_nothing(model: GramianForCausalLM, capsys: Any) -> None:
    spoil(model, "everything", math.nan)
    streamer = TextStreamer(ByteTokenizer(), skip_prompt=True)
    with pytest.raises(FloatingPointError):
        model.generate(IDS[:1], max_new_tokens=4, streamer=streamer)
    assert capsys.readouterr().out == ""


def test_a_pipeline_is_told(make_config: MakeConfig) -> None:
    tokenizer = ByteTokenizer()
    model = GramianForCausalLM(make_config(vocab_size=len(tokenizer))).eval()
    spoil(model, "everything", math.nan)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    with pytest.raises(FloatingPointError):
        write("Once", max_new_tokens=3)


def test_on_an_accelerator_it_is_told_at_the_end() -> None:
    """There, looking at every token would cost time; here are tensors that claim to be there."""

    class Elsewhere(torch.Tensor):
        @property
        def device(self) -> Any:  # type: ignore[override]
            return torch.device("cuda")

    watch = FiniteLogits(at_once=False)
    stop = StopAtNaN(watch)
    assert not stop(IDS, None).any()
    fine = torch.randn(2, 5).as_subclass(Elsewhere)
    assert torch.equal(torch.Tensor(watch(IDS, fine)), torch.Tensor(fine))
    assert not stop(IDS, None).any()
    watch.check()
    wrong = torch.randn(2, 5)
    wrong[1, 2] = math.nan
    given = watch(IDS, wrong.as_subclass(Elsewhere))
    assert torch.equal(torch.Tensor(given[0]), wrong[0]) and not given[1].any()
    watch(IDS, fine)
    assert stop(IDS, None).all()
    with pytest.raises(FloatingPointError):
        watch.check()
