"""Generation within an alphabet: whatever is decoded, saved, distilled or exported keeps to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, CompileConfig, PreTrainedTokenizerFast

from gramian import distill
from gramian.checkpoints import DNATokenizer, EvoTokenizer
from gramian.export import ExportedModel, export_model
from gramian.export._generation import Rules, describe
from gramian.models import (
    ByteTokenizer,
    GramianForCausalLM,
    allowed_tokens,
    load,
    restrict_generation,
)

MakeModel = Callable[..., GramianForCausalLM]
BASES = [7, 8, 9, 10]  # of HyenaDNA
NEW = 12


@pytest.fixture
def dna(make_model: MakeModel) -> GramianForCausalLM:
    """A model over HyenaDNA's 12 tokens and 4 rows without one, which would write all of them."""
    model = make_model(vocab_size=16, mixers="hyena", filter={"type": "implicit"}).float()
    model.generation_config.pad_token_id = 4
    return model


@pytest.fixture
def prompt() -> torch.Tensor:
    return torch.randint(7, 11, (3, 9), generator=torch.Generator().manual_seed(0))


def naive(model: GramianForCausalLM, prompt: torch.Tensor, allowed: list[int]) -> torch.Tensor:
    """Greedy search over the allowed tokens, by whole forward passes without a cache."""
    ids, pick = prompt, torch.tensor(allowed)
    for _ in range(NEW):
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, pick[logits[:, allowed].argmax(-1)][:, None]], 1)
    return ids


def written(sequences: Any) -> set[int]:
    return set(np.asarray(sequences)[:, 9:].flatten().tolist())


def best_beam(model: GramianForCausalLM, prompt: torch.Tensor, allowed: list[int]) -> float:
    """The largest log-likelihood of four more tokens, all of them allowed, by enumeration."""
    grid = torch.cartesian_prod(*[torch.tensor(allowed)] * 4)
    rows = torch.cat([prompt[:1].expand(len(grid), -1), grid], 1)
    with torch.no_grad():
        logs = model(rows, use_cache=False).logits.log_softmax(-1)[:, 8:-1]
    return float(logs.gather(-1, grid[..., None]).sum((1, 2)).max())


def test_greedy_search_is_that_over_the_allowed_tokens(
    dna: GramianForCausalLM, prompt: torch.Tensor
) -> None:
    expected = naive(dna, prompt, BASES)
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "allowed_tokens": BASES}
    free = dna.generate(prompt, max_new_tokens=NEW, do_sample=False)
    assert written(free) - {*BASES}  # the alphabet matters
    assert torch.equal(dna.generate(prompt, **options), expected)
    assert torch.equal(dna.generate(prompt, **options, prefill_chunk_size=2), expected)
    compiled = CompileConfig(backend="eager", mode=None)
    assert torch.equal(dna.generate(prompt, **options, compile_config=compiled), expected)
    assert torch.equal(dna.generate(prompt, max_new_tokens=NEW, do_sample=False), free)


def test_sampling_and_beams_keep_to_it(dna: GramianForCausalLM, prompt: torch.Tensor) -> None:
    torch.manual_seed(0)
    rows = prompt.repeat(20, 1)
    sampled = dna.generate(
        rows, max_new_tokens=NEW, do_sample=True, temperature=9.0, allowed_tokens=BASES
    )
    assert written(sampled) == {*BASES}
    for count in (1, 4):
        beams = dna.generate(
            prompt,
            max_new_tokens=NEW,
            num_beams=4,
            num_return_sequences=count,
            do_sample=False,
            allowed_tokens=[8],
        )
        assert written(beams) == {8}
    found = dna.generate(
        prompt[:1],
        max_new_tokens=4,
        num_beams=64,
        length_penalty=0.0,
        do_sample=False,
        allowed_tokens=BASES,
        output_scores=True,
        return_dict_in_generate=True,
    )
    assert float(found.sequences_scores[0]) == pytest.approx(best_beam(dna, prompt, BASES), 1e-4)


