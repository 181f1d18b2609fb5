"""Saving and loading: exact to the bit, whole or not at all, and clear about what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers.quantizers.quantizers_utils import should_convert_module

from gramian.filters import Filter, register
from gramian.models import (
    GramianConfig,
    GramianForCausalLM,
    GramianModel,
    GramianPreTrainedModel,
    load,
)
from gramian.systems import Modal, System

MakeConfig = Callable[..., GramianConfig]
MakeTokens = Callable[[int, int], torch.Tensor]


def make(make_config: MakeConfig, **kwargs: Any) -> GramianForCausalLM:
    torch.manual_seed(5)
    return GramianForCausalLM(make_config(**kwargs)).eval()


@torch.no_grad()
def assert_same(one: GramianForCausalLM, other: GramianForCausalLM, tokens: torch.Tensor) -> None:
    """The same to the bit: parameters, saved and computed buffers, outputs."""
    tensors = dict([*other.named_parameters(), *other.named_buffers()])
    for name, tensor in [*one.named_parameters(), *one.named_buffers()]:
        assert tensor.dtype == tensors[name].dtype, name
        assert torch.equal(tensor, tensors.pop(name)), name
    assert not tensors
    assert torch.equal(one(tokens).logits, other(tokens).logits)


@pytest.mark.each
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(
    make_config: MakeConfig,
    make_tokens: MakeTokens,
    tmp_path: Path,
    mixer: str,
    filter_config: dict[str, Any],
    tied: bool,
) -> None:
    model = make(make_config, mixers=mixer, filter=filter_config, tie_word_embeddings=tied)
    for tensor in model.state_dict().values():  # away from what an initialisation could restore
        tensor.add_(0.01 * torch.randn_like(tensor))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    tokens = make_tokens(2, 30)
    for read in (
        load(tmp_path),
        load(str(tmp_path)),
        GramianForCausalLM.from_pretrained(tmp_path),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path),
    ):
        assert not read.training
        assert (read.lm_head.weight is read.model.embed_tokens.weight) is tied
        assert_same(model, read, tokens)


def test_ragged_modal_orders(
    make_config: MakeConfig, make_tokens: MakeTokens, tmp_path: Path
) -> None:
    filters = [{"type": "modal", "orders": [1, 4, 2]}, {"type": "modal", "orders": [3, 0, 5]}]
    model = make(make_config, filter=filters)
    model.save_pretrained(tmp_path)
    assert_same(model, load(tmp_path), make_tokens(2, 30))


def test_shards(make_config: MakeConfig, make_tokens: MakeTokens, tmp_path: Path) -> None:
    model = make(make_config, hidden_size=48)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_same(model, load(tmp_path), make_tokens(1, 9))


@pytest.mark.each
def test_half_precision(
    make_config: MakeConfig,
    make_tokens: MakeTokens,
    tmp_path: Path,
    mixer: str,
    filter_config: dict[str, Any],
) -> None:
    model = make(make_config, mixers=mixer, filter=filter_config)
    model.save_pretrained(tmp_path / "single")
    half = GramianForCausalLM.from_pretrained(tmp_path / "single", dtype=torch.bfloat16)
    for ours, theirs in zip(model.model.layers, half.model.layers, strict=True):
        assert theirs.mlp.up_proj.weight.dtype == torch.bfloat16
        if not hasattr(ours.mixer, "filter"):
            continue
        pairs = zip(
            [*ours.mixer.filter.parameters(), *ours.mixer.filter.buffers()],
            [*theirs.mixer.filter.parameters(), *theirs.mixer.filter.buffers()],
            strict=True,
        )
        assert all(torch.equal(one, other) for one, other in pairs)
    half.save_pretrained(tmp_path / "half")
    assert_same(half, load(tmp_path / "half"), make_tokens(2, 12))
    assert load(tmp_path / "single", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_the_base_model(make_config: MakeConfig, make_tokens: MakeTokens, tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = GramianModel(make_config()).eval()
    model.save_pretrained(tmp_path)
    tokens = make_tokens(1, 7)
    read = transformers.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(read(tokens).last_hidden_state, model(tokens).last_hidden_state)
    with pytest.raises(ValueError, match="holds a GramianModel; a GramianForCausalLM is needed"):
        load(tmp_path)


def test_with_accelerate(make_config: MakeConfig, make_tokens: MakeTokens, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = make(make_config)
    model.save_pretrained(tmp_path)
    read = GramianForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert_same(model, read, make_tokens(1, 9))


def test_what_is_missing_is_drawn_and_what_is_there_is_kept(
    make_config: MakeConfig, tmp_path: Path, filter_config: dict[str, Any]
) -> None:
    """transformers' own loading may find a part: a filter must not draw over what was read."""
    model = make(make_config, filter=filter_config)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    inside = [n for n in weights if "layers.0.mixer.filter." in n or "layers.0.mixer.short." in n]
    dropped = [inside[0], "model.layers.1.mixer.short.weight", "model.layers.1.mlp.up_proj.weight"]
    kept = {name: tensor for name, tensor in weights.items() if name not in dropped}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    read = GramianForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, tensor in kept.items():
        assert torch.equal(read[name], tensor), name
    for name in dropped:
        assert read[name].isfinite().all()
        assert read[name].abs().max() < 20  # drawn, not left as the memory was found


