"""Exported ONNX programs with weights of 8 bits, made by onnxruntime's dynamic quantization."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("transformers")

import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic

from gramian.export import ExportedModel, export_model
from gramian.models import GramianConfig, GramianForCausalLM


@pytest.mark.slow
def test_programs_of_eight_bits_compute_nearly_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GramianConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=4,
        mixers=["hyena", "softmax_attention"],
        max_position_embeddings=64,
        filter={"type": "modal", "orders": 4},
    )
    model = GramianForCausalLM(config).eval()
    export_model(model, tmp_path / "exported")
    shutil.copytree(tmp_path / "exported", tmp_path / "small")
    for name in ("step.onnx", "prefill.onnx"):
        quantize_dynamic(
            tmp_path / "exported" / name, tmp_path / "small" / name, weight_type=QuantType.QInt8
        )
        nodes = onnx.load(tmp_path / "small" / name, load_external_data=False).graph.node
        assert sum(node.op_type == "MatMulInteger" for node in nodes) >= 11  # every linear map
    (tmp_path / "small" / "weights.bin").unlink()  # the new files hold their weights themselves
    run = ExportedModel(tmp_path / "small")
    ids = torch.randint(50, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids).logits.numpy()
    prompt, state = run.prefill(ids[:, :19].numpy())
    after, _ = run.step(ids[:, 19].numpy(), state)
    padded, mask = np.pad(ids[:, :19].numpy(), ((0, 0), (4, 0))), np.ones((2, 23), dtype=int)
    mask[:, :4] = 0
    mask[1, 4:12] = 0
    with torch.no_grad():
        shorter = model(ids[1:, 8:]).logits.numpy()[0]
    made, state = run.prefill(padded, attention_mask=mask)
    later, _ = run.step(ids[:, 19].numpy(), state)
    for found, exact in (
        (prompt, expected[:, 18]),
        (after, expected[:, 19]),
        (made, np.stack([expected[0, 18], shorter[10]])),
        (later, np.stack([expected[0, 19], shorter[11]])),
    ):
        error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
        assert 1e-5 < error < 0.05, error
