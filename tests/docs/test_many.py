"""The example of the guide to many inputs: its parts of a file, and what its actors write."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from gramian.models import ByteTokenizer, GramianConfig, GramianForCausalLM, restrict_generation

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "generate_many.py"
PAGE = (ROOT / "docs/guides/many.md").read_text(encoding="utf-8")
PROMPTS = ["It was", "a ", "dark and stormy night;", "the rain fell", "é", "in torrents", "except"]
NEW = 8


def command() -> list[str]:
    """The arguments of the example in the guide."""
    [line] = re.findall(r"^python examples/generate_many\.py (.*)$", PAGE, flags=re.MULTILINE)
    return shlex.split(line)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example as a module, which its dataclasses look up by its name."""
    spec = importlib.util.spec_from_file_location("generate_many", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "generate_many", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of the guide, with a model that writes lower-case letters."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = GramianConfig(
        mixers="hyena", hidden_size=16, initializer_range=0.5, filter={"type": "modal", "orders": 4}
    )
    model = GramianForCausalLM(config)
    restrict_generation(model, [*range(ord("a"), ord("z") + 1)])
    model.save_pretrained("model")
    ByteTokenizer().save_pretrained("model")
    lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS]
    (tmp_path / "prompts.jsonl").write_text("".join(lines[:3]) + "\n" + "".join(lines[3:]))
    return tmp_path


