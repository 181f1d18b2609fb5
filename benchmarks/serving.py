"""How many requests a second does `transformers serve` answer, from how many clients at once?

The models are those of the demo, original and distilled, and a GPT-2 of the same width, number of
layers and number of parameters, with random weights, which do not change the speed. Each is served
by a process of its own with one thread. A request asks for 64 tokens (bytes) after a prompt of 256,
without sampling. Each client sends its next request when it has the answer to the last one. The
server generates for one request after the other, so more clients do not make it faster; they wait.

The figures are requests a second of wall time, the processor time of the server for each request,
and the median time to an answer. On a machine with other work only the processor time means much.

    make demo
    python benchmarks/serving.py [--models demo-output] [--clients 1 8 64] [--fresh]

Rows are kept as they are finished, so that a run that was stopped continues. The table in
`docs/guides/serve.md` is made from them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._pages import fill_marks, table
from benchmarks._report import write
from benchmarks._server import Server, serve
from gramian.models import ByteTokenizer, load

RESULTS = Path(__file__).parent / "results" / "serving.json"
PAGE = Path(__file__).resolve().parent.parent / "docs/guides/serve.md"
PROMPT, NEW, REQUESTS = 256, 64, 64


def parameters(model: torch.nn.Module) -> int:
    """Count the parameters, without the embeddings and the output projection tied to them."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    return sum(p.numel() for p in model.parameters() if id(p) not in embeddings)


def save_gpt2(original: Path, folder: Path) -> int:
    """Save a GPT-2 like a Gramian model, and return the number of its parameters."""
    like = load(original)
    config = like.config

    def build(inner: int) -> GPT2LMHeadModel:
        torch.manual_seed(0)
        settings = GPT2Config(
            vocab_size=config.vocab_size,
            n_embd=config.hidden_size,
            n_layer=config.num_hidden_layers,
            n_head=max(1, config.hidden_size // 64),
            n_inner=inner,
            n_positions=PROMPT + NEW,
            bos_token_id=None,
            eos_token_id=None,
        )
        return GPT2LMHeadModel(settings)

    small, large = parameters(build(1)), parameters(build(2))
    model = build(max(1, 1 + round((parameters(like) - small) / (large - small))))
    model.save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    return parameters(model)


def measure(server: Server, clients: int, prompt: str) -> dict[str, float]:
    """Return the figures of one model with a number of clients."""
    seconds: list[float] = []

    def ask(_: int) -> None:
        began = time.perf_counter()
        answer = server.ask("/v1/completions", prompt=prompt, max_tokens=NEW, temperature=0.0)
        assert answer["usage"]["completion_tokens"] == NEW, answer["usage"]
        seconds.append(time.perf_counter() - began)

    ask(0)
    seconds.clear()
    count = max(clients, REQUESTS if clients > 1 else REQUESTS // 4)
    used, began = server.processor_seconds(), time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(ask, range(count)))
    return {
        "requests": count,
        "requests a second": count / (time.perf_counter() - began),
        "processor seconds a request": (server.processor_seconds() - used) / count,
        "median seconds to an answer": statistics.median(seconds),
    }


def serving_table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the table of the guide."""
    clients = sorted({row["clients"] for row in rows.values()})
    counts = ", ".join(map(str, clients))

    def line(model: str) -> list[str]:
        own = [rows[f"{model}, {count} clients"] for count in clients]
        used = statistics.mean(row["processor seconds a request"] for row in own)
        return [
            model,
            f"{own[0]['parameters']:,}",
            ", ".join(f"{row['requests a second']:.1f}" for row in own),
            f"{used:.2f} s",
            ", ".join(f"{row['median seconds to an answer']:.1f} s" for row in own),
        ]

    head = [
        "model",
        "parameters",
        f"requests a second from {counts} clients",
        "processor time of a request",
        f"median time to an answer, from {counts} clients",
    ]
    return table(
        head, [line(model) for model in dict.fromkeys(row["model"] for row in rows.values())]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", type=Path, default=Path("demo-output"), help="Demo's folder.")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--fresh", action="store_true", help="Measure finished rows again.")
    arguments = parser.parse_args()
    rows: dict[str, Any] = {}
    if RESULTS.is_file() and not arguments.fresh:
        rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    text = "The import statement finds a module, and binds its name. " * 5
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        folders = {name: arguments.models.resolve() / name for name in ("original", "distilled")}
        folders["GPT-2"] = Path(scratch, "gpt2")
        counts = {"GPT-2": save_gpt2(folders["original"], folders["GPT-2"])}
        counts |= {name: parameters(load(folders[name])) for name in ("original", "distilled")}
        servers = {name: stack.enter_context(serve(path)) for name, path in folders.items()}
        for clients in arguments.clients:
            for name, server in servers.items():
                key = f"{name}, {clients} clients"
                if key not in rows:
                    rows[key] = {
                        "model": name,
                        "clients": clients,
                        "parameters": counts[name],
                        **measure(server, clients, text[:PROMPT]),
                    }
                    write(RESULTS, {"prompt": PROMPT, "new": NEW, "rows": rows})
                print(key, json.dumps(rows[key]), flush=True)
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(fill_marks(page, {"serving": serving_table(rows)}), encoding="utf-8")


if __name__ == "__main__":
    main()
