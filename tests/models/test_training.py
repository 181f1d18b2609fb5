"""Training with Hugging Face's Trainer, saved and generated from as it comes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from gramian.models import GramianConfig, GramianForCausalLM, load


class Words(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sequences in which the token seven places back comes again: nothing but memory helps."""

    def __init__(self, size: int, length: int) -> None:
        generator = torch.Generator().manual_seed(0)
        period = torch.randint(8, (size, 7), generator=generator)
        self.tokens = period.repeat(1, -(-length // 7))[:, :length]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_lowers_the_loss(
    make_config: Callable[..., GramianConfig],
    tmp_path: Path,
    filter_config: dict[str, Any],
    checkpointing: bool,
) -> None:
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    config = make_config(vocab_size=8, filter=filter_config, initializer_range=0.1)
    model = GramianForCausalLM(config)
    data = Words(64, 28)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=16,
        max_steps=12,
        learning_rate=1e-2,
        logging_steps=1,
        gradient_checkpointing=checkpointing,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < before - 0.05
    trainer.save_model(str(tmp_path / "trained"))
    read = load(tmp_path / "trained")
    tokens = data.tokens[:2]
    with torch.no_grad():
        assert torch.equal(read(tokens).logits, model.eval()(tokens).logits)
