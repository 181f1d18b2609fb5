"""Trials of the ways in which tools load Gramian's models and tokenizers."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from benchmarks._trials import Models, compare, refused, trial

TEXT = "The import statement finds a module, and binds its name."


@trial("transformers", "AutoModelForCausalLM and AutoTokenizer, and greedy generation")
def auto_classes(models: Models) -> str:
    from transformers import AutoModelForCausalLM

    seen = []
    for name in ("original", "distilled"):
        expected = models.load(name)
        inputs = models.tokenizer()(TEXT, return_tensors="pt")
        model = AutoModelForCausalLM.from_pretrained(models.path(name))
        with torch.no_grad():
            logits = expected(**inputs).logits
            seen.append(f"{name} {compare(model(**inputs).logits, logits):.0e}")
        written = model.generate(**inputs, max_new_tokens=20, do_sample=False)
        length = inputs["input_ids"].shape[1]
        with torch.no_grad():  # each token is the best after those before it
            again = expected(written[:, :-1]).logits[:, length - 1 :].argmax(-1)
        assert torch.equal(again, written[:, length:])
    return f"Relative differences of logits: {', '.join(seen)}; 20 tokens are the same."


@trial("transformers", 'pipeline("text-generation") on prompts of different lengths')
def pipeline(models: Models) -> str:
    from transformers import pipeline

    import gramian.models  # noqa: F401 (registers the classes)

    prompts = ["A list ", "The import statement ", "for"]
    writer = pipeline(
        "text-generation", model=str(models.path("distilled")), device="cpu", batch_size=3
    )
    options = {"max_new_tokens": 20, "do_sample": False}
    batched = [one[0]["generated_text"] for one in writer(prompts, **options)]
    alone = [writer(prompt, **options)[0]["generated_text"] for prompt in prompts]
    assert batched == alone
    return "A batch of 3 prompts continues as each prompt alone."


@trial("transformers", "AutoTokenizer in a process that has not imported Gramian")
def unprepared(models: Models) -> str:
    code = (
        "import sys; from transformers import AutoTokenizer\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=trust)\n"
        "print(type(tokenizer).__name__, *tokenizer('hé')['input_ids'])\n"
    )
    found = []
    for trust in (True, False):
        ran = subprocess.run(
            [sys.executable, "-c", f"trust = {trust}\n{code}", models.path("distilled")],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=120,
            cwd=models.scratch,
            env=os.environ | {"HF_HOME": str(models.scratch)},
        )
        assert ran.returncode == 0, ran.stderr
        kind, *ids = ran.stdout.split()
        assert ids == [str(byte) for byte in "hé".encode()], ran.stdout
        found.append(f"{kind} with trust_remote_code={trust}")
    return f"It returns a {', and a '.join(found)}; without the argument it asks."


@trial(
    "TRL", "SFT of a folder by its path, with the loss on answers only", needs=("trl", "datasets")
)
def sft(models: Models) -> str:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    import gramian.models  # noqa: F401 (registers the classes)

    def row(count: int) -> dict[str, list[dict[str, str]]]:
        question = {"role": "user", "content": f"{count} times a"}
        return {"messages": [question, {"role": "assistant", "content": "a" * count}]}

    settings = SFTConfig(
        output_dir=str(models.scratch),
        max_steps=20,
        learning_rate=1e-3,
        per_device_train_batch_size=4,
        assistant_only_loss=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    )
    trainer = SFTTrainer(
        model=str(models.path("distilled")),
        args=settings,
        train_dataset=Dataset.from_list([row(count) for count in range(1, 33)]),
    )
    assert type(trainer.model).__name__ == "GramianForCausalLM"
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    first, last = sum(map(float, losses[:3])) / 3, sum(map(float, losses[-3:])) / 3
    assert last < first / 2, losses
    return f"The loss falls from {first:.1f} to {last:.2f} in 20 steps."


@trial(
    "safetensors",
    "a folder of several files of weights, and saving it as one",
    needs=("safetensors",),
)
def sharded(models: Models) -> str:
    from transformers import AutoModelForCausalLM

    from gramian.models import load

    model = models.load("distilled")
    ids = torch.arange(64)[None]
    with torch.no_grad():
        logits = model(ids).logits
        model.save_pretrained(models.scratch / "parts", max_shard_size="200KB")
        files = sorted((models.scratch / "parts").glob("model-*.safetensors"))
        assert len(files) > 1
        for read in (load, AutoModelForCausalLM.from_pretrained):
            again = read(models.scratch / "parts")
            assert torch.equal(again(ids).logits, logits)
        again.save_pretrained(models.scratch / "whole")
        assert torch.equal(load(models.scratch / "whole")(ids).logits, logits)
    return f"{len(files)} files give the same logits."


@trial("torch.load", "the state of a recurrence, with weights_only=True", needs=("torch",))
def states(models: Models) -> str:
    mixer = models.load("distilled").model.layers[0].mixer
    recurrence = mixer.recurrence()
    x = torch.randn(1, 9, mixer.width)
    _, state = recurrence.prefill(x[:, :8], recurrence.initial_state(1))
    state.save(models.scratch / "state.pt")
    again = torch.load(models.scratch / "state.pt", weights_only=True)
    outputs = [recurrence.step(x[:, 8], one)[0] for one in (again, state)]
    return f"Relative difference of the next output: {compare(*outputs, 0.0):.0e}."


@trial("torch.jit", "tracing a model", needs=("torch",))
def torchscript(models: Models) -> str:
    model, ids = models.load("distilled"), torch.arange(8)[None]
    return refused(
        lambda: torch.jit.trace(model, (ids,)), NotImplementedError, names="torch.export"
    )
