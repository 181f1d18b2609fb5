"""Exported language models write what their recurrences in PyTorch write."""

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

from gramian.distillation import distill
from gramian.export import ExportedModel, ExportReport, export_model
from gramian.models import ByteTokenizer, GramianConfig, GramianForCausalLM
from tests.export.reference import padded_rows

MODAL = {"type": "modal", "orders": 5}
WINDOW = {"type": "explicit", "taps": 9, "skip": True}  # what is exported fastest
KINDS: dict[str, dict[str, Any]] = {
    "multi_hyena": {"mixers": "multi_hyena"},
    "hybrid": {
        "mixers": ["hyena", "softmax_attention"],
        "attention": {"kv_heads": 1, "window": 33},
    },
    "glu": {"mixers": ["long_convolution", "multi_hyena"], "block": "glu"},
    "mixer": {"mixers": ["hyena", "s6"], "block": "mixer"},
    "hyena_order_3": {"mixers": "hyena", "hyena_order": 3, "hyena_mimo_size": 7},
    "explicit": {
        "mixers": ["hyena", "multi_hyena"],
        "filter": WINDOW,
    },
    "real": {"mixers": "hyena", "filter": {"type": "modal", "orders": 5, "real": True}},
    "rtf": {"mixers": "multi_hyena", "filter": {"type": "rtf", "state_size": 4}},
    "s4": {"mixers": "hyena", "filter": {"type": "s4", "state_size": 8}},
    "attention": {"mixers": "softmax_attention", "filter": None},
    "grouped": {
        "mixers": "softmax_attention",
        "filter": None,
        "num_hidden_layers": 1,
        "attention": {"kv_heads": 1, "window": 33},
    },
    "linear": {"mixers": ["linear_attention", "gated_linear_attention"], "filter": None},
    "delta": {"mixers": ["gated_delta_net", "weighted_linear_attention"], "filter": None},
    "mapped": {
        "mixers": ["weighted_linear_attention", "gated_linear_attention"],
        "linear_recurrence": {"state_size": 4, "feature_size": 6, "head_gates": True},
        "filter": None,
    },
    "s6": {"mixers": ["s6", "gla_s6"], "filter": None},
    "ragged": {
        "mixers": ["hyena", "multi_hyena"],
        "filter": [
            {"type": "modal", "orders": [1, 1, 7, 7, 7, 1] * 2},
            {"type": "modal", "orders": [1, 9, 1]},
        ],
    },
}

# The state of the layer has two groups of channels.
RAGGED = {
    "mixers": "multi_hyena",
    "filter": {"type": "modal", "orders": [1, 7, 1]},
    "num_hidden_layers": 1,
}


def make(**changes: Any) -> GramianForCausalLM:
    torch.manual_seed(3)
    settings = {
        "vocab_size": 101,
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_heads": 3,
        "filter": MODAL,
        "max_position_embeddings": 300,
        "initializer_range": 0.4,
    }
    return GramianForCausalLM(GramianConfig(**(settings | changes))).eval()


@torch.no_grad()
def greedy(model: GramianForCausalLM, ids: torch.Tensor, count: int) -> tuple[Any, float, float]:
    """Tokens of the recurrence, the smallest lead of one over the next best, the largest logit."""
    output = model(ids, use_cache=True, logits_to_keep=1)
    tokens, lead, scale = [], float("inf"), 0.0
    for _ in range(count):
        logits = output.logits[:, -1]
        best = logits.topk(2).values
        lead = min(lead, float((best[:, 0] - best[:, 1]).min()))
        scale = max(scale, float(logits.abs().max()))
        tokens.append(logits.argmax(-1))
        output = model(tokens[-1][:, None], past_key_values=output.past_key_values, use_cache=True)
    return torch.stack(tokens, 1).numpy(), lead, scale


@pytest.fixture(scope="module")
def distilled() -> GramianForCausalLM:
    """A distilled layer and attention.

    The filters of the layer have one order: every group of channels with an order of its own is
    traced again, which takes seconds. `in_training` has several groups.
    """
    implicit = {"type": "implicit", "hidden": 16, "embedding_features": 5}
    model = make(
        mixers=["multi_hyena", "softmax_attention"],
        attention={"kv_heads": 1, "window": 33},
        num_heads=3,
        filter=implicit,
        max_position_embeddings=64,
    )
    return distill(model, order=6)[0]


