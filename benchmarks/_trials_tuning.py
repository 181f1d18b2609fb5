"""Trials of peft and TRL, and of traced graphs and the names of attention."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks._trials import Models, compare, refused, trial

TEXTS = ["The memory of a model.", "State.", "A longer text about the state of a recurrence."]


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor, **others: Any) -> torch.Tensor:
    found: torch.Tensor = model(ids, **others).logits
    return found


def _padded(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens, and a mask with padding on the left of one row and on the right of another."""
    ids = torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[0, : length // 4] = 0
    mask[-1, length - length // 4 :] = 0
    return ids, mask


@trial("peft", 'LoRA on "all-linear", merged, saved and loaded', needs=("peft",))
def adapter(models: Models) -> str:
    from peft import LoraConfig, get_peft_model

    from gramian.models import load

    seen = []
    for name in ("original", "distilled"):
        ids = models.tokenizer()(TEXTS[2], return_tensors="pt")["input_ids"]
        lora = LoraConfig(
            r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
        )
        adapted = get_peft_model(models.load(name), lora).eval()
        expected = _logits(adapted, ids)
        assert not torch.allclose(expected, _logits(models.load(name), ids), atol=1e-3)
        folder = models.scratch / name
        adapted.save_pretrained(folder)
        errors = [compare(_logits(load(folder), ids), expected)]
        merged = adapted.merge_and_unload()
        errors.append(compare(_logits(merged, ids), expected))
        merged.compile_decoding()
        written = merged.generate(ids, max_new_tokens=10, do_sample=False)
        again = _logits(merged, written[:, :-1])[:, ids.shape[1] - 1 :].argmax(-1)
        assert torch.equal(again, written[:, ids.shape[1] :])
        seen.append(f"{name} {max(errors):.0e}")
    return f"Relative differences of logits: {', '.join(seen)}; compiled decoding agrees."


def _fine_tune(models: Models, **settings: Any) -> str:
    import trl
    from datasets import Dataset

    from gramian.models import ByteTokenizer

    model, tokenizer = models.load("distilled"), ByteTokenizer(split_special_tokens=False)
    rows = [torch.tensor([[*text.encode(), tokenizer.eos_token_id]]) for text in TEXTS]
    with torch.no_grad():
        counts = [row.shape[1] - 1 for row in rows]
        losses = [float(model(row, labels=row).loss) for row in rows]
    expected = sum(c * x for c, x in zip(counts, losses, strict=True)) / sum(counts)
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(models.scratch),
            max_steps=1,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            **settings,
        ),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
    )
    trainer.train()
    (loss,) = (entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert abs(loss - expected) < 1e-3, (loss, expected)
    return f"The first loss is {loss:.3f}, as for the texts one by one."


@trial("TRL", "SFT with padded rows", needs=("trl",))
def padded(models: Models) -> str:
    return _fine_tune(models, max_length=128, per_device_train_batch_size=3)


@trial("TRL", "SFT with packing", needs=("trl",))
def packed(models: Models) -> str:
    return _fine_tune(models, max_length=128, packing=True)


@trial("TRL", "SFT with padding_free", needs=("trl",))
def padding_free(models: Models) -> str:
    settings = {"max_length": None, "padding_free": True, "per_device_train_batch_size": 3}
    return _fine_tune(models, **settings)


@trial("TRL", "DPO, with the reference model that TRL loads", needs=("trl",))
def preferences(models: Models) -> str:
    import trl
    from datasets import Dataset

    from gramian.models import ByteTokenizer

    data = {"prompt": ["The memory"] * 2, "chosen": [" of a model."] * 2, "rejected": [" no"] * 2}
    trainer = trl.DPOTrainer(
        model=models.load("distilled"),
        args=trl.DPOConfig(
            output_dir=str(models.scratch),
            max_steps=3,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            learning_rate=1e-4,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_dict(data),
        processing_class=ByteTokenizer(split_special_tokens=False),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert abs(losses[0] - 0.6931) < 1e-3, losses
    assert losses[-1] < losses[0], losses
    return f"The loss falls from {losses[0]:.3f} to {losses[-1]:.3f} in 3 steps."


@trial("torch.export", "a model for every batch and length, with padding", needs=("torch",))
def graph(models: Models) -> str:
    open_ = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    model = models.load("distilled")
    inputs = {"input_ids": torch.zeros(2, 512).long(), "attention_mask": torch.ones(2, 512).long()}
    with torch.no_grad():
        program = torch.export.export(
            model, (), inputs, dynamic_shapes=dict.fromkeys(inputs, open_)
        ).module()
    errors = []
    for batch, length in ((1, 7), (3, 200), (2, 512), (1, 1024)):
        ids, mask = _padded(batch, length)
        with torch.no_grad():
            found = program(input_ids=ids, attention_mask=mask)[0][mask == 1]
        errors.append(compare(found, _logits(model, ids, attention_mask=mask)[mask == 1]))
    return f"Relative differences of logits at 4 sizes: at most {max(errors):.0e}."


@trial("torch.compile", "a model for every batch and length, with padding", needs=("torch",))
def compiled(models: Models) -> str:
    model = models.load("distilled")
    fast = torch.compile(model, dynamic=True, fullgraph=True)
    errors = []
    for batch, length in ((2, 12), (3, 200), (2, 512)):
        ids, mask = _padded(batch, length)
        found = _logits(fast, ids, attention_mask=mask)[mask == 1]
        errors.append(compare(found, _logits(model, ids, attention_mask=mask)[mask == 1]))
    return f"Relative differences of logits at 3 sizes: at most {max(errors):.0e}."


@trial("torch.compile", "a training step, with padding and labels", needs=("torch",))
def compiled_steps(models: Models) -> str:
    model = models.load("original").train()
    fast = torch.compile(model, dynamic=True, fullgraph=True)
    parameters = list(model.parameters())
    errors = []
    for batch, length in ((2, 12), (3, 200), (2, 512)):
        ids, mask = _padded(batch, length)
        gradients = []
        for one in (fast, model):
            loss = one(ids, attention_mask=mask, labels=ids).loss
            found = torch.autograd.grad(loss, parameters)
            gradients.append(torch.cat([gradient.flatten() for gradient in found]))
        errors.append(compare(*gradients))
    return f"Relative differences of gradients at 3 sizes: at most {max(errors):.0e}."


@trial("transformers", "attn_implementation")
def attention(models: Models) -> str:
    from transformers import AutoModelForCausalLM

    import gramian.models  # noqa: F401 (registers the classes)

    path = models.path("distilled")
    for name in ("sdpa", "eager"):
        AutoModelForCausalLM.from_pretrained(path, attn_implementation=name)
    return refused(
        lambda: AutoModelForCausalLM.from_pretrained(path, attn_implementation="flex_attention"),
        ValueError,
        names="sdpa",
    )


@trial("transformers", "a DynamicCache")
def cache(models: Models) -> str:
    from transformers import DynamicCache

    model = models.load("distilled")
    return refused(
        lambda: model(torch.zeros(1, 3).long(), past_key_values=DynamicCache()),
        TypeError,
        names="make_cache",
    )