def alone(folder: Path) -> list[str]:
    """What the model writes after each prompt by itself."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder / "model"), ByteTokenizer()
    texts = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        sequence = model.generate(ids, max_new_tokens=NEW, do_sample=False)[0]
        texts.append(tokenizer.decode(sequence[ids.shape[1] :]))
    assert len({*texts}) > 2
    return texts


def rows(folder: Path, suffix: str) -> list[dict[str, Any]]:
    """The rows of all parts, in the order of the parts."""
    found: list[dict[str, Any]] = []
    for file in sorted(folder.glob(f"part-*{suffix}")):
        if suffix == ".parquet":
            found += pytest.importorskip("pyarrow.parquet").read_table(file).to_pylist()
        else:
            found += [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return found


def expected(folder: Path) -> list[dict[str, Any]]:
    lines = [1, 2, 3, 5, 6, 7, 8]  # the fourth is blank
    return [
        {"line": line, "prompt": prompt, "text": text}
        for line, prompt, text in zip(lines, PROMPTS, alone(folder), strict=True)
    ]


def job(example: ModuleType, folder: Path, **changes: Any) -> Any:
    values = {
        "model": str(folder / "model"),
        "prompts": str(folder / "prompts.jsonl"),
        "output": str(folder / "continued"),
        "key": "prompt",
        "max_new_tokens": NEW,
        "batch_size": 2,
        "format": "jsonl",
        "device": "cpu",
        "threads": 1,
    }
    return example.Job(**values | changes)


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_an_actor_writes_what_each_prompt_alone_gives(
    example: ModuleType, folder: Path, format: str
) -> None:
    if format == "parquet":
        pytest.importorskip("pyarrow")
    wanted = job(example, folder, format=format)
    first, second = example.prepare(wanted, 4)
    generator = example.Generator(wanted)
    assert generator(vars(second)) == {"index": 1, "prompts": 3}
    assert example.prepare(wanted, 4) == [first]
    assert generator(vars(first)) == {"index": 0, "prompts": 4}
    assert example.prepare(wanted, 4) == []
    assert rows(folder / "continued", f".{format}") == expected(folder)


def test_other_models_without_a_padding_token(example: ModuleType, folder: Path) -> None:
    config = GPT2Config(
        vocab_size=259, n_embd=16, n_layer=2, n_head=2, bos_token_id=256, eos_token_id=257
    )
    model = GPT2LMHeadModel(config)
    model.generation_config.suppress_tokens = [*range(ord("a")), *range(ord("z") + 1, 259)]
    shutil.rmtree(folder / "model")
    model.save_pretrained(folder / "model")
    ByteTokenizer(pad_token=None).save_pretrained(folder / "model")
    wanted = job(example, folder, batch_size=5)
    [part] = example.prepare(wanted, 10)
    example.Generator(wanted)(vars(part))
    assert rows(folder / "continued", ".jsonl") == expected(folder)


def test_a_part_that_failed_is_done_again(
    example: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = job(example, folder)
    [part] = example.prepare(wanted, 10)
    generator = example.Generator(wanted)
    generate, calls = generator.generate, []

    def fail_once(prompts: list[str]) -> list[str]:
        calls.append(prompts)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return generate(prompts)

    monkeypatch.setattr(generator, "generate", fail_once)
    with pytest.raises(RuntimeError, match="out of memory"):
        generator(vars(part))
    stage = folder / "continued" / ".part-000000.jsonl"
    assert len(stage.read_text().splitlines()) == 2  # the rows of the first batch
    assert example.prepare(wanted, 10) == [part]
    generator(vars(part))
    assert rows(folder / "continued", ".jsonl") == expected(folder)
    assert not stage.exists()


def test_parts_of_text_have_every_line_once(example: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeff\none\r\n\n  two\nthree\n\n\nfour\n\nfive".encode())
    wanted = job(example, tmp_path, prompts=str(file))
    for size in range(1, 7):
        parts, digest = example.split(str(file), "prompt", size)
        assert len(parts) == -(-5 // size) and len(digest) == 64
        found = [list(example.read(part, wanted)) for part in parts]
        assert all(len(one) == size for one in found[:-1])
        assert [prompt for one in found for prompt in one] == [
            (2, "one"),
            (4, "  two"),
            (5, "three"),
            (8, "four"),
            (10, "five"),
        ]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"prompt": "a"}\n{"text": "b"}\n', "line 2: there is no prompt under 'prompt'"),
        (b'{"prompt": " "}\n', "line 1: there is no prompt"),
        (b"[1]\n", "line 1: there is no prompt"),
        (b"one\n", "line 1: Expecting value"),
        (b"\xff\n", "line 1: 'utf-8' codec"),
        (b"\n\n", "has no prompts"),
    ],
)
def test_mistakes_in_the_file_start_nothing(
    example: ModuleType, tmp_path: Path, content: bytes, sentence: str
) -> None:
    (tmp_path / "prompts.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        example.prepare(job(example, tmp_path), 10)
    assert not (tmp_path / "continued").exists()


def test_a_folder_that_was_made_otherwise_is_refused(example: ModuleType, folder: Path) -> None:
    example.prepare(job(example, folder), 4)
    example.prepare(job(example, folder, batch_size=3, threads=2), 4)
    with pytest.raises(ValueError, match=r"made otherwise \(prompts in a part\)"):
        example.prepare(job(example, folder), 5)
    with (folder / "prompts.jsonl").open("a") as stream:
        stream.write('{"prompt": "more"}\n')
    with pytest.raises(ValueError, match=r"\(sha256 of the prompts, max_new_tokens\)"):
        example.prepare(job(example, folder, max_new_tokens=9), 4)


def test_the_guide_calls_the_example_with_options_it_has(example: ModuleType) -> None:
    arguments = example.parser().parse_args(command())
    assert arguments.concurrency > 1 and arguments.address is None


@pytest.mark.slow
def test_two_actors_of_a_ray_cluster_write_what_each_prompt_alone_gives(folder: Path) -> None:
    """On a cluster of this machine whose two cores the actors take; the call is repeated."""
    pytest.importorskip("pyarrow")
    ray = pytest.importorskip("ray")
    cluster = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)

    def call() -> str:
        changes = ["--concurrency", "2", "--batch-size", "2", "--part-size", "2"]
        changes += ["--max-new-tokens", str(NEW), "--address", cluster.address_info["gcs_address"]]
        child = subprocess.run(
            [sys.executable, str(SCRIPT), *command(), *changes],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert child.returncode == 0, child.stderr
        return child.stdout

    try:
        printed = call()
        assert [f"({done} of 4)" in printed for done in range(1, 6)] == [True] * 4 + [False]
        assert rows(folder / "continued", ".jsonl") == expected(folder)
        (folder / "continued" / "part-000002.jsonl").unlink()
        assert call() == "part 2: 2 prompts (1 of 1)\n"
        assert rows(folder / "continued", ".jsonl") == expected(folder)
        assert "Every prompt has its continuation" in call()
    finally:
        ray.shutdown()