def test_quantizers_are_told_to_keep_out_of_filters(make_config: MakeConfig) -> None:
    model = make(make_config)
    skipped = model._keep_in_fp32_modules
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    inside = [name for name in linear if not should_convert_module(name, skipped)]
    assert inside == [name for name in linear if ".filter." in name]
    assert 0 < len(inside) < len(linear)


def test_a_model_built_on_meta_has_the_shapes(make_config: MakeConfig, mixer: str) -> None:
    config = make_config(mixers=mixer)
    with torch.device("meta"):
        hollow = GramianForCausalLM(config)
    real = GramianForCausalLM(config)
    assert all(tensor.is_meta for tensor in hollow.state_dict().values())
    assert {n: t.shape for n, t in hollow.state_dict().items()} == {
        n: t.shape for n, t in real.state_dict().items()
    }


def test_a_model_that_is_not_tied_needs_its_head(make_config: MakeConfig, tmp_path: Path) -> None:
    make(make_config, tie_word_embeddings=False).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing \(lm_head.weight\)"):
        load(tmp_path)
    edit(tmp_path / "config.json", tie_word_embeddings=True)
    model = load(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def drop_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def add_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["stray"] = torch.ones(2)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "error", "sentence"),
    [
        (shutil.rmtree, FileNotFoundError, "there is no model folder"),
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, "has no config.json"),
        (
            lambda f: (f / "config.json").write_text("{"),
            ValueError,
            "config.json cannot be read as JSON",
        ),
        (lambda f: (f / "config.json").write_text("[1]"), ValueError, "JSON object.*list"),
        (
            lambda f: edit(f / "config.json", model_type="llama"),
            ValueError,
            "a model of type 'llama'; 'gramian' is needed",
        ),
        (
            lambda f: edit(f / "config.json", mixers="unheard"),
            ValueError,
            "not a valid configuration: mixers must be among .*'unheard'",
        ),
        (
            lambda f: edit(f / "config.json", filter={"type": "unheard"}),
            ValueError,
            "describes no model: .*'unheard'",
        ),
        (
            lambda f: (f / "model.safetensors").unlink(),
            FileNotFoundError,
            "has no weights: neither model.safetensors nor",
        ),
        (lambda f: cut(f / "model.safetensors"), ValueError, "model.safetensors cannot be read"),
        (
            lambda f: (f / "model.safetensors").write_bytes(b""),
            ValueError,
            "model.safetensors cannot be read",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"\0" * 500),
            ValueError,
            "model.safetensors cannot be read",
        ),
        (drop_tensor, ValueError, r"1 missing \(model.norm.weight\)"),
        (add_tensor, ValueError, r"1 not of this model \(stray\)"),
        (
            lambda f: edit(f / "config.json", hidden_size=24),
            ValueError,
            r"is \(.*\), and \(.*\) is needed",
        ),
        (
            lambda f: edit(f / "config.json", num_hidden_layers=3),
            ValueError,
            r"missing \(model.layers.2.mixer.filter.*, …\)",
        ),
    ],
)
def test_damaged_folders_are_refused_in_one_sentence(
    make_config: MakeConfig,
    tmp_path: Path,
    damage: Callable[[Path], None],
    error: type[Exception],
    sentence: str,
) -> None:
    folder = tmp_path / "model"
    make(make_config).save_pretrained(folder)
    damage(folder)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(error, match=sentence) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


