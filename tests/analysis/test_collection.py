"""Texts are analyzed as alone, and their means and spreads are those of numpy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import transformers

import gramian
from gramian.analysis import StateReport, StateReports, analyze_texts
from gramian.tasks import Document

LENGTHS = (23, 9, 31, 2)
ROWS = [torch.randint(3, 64, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    one = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in one.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(8)
    return one


def same(one: StateReport, other: StateReport) -> None:
    assert one.positions == other.positions and one.tokens == other.tokens
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        assert mine.name == theirs.name and torch.equal(mine.ess, theirs.ess)
        assert torch.equal(mine.tss, theirs.tss)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_padded_batch_are_read_as_alone(model: Any, side: str) -> None:
    longest = max(LENGTHS)
    ids = torch.zeros(len(ROWS), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(ROWS):
        place = slice(longest - len(tokens), None) if side == "left" else slice(len(tokens))
        ids[row, place], mask[row, place] = tokens, 1
    batch = {"input_ids": ids, "attention_mask": mask}
    found = analyze_texts(model, batch, every=1)
    listed = analyze_texts(model, [row.tolist() for row in ROWS], every=1)
    for report, again, row in zip(found, listed, ROWS, strict=True):
        alone = gramian.analyze(model, row, every=1)
        same(report, alone)
        same(again, alone)
    assert found.names == ("text 1", "text 2", "text 3", "text 4")


def test_what_accompanies_the_tokens_of_a_batch_is_unpacked_too(model: Any) -> None:
    ids = torch.stack([ROWS[2][:20], ROWS[0][:20]])
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0) * 3
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    found = analyze_texts(model, batch, every=2)
    ones = torch.ones(15, dtype=torch.long)
    row = {"input_ids": ids[1, 5:], "attention_mask": ones, "position_ids": positions[1, 5:]}
    same(found.reports[1], gramian.analyze(model, row, every=2))
    embedded = model.get_input_embeddings()(ids).detach()
    other = analyze_texts(model, {"inputs_embeds": embedded, "attention_mask": mask}, every=2)
    plain = analyze_texts(model, {"input_ids": ids, "attention_mask": mask}, every=2)
    for one, two in zip(other, plain, strict=True):
        torch.testing.assert_close(one.ess, two.ess)


def test_means_and_spreads_are_those_of_numpy(model: Any) -> None:
    found = analyze_texts(model, ROWS[:3], every=4)
    alone = [gramian.analyze(model, row, every=4) for row in ROWS[:3]]
    assert found.positions == (0, 4, 8)
    for index, layer in enumerate(found.layers):
        sizes = np.stack([report.ess[index][:, :3].double().numpy() for report in alone])
        assert layer.ess is not None
        np.testing.assert_allclose(layer.ess.mean.numpy(), sizes.mean(0), rtol=1e-6)
        np.testing.assert_allclose(
            layer.ess.deviation.numpy(), np.std(sizes, axis=0, ddof=1), rtol=1e-5, atol=1e-7
        )
        np.testing.assert_allclose(
            layer.ess.error.numpy(), np.std(sizes, axis=0, ddof=1) / 3**0.5, rtol=1e-5, atol=1e-7
        )
        means = [float(report.ess[index].double().mean()) for report in alone]
        assert layer.average.mean == pytest.approx(np.mean(means))
        assert layer.average.deviation == pytest.approx(np.std(means, ddof=1))
        assert layer.average.error == pytest.approx(np.std(means, ddof=1) / 3**0.5)
        shares = [report.layers[index].in_use for report in alone]
        assert layer.in_use is not None
        assert layer.in_use.mean == pytest.approx(np.mean(shares))  # type: ignore[arg-type]
    averages = [float(report.average()) for report in alone]
    assert found.average().mean == pytest.approx(np.mean(averages))
    assert found.average().error == pytest.approx(np.std(averages, ddof=1) / 3**0.5)


def test_texts_without_a_common_position_still_have_layers(model: Any) -> None:
    reports = [gramian.analyze(model, ROWS[0], at=[i]) for i in (5, 6)]
    found = StateReports(tuple(reports))
    assert found.positions == () and all(layer.ess is None for layer in found.layers)
    assert found.layers[0].average.mean > 0


def test_one_text_has_no_spread(model: Any) -> None:
    found = analyze_texts(model, ROWS[0], every=5)
    (layer, _) = found.layers
    assert math.isnan(layer.average.deviation) and math.isnan(found.average().error)
    assert layer.ess is not None and bool(layer.ess.error.isnan().all())
    assert "±" not in str(found).splitlines()[1] and "1 text of 23 tokens" in str(found)
    assert json.loads(found.to_json())["average"]["error"] is None


def test_a_layer_that_some_texts_lack_is_named(model: Any) -> None:
    whole = gramian.analyze(model, ROWS[0], every=5)
    import dataclasses

    part = dataclasses.replace(
        whole, layers=whole.layers[:1], unread=((whole.layers[1].name, "it was too short."),)
    )
    found = StateReports((whole, part, whole))
    assert [layer.name for layer in found.layers] == [whole.layers[0].name]
    ((name, reason),) = found.unread
    assert name == whole.layers[1].name
    assert reason == "it was read in 2 of 3 texts (it was too short.)."


def test_reports_survive_their_file(model: Any, tmp_path: Path) -> None:
    found = analyze_texts(model, ROWS[:2], every=4, names=["a", "b"])
    loaded = StateReports.load(found.save(tmp_path / "reports.json"))
    assert loaded.names == ("a", "b") and loaded.to_json() == found.to_json()
    for one, other in zip(loaded, found, strict=True):
        same(one, other)
    (tmp_path / "other.json").write_text(found.reports[0].to_json())
    with pytest.raises(ValueError, match=r"of format 'gramian.state_reports/1' are needed; got"):
        StateReports.load(tmp_path / "other.json")


def test_texts_are_documents_and_fasta_records(model: Any) -> None:
    def encode(text: str) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(c) % 60 for c in text]}

    encode.decode = lambda ids: str(ids[0])  # type: ignore[attr-defined]
    texts = [Document("some words", "first"), "others", encode("more of them")["input_ids"]]
    found = analyze_texts(model, texts, tokenizer=encode, horizon=8, every=3)
    assert [report.horizon for report in found] == [8, 6, 8]
    assert found.names == ("first", "text 2", "text 3")
    same(found.reports[0], gramian.analyze(model, "some wor", tokenizer=encode, every=3))


def test_progress_runs_over_all_texts(model: Any) -> None:
    told: list[tuple[int, int]] = []
    analyze_texts(model, ROWS[:3], every=9, progress=lambda *now: told.append(now))
    assert told == [(i, 6) for i in range(1, 7)]


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "no texts"),
        ("", {}, "no texts"),
        (ROWS, {"names": ["a"]}, "4 texts need as many names; got 1"),
        (ROWS, {"horizon": 0}, "horizon must be at least 1"),
        (ROWS, {"at": [10]}, "text 2: positions must lie in 0 … 8"),
        ([ROWS[0], "words"], {}, "text 2: a text needs a tokenizer"),
        (
            {"input_ids": torch.ones(2, 5).long(), "attention_mask": torch.eye(5)[None, None]},
            {},
            "attention_mask must be 0 or 1",
        ),
        (
            {
                "input_ids": torch.ones(2, 5).long(),
                "attention_mask": torch.tensor([[1.0] * 5, [0.0] * 5]),
            },
            {},
            "text 2: there is nothing to analyze",
        ),
        (
            {"input_ids": torch.ones(2, 5).long(), "labels": torch.ones(2)},
            {},
            "labels must have an entry for each token",
        ),
        (
            {"input_ids": torch.ones(2, 5).long(), "labels": torch.ones(2, 5).long()},
            {},
            "text 1: labels are no inputs",
        ),
    ],
)
def test_what_cannot_be_read_says_which_text_it_is(
    model: Any, texts: Any, options: Any, message: str
) -> None:
    calls: list[Any] = []
    hook = model.register_forward_pre_hook(lambda *arguments: calls.append(arguments))
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is compared below)
        analyze_texts(model, texts, **options)
    hook.remove()
    assert message in str(error.value) and not calls


def test_frames_and_figures_have_every_text(model: Any, tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    found = analyze_texts(model, ROWS[:2], every=4, names=["a", "b"])
    frame = found.to_frame()
    assert len(frame) == sum(layer.ess.numel() for report in found for layer in report.layers)
    for name, report in zip(("a", "b"), found, strict=True):
        part = frame[frame.text == name]
        sizes = torch.cat([layer.ess.flatten() for layer in report.layers])
        assert part.ess.tolist() == sizes.tolist()
    assert found.to_frame("layer").text.tolist() == ["a", "a", "b", "b"]
    assert (tmp_path / "t.csv") == found.to_csv(tmp_path / "t.csv")
    with pytest.raises(ValueError, match=r"end in .csv; got t.txt"):
        found.to_csv(tmp_path / "t.txt")
    with pytest.raises(ValueError, match="by must be"):
        found.to_frame("text")
    pytest.importorskip("matplotlib")
    from gramian.reports import plot_state_spread

    (axes,) = plot_state_spread(found).axes
    middle = axes.containers[0].lines[0].get_ydata()
    assert middle == pytest.approx([layer.average.mean for layer in found.layers])
