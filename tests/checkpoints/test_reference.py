"""Converted models compute what the published implementations computed, in every way they run."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import gramian
from gramian import checkpoints
from gramian.filters import ModalFilter
from gramian.models import GramianCache, GramianForCausalLM, load


def logits(model: GramianForCausalLM, tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, **({"use_cache": False} | kwargs)).logits


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.fixture
def model(every: Any) -> GramianForCausalLM:
    return checkpoints.load(every.file).model


@pytest.fixture
def tokens(every: Any) -> torch.Tensor:
    return every.expected()["input_ids"]


def test_logits_are_the_published_ones(every: Any) -> None:
    loaded = checkpoints.load(every.file)
    expected = every.expected()
    assert loaded.format == every.format
    assert not loaded.model.training and loaded.model.dtype == torch.float32
    close(logits(loaded.model, expected["input_ids"]), expected["logits"])
    shorter = expected["input_ids"][:, :17]
    close(logits(loaded.model, shorter), expected["logits"][:, :17])


def test_hidden_states_are_the_published_ones(published: Any) -> None:
    checkpoint = published("hyenadna_tiny")
    expected = checkpoint.expected()
    with torch.no_grad():
        model = checkpoints.load(checkpoint.file).model.model
        hidden = model(expected["input_ids"]).last_hidden_state
    close(hidden, expected["hidden"])


def test_recurrent_and_chunked(every: Any, model: GramianForCausalLM) -> None:
    expected = every.expected()
    tokens = expected["input_ids"]
    cache = GramianCache(model.config)
    cuts = [0, 1, 3, 20, *range(21, 30), tokens.shape[1]]
    parts = [
        logits(model, tokens[:, begin:end], past_key_values=cache, use_cache=True)
        for begin, end in itertools.pairwise(cuts)
    ]
    close(torch.cat(parts, dim=1), expected["logits"])


def test_left_padded(every: Any, model: GramianForCausalLM) -> None:
    expected = every.expected()
    tokens, length = expected["input_ids"], 40
    padded = torch.cat([torch.full((len(tokens), 9), 3), tokens[:, :length]], dim=1)
    mask = (torch.arange(9 + length) >= 9).long().expand(len(tokens), -1)
    for use_cache in (False, True):
        made = logits(model, padded, attention_mask=mask, use_cache=use_cache)
        close(made[:, 9:], expected["logits"][:, :length])


def test_saved_and_loaded(model: GramianForCausalLM, tokens: torch.Tensor, tmp_path: Path) -> None:
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path)
    for again in (load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path).eval()):
        assert torch.equal(logits(again, tokens), expected)
        assert again.generation_config.suppress_tokens == model.generation_config.suppress_tokens


@pytest.mark.each
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}])
def test_generation_with_the_cache_is_generation_without(
    model: GramianForCausalLM, tokens: torch.Tensor, settings: dict[str, Any]
) -> None:
    prompt = tokens[:, :11]
    settings = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None} | settings
    written = model.generate(prompt, pad_token_id=0, **settings)
    assert written.shape[1] == 20
    assert torch.equal(written, model.generate(prompt, pad_token_id=0, use_cache=False, **settings))


@pytest.mark.parametrize("name", ["hyenadna_tiny", "hyenadna_order3", "hyena_rtf"])
def test_distilled(published: Any, name: str, tmp_path: Path) -> None:
    checkpoint = published(name)
    expected = checkpoint.expected()
    model = checkpoints.load(checkpoint.file).model
    distilled, report = gramian.distill(model, tol=1e-2)
    assert report.converged
    error = logits(distilled, expected["input_ids"]) - expected["logits"]
    assert float(error.norm() / expected["logits"].norm()) < 1e-2
    distilled.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert all(isinstance(block.mixer.filter, ModalFilter) for block in again.model.layers)
    prompt = expected["input_ids"][:1, :9]
    settings = {"max_new_tokens": 150, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    written = again.generate(prompt, **settings)  # past the length of the filters
    assert written.shape[1] == 159


def test_what_is_modal_already_is_not_distilled(published: Any) -> None:
    model = checkpoints.load(published("stripedhyena_tiny").file).model
    with pytest.raises(ValueError, match="modal already"):
        gramian.distill(model)


def test_training_reaches_every_weight(every: Any, model: GramianForCausalLM) -> None:
    tokens = every.expected()["input_ids"][:, :20]
    model.train()
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_half_precision(every: Any, model: GramianForCausalLM) -> None:
    expected = every.expected()
    half = checkpoints.load(every.file, dtype=torch.bfloat16).model
    assert half.dtype == torch.bfloat16
    for block in half.model.layers:
        filter = getattr(block.mixer, "filter", None)
        assert filter is None or all(p.dtype == torch.float32 for p in filter.parameters())
    made = logits(half, expected["input_ids"]).float()
    reference = logits(model.bfloat16(), expected["input_ids"]).float()
    torch.testing.assert_close(made, reference)
    assert float((made - expected["logits"]).norm() / expected["logits"].norm()) < 0.1


def test_the_residual_stream_of_a_hyenadna_is_in_single_precision(published: Any) -> None:
    checkpoint = published("hyenadna_tiny")
    half = checkpoints.load(checkpoint.file, dtype=torch.bfloat16).model
    with torch.no_grad():
        outputs = half(checkpoint.expected()["input_ids"], output_hidden_states=True)
    *stream, last = outputs.hidden_states
    assert {hidden.dtype for hidden in stream} == {torch.float32}
    assert last.dtype == outputs.logits.dtype == torch.bfloat16


def test_progress_counts_layers(every: Any) -> None:
    seen: list[tuple[int, int]] = []
    loaded = checkpoints.load(every.file, progress=lambda done, total: seen.append((done, total)))
    layers = loaded.model.config.num_hidden_layers
    assert seen == [(i + 1, layers) for i in range(layers)]


def test_a_hugging_face_hyenadna(published: Any, hugging_face_dna: Path) -> None:
    expected = published("hyenadna_tiny").expected()
    loaded = checkpoints.load(hugging_face_dna)
    assert loaded.format == "hyenadna" and loaded.model.config.residual_in_fp32
    close(logits(loaded.model, expected["input_ids"]), expected["logits"])


def test_names_of_wrappers_and_counters(published: Any, write: Callable[..., Path]) -> None:
    checkpoint = published("hyenadna_tiny")
    expected = checkpoint.expected()
    renamed = {
        name.replace(".mixer.", ".mixer.layer.").replace(".mlp.", ".mlp.layer."): value
        for name, value in checkpoint.tensors().items()
    }
    renamed["val_torchmetrics.num-tokens.count"] = torch.tensor(7)
    loaded = checkpoints.load(write(renamed), config=checkpoint.config())
    close(logits(loaded.model, expected["input_ids"]), expected["logits"])


def test_a_striped_hyena_with_and_without_the_prefix(
    published: Any, write: Callable[..., Path]
) -> None:
    checkpoint = published("evo_tiny")
    expected = checkpoint.expected()
    bare = {k.removeprefix("backbone."): v for k, v in checkpoint.tensors().items()}
    loaded = checkpoints.load(write(bare), config=checkpoint.config())
    close(logits(loaded.model, expected["input_ids"]), expected["logits"])
    assert loaded.model.config.tie_word_embeddings


def test_heads_are_tied_where_they_are_the_embedding(
    published: Any, write: Callable[..., Path]
) -> None:
    checkpoint = published("safari_hyena_order2")
    assert checkpoints.load(checkpoint.file).model.config.tie_word_embeddings
    tensors = checkpoint.tensors()
    tensors["lm_head.weight"] = 2 * tensors["lm_head.weight"]
    untied = checkpoints.load(write(tensors), config=checkpoint.config()).model
    assert not untied.config.tie_word_embeddings
    expected = checkpoint.expected()
    close(logits(untied, expected["input_ids"]) / 2, expected["logits"])
    del tensors["lm_head.weight"]
    tied = checkpoints.load(write(tensors), config=checkpoint.config()).model
    close(logits(tied, expected["input_ids"]), expected["logits"])


@pytest.mark.parametrize(
    ("name", "head", "embedding", "setting"),
    [
        ("hyenadna_tiny", "lm_head.weight", "backbone.embeddings.word_embeddings.weight", "word_"),
        ("safari_hyena_order2", "lm_head.weight", "backbone.embeddings.word_embeddings.weight", ""),
        ("evo_tiny", "unembed.weight", "embedding_layer.weight", ""),
        ("stripedhyena_gqa", "unembed.weight", "embedding_layer.weight", "word_"),
    ],
)
def test_a_head_that_is_said_to_be_its_own_is_one(
    published: Any,
    write: Callable[..., Path],
    name: str,
    head: str,
    embedding: str,
    setting: str,
) -> None:
    """It is refused where it is missing, and not tied where it equals the embedding."""
    checkpoint = published(name)
    tensors = checkpoint.tensors()
    config = {**checkpoint.config(), f"tie_{setting}embeddings": False}
    bare, head = head, next((n for n in tensors if n.endswith(head)), head)
    found = next(n for n in tensors if n.endswith(embedding))
    without = {n: tensor for n, tensor in tensors.items() if n != head}
    with pytest.raises(ValueError, match=f"no {bare}.*=False"):
        checkpoints.load(write(without), config=config)
    equal = {**tensors, head: tensors[found].clone()}
    model = checkpoints.load(write(equal), config=config).model
    assert not model.config.tie_word_embeddings
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_the_window_of_a_hyenadna_and_of_safari_differ(published: Any) -> None:
    checkpoint = published("hyenadna_tiny")
    expected = checkpoint.expected()
    other = checkpoints.load(checkpoint.file, format="safari")
    assert other.format == "safari" and other.tokenizer is None
    difference = logits(other.model, expected["input_ids"]) - expected["logits"]
    assert float(difference.abs().max()) > 1e-3


def test_time_features_are_the_checkpoints_own(
    published: Any, write: Callable[..., Path], tmp_path: Path
) -> None:
    """The MLP multiplies their rounding; computed anew they would make other kernels."""
    checkpoint = published("hyenadna_tiny")
    tensors = checkpoint.tensors()
    for i in range(2):
        name = f"model.backbone.layers.{i}.mixer.filter_fn.pos_emb.z"
        tensors[name] = tensors[name] + 1e-3
    model = checkpoints.load(write(tensors), config=checkpoint.config()).model
    expected = tensors[name][0]
    model.save_pretrained(tmp_path / "saved")
    for made in (model, load(tmp_path / "saved"), model.bfloat16()):
        features = made.model.layers[1].mixer.filter.features
        assert torch.equal(features, expected) and not features.requires_grad


def test_trained_time_features_are_parameters(published: Any) -> None:
    model = checkpoints.load(published("safari_hyena_order3").file).model
    assert model.model.layers[0].mixer.filter.features.requires_grad


def test_a_pole_outside_of_the_unit_circle_stays_there(published: Any) -> None:
    model = checkpoints.load(published("evo_tiny").file).model
    with torch.no_grad():
        radius = float(model.model.layers[0].mixer.filter().spectral_radius().max())
    assert radius == pytest.approx(1.01, rel=1e-5)


@pytest.mark.parametrize("shape", ["nested", "yaml", "path", "mapping"])
def test_where_a_configuration_may_be(
    published: Any, write: Callable[..., Path], tmp_path: Path, shape: str
) -> None:
    yaml = pytest.importorskip("yaml")
    checkpoint = published("safari_hyena_order2")
    expected = checkpoint.expected()
    file, config = write(checkpoint.tensors()), checkpoint.config()
    given: Any = None
    if shape == "nested":
        (tmp_path / "config.json").write_text(json.dumps({"model": config, "seed": 1}))
    elif shape == "yaml":
        (tmp_path / "checkpoint.yml").write_text(yaml.safe_dump(config))
    elif shape == "path":
        given = tmp_path / "elsewhere.json"
        given.write_text(json.dumps(config))
    else:
        given = config
    model = checkpoints.load(file, config=given).model
    close(logits(model, expected["input_ids"]), expected["logits"])