def test_a_missing_shard_is_named(make_config: MakeConfig, tmp_path: Path) -> None:
    make(make_config, hidden_size=48).save_pretrained(tmp_path, max_shard_size="40KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        load(tmp_path)


class Scale(nn.Module):
    """A module with a buffer that is not saved, filled where `reset_parameters` says."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.empty(width))
        self.register_buffer("ramp", torch.empty(width), persistent=False)
        self.register_buffer("kept", torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.gain.data.normal_()
        self.kept.uniform_()
        self.ramp.copy_(torch.linspace(0, 1, len(self.ramp)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gain + self.ramp + self.kept


class Head(GramianPreTrainedModel):
    """A user's head of several kinds of modules, and no initialisation of its own."""

    def __init__(self, config: GramianConfig) -> None:
        super().__init__(config)
        self.model = GramianModel(config)
        self.scale = Scale(config.hidden_size)
        self.head = nn.Sequential(
            nn.LayerNorm(config.hidden_size), nn.Linear(config.hidden_size, 3)
        )
        self.query = nn.Parameter(torch.randn(config.hidden_size))
        self.post_init()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.scale(self.model(input_ids).last_hidden_state)
        return self.head(hidden) + (hidden @ self.query)[..., None]


class ByData(Head):
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            module.weight.data.normal_()
            module.bias = None if module.bias is None else nn.Parameter(module.bias.detach() + 1)
        if module is self:
            self.query.data = torch.randn_like(self.query)


class ByCopy(Head):
    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        for parameter in module.parameters():  # of all modules below, too
            parameter.copy_(torch.randn_like(parameter))


class ByView(Head):
    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        parameters = list(module.parameters(recurse=False))
        if parameters:
            torch._foreach_mul_(parameters, 3.0)
        for parameter in parameters:
            torch.neg(parameter, out=parameter.detach())
            parameter.view(-1)[::2].fill_(5)


class WithoutOurs(Head):
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.ones_(module.weight)


class FromInside(Head):
    """The parent writes into its parts."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Sequential):
            module[1].weight.data.zero_()
        if isinstance(module, Scale):
            module.reset_parameters()


HEADS = [Head, ByData, ByCopy, ByView, WithoutOurs, FromInside]


def everything(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.each
@torch.no_grad()
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_users_derive_is_read_to_the_bit(
    make_config: MakeConfig,
    make_tokens: MakeTokens,
    tmp_path: Path,
    filter_config: dict[str, Any],
    kind: type[Head],
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(3)
    model = kind(make_config(filter=filter_config, mixers=["hyena", "s6"])).eval()
    for tensor in model.state_dict().values():
        tensor.add_(0.01 * torch.randn_like(tensor))
    model.to(dtype).save_pretrained(tmp_path)
    read, info = kind.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not any(info.values())
    expected, found = everything(model), everything(read.eval())
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        if name == "scale.ramp":  # it has the precision that it was filled in
            tensor = tensor.to(found[name].dtype)
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    if dtype == torch.float32:
        tokens = make_tokens(2, 7)
        assert_close(read(tokens), model(tokens))  # up to where memory is aligned
    if kind in (Head, WithoutOurs):  # what is not in the files, `query`, has no initialiser
        model.model.save_pretrained(tmp_path / "base")
        with pytest.raises(ValueError, match=r"^query: not in the files, and nothing initializes"):
            kind.from_pretrained(tmp_path / "base")


@torch.no_grad()
@pytest.mark.parametrize("kind", [ByCopy, ByView])
def test_what_the_files_lack_is_drawn_and_the_rest_kept(
    make_config: MakeConfig, tmp_path: Path, kind: type[Head]
) -> None:
    model = kind(make_config(mixers=["long_convolution", "gated_delta_net"]))
    model.model.save_pretrained(tmp_path)
    read = kind.from_pretrained(tmp_path)
    for name, tensor in everything(model.model).items():
        assert torch.equal(tensor, everything(read.model)[name]), name
    for name, tensor in everything(read).items():
        assert tensor.isfinite().all() and tensor.abs().max() < 30, name
    assert torch.equal(read.scale.ramp, model.scale.ramp)


@register("test_in_place")
class InPlaceFilter(Filter):
    """A user's filter that writes in place, by every way there is, and has a buffer not saved."""

    def __init__(self, channels: int, max_length: int) -> None:
        super().__init__(channels, max_length)
        self.rate = nn.Parameter(torch.empty(channels, 2))
        self.gain = nn.Parameter(torch.empty(channels, 2))
        self.register_buffer("grid", torch.empty(channels), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.rate.data.uniform_(0.5, 2)
        self.gain.data = torch.randn_like(self.gain)
        self.grid = torch.linspace(0.1, 1, self.channels, device=self.gain.device)

    def forward(self, length: int | None = None) -> System:
        poles = torch.exp(-self.rate * self.grid[:, None]).to(torch.complex64)
        return Modal(poles, self.gain.to(torch.complex64), torch.zeros(self.channels))


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["hyena", "multi_hyena", "long_convolution"])
def test_a_filter_of_ones_own(
    make_config: MakeConfig, make_tokens: MakeTokens, tmp_path: Path, mixer: str
) -> None:
    model = make(make_config, mixers=mixer, filter={"type": "test_in_place"})
    model.save_pretrained(tmp_path)
    assert_same(model, load(tmp_path), make_tokens(2, 9))
    half = GramianForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, tensor in everything(half).items():
        if ".filter." in name:
            assert torch.equal(tensor, everything(model)[name]), name


def test_a_file_that_cannot_be_mapped_is_to_be_saved_in_parts(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux refuses to map a file that is larger than the memory."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("unable to mmap 42949672960 bytes: Cannot allocate memory (12)")

    make(make_config).save_pretrained(tmp_path)
    monkeypatch.setattr("gramian.models.loading.safe_open", refuse)
    with pytest.raises(ValueError, match=r"cannot be mapped .*\(12\)\); save .*smaller files"):
        load(tmp_path)
