"""A mixer of one's own with a state of its own: what a model does with ours, it does with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import gramian
from gramian.export import ExportedModel, MixerProgram, export_model, register_program
from gramian.export._mixers import _PROGRAMS
from gramian.memory import Observer
from gramian.mixers import MIXERS, Mixer, register
from gramian.models import GramianConfig, GramianForCausalLM, load
from gramian.systems import State, System, TimeVarying


class _Fields(NamedTuple):
    level: Tensor


class LevelState(_Fields, State):
    """What each channel has risen to, (batch, width)."""

    __slots__ = ()


class Level(Mixer):
    """`s_t = a ∘ s_{t-1} + x_t`, `y_t = W s_t`, one gate a channel."""

    def __init__(self, width: int, slowness: float = 2.0) -> None:
        super().__init__()
        self.width = width
        self.slowness = slowness
        self.logits = nn.Parameter(torch.empty(width))
        self.out_proj = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.logits, self.slowness)

    def config(self) -> dict[str, Any]:
        return super().config() | {"slowness": self.slowness}

    def _levels(self, x: Tensor, start: Tensor) -> Tensor:
        """s_1 … s_L, (batch, L, width): products with powers of the gates."""
        gates = torch.sigmoid(self.logits)
        time = torch.arange(x.shape[1], device=x.device)
        lag = (time[:, None] - time).unsqueeze(-1)  # (L, L, 1)
        taps = torch.where(lag >= 0, gates ** lag.clamp_min(0), 0)
        carried = gates ** (time + 1).unsqueeze(-1) * start.unsqueeze(1)
        return torch.einsum("tsw,bsw->btw", taps, x) + carried

    def mix_chunk(self, x: Tensor, state: State, mask: Tensor | None) -> tuple[Tensor, State]:
        assert isinstance(state, LevelState)
        start = state.level
        if mask is not None:  # padding before the tokens must not let the level fall
            waited = (mask == 0).sum(1, keepdim=True)
            start = start / torch.sigmoid(self.logits) ** waited
        levels = self._levels(x, start)
        last = levels[:, -1]
        if mask is not None:
            last = torch.where(mask.any(1, keepdim=True), last, state.level)
        return self.out_proj(levels), LevelState(last)

    def make_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> State:
        return LevelState(torch.zeros(batch, self.width, dtype=dtype, device=device))

    def make_operator(self, x: Tensor, channels: slice, mask: Tensor | None) -> System:
        gates = torch.sigmoid(self.logits)[channels]
        A = gates[None, :, None, None].expand(x.shape[0], -1, x.shape[1], 1)
        ones = torch.ones_like(A)
        return TimeVarying(A, ones, A, ones.squeeze(-1))


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register("level")(Level)
    yield
    del MIXERS["level"]


def make(mixers: Any = ("level", "s6"), **changes: Any) -> GramianForCausalLM:
    torch.manual_seed(4)
    settings = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_heads": 2}
    config = GramianConfig(**settings | {"initializer_range": 0.4} | changes, mixers=mixers)
    return GramianForCausalLM(config).eval()


def tokens(length: int = 12) -> Tensor:
    return torch.randint(20, (2, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> GramianForCausalLM:
    return make()


@pytest.mark.parametrize("block", ["mlp", "glu", "mixer"])
@torch.no_grad()
def test_every_mode_is_one_map(block: str) -> None:
    model = make(block=block).double()
    ids = tokens(15)
    whole = model(ids, use_cache=False).logits
    cache, logits = None, []
    for part in ids.split([6, 1, 1, 7], 1):
        outputs = model(part, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        logits.append(outputs.logits)
    assert_close(torch.cat(logits, 1), whole)
    assert cache.nbytes == model.state_bytes(2)

    mask = torch.ones(2, 19)
    mask[:, :4] = 0
    padded = model(torch.cat([tokens(4), ids], 1), attention_mask=mask, use_cache=True)
    assert_close(padded.logits[:, 4:], whole)
    following = tokens(3)
    after = model(following, past_key_values=padded.past_key_values).logits
    assert_close(after, model(torch.cat([ids, following], 1), use_cache=False).logits[:, 15:])


def test_it_is_trained_saved_loaded_and_generates(
    model: GramianForCausalLM, tmp_path: Path
) -> None:
    ids = tokens()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loss = model(ids, labels=ids).loss
    loss.backward()
    mixer = model.model.layers[0].mixer
    assert isinstance(mixer, Level) and mixer.logits.grad is not None
    assert mixer.logits.grad.abs().sum() > 0
    optimizer.step()
    model.eval()
    assert model(ids, labels=ids).loss < loss

    model.save_pretrained(tmp_path)
    read = load(tmp_path)
    with torch.no_grad():
        assert torch.equal(read(ids).logits, model(ids).logits)
    written = read.generate(ids, max_new_tokens=5, do_sample=False, use_cache=True)
    plain = model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(written, plain)


def test_its_options_stand_beside_its_name() -> None:
    model = make([{"type": "level", "slowness": 3.0}, "level"])
    first, second = (block.mixer.logits for block in model.model.layers)
    assert first.eq(3.0).all() and second.eq(2.0).all()
    assert GramianConfig(**model.config.to_dict()).mixers == model.config.mixers
    assert make({"type": "level", "slowness": 1.0}).config.mixer_of(1) == "level"
    with pytest.raises(ValueError, match=r"unknown key of a mixer 'level' 'slownes'\. Did"):
        make([{"type": "level", "slownes": 3.0}, "level"])
    with pytest.raises(ValueError, match=r"mixers must be among .*'level'.*; got 'bevel'"):
        make(["bevel", "level"])


def test_its_output_projection_starts_small() -> None:
    model = make(initializer_range=0.01, hidden_size=64)
    weight = model.model.layers[0].mixer.out_proj.weight
    assert_close(weight.std().item(), 0.01 / 2, rtol=0.1, atol=0)


def test_it_is_exported_once_it_says_how(tmp_path: Path) -> None:
    model = make("level", num_hidden_layers=1)
    with pytest.raises(ValueError, match="says how a Level is traced; register a MixerProgram for"):
        export_model(model, tmp_path / "refused", "torch", verify=2)
    assert not (tmp_path / "refused").exists()
    register_program(Level)(MixerProgram)
    try:
        report = export_model(model, tmp_path / "exported", "torch", verify=6)
    finally:
        del _PROGRAMS[Level]
    assert report.step_difference < 1e-4 * report.scale
    written = model.generate(tokens(), max_new_tokens=6, do_sample=False)
    run = ExportedModel(tmp_path / "exported")
    assert torch.equal(torch.from_numpy(run.generate(tokens().numpy(), 6)), written)


@torch.no_grad()
def test_its_state_is_measured(model: GramianForCausalLM) -> None:
    x = torch.randn(2, 10, 8)
    mixer = model.model.layers[0].mixer
    operator = mixer.operator(x)
    u = x.mT  # (batch, width, length)
    assert_close(mixer(x), mixer.out_proj(operator(u).mT))
    sizes = gramian.effective_state_size(operator, 5)
    assert_close(sizes, torch.ones(2, 8, dtype=sizes.dtype))

    report = gramian.analyze(model, tokens(10)[0], every=3)
    assert [(layer.mixer, layer.kind) for layer in report.main.layers] == [
        ("Level", "recurrence"),
        ("S6", "recurrence"),
    ]
    assert not report.unread
    with Observer(model, Level) as observer:
        model(tokens(), use_cache=False)
        (seen,) = observer.operators(channels=2)
    assert seen.channel_shape == (2, 2)
