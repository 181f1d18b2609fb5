"""Mixers by name: built from their configuration, and made again from what they say of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from gramian.mixers import MIXERS, S6, Block, LongConvolution, build, register

FILTER = {"type": "modal", "orders": 3}
SHARED: dict[str, Any] = {"width": 8, "heads": 2, "filter": FILTER, "max_length": 20}
OTHERS: dict[str, dict[str, Any]] = {
    "hyena": {"order": 3, "mimo_size": 5, "short_kernel": 2, "kernel_dropout": 0.1},
    "multi_hyena": {"short_kernel": 2, "kernel_dropout": 0.1},
    "long_convolution": {"bidirectional": True, "kernel_dropout": 0.1},
    "softmax_attention": {
        "kv_heads": 1,
        "head_width": 6,
        "window": 7,
        "rotary_base": 100.0,
        "rotary_scaling": 2.0,
        "rotary_width": 4,
        "bias": True,
        "out_bias": False,
    },
    "linear_attention": {"state_size": 3, "value_width": 5, "feature_map": "elu"},
    "weighted_linear_attention": {"state_size": 3, "temperature": 2.0, "short_kernel": 2},
    "gated_linear_attention": {"value_width": 3, "temperature": 2.0, "gate_rank": 3},
    "s6": {"state_size": 3, "expand": 3, "step_rank": 2, "short_kernel": 2},
    "gla_s6": {"state_size": 3, "normalization": 2.0, "feature_map": "silu"},
    "gated_delta_net": {"state_size": 3, "value_width": 5, "short_kernel": 2},
}


@pytest.mark.each
@pytest.mark.parametrize("options", ["defaults", "others"])
@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_a_mixer_is_made_again_from_its_configuration(name: str, options: str) -> None:
    given = OTHERS[name] if options == "others" else {}
    mixer = build({"type": name, **given}, **SHARED).eval()
    config = mixer.config()
    assert config == json.loads(json.dumps(config))
    assert {key: config[key] for key in given} == given
    again = build(config).eval()
    assert type(again) is type(mixer) is MIXERS[name] and again.config() == config
    again.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 9, 8)
    assert torch.equal(again(x), mixer(x))
    if mixer.causal:
        system = mixer.operator(x)
        assert system.channel_shape[-1] == mixer.channels


def test_every_mixer_is_tried() -> None:
    assert set(OTHERS) == set(MIXERS)


def test_a_name_or_a_mixer_is_enough() -> None:
    assert isinstance(build("s6", width=4), S6)
    mixer = S6(4)
    assert build(mixer, width=4) is mixer


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: build("s7", width=4), "unknown mixer type 's7'. Did you mean 's6'"),
        (lambda: build({"type": "s6", "wide": 4}), "unknown key of a mixer 's6' 'wide'"),
        (lambda: build("s6"), "the mixer 's6' cannot be built: .*width"),
        (lambda: build(S6(4), width=6), "width 6 is needed; got one of 4"),
        (lambda: register("s6")(Block), "'s6' is already registered"),
    ],
)
def test_bad_input_gets_one_sentence(call: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()


def test_a_long_convolution_builds_its_filter() -> None:
    mixer = LongConvolution(FILTER, width=6, max_length=12)
    assert (mixer.width, mixer.filter.channels, mixer.filter.max_length) == (6, 6, 12)
    with pytest.raises(ValueError, match="8 channels is needed; got one of 6"):
        LongConvolution(mixer.filter, width=8)
