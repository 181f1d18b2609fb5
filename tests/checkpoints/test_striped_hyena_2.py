"""StripedHyena 2: the published logits, every layout of a configuration, and what files hold.

`evo2_tiny` has random weights in the layout of the published Evo 2 of 7 billion parameters; vortex,
the published implementation, made its outputs. `reference` is the same model written down from its
equations, in double precision and without any convolution routine.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves

import gramian
from gramian import checkpoints
from gramian.checkpoints.files import open_checkpoint
from gramian.filters import ExplicitFilter, ModalFilter
from gramian.models import GramianForCausalLM, load

DATA = Path(__file__).parents[1] / "data"
TINY = DATA / "evo2_tiny.pt"

CONFIG: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 12,
    "num_layers": 5,
    "num_attention_heads": 2,
    "state_size": 3,
    "short_filter_length": 3,
    "hcs_layer_idxs": [0],
    "hcm_layer_idxs": [1],
    "hcl_layer_idxs": [2, 4],
    "attn_layer_idxs": [3],
    "hcs_filter_length": 7,
    "hcm_filter_length": 130,
    "hcs_filter_groups": 4,
    "hcm_filter_groups": 6,
    "eps": 1e-5,
    "inner_mlp_size": 20,
    "interleave": True,
    "column_split": True,
    "column_split_hyena": False,
    "evo2_style_activations": True,
    "tie_embeddings": True,
    "mha_out_proj_bias": True,
    "hyena_out_proj_bias": True,
    "mlp_activation": "gelu",
    "max_seqlen": 256,
    "final_norm": True,
}

LAYOUTS: dict[str, dict[str, Any]] = {
    "published": {},
    "by_head": {"interleave": False, "column_split_hyena": True},
    "by_kind": {"interleave": False},
    "interleaved_by_head": {"column_split_hyena": True},
    "flipped": {"hyena_flip_x1x2": True},
    "flipped_by_head": {
        "interleave": False,
        "column_split_hyena": True,
        "hyena_flip_x1x2": True,
    },
    "biases": {"qkv_proj_bias": True, "short_filter_bias": True, "short_filter_length": 4},
    "no_biases": {"mha_out_proj_bias": False, "hyena_out_proj_bias": False},
    "untied": {"tie_embeddings": False},
    "attention_by_kind": {"column_split": False},
    "activations": {"evo2_style_activations": False, "mlp_activation": "silu"},
    "default_inner": {
        "inner_mlp_size": None,
        "inner_size_multiple_of": 8,
        "model_parallel_size": 2,
    },
    "short_medium": {"hcm_filter_length": 32, "hcs_filter_length": 1},
    "long_short": {"hcs_filter_length": 150, "hcm_filter_length": 2},
    "stretched": {
        "rotary_emb_base": 1_000_000,
        "use_interpolated_rotary_pos_emb": True,
        "rotary_emb_scaling_factor": 4,
    },
    "stretched_without_saying_so": {"rotary_emb_scaling_factor": 4},
    "flash_norm": {"use_flash_rmsnorm": True},
    "attention_first": {
        "attn_layer_idxs": [0, 4],
        "hcs_layer_idxs": [1],
        "hcm_layer_idxs": [2],
        "hcl_layer_idxs": [3],
    },
}


def kind_of(config: dict[str, Any], layer: int) -> str:
    kinds = ("attn", "hcl", "hcm", "hcs")
    return next(kind for kind in kinds if layer in config[f"{kind}_layer_idxs"])


def make_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Draw a checkpoint in the published layout."""
    draw = torch.Generator().manual_seed(seed)
    d, vocabulary = config["hidden_size"], config["vocab_size"]
    inner = config["inner_mlp_size"]
    if inner is None:
        multiple = config["inner_size_multiple_of"] * config["model_parallel_size"]
        inner = math.ceil(int(2 * d * 4 / 3) / multiple) * multiple

    def normal(*shape: int, scale: float = 0.4) -> Tensor:
        return scale * torch.randn(*shape, generator=draw)

    tensors = {
        "embedding_layer.weight": normal(vocabulary, d, scale=1.0),
        "unembed.weight": normal(vocabulary, d),
        "norm.scale": 1 + normal(d, scale=0.1),
    }
    if config["tie_embeddings"]:
        tensors["unembed.weight"] = tensors["embedding_layer.weight"].clone()
    for layer in range(config["num_layers"]):
        own = {
            "pre_norm.scale": 1 + normal(d, scale=0.1),
            "post_norm.scale": 1 + normal(d, scale=0.1),
            "mlp.l1.weight": normal(inner, d),
            "mlp.l2.weight": normal(inner, d),
            "mlp.l3.weight": normal(d, inner),
        }
        own |= draw_mixer(config, kind_of(config, layer), normal, draw)
        tensors |= {f"blocks.{layer}.{name}": value for name, value in own.items()}
    return tensors


