"""Sequence classification: pooling, padding, problems, continuous inputs, saving and training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

from gramian import distill, parameter_groups
from gramian.models import (
    GramianConfig,
    GramianForCausalLM,
    GramianForSequenceClassification,
    GramianModel,
)

MakeConfig = Callable[..., GramianConfig]
MakeTokens = Callable[[int, int], torch.Tensor]

LABELS = 3
ENCODERS: dict[str, dict[str, Any]] = {
    "bidirectional": {"mixers": "long_convolution", "bidirectional": True},
    "long_convolution": {"mixers": "long_convolution"},
    "glu": {
        "mixers": "long_convolution",
        "bidirectional": True,
        "block": "glu",
        "norm": "batch",
        "prenorm": False,
    },
    "hyena": {"mixers": "hyena", "block": "glu", "norm": "layer", "tied_dropout": True},
    "multi_hyena": {"mixers": "multi_hyena"},
}
poolings = pytest.mark.parametrize("pooling", ["mean", "last"])


@pytest.fixture(params=ENCODERS)
def encoder(request: pytest.FixtureRequest) -> dict[str, Any]:
    return ENCODERS[request.param]


@pytest.fixture
def make(make_config: MakeConfig) -> Callable[..., GramianForSequenceClassification]:
    """Makes a float64 classifier in evaluation mode."""

    def build(**kwargs: Any) -> GramianForSequenceClassification:
        torch.manual_seed(3)
        config = make_config(**({"num_labels": LABELS} | kwargs))
        return GramianForSequenceClassification(config).double().eval()

    return build


Make = Callable[..., GramianForSequenceClassification]


@poolings
@torch.no_grad()
def test_logits_are_of_the_pooled_hidden_states(
    make: Make, make_tokens: MakeTokens, encoder: dict[str, Any], pooling: str
) -> None:
    model, tokens = make(pooling=pooling, **encoder), make_tokens(2, 9)
    outputs = model(tokens, output_hidden_states=True)
    hidden = model.model(tokens).last_hidden_state
    assert_close(outputs.hidden_states[-1], hidden)
    assert_close(
        outputs.logits, model.score(hidden.mean(1) if pooling == "mean" else hidden[:, -1])
    )
    assert outputs.logits.shape == (2, LABELS)
    assert outputs.loss is None
    (logits,) = model(tokens, return_dict=False)
    assert_close(logits, outputs.logits)


@pytest.mark.each
@poolings
@torch.no_grad()
def test_padding_leaves_no_trace(
    make: Make,
    make_tokens: MakeTokens,
    encoder: dict[str, Any],
    pooling: str,
    filter_config: dict[str, Any],
) -> None:
    """On the left, on the right, on both sides, of another size in every row."""
    model = make(pooling=pooling, filter=filter_config, **encoder).float()
    tokens = make_tokens(3, 12)
    expected = model(tokens).logits
    for sides in ([(7, 0)] * 3, [(0, 7)] * 3, [(3, 4)] * 3, [(7, 0), (0, 7), (5, 2)]):
        rows, masks = [], []
        for row, (left, right) in zip(tokens, sides, strict=True):
            parts = (make_tokens(1, left)[0], row, make_tokens(1, right)[0])
            rows.append(torch.cat(parts))
            masks.append(torch.cat([torch.full(p.shape, int(p is row)) for p in parts]))
        batch, mask = torch.stack(rows), torch.stack(masks)
        for kind in (mask, mask.bool(), mask.float()):
            assert_close(model(batch, attention_mask=kind).logits, expected, rtol=0, atol=1e-5)
    assert_close(model(tokens, attention_mask=torch.ones(3, 12)).logits, expected)


@torch.no_grad()
def test_only_a_bidirectional_encoder_looks_ahead(make: Make, make_tokens: MakeTokens) -> None:
    tokens = make_tokens(1, 15)
    later = tokens.clone()
    later[0, 10] = (later[0, 10] + 1) % 50
    for kwargs in ENCODERS.values():
        model = make(**kwargs).model
        change = model(later).last_hidden_state - model(tokens).last_hidden_state
        earlier = float(change[:, :10].abs().max())
        assert earlier > 1e-6 if kwargs.get("bidirectional") else earlier < 1e-12


@pytest.mark.parametrize("input_size", [1, 3])
@torch.no_grad()
def test_continuous_inputs(make: Make, input_size: int, encoder: dict[str, Any]) -> None:
    model = make(input_size=input_size, **encoder)
    assert model.main_input_name == "input_values"
    assert not hasattr(model.model, "embed_tokens")
    assert model.get_input_embeddings() is model.model.input_proj
    values = torch.randn(2, 20, input_size, dtype=torch.float64)
    logits = model(input_values=values).logits
    assert_close(model(inputs_embeds=model.model.input_proj(values)).logits, logits)
    assert_close(model(input_values=values.float()).logits, logits, rtol=1e-4, atol=1e-5)
    padded = torch.cat([9 * torch.ones(2, 4, input_size), values, values], 1)
    mask = torch.zeros(2, 44)
    mask[:, 4:24] = 1
    assert_close(model(input_values=padded, attention_mask=mask).logits, logits)
    half = model.to(torch.bfloat16)(input_values=values.float()).logits
    assert half.dtype == torch.bfloat16
    assert (half - logits).norm() < 0.1 * logits.norm()


def test_a_continuous_input_may_be_continued(make_config: MakeConfig) -> None:
    """The base model of a causal encoder streams: its cache knows nothing of tokens."""
    torch.manual_seed(0)
    model = GramianModel(make_config(input_size=2)).double().eval()
    values = torch.randn(1, 20, 2, dtype=torch.float64)
    with torch.no_grad():
        first = model(input_values=values[:, :11])
        rest = model(input_values=values[:, 11:], past_key_values=first.past_key_values)
        whole = model(input_values=values).last_hidden_state
    assert_close(torch.cat([first.last_hidden_state, rest.last_hidden_state], 1), whole)


@pytest.mark.parametrize(
    ("kwargs", "labels", "loss"),
    [
        ({"num_labels": 3}, torch.tensor([2, 0]), "cross_entropy"),
        ({"num_labels": 3}, torch.tensor([2, 0], dtype=torch.int32), "cross_entropy"),
        ({"num_labels": 2}, torch.tensor([[1.0, 0], [1, 1]]), "binary"),
        (
            {"num_labels": 2, "problem_type": "multi_label_classification"},
            torch.tensor([[1, 0], [1, 1]]),
            "binary",
        ),
        ({"num_labels": 1}, torch.tensor([0.5, -2]), "squared"),
        ({"num_labels": 1}, torch.tensor([[1], [-2]]), "squared"),
        (
            {"num_labels": 2, "problem_type": "regression"},
            torch.tensor([[0.5, 1], [2, 3]]),
            "squared",
        ),
    ],
)
def test_problem_types(
    make: Make, make_tokens: MakeTokens, kwargs: dict[str, Any], labels: torch.Tensor, loss: str
) -> None:
    model, tokens = make(**kwargs), make_tokens(2, 9)
    for _ in range(2):  # what the first call makes of it holds for the second
        outputs = model(tokens, labels=labels)
        logits = outputs.logits
        if loss == "cross_entropy":
            expected = -logits.log_softmax(-1)[torch.arange(2), labels.long()].mean()
        elif loss == "binary":
            p = logits.sigmoid()
            expected = -(labels * p.log() + (1 - labels) * (1 - p).log()).mean()
        else:
            expected = (logits - labels.reshape(logits.shape)).square().mean()
        assert_close(outputs.loss, expected)
    outputs.loss.backward()


@pytest.mark.each
def test_every_parameter_learns(
    make: Make, make_tokens: MakeTokens, encoder: dict[str, Any], filter_config: dict[str, Any]
) -> None:
    model = make(filter=filter_config, **encoder).train()
    model(make_tokens(3, 30), labels=torch.tensor([0, 1, 2])).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.pairs
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inputs", ["tokens", "values"])
def test_gradient_checkpointing_changes_no_gradient(
    make: Make, make_tokens: MakeTokens, encoder: dict[str, Any], reentrant: bool, inputs: str
) -> None:
    if inputs == "tokens":
        model, given = make(**encoder), {"input_ids": make_tokens(2, 12)}
    else:
        model = make(input_size=1, **encoder)
        given = {"input_values": torch.randn(2, 12, 1, dtype=torch.float64)}
    mask = torch.ones(2, 12)
    mask[0, :3] = 0
    arguments = {**given, "attention_mask": mask, "labels": torch.tensor([0, 2])}
    model.train()
    model(**arguments).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(**arguments).loss.backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name], msg=name)


@pytest.mark.parametrize("kind", ["dropout", "kernel_dropout"])
def test_dropout_is_for_training(
    make: Make, make_tokens: MakeTokens, encoder: dict[str, Any], kind: str
) -> None:
    tokens = make_tokens(2, 20)
    model, expected = make(**{kind: 0.5}, **encoder), make(**encoder)(tokens).logits
    assert torch.equal(model(tokens).logits, expected)
    model.train()
    assert not torch.allclose(model(tokens).logits, expected)
    assert not torch.equal(model(tokens).logits, model(tokens).logits)


@pytest.mark.each
@pytest.mark.parametrize("input_size", [None, 2])
def test_round_trip(
    make: Make,
    make_tokens: MakeTokens,
    tmp_path: Path,
    encoder: dict[str, Any],
    filter_config: dict[str, Any],
    input_size: int | None,
) -> None:
    kwargs = {"filter": filter_config, "input_size": input_size, "pooling": "last"}
    model = make(**kwargs, **encoder).float()
    model.save_pretrained(tmp_path)
    given = {"input_ids": make_tokens(2, 30)}
    if input_size is not None:
        given = {"input_values": torch.randn(2, 30, input_size)}
    for cls in (GramianForSequenceClassification, transformers.AutoModelForSequenceClassification):
        read = cls.from_pretrained(tmp_path)
        assert type(read) is GramianForSequenceClassification
        tensors = dict([*read.named_parameters(), *read.named_buffers()])
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            assert torch.equal(tensor, tensors.pop(name)), name
        assert not tensors
        assert torch.equal(read(**given).logits, model(**given).logits)


def test_built_on_meta_and_initialised_as_configured(
    make_config: MakeConfig, encoder: dict[str, Any]
) -> None:
    config = make_config(input_size=4, num_labels=5, **encoder)
    with torch.device("meta"):
        hollow = GramianForSequenceClassification(config)
    real = GramianForSequenceClassification(config)
    assert all(tensor.is_meta for tensor in hollow.state_dict().values())
    shapes = {name: tensor.shape for name, tensor in real.state_dict().items()}
    assert {name: tensor.shape for name, tensor in hollow.state_dict().items()} == shapes
    assert torch.equal(real.score.bias, torch.zeros(5))
    assert real.model.input_proj.weight.std() > 0.1


def test_a_language_model_becomes_a_classifier(
    make_config: MakeConfig, make_tokens: MakeTokens, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    language_model = GramianForCausalLM(make_config()).eval()
    language_model.save_pretrained(tmp_path)
    classifier = GramianForSequenceClassification.from_pretrained(tmp_path, num_labels=4)
    tokens = make_tokens(2, 9)
    assert torch.equal(
        classifier.model(tokens).last_hidden_state,
        language_model.model(tokens).last_hidden_state,
    )
    assert classifier(tokens).logits.shape == (2, 4)
    assert classifier.score.weight.abs().max() > 0


@torch.no_grad()
def test_a_causal_classifier_distils_and_a_bidirectional_one_does_not(
    make: Make, make_tokens: MakeTokens
) -> None:
    model = make(mixers="hyena", max_position_embeddings=20).float()
    tokens = make_tokens(2, 20)
    distilled, _ = distill(model, order=12)
    expected = model(tokens).logits
    assert (distilled(tokens).logits - expected).norm() < 0.05 * expected.norm()
    with pytest.raises(ValueError, match="bidirectional model cannot be distilled"):
        distill(make(**ENCODERS["bidirectional"]))


@pytest.mark.parametrize(  # every pair of two of them
    ("kind", "name", "pooling"),
    [
        ("tokens", "bidirectional", "mean"),
        ("tokens", "glu", "last"),
        ("values", "glu", "mean"),
        ("values", "bidirectional", "last"),
    ],
)
def test_overfits_sixteen_sequences(
    make_config: MakeConfig, make_tokens: MakeTokens, kind: str, name: str, pooling: str
) -> None:
    torch.manual_seed(0)
    config = make_config(
        input_size=None if kind == "tokens" else 1,
        pooling=pooling,
        initializer_range=0.1,
        num_labels=4,
        filter={"type": "rtf", "state_size": 8},
        **ENCODERS[name],
    )
    model = GramianForSequenceClassification(config).train()
    labels = torch.arange(16) % 4
    given = {"input_ids": make_tokens(16, 24)}
    if kind == "values":
        given = {"input_values": torch.randn(16, 24, 1)}
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2, weight_decay=0.01))
    for _ in range(80):
        optimizer.zero_grad()
        model(**given, labels=labels).loss.backward()
        optimizer.step()
    model.eval()
    assert torch.equal(model(**given).logits.argmax(-1), labels)


def test_with_the_trainer(make_config: MakeConfig, tmp_path: Path) -> None:
    """Which half of a scalar sequence is louder; padded on the right by the collator."""
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    values = torch.randn(48, 20, 1)
    labels = torch.arange(48) % 2
    for row, label in zip(values, labels, strict=True):
        row[10 * label : 10 * label + 10] *= 4
    data = [
        {
            "input_values": torch.cat([row, torch.zeros(i % 5, 1)]),
            "attention_mask": (torch.arange(20 + i % 5) < 20).long(),
            "labels": label,
        }
        for i, (row, label) in enumerate(zip(values, labels, strict=True))
    ]

    def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        def pad(name: str) -> torch.Tensor:
            parts = [row[name] for row in rows]
            return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)

        return {
            "input_values": pad("input_values"),
            "attention_mask": pad("attention_mask"),
            "labels": torch.stack([row["labels"] for row in rows]),
        }

    config = make_config(
        input_size=1, initializer_range=0.1, dropout=0.1, **ENCODERS["bidirectional"]
    )
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        max_steps=20,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    trainer = Trainer(
        model=GramianForSequenceClassification(config),
        args=arguments,
        train_dataset=data,
        eval_dataset=data,
        data_collator=collate,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.05
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0] == pytest.approx(before, rel=0.5)  # a mean, not a sum over accumulated steps


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "exactly one of input_ids and inputs_embeds"),
        ({"input_values": torch.ones(2, 3, 1)}, "without input_size takes input_ids"),
        ({"input_ids": torch.ones(2, 0).long()}, "at least one token"),
        (
            {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 2)},
            "attention_mask must be",
        ),
        (
            {
                "input_ids": torch.ones(3, 2).long(),
                "attention_mask": torch.tensor([[1, 0], [0, 0], [0, 0]]),
            },
            "real token in every sequence; it hides all of 1, 2",
        ),
        (
            {"input_ids": torch.ones(2, 3).long(), "labels": torch.tensor([1, 2, 0])},
            r"labels must be \(2,\) for single_label_classification; got \(3,\)",
        ),
        (
            {"input_ids": torch.ones(2, 3).long(), "labels": torch.ones(2)},
            r"labels must be \(2, 3\) for multi_label_classification; got \(2,\)",
        ),
    ],
)
def test_wrong_inputs_are_refused_in_one_sentence(
    make: Make, arguments: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        make()(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "exactly one of input_values and inputs_embeds"),
        ({"input_ids": torch.ones(2, 3).long()}, "of input_size 2 takes input_values, not input"),
        ({"input_values": torch.ones(2, 3, 1)}, r"must be \(batch, length, 2\); got \(2, 3, 1\)"),
        ({"input_values": torch.ones(2, 3)}, r"must be \(batch, length, 2\); got \(2, 3\)"),
    ],
)
def test_wrong_continuous_inputs_are_refused_in_one_sentence(
    make: Make, arguments: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        make(input_size=2)(**arguments)
    assert "\n" not in str(caught.value)


def test_a_bidirectional_model_neither_streams_nor_writes(
    make_config: MakeConfig, make_tokens: MakeTokens
) -> None:
    config = make_config(**ENCODERS["bidirectional"])
    model, tokens = GramianModel(config).eval(), make_tokens(1, 5)
    with torch.no_grad():
        assert model(tokens).past_key_values is None
        cache = GramianModel(make_config())(tokens, use_cache=True).past_key_values
    for call, sentence in (
        (lambda: model(tokens, use_cache=True), "has no cache"),
        (lambda: model(tokens, past_key_values=cache), "has no cache"),
        (model.state_bytes, "no recurrence"),
        (lambda: GramianForCausalLM(config), "cannot look ahead"),
        (
            lambda: GramianForCausalLM(make_config(block="glu", norm="batch")),
            "cannot have norm='batch'",
        ),
        (lambda: GramianForCausalLM(make_config(input_size=1)), "input_size must be None; got 1"),
    ):
        with pytest.raises(ValueError, match=sentence) as caught:
            call()
        assert "\n" not in str(caught.value)
