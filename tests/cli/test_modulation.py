"""`gramian modulation` as its users meet it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from transformers import MambaConfig, MambaForCausalLM
from transformers.models.mamba import modeling_mamba

from gramian.analysis import analyze_texts, measure_modulation, open_model
from gramian.evaluation import count_bigrams, perplexity
from gramian.models import ByteTokenizer, GramianConfig, GramianForCausalLM

Call = Callable[..., tuple[int, str, str]]
TEXT = "The river rose. The bridge was gone! The river fell.\nThe road was closed? The end.\n" * 3


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("modulation")
    for name, mixer in (("conv", "long_convolution"), ("gla", "gated_linear_attention")):
        torch.manual_seed(0)
        config = GramianConfig(
            hidden_size=12,
            num_hidden_layers=1,
            num_heads=3,
            mixers=mixer,
            filter={"type": "modal", "orders": 2},
            max_position_embeddings=128,
        )
        GramianForCausalLM(config).save_pretrained(folder / name)
    recall = GramianConfig(hidden_size=8, num_hidden_layers=1, num_heads=2, vocab_size=40)
    GramianForCausalLM(recall).save_pretrained(folder / "recall")
    (folder / "text.txt").write_text(TEXT)
    lines = [json.dumps({"text": TEXT[k : k + 60]}) for k in (0, 20, 40, 60)]
    (folder / "texts.jsonl").write_text("\n".join([*lines, json.dumps({"text": "short"})]))
    (folder / "plain.txt").write_text("no delimiters in this text " * 4)
    return folder


def test_several_models_in_one_table_and_figure(call: Call, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = f"modulation conv gla --text texts.jsonl --horizon 50 -o {out} --format svg"
    status, shown, err = call(line, place)
    assert status == 0, err
    assert shown.count(" elsewhere ") >= 2 and "bootstrap" in shown and "sentence: '.'" in shown
    assert "…" not in shown
    assert {path.name for path in out.iterdir()} == {"modulation.json", "modulation.svg"}
    values = json.loads((out / "modulation.json").read_text())
    assert [one["model"] for one in values["models"]] == ["conv", "gla"]
    (one, _) = values["models"]
    assert one["text"] == "4 of 5 documents, up to 50 tokens of each"
    model, tokenizer = open_model(place / "conv")
    rows = [torch.tensor(tokenizer(TEXT[k : k + 60]).input_ids[:50]) for k in (0, 20, 40, 60)]
    expected = measure_modulation(analyze_texts(model, rows, tokenizer=tokenizer))
    for found, kind in zip(one["kinds"], expected.kinds, strict=True):
        assert found["kind"] == kind.kind and found["counts"] == list(kind.counts)
        assert found["ratio"] == pytest.approx(kind.ratio)
        assert (found["low"], found["high"]) == pytest.approx((kind.low, kind.high))
    score = perplexity(model, tokenizer, rows, window=50, stride=50)
    assert one["perplexities"]["perplexity"]["value"] == pytest.approx(score.perplexity)
    recall = one["perplexities"]["bigram_recall_perplexity"]
    assert recall["value"] == pytest.approx(score.recall_perplexity)
    assert recall["tokens"] == score.recall_tokens


def test_pairs_that_are_frequent_in_a_training_text_do_not_count(call: Call, place: Path) -> None:
    line = "modulation gla --text texts.jsonl --horizon 50 --training-text text.txt --rare 6"
    status, out, err = call(f"{line} --json", place)
    assert status == 0, err
    (one,) = json.loads(out)["models"]
    model, tokenizer = open_model(place / "gla")
    rows = [torch.tensor(tokenizer(TEXT[k : k + 50])["input_ids"]) for k in (0, 20, 40, 60)]
    bigrams = count_bigrams(TEXT, tokenizer)
    options = {"window": 50, "stride": 50, "training_bigrams": bigrams}
    score = perplexity(model, tokenizer, rows, rare=6, **options)
    found = one["perplexities"]["bigram_recall_perplexity"]
    assert (found["tokens"], one["rare"]) == (score.recall_tokens, 6)
    assert found["value"] == pytest.approx(score.recall_perplexity)
    assert 0 < score.recall_tokens < perplexity(model, tokenizer, rows, **options).recall_tokens
    _, shown, _ = call(line, place)
    assert "and at most 6 times in training" in " ".join(shown.split())


def test_pieces_of_a_single_document_are_texts(call: Call, place: Path) -> None:
    line = "modulation gla --text text.txt --horizon 60 --texts 3 --delimiters ! --reach 2 --json"
    status, out, err = call(line, place)
    assert status == 0, err
    (one,) = json.loads(out)["models"]
    assert one["texts"] == ["tokens 0 to 60", "tokens 60 to 120", "tokens 120 to 180"]
    assert [kind["kind"] for kind in one["kinds"]] == ["!"] and one["reach"] == 2
    assert one["text"] == f"3 pieces of up to 60 tokens of one document of {len(TEXT)}"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("conv --text plain.txt", 1, "conv: the 1 texts have no delimiters; looked for special"),
        ("conv --text text.txt --horizon 6", 1, "no text has 10 tokens"),
        ("recall --text text.txt", 1, "recall has no tokenizer"),
        ("conv --text absent.txt", 1, "absent.txt"),
        ("absent --text text.txt", 1, "absent"),
        ("conv --text text.txt --format gif", 2, "png or svg"),
        ("conv --text text.txt --delimiters auto --delimiters x", 2, "stands alone"),
        ("conv --text text.txt --rare 3", 2, "--rare needs --training-text"),
        ("conv --text text.txt --training-text absent.txt", 1, "absent.txt"),
        ("conv", 2, "--text"),
    ],
)
def test_mistakes_take_one_line(
    call: Call, place: Path, arguments: str, status: int, message: str
) -> None:
    got, out, err = call(f"modulation {arguments}", place)
    assert got == status and message in err and not out
    if status == 1:
        assert len(err.strip().splitlines()) == 1


@pytest.mark.skipif(
    not hasattr(modeling_mamba, "mamba_selective_scan"),
    reason="the scan of a Mamba is read where transformers names it",
)
def test_short_convolutions_are_included_on_request(
    call: Call, place: Path, tmp_path: Path
) -> None:
    config = MambaConfig(vocab_size=264, hidden_size=8, state_size=4, num_hidden_layers=1)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    ByteTokenizer().save_pretrained(tmp_path / "mamba")
    model, tokenizer = open_model(tmp_path / "mamba")
    rows = [torch.tensor(tokenizer(TEXT[k : k + 60]).input_ids[:25]) for k in (0, 20, 40, 60)]
    found = {}
    for include in ("core", "mixer"):
        line = f"modulation {tmp_path / 'mamba'} --text texts.jsonl --horizon 25 --json"
        line += f" --include {include}"
        status, shown, err = call(line, place)
        assert status == 0, err
        reports = analyze_texts(model, rows, tokenizer=tokenizer, include=include)
        expected = measure_modulation(reports, "auto", special=set())
        found[include] = json.loads(shown)["models"][0]["average_ess"]
        assert found[include] == pytest.approx(expected.average_ess, rel=1e-6)
    assert found["core"] != found["mixer"]
    status, _, err = call("modulation gla --text texts.jsonl --horizon 50 --include all", place)
    assert status == 1 and 'include must be "core" or "mixer"' in err
