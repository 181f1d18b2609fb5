"""Exported models choose tokens as `model.generate` does, whatever its generation settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("transformers")

from transformers import GenerationConfig

from gramian.export import ExportedModel, export_model
from gramian.export._generation import Rules, describe
from gramian.export._runtime import ExportedState
from gramian.models import GramianConfig, GramianForCausalLM

VOCABULARY, CONTEXT, NEW = 61, 48, 20


@pytest.fixture(scope="module")
def model() -> GramianForCausalLM:
    torch.manual_seed(3)
    config = GramianConfig(
        vocab_size=VOCABULARY,
        hidden_size=12,
        num_hidden_layers=2,
        num_heads=3,
        mixers=["hyena", "softmax_attention"],
        filter={"type": "explicit", "taps": 9, "skip": True},
        block="mixer",
        max_position_embeddings=CONTEXT,
        initializer_range=0.6,
    )
    return GramianForCausalLM(config).eval()


@pytest.fixture(scope="module")
def exported(model: GramianForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> ExportedModel:
    folder = tmp_path_factory.mktemp("export") / "model"
    report = export_model(model, folder, "torch", verify=10)
    assert report.context == CONTEXT and report.ties == 0
    return ExportedModel(folder)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def free(model: GramianForCausalLM, ids: torch.Tensor) -> list[list[int]]:
    """What is written without settings, so that settings can be chosen that matter."""
    written = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    return written[:, ids.shape[1] :].tolist()


def settings_that_matter(free: list[list[int]]) -> dict[str, dict[str, Any]]:
    first, second, third = free
    return {
        "suppress": {"suppress_tokens": first[:3]},
        "suppress nearly all": {"suppress_tokens": list(range(VOCABULARY - 2))},
        "suppress outside": {"suppress_tokens": [first[0], VOCABULARY + 5]},
        "begin suppress": {"begin_suppress_tokens": [first[0], second[0], third[0]]},
        "end": {"eos_token_id": first[4], "pad_token_id": 0},
        "ends": {"eos_token_id": [first[4], second[2], third[1]], "pad_token_id": 7},
        "end without pad": {"eos_token_id": [second[3], first[6]]},
        "end at once": {"eos_token_id": [first[0], second[0], third[0]]},
        "end suppressed": {"eos_token_id": first[4], "suppress_tokens": [first[4]]},
        "least new": {"eos_token_id": [first[1], second[2]], "min_new_tokens": 6},
        "least length": {"eos_token_id": [first[1], third[2]], "min_length": 17},
        "both least": {"eos_token_id": first[1], "min_length": 30, "min_new_tokens": 2},
        "forced end": {"forced_eos_token_id": 5},
        "forced ends": {"forced_eos_token_id": [5, 9], "eos_token_id": first[3]},
        "repetition": {"repetition_penalty": 1.7},
        "repetition wanted": {"repetition_penalty": 0.6},
        "bigrams": {"no_repeat_ngram_size": 2},
        "unigrams": {"no_repeat_ngram_size": 1},
        "long n-grams": {"no_repeat_ngram_size": 40},
        "bad words": {"bad_words_ids": [first[:2], [second[0]], third[1:4]]},
        "bad ends": {"bad_words_ids": [[first[2]], [second[0]]], "eos_token_id": first[2]},
        "bias": {"sequence_bias": [[first[:2], -20.0], [[4], 3.0], [second[:3], -9.0]]},
        "decay": {"exponential_decay_length_penalty": (3, 1.4), "eos_token_id": 11},
        "invalid removed": {"remove_invalid_values": True, "suppress_tokens": [first[0]]},
        "normalized": {"renormalize_logits": True, "repetition_penalty": 1.3},
        "several": {
            "repetition_penalty": 1.2,
            "no_repeat_ngram_size": 3,
            "bad_words_ids": [first[:1]],
            "suppress_tokens": [second[0]],
            "begin_suppress_tokens": [third[0]],
            "eos_token_id": [first[5], 3],
            "min_new_tokens": 7,
        },
    }


NAMES = list(settings_that_matter([[0] * NEW] * 3))
DRAWN: dict[str, dict[str, Any]] = {
    "plain": {"top_k": 0},
    "default shortlist": {},
    "temperature": {"temperature": 0.6, "top_k": 0},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.7, "top_k": 0},
    "top_k and top_p": {"top_k": 9, "top_p": 0.8, "temperature": 1.5},
    "min_p": {"min_p": 0.2},
    "typical_p": {"typical_p": 0.6, "top_k": 0},
    "epsilon": {"epsilon_cutoff": 0.03, "top_k": 0},
    "eta": {"eta_cutoff": 0.05, "top_k": 0},
    "with suppression": {"suppress_tokens": list(range(0, VOCABULARY, 2)), "top_p": 0.9},
    "with penalties": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "top_k": 12},
}


@pytest.mark.parametrize("name", NAMES)
def test_greedy_generation(
    model: GramianForCausalLM,
    exported: ExportedModel,
    ids: torch.Tensor,
    free: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    settings = settings_that_matter(free)[name]
    mask = torch.ones_like(ids)
    for length in (ids.shape[1], 1):
        prompt = ids[:, :length]
        expected = model.generate(
            prompt,
            attention_mask=mask[:, :length],
            max_new_tokens=NEW,
            do_sample=False,
            **settings,
        )
        described = describe(GenerationConfig(**settings))
        monkeypatch.setitem(exported.description, "generation", json.loads(json.dumps(described)))
        assert np.array_equal(exported.generate(prompt.numpy(), NEW), expected.numpy())
    whole = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **settings
    )
    found = whole[:, ids.shape[1] :].tolist()
    assert found != free or name in ("long n-grams", "both least")


def test_a_forced_beginning(
    model: GramianForCausalLM, exported: ExportedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is forced after a prompt of one token."""
    settings = {"forced_bos_token_id": 3, "begin_suppress_tokens": [3, 4]}
    monkeypatch.setitem(exported.description, "generation", settings)
    prompt = torch.tensor([[8]])
    expected = model.generate(prompt, max_new_tokens=9, do_sample=False, **settings)
    assert expected[0, 1] == 3
    assert np.array_equal(exported.generate(prompt.numpy(), 9), expected.numpy())


