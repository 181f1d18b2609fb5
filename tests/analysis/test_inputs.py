"""What `analyze` is given reaches the model, or is refused in one sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import gramian
from gramian.analysis._inputs import ModelInputs, read_inputs, run_model
from gramian.mixers import LongConvolution
from gramian.tasks import Document

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BART = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
T5 = {"d_model": 32, "num_layers": 1, "num_heads": 4, "d_kv": 8, "d_ff": 48}
MODAL = {"type": "modal", "orders": 2, "max_length": 32}
LENGTH = 23
IDS = torch.randint(3, 64, (LENGTH,), generator=torch.Generator().manual_seed(2))


def tiny(kind: str, auto: Any = AutoModelForCausalLM, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(TINY | changes))
    model = auto.from_config(config).eval()
    with torch.no_grad():  # attention that is not uniform
        for name, weight in model.named_parameters():
            if any(part in name for part in ("q_proj", "k_proj", "c_attn", "query", "key")):
                weight.mul_(8)
    return model


def sizes(model: Any, inputs: Any) -> Tensor:
    return torch.cat([layer.ess for layer in gramian.analyze(model, inputs, every=4).layers])


def one_sentence(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and len(text) < 300
    return text


@pytest.mark.parametrize(
    ("kind", "auto", "changes", "message"),
    [
        ("t5", AutoModelForSeq2SeqLM, T5, "T5ForConditionalGeneration is an encoder-decoder model"),
        ("bart", AutoModelForSeq2SeqLM, BART, "is an encoder-decoder model"),
        ("fnet", AutoModel, {}, "FNetModel is not causal: its outputs depend on later tokens"),
        ("bert", AutoModel, {}, "BertModel is not causal"),
        ("bert", AutoModelForCausalLM, {}, "BertLMHeadModel is not causal"),
    ],
)
def test_encoders_are_refused(kind: str, auto: Any, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        gramian.analyze(tiny(kind, auto, **changes), IDS)
    one_sentence(error)


def test_the_decoder_of_an_encoder_decoder_is_read() -> None:
    report = gramian.analyze(tiny("bart", **BART), IDS, every=5)
    assert [layer.name for layer in report.layers] == ["model.decoder.layers.0.self_attn"]


def test_one_bidirectional_layer_is_named_beside_the_causal_ones() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ahead, self.behind = (LongConvolution(MODAL, b, width=4) for b in (True, False))

        def forward(self, x: Tensor) -> Tensor:
            return self.behind(self.ahead(x))

    report = gramian.analyze(Both(), torch.randn(9, 4))
    assert [layer.name for layer in report.layers] == ["behind"]
    assert [name for name, _ in report.unread] == ["ahead"]


@pytest.mark.parametrize(
    ("kind", "length", "known"), [("gpt2", 33, 32), ("opt", 33, 32), ("roberta", 32, 31)]
)
def test_more_tokens_than_positions_are_refused(kind: str, length: int, known: int) -> None:
    ids = torch.cat([IDS, IDS])
    changes = {"max_position_embeddings": 32, "word_embed_proj_dim": 32, "ffn_dim": 48}
    own = {"roberta": {"is_decoder": True, "pad_token_id": 0}}.get(kind, {})
    model = tiny(kind, **changes, **own)
    with pytest.raises(ValueError, match=f"at most {known} tokens; got {length}") as error:
        gramian.analyze(model, ids[:length])
    assert "horizon" in one_sentence(error)
    assert gramian.analyze(model, ids, horizon=known, every=9).horizon == known


def test_positions_without_a_table_of_weights_are_refused_too() -> None:
    model = tiny("gptj", max_position_embeddings=16, n_positions=16, rotary_dim=4)
    with pytest.raises(ValueError, match="at most 16 tokens; got 23"):
        run_model(model, ModelInputs(IDS[None]))


def test_weights_without_numbers_are_refused() -> None:
    with torch.device("meta"):
        model = tiny("llama")
    with pytest.raises(ValueError, match="on the device 'meta'") as error:
        gramian.analyze(model, IDS)
    one_sentence(error)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"attention_mask": torch.ones(1, 1, LENGTH, LENGTH).tril()}, "shape (1, 1, 23, 23)"),
        ({"attention_mask": torch.ones(1, 3)}, "shape (1, 3)"),
        ({"attention_mask": torch.arange(LENGTH) > 1}, "padding"),
        ({"token_type_ids": torch.zeros(1, LENGTH, dtype=torch.long)}, "does not read token_type"),
        ({"special_tokens_mask": torch.zeros(LENGTH, dtype=torch.long)}, "does not read special"),
        ({"labels": IDS[None]}, "labels are no inputs"),
        ({"pixel_values": torch.randn(1, 3, 8, 8)}, "pixel_values cannot be read"),
        ({"past_key_values": transformers.DynamicCache()}, "past_key_values cannot be read"),
        ({"position_ids": torch.arange(5)}, "position_ids cannot be read"),
        ({"inputs_embeds": torch.randn(1, LENGTH, 32)}, "one of input_ids, inputs_embeds"),
    ],
)
def test_what_a_mapping_has_beside_its_tokens_is_never_dropped(extra: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is compared below)
        gramian.analyze(tiny("llama"), {"input_ids": IDS[None], **extra})
    assert message in one_sentence(error)


def test_keys_without_a_value_count_as_absent() -> None:
    model = tiny("llama")
    given = {"input_ids": IDS[None], "attention_mask": None, "token_type_ids": None}
    torch.testing.assert_close(sizes(model, given), sizes(model, IDS))


def test_positions_are_those_that_were_given() -> None:
    model = tiny("gpt2")
    shifted = torch.arange(LENGTH)[None].flip(1)
    mask = torch.ones(1, LENGTH, dtype=torch.long)
    given = {"input_ids": IDS[None], "position_ids": shifted, "attention_mask": mask}
    model.set_attn_implementation("eager")
    maps = model(**given, output_attentions=True).attentions
    found = gramian.analyze(model, given, at=[11])
    for layer, T in zip(found.layers, maps, strict=True):
        s = torch.linalg.svdvals(T[0, :, 11:, :11].double())
        p = s / s.sum(-1, keepdim=True)
        expected = torch.exp(torch.special.entr(p).sum(-1))
        torch.testing.assert_close(layer.ess[:, 0].double(), expected, atol=1e-4, rtol=1e-4)
    assert float((sizes(model, given) - sizes(model, IDS)).abs().max()) > 1e-3
    cut = gramian.analyze(model, given, horizon=12, at=[6])
    part = {key: value[:, :12] for key, value in given.items()}
    torch.testing.assert_close(cut.ess[0], gramian.analyze(model, part, at=[6]).ess[0])


def test_positions_of_packed_sequences_need_a_mask() -> None:
    model = tiny("llama")
    packed = torch.cat([torch.arange(10), torch.arange(LENGTH - 10)])[None]
    given = {"input_ids": IDS[None], "position_ids": packed}
    with pytest.raises(ValueError, match="need an attention_mask of ones") as error:
        gramian.analyze(model, given)
    one_sentence(error)
    report = gramian.analyze(model, {**given, "attention_mask": torch.ones(1, LENGTH)}, at=[10])
    assert float(report.ess[0].min()) > 1  # the mask says that it is one sequence


def test_types_of_tokens_are_read() -> None:
    model = tiny("bert", is_decoder=True, type_vocab_size=2)
    with torch.no_grad():
        model.bert.embeddings.token_type_embeddings.weight.mul_(100)
    types = (torch.arange(LENGTH) % 2)[None]
    given = {"input_ids": IDS[None], "token_type_ids": types}
    assert float((sizes(model, given) - sizes(model, IDS)).abs().max()) > 1e-3


def test_embeddings_stand_for_their_tokens() -> None:
    model = tiny("llama")
    embedded = model.get_input_embeddings()(IDS[None]).detach()
    report = gramian.analyze(model, {"inputs_embeds": embedded}, every=4)
    torch.testing.assert_close(torch.cat(report.ess), sizes(model, IDS))
    assert report.tokens == tuple(map(str, range(LENGTH)))
    with pytest.raises(ValueError, match="does not read inputs_embeds"):
        gramian.analyze(LongConvolution(MODAL, width=32), {"inputs_embeds": embedded})


def test_a_document_is_read_as_its_text() -> None:
    def encode(text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % 60 for c in text]}

    given = read_inputs(Document("some words"), encode)
    assert given.sequence.tolist() == [encode("some words")["input_ids"]]
    with pytest.raises(ValueError, match="2 FASTA records, which `analyze_texts`"):
        read_inputs(">a\nACGT\n>b\nACGT\n", encode)


GEMMA4 = {
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
}


@pytest.mark.parametrize(("kind", "changes"), [("llama", {}), ("gemma4_text", GEMMA4)])
def test_only_the_head_is_cut_to_the_last_token(kind: str, changes: dict[str, Any]) -> None:
    model = tiny(kind, **changes)
    lengths: list[int] = []
    for module in model.model.layers:
        module.register_forward_hook(
            lambda m, a, out: lengths.append((out[0] if isinstance(out, tuple) else out).shape[1])
        )
    with torch.no_grad():
        logits = run_model(model, ModelInputs(IDS[None])).logits
        assert set(lengths) == {LENGTH}
        whole = model(IDS[None]).logits
    assert logits.shape[1] == 1
    torch.testing.assert_close(logits, whole[:, -1:])


def test_composite_models_run_without_a_cache() -> None:
    text = {**TINY, "num_key_value_heads": 2, "head_dim": 8}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
        },
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    assert not hasattr(config, "use_cache") and config.text_config.use_cache
    with torch.no_grad():
        assert run_model(model, ModelInputs(IDS[None])).past_key_values is None


def test_modes_of_submodules_come_back() -> None:
    model = tiny("llama").train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    gramian.analyze(model, IDS, every=9)
    assert [module.training for module in model.modules()] == before
    with pytest.raises(ValueError, match="0 … 63"):
        gramian.analyze(model, IDS + 60)
    assert [module.training for module in model.modules()] == before
