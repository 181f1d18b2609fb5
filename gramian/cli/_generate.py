"""Define the command `generate`, which continues a prompt."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gramian._json import to_json
from gramian.cli._app import UserError, command, one_line
from gramian.cli._inputs import (
    byte_tokenizer,
    document_ids,
    load_model,
    load_tokenizer,
    prompt_ids,
    read_texts,
)
from gramian.cli._options import Device, Json, ModelFolder, Seed

if TYPE_CHECKING:
    from torch import Tensor

    from gramian.models import GramianForCausalLM
    from gramian.tasks import Document

_Prompt = Annotated[str | None, typer.Option(help="Text or FASTA record to continue.")]
_PromptFile = Annotated[
    Path | None,
    typer.Option(
        help="File with the text or FASTA record to continue, plain or compressed; replaces "
        "--prompt."
    ),
]
_MaxNewTokens = Annotated[int, typer.Option(help="Largest number of tokens to generate.")]
_Temperature = Annotated[
    float,
    typer.Option(help="Temperature of sampling; below 1, likely tokens become even more likely."),
]
_TopK = Annotated[
    int, typer.Option(help="Sample from the k most likely tokens; 0 samples from all.")
]
_TopP = Annotated[
    float,
    typer.Option(
        help="Sample from the fewest most likely tokens whose probabilities add up to this."
    ),
]
_Greedy = Annotated[
    bool, typer.Option("--greedy", help="Take the most likely token instead of sampling.")
]
_Alphabet = Annotated[
    str | None,
    typer.Option(
        help="Write these characters only, such as ACGT, and never the end of the text (default: "
        "everything that the model writes)."
    ),
]
_Stream = Annotated[
    bool, typer.Option("--stream", help="Print each word as soon as it is generated.")
]
_PrefillChunk = Annotated[
    int | None, typer.Option(min=1, help="Read the prompt in chunks of this many tokens.")
]
_Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Compile the decoding step first, which takes seconds and pays off for long texts.",
    ),
]


@command
def generate(
    model: ModelFolder,
    prompt: _Prompt = None,
    prompt_file: _PromptFile = None,
    max_new_tokens: _MaxNewTokens = 200,
    temperature: _Temperature = 0.8,
    top_k: _TopK = 50,
    top_p: _TopP = 1.0,
    greedy: _Greedy = False,
    alphabet: _Alphabet = None,
    stream: _Stream = False,
    prefill_chunk: _PrefillChunk = None,
    compiled: _Compile = False,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Continue a prompt with MODEL, one recurrent step per token."""
    if stream and as_json:
        raise typer.BadParameter("give --stream or --json, not both.")
    if (prompt is None) == (prompt_file is None):
        raise typer.BadParameter("give one of --prompt TEXT and --prompt-file FILE.")
    if prompt is not None and not prompt:
        raise UserError("the prompt is empty; give some text.")
    _check_sampling(max_new_tokens, temperature, top_k, top_p)
    document = None if prompt_file is None else _only_document(prompt_file)
    loaded = load_model(model, device)
    tokenizer = load_tokenizer(model) or byte_tokenizer(model, loaded)
    if document is not None:
        prompt, ids = document.text, document_ids(tokenizer, document)
    else:
        assert prompt is not None
        ids = prompt_ids(tokenizer, prompt)
    _check_ids(ids, model, loaded)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": not greedy}
    if not greedy:
        options |= {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    if alphabet is not None:
        options["allowed_tokens"] = _allowed(tokenizer, alphabet)
    if compiled:
        loaded.compile_decoding()
    if prefill_chunk is not None:
        options["prefill_chunk_size"] = prefill_chunk
    if stream:
        from transformers import TextStreamer

        sys.stdout.write(prompt)
        options["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    sequence, seconds = _run(model, loaded, ids.to(loaded.device), seed, options)
    if stream:
        return
    new = sequence[ids.shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True)
    if not as_json:
        sys.stdout.write(f"{prompt}{text}\n")
        return
    result = {
        "prompt": prompt,
        "text": text,
        "prompt_tokens": ids.shape[1],
        "new_tokens": len(new),
        "seconds": seconds,
        "state_bytes": loaded.state_bytes(1, len(sequence)),
    }
    print(to_json(result, indent=2))


def _only_document(file: Path) -> Document:
    """Read the one document of a file."""
    documents = read_texts(file)
    if not documents:
        raise UserError(f"{file} has no tokens: it is empty.")
    if len(documents) > 1:
        raise UserError(
            f"{file} holds {len(documents)} documents; the prompt must be one of them in a file of "
            "its own."
        )
    return documents[0]


def _check_ids(ids: Tensor, folder: Path, model: GramianForCausalLM) -> None:
    """Raise a UserError if token ids (1, tokens) lie outside the model's vocabulary."""
    if int(ids.max()) >= model.config.vocab_size:
        raise UserError(
            f"the tokenizer in {folder} knows more tokens than the model's "
            f"{model.config.vocab_size}: they do not belong together."
        )


def _allowed(tokenizer: Any, alphabet: str) -> list[int]:
    """Return the ids of the tokens whose text consists of characters of the alphabet."""
    from gramian.models import allowed_tokens

    try:
        return allowed_tokens(tokenizer, alphabet)
    except ValueError as error:
        raise UserError(f"--alphabet: {one_line(error)}") from error


def _run(
    folder: Path, model: GramianForCausalLM, ids: Tensor, seed: int, options: dict[str, Any]
) -> tuple[Tensor, float]:
    """Return the prompt with its continuation, (tokens,), and the seconds that generation took."""
    import torch

    torch.manual_seed(seed)
    started = time.perf_counter()
    try:
        sequence = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0]
    except (FloatingPointError, ValueError) as error:
        raise UserError(f"{folder}: {one_line(error)}") from error
    return sequence, time.perf_counter() - started


def _check_sampling(max_new_tokens: int, temperature: float, top_k: int, top_p: float) -> None:
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be at least 1; got {max_new_tokens}.")
    if not temperature > 0:
        raise UserError(
            f"--temperature must be above 0; got {temperature:g} (--greedy takes the best token)."
        )
    if top_k < 0:
        raise UserError(f"--top-k must be 0 (all tokens) or more; got {top_k}.")
    if not 0 < top_p <= 1:
        raise UserError(f"--top-p must be above 0 and at most 1; got {top_p:g}.")
