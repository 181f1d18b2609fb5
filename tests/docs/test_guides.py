"""Blocks of the guides run as they stand."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

GUIDES = Path(__file__).parents[2] / "docs/guides"
FENCE = re.compile(r"^```python\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def section(page: str, title: str) -> list[str]:
    """The Python blocks of a section."""
    text = (GUIDES / page).read_text(encoding="utf-8").split(f"\n## {title}\n", 1)[1]
    blocks = FENCE.findall(text.split("\n## ", 1)[0])
    assert blocks
    return blocks


def test_the_section_on_adapters_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("accelerate", "datasets", "peft", "typer"):
        pytest.importorskip(package)
    import torch

    from gramian.cli import main
    from gramian.models import ByteTokenizer, GramianConfig, GramianForCausalLM, load

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "filter": {"type": "modal", "orders": 4}}
    config = GramianConfig(mixers="hyena", **small)
    GramianForCausalLM(config).save_pretrained("runs/base/best")
    ByteTokenizer().save_pretrained("runs/base/best")
    Path("notes.txt").write_text("A note of what was seen.\n" * 40, encoding="utf-8")
    Path("more_notes.txt").write_text("A note of what was heard.\n" * 10, encoding="utf-8")
    text = (GUIDES / "train.md").read_text(encoding="utf-8")
    text = text.split("\n## Adapters\n", 1)[1].split("\n## ", 1)[0]
    [(title, values)] = re.findall(r'^```yaml title="([^"]+)"\n(.*?)^```$', text, re.S | re.M)
    Path(title).write_text(values, encoding="utf-8")
    [commands] = re.findall(r"^```bash\n(.*?)^```$", text, flags=re.S | re.M)
    for line in commands.splitlines():
        command = shlex.split(line)
        if command[1] == "train":
            command += ["optimization.steps=4", "evaluation.every=2", "hardware.device=cpu"]
            command += [
                "evaluation.samples=0",
                "evaluation.examples=2",
                "optimization.batch_size=2",
            ]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0, line
    for block in section("train.md", "Adapters"):
        exec(compile(block, "train.md", "exec"), {})
    assert type(load("runs/merged")) is GramianForCausalLM


def test_the_guide_to_quantization_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("accelerate", "onnxruntime", "onnxscript", "optimum.quanto", "torchao"):
        pytest.importorskip(package)
    import torch

    from gramian.export import export_model
    from gramian.models import ByteTokenizer, GramianConfig, GramianForCausalLM

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = GramianForCausalLM(
        GramianConfig(
            mixers="hyena",
            hidden_size=16,
            num_hidden_layers=1,
            filter={"type": "modal", "orders": 4},
        )
    ).eval()
    model.save_pretrained("small")
    ByteTokenizer().save_pretrained("small")
    export_model(model, "exported", verify=2)
    ids, names = torch.tensor([list(b"A note")]), {}
    with torch.no_grad():
        expected = model(ids).logits
        for title in ("torchao", "optimum-quanto", "ONNX"):
            for block in section("quantize.md", title):
                exec(compile(block, "quantize.md", "exec"), names)
                found = names["model"](ids).logits
                assert 0 < (found - expected).norm() / expected.norm() < 0.05
            assert torch.equal(names["again"](ids).logits, found) or title == "ONNX"
    logits, _ = names["run"].prefill(ids.numpy())
    exact = expected[:, -1].numpy()
    assert 0 < abs(logits - exact).max() < 0.05 * abs(exact).max()


def test_the_section_on_alphabets_runs(capsys: pytest.CaptureFixture[str]) -> None:
    from gramian.models import GramianConfig, GramianForCausalLM

    names: dict[str, Any] = {
        "GramianConfig": GramianConfig,
        "GramianForCausalLM": GramianForCausalLM,
    }
    for block in section("generate.md", "Alphabets"):
        exec(compile(block, "generate.md", "exec"), names)
    printed = capsys.readouterr().out.strip()
    assert len(printed) == 48 and {*printed} <= {*"ACGT"}
    assert names["bases"] == [7, 8, 9, 10]
    free = [i for i in range(16) if i not in names["model"].generation_config.suppress_tokens]
    assert free == names["bases"]


def test_the_first_blocks_of_the_guide_to_memory_run() -> None:
    text = (GUIDES / "memory.md").read_text(encoding="utf-8").split("\n## Analyse a model\n", 1)[0]
    names: dict[str, Any] = {}
    blocks = FENCE.findall(text)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block.replace("256", "40").replace("128", "20"), "memory.md", "exec"), names)
    positions = names["torch"].arange(40)
    cap = names["torch"].minimum(positions, 40 - positions)
    assert names["usable"].tolist() == [cap.tolist()] * 4


def test_the_sections_on_states_and_sampling_rates_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    blocks = [*section("generate.md", "States on disk")[1:]]
    blocks += section("state-spaces.md", "Change the sampling rate")
    for block in blocks:
        exec(block, {"torch": torch})
    assert (tmp_path / "state.pt").is_file()


def test_the_chat_of_the_guide_to_serving_is_what_the_tokenizer_writes() -> None:
    models = pytest.importorskip("gramian.models")
    chat = (GUIDES / "serve.md").read_text(encoding="utf-8").split("```\nsystem: ", 1)[1]
    chat = "system: " + chat.split("```")[0]
    messages = [
        dict(zip(("role", "content"), line.split(": ", 1), strict=True))
        for line in chat.splitlines()
    ]
    assert len(messages) == 3
    assert models.ByteTokenizer().apply_chat_template(messages, tokenize=False) == chat