@pytest.mark.parametrize("name", DRAWN)
def test_probabilities_of_drawn_tokens(
    model: GramianForCausalLM, ids: torch.Tensor, name: str
) -> None:
    settings = {**DRAWN[name], "do_sample": True, "eos_token_id": 4, "min_new_tokens": 3}
    torch.manual_seed(0)
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        **settings,
    )
    rules, length = Rules(describe(GenerationConfig(**settings))), ids.shape[1]
    for index, (logits, scores) in enumerate(zip(written.logits, written.scores, strict=True)):
        past = written.sequences[:, : length + index].numpy()
        found = rules.scores(past, logits.numpy(), length, length + NEW)
        assert np.array_equal(np.isneginf(found), np.isneginf(scores.numpy()))
        torch.testing.assert_close(torch.from_numpy(found), scores, rtol=1e-5, atol=1e-5)


def test_what_is_drawn_follows_the_probabilities(
    exported: ExportedModel, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"do_sample": True, "temperature": 0.8, "top_k": 4, "suppress_tokens": [0, 1, 2]}
    monkeypatch.setitem(exported.description, "generation", settings)
    prompt = np.repeat(ids[:1].numpy(), 4000, axis=0)
    found = np.bincount(exported.generate(prompt, 1, seed=1)[:, -1], minlength=VOCABULARY) / 4000
    logits, _ = exported.prefill(prompt[:1])
    scores = Rules(settings).scores(prompt[:1], logits, 12, 13)[0]
    expected = torch.from_numpy(scores).softmax(-1).numpy()
    assert np.count_nonzero(expected) == 4
    np.testing.assert_allclose(found, expected, atol=0.04)  # five standard deviations
    greedy = exported.generate(prompt[:1], 5, temperature=0)
    assert np.array_equal(greedy, exported.generate(prompt[:1], 5, temperature=0, seed=9))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 4},
        {"guidance_scale": 1.5},
        {"stop_strings": ["\n"]},
        {"max_time": 3.0},
        {"num_return_sequences": 2, "do_sample": True},
        {"top_h": 0.4, "do_sample": True},
        {"token_healing": True},
        {"encoder_repetition_penalty": 1.2},
        {"encoder_no_repeat_ngram_size": 2},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "low"},
        {"prompt_lookup_num_tokens": 3},
        {"watermarking_config": {"bias": 2.5}},
    ],
)
def test_what_cannot_be_honoured_is_refused(settings: dict[str, Any]) -> None:
    name = next(iter(settings))
    with pytest.raises(ValueError, match=f"cannot generate with {name}=") as caught:
        describe(GenerationConfig(**settings))
    assert "\n" not in str(caught.value)


def test_what_changes_no_token_is_no_setting() -> None:
    idle = GenerationConfig(
        max_new_tokens=9,
        num_beams=1,
        use_cache=False,
        output_scores=True,
        guidance_scale=1.0,
        repetition_penalty=1.0,
        top_p=1.0,
        min_length=0,
        top_k=0,
        bos_token_id=1,
        of_ones_own=3,
    )
    assert describe(idle) == {}
    assert describe(GenerationConfig()) == {"top_k": 50}


