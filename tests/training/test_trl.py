"""TRL trains a language model of bytes: the losses are those of the plain forward pass."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("trl")

import datasets
import trl

from gramian.models import ByteTokenizer, GramianConfig, GramianForCausalLM

TEXTS = ["The memory of a model.", "State.", "A longer text about the state of a recurrence."]


@pytest.fixture
def model(tmp_path: Path) -> GramianForCausalLM:
    torch.manual_seed(0)
    config = GramianConfig(
        vocab_size=259,
        pad_token_id=258,
        hidden_size=16,
        num_heads=2,
        num_hidden_layers=3,
        mixers=["hyena", "gated_delta_net", "softmax_attention"],
        max_position_embeddings=128,
        filter={"type": "modal", "orders": 3},
        initializer_range=0.3,
    )
    return GramianForCausalLM(config)


def options(folder: Path, **others: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 1,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        **others,
    }


@torch.no_grad()
def plain_loss(model: GramianForCausalLM, rows: list[list[int]]) -> float:
    """The mean loss of all predicted tokens, one text after the other."""
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row])
        logits = model(ids, use_cache=False).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += len(row) - 1
    return total / count


def logged(trainer: Any) -> float:
    trainer.train()
    (loss,) = (entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return float(loss)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_length": 64, "per_device_train_batch_size": 3},
        {"max_length": 128, "packing": True},
        {"max_length": None, "padding_free": True, "per_device_train_batch_size": 3},
    ],
    ids=["padded", "packed", "padding-free"],
)
def test_fine_tuning(model: GramianForCausalLM, tmp_path: Path, settings: dict[str, Any]) -> None:
    before = copy.deepcopy(model).eval()
    # TRL writes the name of the last token after each text, which is to become this token.
    tokenizer = ByteTokenizer(split_special_tokens=False)
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**options(tmp_path, **settings)),
        train_dataset=datasets.Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
    )
    rows = [[*text.encode(), tokenizer.eos_token_id] for text in TEXTS]
    given = [token for row in trainer.train_dataset["input_ids"] for token in row]
    assert sorted(given) == sorted(token for row in rows for token in row)
    assert logged(trainer) == pytest.approx(plain_loss(before, rows), rel=1e-4)
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)


def test_preferences(model: GramianForCausalLM, tmp_path: Path) -> None:
    """The first loss is log 2, because the model is still its own reference."""
    data = {"prompt": ["The memory"] * 2, "chosen": [" of a model."] * 2, "rejected": [" no"] * 2}
    before = copy.deepcopy(model)
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=copy.deepcopy(model),
        args=trl.DPOConfig(**options(tmp_path, max_length=64, learning_rate=1e-3, max_steps=1)),
        train_dataset=datasets.Dataset.from_dict(data),
        processing_class=ByteTokenizer(split_special_tokens=False),
    )
    assert logged(trainer) == pytest.approx(0.6931, abs=1e-3)
    prompt = torch.tensor([list(b"The memory")])

    @torch.no_grad()
    def margin(one: GramianForCausalLM) -> float:
        scores = []
        for answer in (b" of a model.", b" no"):
            ids = torch.cat([prompt, torch.tensor([list(answer)])], dim=1)
            logits = one.eval()(ids).logits[:, :-1].log_softmax(-1)
            taken = logits.gather(-1, ids[:, 1:, None])[0, prompt.shape[1] - 1 :]
            scores.append(float(taken.sum()))
        return scores[0] - scores[1]

    assert margin(model) > margin(before)
