"""Trials of `transformers serve` and `transformers chat`."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from benchmarks._server import Server, serve
from benchmarks._trials import Models, refused, trial

NEEDS = ("transformers", "fastapi", "uvicorn", "openai")
PROMPTS = ["The import statement ", "A list ", "for each é in "]


def expected(models: Models, prompt: str, count: int, **options: object) -> str:
    """Return what a model writes after a prompt in this process."""
    tokenizer = models.tokenizer()
    inputs = tokenizer(prompt, return_tensors="pt")
    options |= {"max_new_tokens": count, "do_sample": False, "tokenizer": tokenizer}
    written = models.load("distilled").generate(**inputs, **options)
    return tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def complete(server: Server, prompt: str, **options: object) -> str:
    """Return what a server writes after a prompt."""
    options = {"max_tokens": 20, "temperature": 0.0, **options}
    return server.ask("/v1/completions", prompt=prompt, **options)["choices"][0]["text"]


@trial("transformers serve", "completions for 8 clients at once, with a stop string", needs=NEEDS)
def completions(models: Models) -> str:
    with serve(models.path("distilled")) as server, ThreadPoolExecutor(8) as clients:
        prompts = [prompt for prompt in PROMPTS for _ in range(8)]
        found = list(clients.map(lambda prompt: complete(server, prompt), prompts))
        assert found == [expected(models, prompt, 20) for prompt in prompts]
        stopped = complete(server, PROMPTS[0], stop=["e"])
        assert stopped == expected(models, PROMPTS[0], 20, stop_strings=["e"])
        assert stopped.endswith("e")
    return f"{len(prompts)} answers are what generate writes, and one ends at the string."


@trial("transformers serve", "chat completions, at once and as a stream of tokens", needs=NEEDS)
def chat_completions(models: Models) -> str:
    messages = [{"role": "user", "content": PROMPTS[2]}]
    asked = {"messages": messages, "max_tokens": 20, "temperature": 0.0}
    text = models.tokenizer().apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    with serve(models.path("distilled")) as server:
        whole = server.ask("/v1/chat/completions", **asked)["choices"][0]["message"]["content"]
        events = server.ask("/v1/chat/completions", stream=True, **asked)
    pieces = [event["choices"][0]["delta"].get("content") or "" for event in events]
    assert whole == expected(models, text, 20) == "".join(pieces)
    return f"The answer is what generate writes; it streams in {sum(map(bool, pieces))} pieces."


@trial("transformers serve", "--continuous-batching", needs=NEEDS)
def continuous_batching(models: Models) -> str:
    model = models.load("distilled")
    with serve(models.path("distilled"), "--continuous-batching") as server:
        assert complete(server, PROMPTS[0]) == expected(models, PROMPTS[0], 20)
    sentence = refused(lambda: model.generate_batch([[1, 2]]), NotImplementedError)
    return f"The server generates without it, and generate_batch is refused: {sentence}"


@trial("transformers chat", "a conversation with a served model", needs=NEEDS)
def chat(models: Models) -> str:
    path = models.path("distilled")
    command = [sys.executable, "-m", "transformers.cli.transformers", "chat", str(path)]
    with serve(path) as server:
        settings = {"HF_HOME": str(models.scratch)}
        ran = subprocess.run(
            [*command, f"{server.url}/v1", "max_new_tokens=20", "do_sample=false"],
            input="Hello\n!exit\n",
            capture_output=True,
            text=True,
            timeout=120,
            cwd=models.scratch,
            env=os.environ | settings,
        )
    assert "20 tokens in" in ran.stdout, ran.stdout + ran.stderr
    return "The model answers with 20 tokens."
