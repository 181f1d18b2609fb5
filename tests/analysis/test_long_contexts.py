"""Attention over long contexts is read by rows, with the numbers of its maps."""

import pytest
import torch

from gramian.analysis import StateReport, _analyze, _recording, analyze

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
KINDS = {
    "llama": {},
    "mistral": {"sliding_window": 40},
    "gemma2": {"sliding_window": 40},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1},
}


def build(kind):
    config = transformers.AutoConfig.for_model(kind, **SIZES, **KINDS[kind])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data *= 3
    return model, torch.randint(61, (500,))


@pytest.fixture
def by_rows(monkeypatch):
    """The calls of attention that were read by rows, at any length."""
    made = []

    class Counted(_recording.AttentionRows):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(_analyze, "_LONG", 100)
    monkeypatch.setattr(_recording, "AttentionRows", Counted)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_rows_give_what_the_maps_give(kind, by_rows):
    model, tokens = build(kind)
    estimated = analyze(model, tokens, at=[50, 250, 260], tolerance=0.02)
    assert len(by_rows) == 2
    exact = analyze(model, tokens, at=[50, 250, 260])
    assert len(by_rows) == 2
    assert not estimated.unread
    for layer, truth in zip(estimated.layers, exact.layers, strict=True):
        assert (layer.name, layer.reader, layer.storage) == (
            truth.name,
            truth.reader,
            truth.storage,
        )
        assert torch.equal(layer.tss, truth.tss)
        assert truth.error is None
        error = torch.zeros_like(layer.ess) if layer.error is None else layer.error
        mean, of_mean = float(layer.ess.double().mean()), layer.mean_error or 0.0
        assert of_mean <= 0.02 * mean
        assert abs(mean - float(truth.ess.double().mean())) <= 2 * of_mean + 1e-4 * mean
        assert bool(((layer.ess - truth.ess).abs() <= 2 * error + 1e-4 * truth.ess).all())


@pytest.mark.parametrize("kind", KINDS)
def test_reading_by_rows_changes_no_output(kind, by_rows):
    model, tokens = build(kind)
    with torch.no_grad():
        before = model(tokens[None]).logits
    outputs = []
    last = model.model.layers[-1]
    handle = last.register_forward_hook(
        lambda module, inputs, output: outputs.append(
            output if isinstance(output, torch.Tensor) else output[0]
        )
    )
    with torch.no_grad():
        model(tokens[None])
        analyze(model, tokens, at=[5], tolerance=0.1)
    handle.remove()
    torch.testing.assert_close(outputs[-1], outputs[0], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(model(tokens[None]).logits, before)


def test_a_function_that_mixes_queries_is_called_as_a_whole(by_rows, monkeypatch):
    from transformers.models.llama import modeling_llama

    own = modeling_llama.eager_attention_forward

    def mixed(module, query, key, value, mask, **kwargs):
        query = query - 0.5 * query.mean(2, keepdim=True).detach() * (query.shape[2] > 1)
        return own(module, query, key, value, mask, **kwargs)

    model, tokens = build("llama")
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", mixed)
    report = analyze(model, tokens, at=[50], tolerance=0.02)
    assert not by_rows
    assert {layer.reader for layer in report.layers} <= {"attention", "general"}


def test_recurrences_are_exact_at_every_tolerance():
    from gramian.mixers import GatedLinearAttention

    torch.manual_seed(0)
    mixer = torch.nn.Sequential(GatedLinearAttention(16, heads=2))
    x = torch.randn(200, 16)
    with torch.no_grad():
        report = analyze(mixer, x, positions=5, tolerance=0.05)
        exact = analyze(mixer, x, positions=5)
    assert report.layers[0].error is None
    assert torch.equal(report.layers[0].ess, exact.layers[0].ess)


def test_errors_are_saved_with_the_report(by_rows, tmp_path):
    model, tokens = build("llama")
    report = analyze(model, tokens, positions=2, tolerance=0.05)
    assert report.positions == (125, 375)
    again = StateReport.load(report.save(tmp_path / "report.json"))
    for layer, other in zip(report.layers, again.layers, strict=True):
        torch.testing.assert_close(layer.ess, other.ess)
        assert (layer.error is None) == (other.error is None)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"positions": 0}, "positions must be at least 1; got 0"),
        ({"positions": 3, "every": 2}, "give one of"),
        ({"positions": 3, "at": [1]}, "give one of"),
        ({"tolerance": 0.0}, "tolerance must be at least 0.001"),
        ({"tolerance": 0.1, "measure": "tolerance", "rtol": 0.1}, 'measure="entropy"'),
    ],
)
def test_what_cannot_be_estimated_is_refused(options, match):
    model, tokens = build("llama")
    with pytest.raises(ValueError, match=match):
        analyze(model, tokens[:20], **options)


def test_positions_are_spread_evenly():
    model, tokens = build("llama")
    assert analyze(model, tokens[:12], positions=3).positions == (2, 6, 10)
    assert analyze(model, tokens[:4], positions=9).positions == (0, 1, 2, 3)