def test_nothing_left_to_choose(exported: ExportedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"suppress_tokens": list(range(VOCABULARY))}
    monkeypatch.setitem(exported.description, "generation", settings)
    with pytest.raises(ValueError, match="leave no token to choose from"):
        exported.generate([[1]], 3)


@pytest.mark.slow
def test_settings_are_written_and_compared(
    model: GramianForCausalLM,
    ids: torch.Tensor,
    free: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = GenerationConfig(
        suppress_tokens=free[0][:2], eos_token_id=[free[1][3]], pad_token_id=2, top_p=0.8
    )
    monkeypatch.setattr(model, "generation_config", config)
    report = export_model(model, tmp_path / "out", "torch", verify=12)
    assert report.compared == 12
    run = ExportedModel(tmp_path / "out")
    assert run.description["generation"] == {
        "suppress_tokens": free[0][:2],
        "eos_token_id": [free[1][3]],
        "pad_token_id": 2,
        "top_k": 50,
        "top_p": 0.8,
    }
    expected = model.generate(ids, max_new_tokens=NEW)
    assert np.array_equal(run.generate(ids.numpy(), NEW), expected.numpy())

    def forgets(self: Rules, tokens: Any, scores: np.ndarray, *more: Any) -> np.ndarray:
        return scores

    monkeypatch.setattr(Rules, "_suppress_tokens", forgets)
    monkeypatch.setattr(config, "suppress_tokens", list(range(VOCABULARY - 3)))
    with pytest.raises(RuntimeError, match="other probabilities than model"):
        export_model(model, tmp_path / "other", "torch", verify=3)
    monkeypatch.setattr(config, "num_beams", 3)
    with pytest.raises(ValueError, match="cannot generate with num_beams=3"):
        export_model(model, tmp_path / "other", "torch")
    assert not (tmp_path / "other").exists()


@torch.no_grad()
def test_past_the_room_of_attention_nothing_is_a_number(
    model: GramianForCausalLM, exported: ExportedModel
) -> None:
    """Of programs run by hand, which cannot raise; `ExportedModel` refuses."""
    ids = torch.randint(VOCABULARY, (2, CONTEXT + 3), generator=torch.Generator().manual_seed(5))
    expected = model(ids).logits
    logits, state = exported.prefill(ids[:, : CONTEXT - 2].numpy())
    for place in range(CONTEXT - 2, CONTEXT + 3):
        token = np.ascontiguousarray(ids[:, place : place + 1].numpy())
        logits, tensors = exported._step(token, state.tensors)
        state = ExportedState(tensors)
        assert state.taken == place + 1
        if place < CONTEXT:
            np.testing.assert_allclose(logits, expected[:, place], atol=1e-4)
        else:
            assert np.isnan(logits).all()
    zeros, mask = exported.initial_state(2).tensors, np.ones(ids.shape, dtype=np.int64)
    mask[1, :3] = 0  # this row has room
    logits, tensors = exported._prefill(ids.numpy(), zeros, mask)
    assert np.isnan(logits[0]).all() and np.isfinite(logits[1]).all()
    first = np.ascontiguousarray(ids[:, :CONTEXT].numpy())
    logits, tensors = exported._prefill(first, zeros, np.ones_like(first))
    np.testing.assert_allclose(logits, expected[:, CONTEXT - 1], atol=1e-4)


def test_a_state_knows_what_it_has_taken(exported: ExportedModel, ids: torch.Tensor) -> None:
    _, state = exported.prefill(ids.numpy())
    rebuilt = ExportedState({name: tensor.copy() for name, tensor in state.tensors.items()})
    assert rebuilt.taken == state.taken == 12
    assert exported.initial_state(2).taken == ExportedState(exported.initial_state(2).tensors).taken
    with pytest.raises(ValueError, match=f"room for {CONTEXT} tokens, {CONTEXT + 1} are wanted"):
        exported.prefill(np.ones((3, CONTEXT - 11), dtype=int), rebuilt)
    mask = np.ones((3, 40), dtype=int)
    mask[1:, :9] = 0  # there is room for the tokens of these rows, but not of the first
    with pytest.raises(ValueError, match=f"room for {CONTEXT} tokens, 52 are wanted"):
        exported.prefill(np.ones((3, 40), dtype=int), rebuilt, attention_mask=mask)
    mask[0, :4] = 0
    _, full = exported.prefill(np.ones((3, 40), dtype=int), rebuilt, attention_mask=mask)
    assert full.counts is not None and full.counts.tolist() == [48, 43, 43]
    other = {name: tensor for name, tensor in state.tensors.items() if not name.endswith("real")}
    assert ExportedState(other).taken is None and ExportedState(other, 5).taken == 5