def draw_mixer(
    config: dict[str, Any], kind: str, normal: Callable[..., Tensor], draw: torch.Generator
) -> dict[str, Tensor]:
    d, own = config["hidden_size"], {}
    if kind == "attn":
        half = d // config["num_attention_heads"] // 2
        own["inner_mha_cls.Wqkv.weight"] = normal(3 * d, d)
        own["inner_mha_cls.out_proj.weight"] = normal(d, d)
        own["inner_mha_cls.rotary_emb.inv_freq"] = torch.rand(half, generator=draw).bfloat16()
        if config.get("qkv_proj_bias"):
            own["inner_mha_cls.Wqkv.bias"] = normal(3 * d)
        if config["mha_out_proj_bias"]:
            own["inner_mha_cls.out_proj.bias"] = normal(d)
    else:
        own["projections.weight"] = normal(3 * d, d)
        own["filter.short_filter_weight"] = normal(3 * d, 1, config["short_filter_length"])
        own["out_filter_dense.weight"] = normal(d, d)
        if config.get("qkv_proj_bias"):
            own["projections.bias"] = normal(3 * d)
        if config.get("short_filter_bias"):
            own["filter.short_filter_bias"] = normal(3 * d)
        if config["hyena_out_proj_bias"]:
            own["out_filter_dense.bias"] = normal(d)
    if kind == "hcl":
        rates = 0.05 + torch.rand(d, config["state_size"], 1, generator=draw)
        own["filter.log_poles"] = -rates
        own["filter.residues"] = normal(d, config["state_size"])
        own["filter.D"] = normal(d)
        own["mixer.mixer.filter.t"] = torch.arange(256.0).reshape(1, 1, -1)
    elif kind != "attn":
        taps = config[f"{kind}_filter_length"]
        own["filter.h"] = normal(config[f"{kind}_filter_groups"], 1, taps, scale=0.3)
        if taps >= 128:
            own["filter.D"] = normal(d)
    return own