@pytest.fixture(scope="module")
def exported(distilled: GramianForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "model"
    report = export_model(distilled, folder, tokenizer=ByteTokenizer(), verify=20, threads=1)
    assert report.ties == 0 and report.step_difference < 1e-4 * report.scale
    return folder


def test_a_thousand_greedy_tokens_are_the_same(
    distilled: GramianForCausalLM, exported: Path
) -> None:
    ids = torch.randint(101, (3, 50), generator=torch.Generator().manual_seed(0))
    expected, lead, scale = greedy(distilled, ids, 1000)
    assert len(np.unique(expected)) > 20  # a text that says something about the program
    assert lead > 1e-7 * scale  # no tie, which any rounding may decide
    run = ExportedModel(exported, threads=1)
    assert np.array_equal(run.generate(ids.numpy(), 1000)[:, 50:], expected)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 63, 64, 257])
@pytest.mark.parametrize("batch", [1, 4])
def test_prompts_of_any_length_and_batch(
    distilled: GramianForCausalLM, exported: Path, length: int, batch: int
) -> None:
    run = ExportedModel(exported, threads=1)
    ids = torch.randint(101, (batch, length + 1), generator=torch.Generator().manual_seed(length))
    output = distilled(ids[:, :length], use_cache=True)
    logits, state = run.prefill(ids[:, :length].numpy())
    np.testing.assert_allclose(logits, output.logits[:, -1], atol=1e-4)
    in_chunks, _ = run.prefill(ids[:, :length].numpy(), chunk_size=23)
    np.testing.assert_allclose(in_chunks, logits, atol=1e-4)
    assert state.taken == length and state.batch_size == batch
    logits, state = run.step(ids[:, length].numpy(), state)
    after = distilled(ids[:, length:], past_key_values=output.past_key_values, use_cache=True)
    np.testing.assert_allclose(logits, after.logits[:, -1], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("length", [2, 33, 100])
def test_rows_of_a_padded_batch_are_what_they_are_alone(
    distilled: GramianForCausalLM, exported: Path, length: int
) -> None:
    run = ExportedModel(exported, threads=1)
    ids, mask = padded_rows(length)
    logits, state = run.prefill(ids, attention_mask=mask)
    in_chunks, continued = run.prefill(ids, attention_mask=mask, chunk_size=23)
    np.testing.assert_allclose(in_chunks, logits, atol=1e-4)
    after, state = run.step(ids[:, 0], state)
    again, _ = run.step(ids[:, 0], continued)
    np.testing.assert_allclose(again, after, atol=1e-4)
    assert state.counts is not None and state.counts.tolist() == (mask.sum(1) + 1).tolist()
    assert state.taken == length + 1
    for row in range(4):
        alone = torch.from_numpy(np.append(ids[row, mask[row] == 1], ids[row, 0]))[None]
        expected = distilled(alone).logits[0]
        np.testing.assert_allclose(logits[row], expected[-2], atol=1e-4)
        np.testing.assert_allclose(after[row], expected[-1], atol=1e-4)


def test_a_server_of_padded_prompts_needs_onnxruntime_only(exported: Path) -> None:
    import onnxruntime

    run = ExportedModel(exported, threads=1)
    ids, mask = padded_rows(12)
    session = onnxruntime.InferenceSession(str(exported / "prefill.onnx"))
    given = {given.name: given for given in session.get_inputs()}["attention_mask"]
    assert (given.type, len(given.shape)) == ("tensor(int64)", 2)
    states = run.initial_state(4).tensors
    logits, *_ = session.run(None, {"input_ids": ids, "attention_mask": mask, **states})
    np.testing.assert_allclose(logits, run.prefill(ids, attention_mask=mask)[0], atol=1e-5)


def test_padded_prompts_are_continued_as_the_model_does(
    distilled: GramianForCausalLM, exported: Path
) -> None:
    ids, mask = padded_rows(20)
    tensors = {"inputs": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    written = distilled.generate(**tensors, max_new_tokens=30, do_sample=False)
    run = ExportedModel(exported, threads=1)
    assert np.array_equal(run.generate(ids, 30, attention_mask=mask), written.numpy())


def test_masks_that_cannot_be_meant_are_refused(exported: Path) -> None:
    run = ExportedModel(exported, threads=1)
    ids, mask = padded_rows(5)
    for wrong in (mask[:2], mask[0], mask * 2, mask - 1.5):
        with pytest.raises(ValueError, match=r"attention_mask must be \(4, 5\) of ones for tokens"):
            run.prefill(ids, attention_mask=wrong)
    with pytest.raises(ValueError, match=r"int64 \(4, 5\) with the value 2"):
        run.prefill(ids, attention_mask=mask * 2)
    with pytest.raises(ValueError, match="attention_mask must have rows of one length"):
        run.prefill(ids, attention_mask=[[1, 1], [1]])
    with pytest.raises(ValueError, match="input_ids must have rows of one length"):
        run.prefill([[1, 2], [3]])
    with pytest.raises(ValueError, match="also at padding; got -100"):
        run.prefill([[-100, 2]], attention_mask=[[0, 1]])
    mask[2] = 0
    with pytest.raises(ValueError, match="row 2 of attention_mask has no token"):
        run.prefill(ids, attention_mask=mask)


def test_the_folder_says_what_it_holds(distilled: GramianForCausalLM, exported: Path) -> None:
    names = {file.name for file in exported.iterdir()}
    assert {"step.onnx", "prefill.onnx", "export.json", "config.json"} < names
    assert "tokenizer_config.json" in names
    description = json.loads((exported / "export.json").read_text())
    run = ExportedModel(exported)
    assert run.initial_state(2).nbytes == distilled.state_bytes(2)
    for state in description["states"]:
        assert state["input"].startswith("layers.")
        assert ".mixer.state." in state["input"]
        assert state["output"] == f"next.{state['input']}"
        assert state["shape"][0] == "batch" and state["initial"] == 0


def test_a_loop_needs_onnxruntime_and_the_description_only(exported: Path) -> None:
    import onnxruntime

    description = json.loads((exported / "export.json").read_text())
    session = onnxruntime.InferenceSession(str(exported / "step.onnx"))
    assert session.get_inputs()[0].name == "input_ids"
    assert session.get_outputs()[0].name == "logits"
    feeds = {
        state["input"]: np.zeros([1, *state["shape"][1:]], state["dtype"])
        for state in description["states"]
    }
    token, written = np.array([[7]]), []
    for _ in range(30):
        logits, *states = session.run(None, {"input_ids": token, **feeds})
        feeds = dict(zip(feeds, states, strict=True))
        token = logits.argmax(-1)[:, None]
        written.append(int(token[0, 0]))
    expected = ExportedModel(exported).generate(np.array([[7]]), 30)[0, 1:]
    assert written == expected.tolist()


def test_drawn_tokens_are_seeded(exported: Path) -> None:
    run = ExportedModel(exported, threads=1)
    ids = np.array([[1, 2, 3]])
    first, again = (run.generate(ids, 40, temperature=1.0, seed=5) for _ in range(2))
    other = run.generate(ids, 40, temperature=1.0, seed=6)
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.fixture(scope="module")
def in_training(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[GramianForCausalLM, Any, ExportReport, Path]:
    """A model that was exported while it was trained and compiled, and its compiled step."""
    model = make(**RAGGED).train()
    model.compile_decoding()
    compiled = model.model.layers[0].mixer.compiled_step
    folder = tmp_path_factory.mktemp("torch") / "out"
    return model, compiled, export_model(model, folder, "torch", verify=10), folder


def test_the_model_is_left_as_it_was(in_training: Any) -> None:
    model, compiled, _, _ = in_training
    mixer = model.model.layers[0].mixer
    assert model.training and mixer.training and mixer.compiled_step is compiled
    assert compiled is not None


@torch.no_grad()
def test_torch_programs(in_training: Any) -> None:
    trained, _, report, folder = in_training
    model = make(**RAGGED)
    model.load_state_dict(trained.state_dict())
    assert (report.format, report.ties) == ("torch", 0)
    ids = torch.randint(101, (2, 40))
    expected, _, _ = greedy(model, ids, 60)
    run = ExportedModel(folder)
    assert np.array_equal(run.generate(ids.numpy(), 60)[:, 40:], expected)
    program = torch.export.load(folder / "step.pt2").module()
    states = {n: torch.from_numpy(x) for n, x in run.initial_state(1).tensors.items()}
    logits, after = program(ids[:1, :1], states)
    torch.testing.assert_close(logits, model(ids[:1, :1]).logits[:, 0])
    assert after.keys() == states.keys()
    for length in (1, 2, 32, 100):
        prompt = torch.randint(101, (1, length))
        logits, _ = run.prefill(prompt.numpy())
        np.testing.assert_allclose(logits, model(prompt).logits[:, -1], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_layer(tmp_path: Path, name: str) -> None:
    model = make(**KINDS[name])
    report = export_model(model, tmp_path / "out", verify=200, threads=1)
    assert report.ties == 0 and report.step_difference < 2e-5 * report.scale
    ids = torch.randint(101, (1, 70), generator=torch.Generator().manual_seed(1))
    expected, lead, scale = greedy(model, ids, 200)
    assert lead > 1e-6 * scale
    run = ExportedModel(tmp_path / "out", threads=1)
    assert np.array_equal(run.generate(ids.numpy(), 200)[:, 70:], expected)


@pytest.mark.slow
def test_full_attention_has_a_room(tmp_path: Path) -> None:
    model = make(mixers="softmax_attention", filter=None, num_hidden_layers=1)
    report = export_model(model, tmp_path / "out", context=30, verify=100, threads=1)
    assert report.context == 30 and report.compared == 15
    run = ExportedModel(tmp_path / "out", threads=1)
    ids = np.arange(20)[None]
    written = run.generate(ids, 11)  # the last one is not read
    expected, _, _ = greedy(model, torch.from_numpy(ids), 11)
    assert np.array_equal(written[:, 20:], expected)
    with pytest.raises(ValueError, match="room for 30 tokens, 31 are wanted"):
        run.generate(ids, 12)


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    implicit = {"type": "implicit", "hidden": 16, "embedding_features": 5}
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"layer 0 \(Hyena\) cannot be exported: .*distil"):
        export_model(make(mixers="hyena", filter=implicit, max_position_embeddings=400), out)
    model = make(mixers="hyena")
    with pytest.raises(ValueError, match="format must be one of onnx, torch; got 'tflite'"):
        export_model(model, out, "tflite")
    with pytest.raises(ValueError, match=r"float32 or float64; got torch.bfloat16"):
        export_model(make(mixers="hyena").bfloat16(), out)
    with pytest.raises(ValueError, match="verify must be at least 1"):
        export_model(model, out, verify=0)
    with pytest.raises(TypeError, match="got Linear"):
        export_model(torch.nn.Linear(2, 2), out)  # type: ignore[arg-type]
    assert not out.exists()
    out.mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        export_model(model, out)


def test_a_program_that_computes_something_else_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = ExportedModel.step

    def off(self: ExportedModel, *arguments: Any) -> Any:
        logits, state = step(self, *arguments)
        return np.roll(logits, 1, axis=-1), state

    monkeypatch.setattr(ExportedModel, "step", off)
    model = make(mixers="hyena", num_hidden_layers=1, filter=WINDOW)
    with pytest.raises(RuntimeError, match="writes another token than PyTorch at place 1"):
        export_model(model, tmp_path / "out", "torch", verify=5)
    assert list(tmp_path.iterdir()) == []


def test_wrong_inputs_of_a_run(exported: Path, tmp_path: Path) -> None:
    run = ExportedModel(exported, threads=1)
    for ids in ([1, 2], [[]], [[1.5]]):
        with pytest.raises(ValueError, match="integers \\(batch, length\\)"):
            run.prefill(ids)
    with pytest.raises(ValueError, match="must lie in 0 … 100"):
        run.prefill([[101]])
    with pytest.raises(ValueError, match="the input has 2 sequences, the state 1"):
        run.step([1, 2], run.initial_state(1))
    with pytest.raises(ValueError, match="one token a sequence; got 2"):
        run.step([[1, 2]], run.initial_state(1))
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        run.generate([[1]], 0)
    with pytest.raises(ValueError, match="batch_size must be a positive"):
        run.initial_state(0)
    with pytest.raises(FileNotFoundError, match=r"has no export\.json"):
        ExportedModel(tmp_path)
