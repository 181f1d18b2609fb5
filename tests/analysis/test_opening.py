"""Models are opened, or refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from gramian.analysis import open_model
from gramian.models import ByteTokenizer

TINY: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
}
T5 = {"d_model": 32, "num_layers": 1, "num_heads": 4, "d_kv": 8, "d_ff": 48}


def saved(folder: Path, kind: str, auto: Any, **changes: Any) -> Path:
    auto.from_config(AutoConfig.for_model(kind, **(TINY | changes))).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "auto", "changes", "message"),
    [
        (
            "t5",
            AutoModelForSeq2SeqLM,
            T5,
            "holds a T5ForConditionalGeneration, an encoder-decoder model",
        ),
        ("fnet", AutoModel, {}, "holds a FNetModel; a causal language model is needed"),
    ],
)
def test_folders_of_encoders_are_refused(
    tmp_path: Path, kind: str, auto: Any, changes: Any, message: str
) -> None:
    folder = saved(tmp_path / kind, kind, auto, **changes)
    with pytest.raises(ValueError, match=message) as error:
        open_model(folder)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 300


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        {"quant_method": "awq", "bits": 4, "group_size": 128},
        {"quant_method": "aqlm"},
    ],
    ids=lambda settings: settings["quant_method"],
)
def test_a_missing_package_of_quantized_weights_is_named(tmp_path: Path, settings: Any) -> None:
    folder = saved(tmp_path / "model", "llama", AutoModelForCausalLM)
    file = folder / "config.json"
    values = json.loads(file.read_text()) | {"quantization_config": settings}
    file.write_text(json.dumps(values))
    method = settings["quant_method"]
    with pytest.raises(ImportError, match=f"are quantized by {method} and cannot be") as error:
        open_model(folder)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("kind", ["llama", "mamba"])  # transformers makes one for Mamba
def test_a_folder_without_a_tokenizer_is_refused_in_one_sentence(kind: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", kind, AutoModelForCausalLM)
    with pytest.raises(OSError, match="has no tokenizer that can be read") as error:
        open_model(folder)
    assert len(str(error.value).splitlines()) == 1


def gguf_file(path: Path) -> dict[str, np.ndarray]:
    """Write a tiny Llama with a tokenizer of bytes, and return its tensors."""
    gguf = pytest.importorskip("gguf")
    width, inner, heads = 32, 64, 4
    # bytes under the names that the byte-level tokenizers of GPT-2 have for them
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    names = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    tokens = ["<s>", "</s>", *(names[b] for b in range(256)), "ab"]
    random = np.random.default_rng(0)

    def weights(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    tensors = {
        "token_embd.weight": weights(len(tokens), width),
        "output_norm.weight": np.ones(width, np.float32),
    }
    for layer in range(2):
        for name, shape in {
            "attn_q": (width, width),
            "attn_k": (width, width),
            "attn_v": (width, width),
            "attn_output": (width, width),
            "ffn_gate": (inner, width),
            "ffn_up": (inner, width),
            "ffn_down": (width, inner),
        }.items():
            tensors[f"blk.{layer}.{name}.weight"] = weights(*shape)
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{layer}.{name}.weight"] = np.ones(width, np.float32)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(2)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, values in tensors.items():
        if name.endswith("ffn_up.weight"):
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_a_gguf_file_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = pytest.importorskip("gguf")
    tensors = gguf_file(tmp_path / "tiny.gguf")
    options: Any = {"gguf_file": "tiny.gguf", "local_files_only": True}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **options)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path, **options)
    parsed: list[Any] = []

    class Counted(gguf.GGUFReader):  # type: ignore[name-defined, misc]
        def __init__(self, *args: Any) -> None:
            parsed.append(args)
            super().__init__(*args)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    before = gguf.GGUFReader, gguf.dequantize, gguf.get_tensor_name_map
    told: list[tuple[int, int]] = []
    model, tokenizer = open_model(tmp_path / "tiny.gguf", progress=lambda *now: told.append(now))
    assert len(parsed) == 1
    assert (gguf.GGUFReader, gguf.dequantize, gguf.get_tensor_name_map) == before
    assert told == [(i + 1, len(tensors)) for i in range(len(tensors))]
    assert tokenizer("ab cab").input_ids == words("ab cab").input_ids
    assert not model.training
    expected = plain.state_dict()
    assert expected.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    embedding = torch.from_numpy(tensors["token_embd.weight"])
    torch.testing.assert_close(model.get_input_embeddings().weight.detach(), embedding)


def test_functions_of_gguf_come_back_after_an_error(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    before = gguf.GGUFReader, gguf.dequantize, gguf.get_tensor_name_map
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(Exception):  # noqa: B017, PT011 (of any of the packages that read it)
        open_model(tmp_path / "broken.gguf")
    assert (gguf.GGUFReader, gguf.dequantize, gguf.get_tensor_name_map) == before
    assert len(ByteTokenizer()) == 259
