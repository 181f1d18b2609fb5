"""Trials of the ways in which tools load Gramian's models and tokenizers."""

from __future__ import annotations

import torch

from benchmarks._trials import Models, compare, trial

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