def reference(config: dict[str, Any], tensors: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Return the logits (batch, length, vocab) of the equations, in float64."""
    w = {name: value.double() for name, value in tensors.items()}
    embedding = w["embedding_layer.weight"]
    x = embedding[ids]
    for layer in range(config["num_layers"]):
        own = {
            name.removeprefix(f"blocks.{layer}."): value
            for name, value in w.items()
            if name.startswith(f"blocks.{layer}.")
        }
        kind = kind_of(config, layer)
        u = norm(config, x, own["pre_norm.scale"])
        x = x + (attend(config, own, u) if kind == "attn" else convolve(config, own, u, kind))
        u = norm(config, x, own["post_norm.scale"])
        gate = u @ own["mlp.l1.weight"].T
        if layer == 0 or not config["evo2_style_activations"]:
            gelu = config["mlp_activation"] == "gelu"
            gate = gate * (
                0.5 * (1 + torch.erf(gate / math.sqrt(2))) if gelu else torch.sigmoid(gate)
            )
        x = x + (gate * (u @ own["mlp.l2.weight"].T)) @ own["mlp.l3.weight"].T
    head = embedding if config["tie_embeddings"] else w["unembed.weight"]
    return norm(config, x, w["norm.scale"]) @ head.T


def norm(config: dict[str, Any], x: Tensor, scale: Tensor) -> Tensor:
    square = x.square().mean(-1, keepdim=True)
    if config.get("use_flash_rmsnorm"):
        return x / (square + config["eps"]).sqrt() * scale
    return x / (square.sqrt() + config["eps"]) * scale


def causal(taps: Tensor, x: Tensor) -> Tensor:
    """Return `Σ_k taps[k] x[t - k]` for taps (d, K), the present first, and x (batch, L, d)."""
    y = torch.zeros_like(x)
    for lag in range(min(taps.shape[1], x.shape[1])):
        y[:, lag:] += taps[:, lag] * x[:, : x.shape[1] - lag]
    return y


def convolve(config: dict[str, Any], own: dict[str, Tensor], u: Tensor, kind: str) -> Tensor:
    d, heads = config["hidden_size"], config["num_attention_heads"]
    z = u @ own["projections.weight"].T + own.get("projections.bias", 0)
    z = causal(own["filter.short_filter_weight"][:, 0].flip(-1), z)
    z = z + own.get("filter.short_filter_bias", 0)
    if config["interleave"]:
        z = torch.cat([z[..., 0::3], z[..., 1::3], z[..., 2::3]], dim=-1)
    if config["column_split_hyena"]:
        parts = z.unflatten(-1, (heads, 3, d // heads))
        o, g, v = (parts[..., i, :].flatten(-2) for i in range(3))
    else:
        o, g, v = z.split(d, dim=-1)
    if config.get("hyena_flip_x1x2"):
        o, g = g, o
    s = g * v
    if kind == "hcl":
        t = torch.arange(u.shape[1], dtype=torch.float64)
        taps = (own["filter.residues"][..., None] * torch.exp(own["filter.log_poles"] * t)).sum(1)
        y = causal(taps, s) + own["filter.D"] * s
    else:
        stored = own["filter.h"][:, 0]
        taps = stored[torch.arange(d) // (d // len(stored))]
        if taps.shape[1] >= 128:
            y = causal(taps, s) + own["filter.D"] * s
        else:
            y = causal(taps.flip(-1), s)
    return (o * y) @ own["out_filter_dense.weight"].T + own.get("out_filter_dense.bias", 0)


def attend(config: dict[str, Any], own: dict[str, Tensor], u: Tensor) -> Tensor:
    heads, length = config["num_attention_heads"], u.shape[1]
    e = config["hidden_size"] // heads
    z = u @ own["inner_mha_cls.Wqkv.weight"].T + own.get("inner_mha_cls.Wqkv.bias", 0)
    if config["column_split"]:
        q, k, v = z.unflatten(-1, (heads, 3, e)).unbind(-2)
    else:
        q, k, v = z.unflatten(-1, (3, heads, e)).unbind(-3)
    factor = 1.0
    if config.get("use_interpolated_rotary_pos_emb"):
        factor = config["rotary_emb_scaling_factor"]
    t = torch.arange(length, dtype=torch.float64)
    angle = (t / factor)[:, None, None] * own["inner_mha_cls.rotary_emb.inv_freq"]

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat(
            [
                first * angle.cos() - second * angle.sin(),
                second * angle.cos() + first * angle.sin(),
            ],
            dim=-1,
        )

    scores = torch.einsum("blhe,bmhe->bhlm", rotate(q), rotate(k)) / math.sqrt(e)
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
    y = torch.einsum("bhlm,bmhe->blhe", scores.softmax(-1), v).flatten(-2)
    out = y @ own["inner_mha_cls.out_proj.weight"].T
    return out + own.get("inner_mha_cls.out_proj.bias", 0)


class Saved:
    """A byte stream as the published files hold it."""

    @staticmethod
    def scales(a: float, b: float) -> io.BytesIO:
        stream = io.BytesIO()
        torch.save({"scale_fwd": torch.tensor([a, b, 1.0]), "num_gemms": 1}, stream)
        stream.seek(0)
        return stream


def write(folder: Path, content: dict[str, Any], config: dict[str, Any] | None = None) -> Path:
    torch.save(content, folder / "model.pt")
    if config is not None:
        (folder / "model.json").write_text(json.dumps(config))
    return folder / "model.pt"


@pytest.fixture(scope="module")
def tiny() -> GramianForCausalLM:
    return checkpoints.load(TINY, dtype=torch.float32).model


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(DATA / "evo2_tiny.expected.safetensors")


@torch.no_grad()
def test_the_published_logits_and_blocks(
    tiny: GramianForCausalLM, expected: dict[str, Tensor]
) -> None:
    output = tiny(expected["input_ids"], output_hidden_states=True, use_cache=False)
    torch.testing.assert_close(output.logits, expected["logits"], rtol=0, atol=1e-4)
    for layer in range(7):  # the last hidden state is after the norm
        made, theirs = output.hidden_states[layer + 1], expected[f"block.{layer}"]
        torch.testing.assert_close(made, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
    long = tiny(expected["long.input_ids"], use_cache=False).logits
    torch.testing.assert_close(long, expected["long.logits"], rtol=0, atol=1e-4)


def test_the_equations_are_the_published_ones(expected: dict[str, Tensor]) -> None:
    """Hold the reference of the other tests against the published implementation."""
    config = json.loads(TINY.with_suffix(".json").read_text())
    tensors = open_checkpoint(TINY).tensors
    made = reference(config, tensors, expected["input_ids"][:1])
    torch.testing.assert_close(made.float(), expected["logits"][:1], rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_that_of_the_equations(layout: str, tmp_path: Path) -> None:
    config = CONFIG | LAYOUTS[layout]
    tensors = make_tensors(config)
    ids = torch.randint(40, (2, 200), generator=torch.Generator().manual_seed(1))
    made = reference(config, tensors, ids)
    stored = {name: value for name, value in config.items() if value is not None}
    loaded = checkpoints.load(write(tmp_path, tensors, stored))
    assert loaded.format == "striped_hyena_2"
    model = loaded.model
    scale = float(made.abs().max())
    whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(whole.double(), made, rtol=0, atol=2e-5 * scale)
    cache = None
    parts = []
    for part in ids.split([5, 1, 1, 130, 1, 62], dim=1):
        output = model(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1).double(), made, rtol=0, atol=2e-5 * scale)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 3, 5, 6, 7, 8])
def test_prompts_of_few_tokens_go_on_as_the_whole(
    tiny: GramianForCausalLM, expected: dict[str, Tensor], length: int
) -> None:
    ids = expected["input_ids"][:, :60]
    whole = tiny(ids, use_cache=False).logits
    output = tiny(ids[:, :length], use_cache=True)
    for t in range(length, 60):
        output = tiny(ids[:, t : t + 1], past_key_values=output.past_key_values, use_cache=True)
        torch.testing.assert_close(output.logits[:, 0], whole[:, t], rtol=0, atol=1e-4)


@torch.no_grad()
def test_filters_and_states_are_as_small_as_published(tiny: GramianForCausalLM) -> None:
    mixers = [layer.mixer for layer in tiny.model.layers]
    short, medium, long = (mixers[i] for i in (0, 1, 2))
    assert isinstance(short.filter, ExplicitFilter) and isinstance(medium.filter, ExplicitFilter)
    assert isinstance(long.filter, ModalFilter) and long.filter.real
    inputs = 2 * 3 * 64  # of the short convolution of the projections
    for mixer, numbers in ((short, 6 * 64), (medium, 127 * 64), (long, 16 * 64)):
        assert mixer.recurrence().state_bytes(1) == 4 * (inputs + numbers)


@torch.no_grad()
def test_a_cache_keeps_nothing_of_the_prompt_but_its_state(
    tiny: GramianForCausalLM, expected: dict[str, Tensor]
) -> None:
    cache = tiny.prefill(expected["long.input_ids"]).past_key_values
    for layer in cache.layers:
        for leaf in tree_leaves(layer.state):
            assert leaf.untyped_storage().nbytes() == leaf.nbytes


@torch.no_grad()
def test_it_is_saved_and_loaded_with_its_stored_frequencies(
    tiny: GramianForCausalLM, expected: dict[str, Tensor], tmp_path: Path
) -> None:
    stored = open_checkpoint(TINY).tensors["blocks.3.inner_mha_cls.rotary_emb.inv_freq"]
    assert stored.dtype == torch.bfloat16
    assert list(tiny.model.layers[3].mixer.rotary_frequencies) == stored.tolist()
    tiny.save_pretrained(tmp_path)
    again = load(tmp_path)
    ids = expected["input_ids"]
    assert torch.equal(again(ids, use_cache=False).logits, tiny(ids, use_cache=False).logits)


@torch.no_grad()
def test_projections_in_fp8_are_their_definition(expected: dict[str, Tensor]) -> None:
    """Round through a table of all 256 numbers of the format."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    table = codes[codes.isfinite()].unique()

    def nearest(x: Tensor) -> Tensor:
        clamped = x.double().clamp(-448, 448)
        place = torch.searchsorted(table, clamped).clamp(1, len(table) - 1)
        below, above = table[place - 1], table[place]
        tie = clamped - below == above - clamped
        even = (place - (table == 0).nonzero()[0]).abs() % 2 == 0  # the mantissa of `above`
        up = torch.where(tie, even, clamped - below > above - clamped)
        return torch.where(up, above, below)

    model = checkpoints.load(TINY, dtype=torch.float32, fp8=True).model
    content = open_checkpoint(TINY)
    for layer in (0, 1, 2):
        projection = model.model.layers[layer].mixer.in_proj
        state = content.states[f"blocks.{layer}.projections._extra_state"]
        assert state is not None
        held = torch.load(io.BytesIO(state), weights_only=True)["scale_fwd"]
        a, b = projection.scales
        assert (a, b) == (float(held[0]), float(held[1]))
        x = torch.randn(3, 64)
        x[0, 0] = 1000.0  # is clamped
        weight = projection.weight.double()
        made = nearest(x.float() * a) @ nearest(projection.weight.float() * b).T / (a * b)
        torch.testing.assert_close(projection(x).double(), made, rtol=1e-5, atol=1e-5)
        assert (projection(x) - x @ weight.float().T).abs().max() > 1e-3
    plain = checkpoints.load(TINY, dtype=torch.float32).model
    ids = expected["input_ids"]
    assert (model(ids).logits - plain(ids).logits).abs().max() > 1e-2


def test_fp8_is_taken_where_the_model_needs_it(tmp_path: Path) -> None:
    config = CONFIG | {"use_fp8_input_projections": True}
    content: dict[str, Any] = dict(make_tensors(config))
    file = write(tmp_path, content, config)
    with pytest.raises(ValueError, match=r"needs the FP8 scales .* blocks\.0\.projections"):
        checkpoints.load(file)
    assert checkpoints.load(file, fp8=False).model.config.mixers[0].get("fp8_scales") is None
    for layer in (0, 1, 2, 4):
        content[f"blocks.{layer}.projections._extra_state"] = Saved.scales(2.0 + layer, 3.0)
    content["blocks.3.mixer.attn._extra_state"] = None
    mixers = checkpoints.load(write(tmp_path, content, config)).model.config.mixers
    assert [mixer.get("fp8_scales") for mixer in mixers] == [
        [2.0, 3.0],
        [3.0, 3.0],
        [4.0, 3.0],
        None,
        [6.0, 3.0],
    ]
    content["blocks.1.projections._extra_state"] = io.BytesIO(b"no archive")
    with pytest.raises(ValueError, match=r"blocks\.1\.projections\._extra_state holds none"):
        checkpoints.load(write(tmp_path, content, config))


def test_byte_streams_run_no_code(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (print, ("ran",))

    config = CONFIG | {"use_fp8_input_projections": True}
    content: dict[str, Any] = dict(make_tensors(config))
    content["blocks.0.projections._extra_state"] = io.BytesIO(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="holds none"):
        checkpoints.load(write(tmp_path, content, config))
    content["blocks.0.projections._extra_state"] = Trap()
    with pytest.raises(ValueError, match=r"is refused: reading it would call builtins\.print"):
        checkpoints.load(write(tmp_path, content, config))
    content["blocks.0.projections._extra_state"] = "text"
    with pytest.raises(ValueError, match="_extra_state' is a str"):
        checkpoints.load(write(tmp_path, content, config))


@torch.no_grad()
@pytest.mark.parametrize("named", ["model.pt", "model.pt.part0", "."])
def test_parts_are_read_as_one_file(tmp_path: Path, named: str) -> None:
    tensors = make_tensors(CONFIG)
    whole = write(tmp_path, tensors, CONFIG)
    ids = torch.randint(40, (1, 20))
    logits = checkpoints.load(whole).model(ids).logits
    content = whole.read_bytes()
    third = len(content) // 3
    for index in range(3):
        end = None if index == 2 else (index + 1) * third
        (tmp_path / f"model.pt.part{index}").write_bytes(content[index * third : end])
    with pytest.raises(ValueError, match="whole and in parts"):
        checkpoints.load(whole)
    whole.unlink()
    config = tmp_path / "model.json"
    joined = checkpoints.load(tmp_path / named, config=config).model(ids).logits
    assert torch.equal(joined, logits)
    (tmp_path / "model.pt.part1").unlink()
    with pytest.raises(ValueError, match=r"lacks its part 1, model\.pt\.part1"):
        checkpoints.load(tmp_path / named, config=config)


@torch.no_grad()
def test_parts_of_safetensors_are_read_among_files_of_other_names(tmp_path: Path) -> None:
    tensors = {"weight": torch.randn(30, 7)}
    save_file(tensors, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").unlink()
    for index in range(11):  # part10 comes after part9
        end = None if index == 10 else (index + 1) * 70
        part = tmp_path / f"model.safetensors.part{index}"
        part.write_bytes(content[index * 70 : end])
    for name in ("11", "12", "model.safetensors.part011", "model.safetensors.part\u0661\u0661"):
        (tmp_path / name).write_bytes(b"no part")
    (tmp_path / "model.safetensors.part11").mkdir()
    for named in (tmp_path, tmp_path / "model.safetensors.part0"):
        assert torch.equal(open_checkpoint(named).tensors["weight"], tensors["weight"])


@pytest.mark.parametrize("value", ["true", "false", 1, 0])
def test_whether_embeddings_are_tied_is_no_other_thing_than_a_bool(
    value: Any, tmp_path: Path
) -> None:
    tensors = make_tensors(CONFIG | {"tie_embeddings": False})
    file = write(tmp_path, tensors, CONFIG | {"tie_embeddings": value})
    with pytest.raises(ValueError, match="tie_embeddings in the checkpoint's configuration cannot"):
        checkpoints.load(file)


def test_a_folder_does_not_hide_a_published_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path, make_tensors(CONFIG))
    (tmp_path / "evo2_7b").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"embedding_layer\.weight is \(40, 12\) and not \(512, 4"):
        checkpoints.load(file, config="evo2_7b")


def test_views_of_larger_storages_are_cut(tmp_path: Path) -> None:
    tensors = make_tensors(CONFIG)
    weight = tensors["blocks.0.out_filter_dense.weight"]
    tensors["blocks.0.out_filter_dense.weight"] = torch.cat([weight, weight.new_ones(500, 12)])[:12]
    model = checkpoints.load(write(tmp_path, tensors, CONFIG)).model
    kept = model.model.layers[0].mixer.out_proj.weight
    assert torch.equal(kept, weight)
    assert kept.untyped_storage().nbytes() == kept.nbytes


def test_a_wrong_configuration_names_the_tensor(tmp_path: Path) -> None:
    file = write(tmp_path, make_tensors(CONFIG))
    for change, words in (
        ({"hcm_filter_length": 100}, r"blocks\.1\.filter\.h is \(6, 1, 130\) and not"),
        ({"hcs_filter_groups": 6}, r"blocks\.0\.filter\.h is \(4, 1, 7\) and not \(6, 1, 7\)"),
        ({"state_size": 4}, r"blocks\.2\.filter\.log_poles is \(12, 3, 1\)"),
        ({"hcs_layer_idxs": [0, 4], "hcl_layer_idxs": [2]}, r"missing \(blocks\.4\.filter\.h\)"),
        ({"hcs_layer_idxs": []}, "block 0 is in none of attn_layer_idxs"),
        ({"hcm_filter_groups": 5}, "hcm_filter_groups must divide hidden_size; got 5 and 12"),
        ({"qkv_proj_bias": True}, r"missing \(.*Wqkv\.bias"),
    ):
        with pytest.raises(ValueError, match=words):
            checkpoints.load(file, config=CONFIG | change)


def test_published_sizes_have_names(tmp_path: Path) -> None:
    file = write(tmp_path, make_tensors(CONFIG))
    assert len(checkpoints.PUBLISHED) == 8
    with pytest.raises(ValueError, match=r"embedding_layer\.weight is \(40, 12\) and not \(512, 4"):
        checkpoints.load(file, config="evo2_7b")
    for config in checkpoints.PUBLISHED.values():
        lists = [config[f"{kind}_layer_idxs"] for kind in ("attn", "hcs", "hcm", "hcl")]
        assert sorted(itertools.chain(*lists)) == list(range(config["num_layers"]))
        assert len(lists[1]) == len(lists[2]) == len(lists[3])


def test_medium_filters_become_smaller_and_long_ones_stay(expected: dict[str, Tensor]) -> None:
    """Smooth medium filters, since random ones have no smaller recurrence."""
    model = checkpoints.load(TINY, dtype=torch.float32).model
    medium = [model.model.layers[layer].mixer.filter for layer in (1, 5)]
    t = torch.arange(128.0)
    with torch.no_grad():
        for filter in medium:
            rates = torch.linspace(0.05, 0.5, filter.groups)[:, None]
            filter.kernel.copy_(torch.exp(-rates * t) * torch.cos(0.3 * t))
    small, report = gramian.distill(model, tol=1e-3)
    kept = {layer.layer: layer.kept for layer in report.layers}
    assert kept == {0: True, 1: False, 4: True, 5: False, 7: True}
    assert report.converged and report.max_tail_energy < 1e-5
    medium_bytes = 2 * 127 * 64 * 4
    assert report.original_state_bytes - report.distilled_state_bytes > 0.9 * medium_bytes
    assert "The filters of layers 0, 4, 7 stay" in report.summary
    ids = expected["long.input_ids"]  # longer than the taps
    with torch.no_grad():
        difference = (small(ids).logits - model(ids).logits).abs().max()
    assert difference < 0.05 * expected["long.logits"].abs().max()
