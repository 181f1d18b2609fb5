"""The configuration: defaults, round trips, and one clear sentence for what cannot be."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import gramian
from gramian.models import (
    GramianConfig,
    GramianForCausalLM,
    GramianForSequenceClassification,
    GramianModel,
    load,
)


def test_defaults_describe_a_model_of_the_byte_tokenizer() -> None:
    config = GramianConfig()
    assert config.vocab_size == 259
    assert config.mixer_of(3) == "multi_hyena"
    assert config.filter_of(3)["type"] == "implicit"
    assert config.intermediate_size % 16 == 0
    assert 8 * config.hidden_size <= 3 * config.intermediate_size


def test_a_plain_mlp_is_four_times_as_wide() -> None:
    assert GramianConfig(hidden_size=48, gated_mlp=False).intermediate_size == 192


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"mixers": ["hyena", "multi_hyena"], "num_hidden_layers": 2, "hyena_order": 3},
        {
            "mixers": "hyena",
            "hyena_input_dropout": 0.25,
            "filter": {"type": "rtf", "direct": "one"},
        },
        {
            "mixers": ["hyena", "softmax_attention"],
            "num_hidden_layers": 2,
            "filter": [{"type": "implicit"}, None],
            "attention": {"kv_heads": 2, "window": 128, "rotary_base": 1e6},
        },
        {"filter": [{"type": "modal", "orders": [1, 2]}, {"type": "rtf", "state_size": 3}]},
        {"tie_word_embeddings": False, "eos_token_id": 5, "intermediate_size": 7},
        {
            "mixers": "long_convolution",
            "block": "glu",
            "norm": "batch",
            "prenorm": False,
            "tied_dropout": True,
            "bidirectional": True,
            "input_size": 1,
            "pooling": "last",
            "dropout": 0.1,
            "kernel_dropout": 0.2,
            "num_labels": 7,
            "problem_type": "multi_label_classification",
        },
    ],
)
def test_json_round_trip(kwargs: dict[str, Any], tmp_path: Path) -> None:
    config = GramianConfig(**({"num_hidden_layers": 2} | kwargs))
    config.save_pretrained(tmp_path)
    json.loads((tmp_path / "config.json").read_text())
    for reader in (GramianConfig, transformers.AutoConfig):
        read = reader.from_pretrained(tmp_path)
        assert type(read) is GramianConfig
        assert read.to_diff_dict() == config.to_diff_dict()
        assert (read.mixers, read.filter) == (config.mixers, config.filter)
        assert read.attention == config.attention
        assert (read.num_labels, read.problem_type) == (config.num_labels, config.problem_type)


def test_layers_have_their_own_numbers_of_heads(tmp_path: Path) -> None:
    mixers = ["softmax_attention", {"type": "multi_hyena", "heads": 16}]
    config = GramianConfig(hidden_size=48, num_hidden_layers=2, num_heads=3, mixers=mixers)
    model = GramianForCausalLM(config).eval()
    attention, hyena = (layer.mixer for layer in model.model.layers)
    assert (attention.heads, hyena.heads, hyena.filter.channels) == (3, 16, 16)
    model.save_pretrained(tmp_path)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(load(tmp_path)(ids).logits, expected)


def test_options_of_hyena_and_its_filters_are_saved_and_older_files_load(tmp_path: Path) -> None:
    given = {"direct": "one", "weight_decay": 0.05, "optimizer_scope": "all", "lr": 1e-3}
    config = GramianConfig(
        hidden_size=8,
        num_hidden_layers=1,
        mixers="hyena",
        hyena_input_dropout=0.25,
        filter={"type": "rtf", "state_size": 3, **given},
    )
    model = GramianForCausalLM(config)
    model.save_pretrained(tmp_path)
    mixer = GramianForCausalLM.from_pretrained(tmp_path).model.layers[0].mixer
    assert mixer.input_dropout == 0.25
    assert mixer.filter.config() == model.model.layers[0].mixer.filter.config()
    assert mixer.filter.config().items() >= given.items()
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    values.pop("hyena_input_dropout")
    values["filter"] = {"type": "rtf", "state_size": 3, "lr": 1e-3}
    file.write_text(json.dumps(values))
    older = GramianForCausalLM.from_pretrained(tmp_path).model.layers[0].mixer
    assert older.input_dropout == 0.0
    assert older.filter.optimizer_hints() == {"a": {"weight_decay": 0.0, "lr": 1e-3}}
    for name, parameter in older.named_parameters():
        assert parameter.equal(mixer.get_parameter(name))


def test_per_layer_lists_are_read_by_layer() -> None:
    filters = [{"type": "modal", "orders": 2}, {"type": "implicit"}]
    config = GramianConfig(
        num_hidden_layers=2, mixers=["hyena", "long_convolution"], filter=filters
    )
    assert [config.mixer_of(i) for i in range(2)] == ["hyena", "long_convolution"]
    assert [config.filter_of(i) for i in range(2)] == filters
    assert config.layer_types == ["linear_attention"] * 2


def test_reading_a_filter_gives_a_copy() -> None:
    config = GramianConfig()
    config.filter_of(0)["type"] = "other"
    assert config.filter_of(0)["type"] == "implicit"


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"mixers": "attention"}, "mixers must be among .*'multi_hyena', .*; got 'attention'"),
        ({"mixers": ["hyena"] * 3}, "one mixer for each of the 4 layers; got 3"),
        (
            {"mixers": "softmax_attention", "num_heads": 7},
            "num_heads must divide hidden_size for softmax_attention",
        ),
        ({"attention": {"heads": 3}}, "unknown key of attention 'heads'. Did you mean 'kv_heads'"),
        ({"attention": 5}, "attention must be a dict .*got 5"),
        ({"filter": [None] * 4}, "filter must be a dict .*got None"),
        ({"mixers": 5}, "mixers must be .*; got int"),
        ({"filter": "implicit"}, "filter must be a dict .*; got 'implicit'"),
        ({"filter": {"state_size": 4}}, "filter must be a dict .*'type'"),
        ({"filter": [{"type": "implicit"}] * 3}, "each of the 4 layers; got 3"),
        ({"hidden_size": 0}, "hidden_size must be an integer of at least 1; got 0"),
        ({"vocab_size": "many"}, "vocab_size must be an integer of at least 1; got 'many'"),
        ({"max_position_embeddings": 2.5}, "max_position_embeddings must be an integer"),
        ({"intermediate_size": -1}, "intermediate_size must be an integer"),
        ({"hyena_order": 1}, "hyena_order must be an integer of at least 2; got 1"),
        ({"num_heads": 7}, "num_heads must divide hidden_size .* 7 heads and width 256"),
        (
            {"mixers": {"type": "multi_hyena", "heads": 7}},
            "^heads must divide hidden_size for multi_hyena .* 7 heads and width 256",
        ),
        ({"mixers": {"type": "multi_hyena", "heads": 0}}, "heads must be an integer of at least 1"),
        ({"mixers": {"type": "s6", "heads": 2}}, "unknown key of a mixer 's6' 'heads'"),
        ({"block": "conv"}, "block must be one of 'mlp', 'glu', 'mixer'; got 'conv'"),
        ({"block": "glu", "norm": "group"}, "norm must be one of .*; got 'group'"),
        ({"norm": "batch"}, "norm must be one of 'rms', .* in 'mlp' blocks; got 'batch'"),
        ({"block": "glu", "norm": "rms_plus_eps"}, "in 'glu' blocks; got 'rms_plus_eps'"),
        ({"final_norm": "batch"}, "final_norm must be one of 'rms', .*; got 'batch'"),
        ({"final_norm": "none", "residual_in_fp32": True}, "residual_in_fp32 needs a final_norm"),
        ({"block": "mixer", "norm": "batch"}, "norm must be one of 'rms', .*; got 'batch'"),
        ({"block": "mixer", "mlp_bias": True}, "options of block='mlp'; got them with block='mix"),
        ({"prenorm": False}, "options of block='glu'; got them with block='mlp'"),
        ({"block": "glu", "mlp_bias": True}, "options of block='mlp'; got them with block='glu'"),
        ({"embedding_dropout": -0.1}, "embedding_dropout must be a probability.*; got -0.1"),
        ({"hyena_mimo_size": 0}, "hyena_mimo_size must be an integer of at least 1; got 0"),
        ({"pooling": "max"}, "pooling must be one of 'mean', 'last'; got 'max'"),
        ({"dropout": 1.0}, "dropout must be a probability.*; got 1.0"),
        ({"hyena_input_dropout": 1}, "hyena_input_dropout must be a probability.*; got 1"),
        ({"kernel_dropout": "some"}, "kernel_dropout must be a probability.*; got 'some'"),
        ({"input_size": 0}, "input_size must be an integer of at least 1; got 0"),
        (
            {"bidirectional": True, "mixers": ["hyena"] * 2 + ["long_convolution"] * 2},
            "bidirectional needs the mixer 'long_convolution' in every layer; got 'hyena'",
        ),
        ({"hidden_act": "loud"}, "hidden_act must be among .*; got 'loud'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(kwargs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        GramianConfig(**kwargs)
    assert "\n" not in str(caught.value)


def test_heads_matter_to_multi_hyena_only() -> None:
    assert GramianConfig(num_heads=7, mixers="hyena").num_attention_heads == 7


@pytest.mark.parametrize(
    ("filter_config", "sentence"),
    [
        ({"type": "unheard"}, "unheard"),
        ({"type": "rtf", "state_size": 4, "colour": 1}, "colour"),
        ({"type": "modal", "orders": [1, 2]}, "orders"),
    ],
)
def test_a_filter_that_cannot_be_built_is_named(
    make_config: Callable[..., GramianConfig], filter_config: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        GramianForCausalLM(make_config(filter=filter_config))


def test_auto_classes_make_our_models(make_config: Callable[..., GramianConfig]) -> None:
    config = make_config()
    assert type(transformers.AutoModel.from_config(config)) is GramianModel
    assert type(transformers.AutoModelForCausalLM.from_config(config)) is GramianForCausalLM
    classifier = transformers.AutoModelForSequenceClassification.from_config(config)
    assert type(classifier) is GramianForSequenceClassification


def test_importing_registers_once_and_again() -> None:
    code = "import sys, gramian; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False", done.stderr
    importlib.reload(gramian.models)
    assert type(transformers.AutoConfig.for_model("gramian")) is GramianConfig