def test_a_restricted_model_stays_so(
    dna: GramianForCausalLM, prompt: torch.Tensor, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
    expected = naive(dna, prompt, BASES)
    restrict_generation(dna, allowed_tokens(DNATokenizer(), "ACGT"))
    assert torch.equal(dna.generate(prompt, **options), expected)
    dna.save_pretrained(tmp_path / "saved")
    for again in (
        load(tmp_path / "saved"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved"),
    ):
        assert torch.equal(again.generate(prompt, **options), expected)
    small, _ = distill(dna, order=4)
    assert torch.equal(small.generate(prompt, **options), naive(small, prompt, BASES))
    small.save_pretrained(tmp_path / "distilled")
    again = load(tmp_path / "distilled")
    assert written(again.generate(prompt, **options)) <= {*BASES}
    # a second restriction goes on from the first
    restrict_generation(dna, [9, 10, 11])
    assert torch.equal(dna.generate(prompt, **options), naive(dna, prompt, [9, 10]))
    narrow = dna.generate(prompt, allowed_tokens=[10, 7], **options)
    assert written(narrow) == {10}


def test_the_rules_of_exported_programs_keep_to_it(dna: GramianForCausalLM) -> None:
    restrict_generation(dna, BASES)
    logits = np.random.default_rng(0).normal(size=(9, 16)).astype(np.float32)
    ids, settings = np.full((9, 3), 7), describe(dna.generation_config)
    draw = np.random.default_rng(1)
    chosen = Rules(settings).choose(ids, logits, 3, 9, draw)
    assert (chosen == 7 + logits[:, 7:11].argmax(-1)).all()
    drawn = [Rules(settings, 50.0).choose(ids, logits, 3, 9, draw) for _ in range(9)]
    assert {*np.stack(drawn).flatten().tolist()} == {*BASES}


@pytest.mark.slow
@pytest.mark.parametrize("format", ["torch", "onnx"])
def test_exported_programs_keep_to_it(
    make_model: MakeModel, prompt: torch.Tensor, tmp_path: Path, format: str
) -> None:
    pytest.importorskip("onnxruntime")
    model = make_model(vocab_size=16, num_hidden_layers=1, mixers="hyena").float()
    model, _ = distill(model, order=3)
    restrict_generation(model, BASES)
    export_model(model, tmp_path / "exported", format, verify=4)
    program = ExportedModel(tmp_path / "exported")
    assert (program.generate(prompt, NEW) == naive(model, prompt, BASES).numpy()).all()
    assert written(program.generate(prompt.repeat(9, 1), NEW, temperature=50.0)) == {*BASES}


def test_tokens_that_cannot_be_chosen_are_refused(
    dna: GramianForCausalLM, prompt: torch.Tensor
) -> None:
    with pytest.raises(ValueError, match=r"must lie from 0 to 15; got 16\."):
        dna.generate(prompt, max_new_tokens=2, allowed_tokens=[16])
    with pytest.raises(ValueError, match="at least one to choose that is not suppressed; got"):
        dna.generate(prompt, max_new_tokens=2, allowed_tokens=[])
    with pytest.raises(ValueError, match="at least one to choose"):
        dna.generate(prompt, max_new_tokens=2, allowed_tokens=[3], suppress_tokens=[3])
    dna.generation_config.forced_eos_token_id = 1
    with pytest.raises(ValueError, match="forces the token 1 by forced_eos_token_id"):
        restrict_generation(dna, BASES)
    assert dna.generation_config.suppress_tokens is None
    restrict_generation(dna, [*BASES, 1])
    assert written(dna.generate(prompt, max_new_tokens=NEW, do_sample=False)) <= {*BASES, 1, 4}


@pytest.mark.parametrize(
    ("tokenizer", "alphabet", "ids"),
    [
        (DNATokenizer(), "ACGT", BASES),
        (DNATokenizer(), "TTN", [10, 11]),
        (DNATokenizer("acgt"), "acgt", BASES),
        (EvoTokenizer(), "ACGT", [65, 67, 71, 84]),
        (ByteTokenizer(), " a\n", [10, 32, 97]),
        (ByteTokenizer(), ["b", "a"], [97, 98]),
    ],
)
def test_the_tokens_of_an_alphabet(tokenizer: Any, alphabet: Any, ids: list[int]) -> None:
    assert allowed_tokens(tokenizer, alphabet) == ids


@pytest.mark.parametrize(
    ("tokenizer", "alphabet", "message"),
    [
        (DNATokenizer(), "ACGU", r"which are A, C, G, N, T; got U\."),
        (DNATokenizer(), "acgt", r"which are A, C, G, N, T; got a, c, g, t\."),
        (DNATokenizer(), "SEP[]", r"got S, E, P, \[, \]\."),
        (EvoTokenizer(), "A\0", r", …; got '\\x00'\."),
        (ByteTokenizer(), "aé", r"got é\."),
        (DNATokenizer(), "", r"at least one character; got none\."),
    ],
)
def test_letters_without_a_token_are_refused(tokenizer: Any, alphabet: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        allowed_tokens(tokenizer, alphabet)


def byte_pairs(words: list[str], decoder: Any, prepend: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary is `<s>` and then these words."""
    vocabulary = {word: index for index, word in enumerate(["<s>", *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<s>"))
    if prepend:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<s>")


def test_tokens_of_several_characters_must_be_allowed_whole() -> None:
    words = ["A", "C", "AC", "ACG", "G", "Ġ", "ĠA", "ACĠC"]
    tokenizer = byte_pairs(words, decoders.ByteLevel())
    assert allowed_tokens(tokenizer, "AC") == [1, 2, 3]
    assert allowed_tokens(tokenizer, "AC ") == [1, 2, 3, 6, 7, 8]
    # a letter within longer tokens alone
    assert allowed_tokens(byte_pairs(["A", "AG"], decoders.ByteLevel()), "AG") == [1, 2]
    with pytest.raises(ValueError, match=r"which are A, G, T; got G\."):
        allowed_tokens(byte_pairs(["A", "TG"], decoders.ByteLevel()), "G")


def test_a_space_that_only_the_first_word_loses_counts() -> None:
    tokenizer = byte_pairs(["A", "▁A", "▁C", "C"], decoders.Metaspace(), prepend=True)
    assert tokenizer.decode([2]) == "A"
    assert allowed_tokens(tokenizer, "AC") == [1, 4]
    assert allowed_tokens(tokenizer, "AC ") == [1, 2, 3, 4]
