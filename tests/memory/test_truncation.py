"""Dropping modes in training, against sums over all subsets' taps."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gramian.filters import RTF, S4D, ModalFilter, ModeFilter, build
from gramian.memory import truncate_modes
from gramian.models import GramianConfig, GramianForCausalLM, load

KINDS: dict[str, dict[str, Any]] = {
    "modal": {"type": "modal", "orders": [6, 0, 3, 1]},
    "modal_free": {"type": "modal", "orders": 5, "bounded": False},
    "modal_real": {"type": "modal", "orders": [4, 2, 5, 3], "real": True},
    "s4d": {"type": "s4d", "state_size": 12},
    "s4d_bilinear": {"type": "s4d", "state_size": 8, "discretization": "bilinear"},
    "s4d_again": {"type": "s4d", "state_size": 12, "orders": [5, 2, 0, 6]},
}


def make(name: str, taps: int = 50) -> ModeFilter:
    filter = build(KINDS[name], channels=4, max_length=taps)
    assert isinstance(filter, ModeFilter)
    weights = filter.residues if isinstance(filter, ModalFilter) else filter.C
    with torch.no_grad():  # energies of many sizes
        weights.mul_(10 ** torch.linspace(0, -3, weights.numel()).reshape(weights.shape))
    return filter


def modes(filter: ModeFilter, taps: int) -> list[Tensor]:
    """The taps h_1 … of every mode of every channel: (modes in use, taps - 1), float64."""
    system = filter(taps)
    t = torch.arange(taps - 1)
    poles, residues = (x.detach().to(torch.complex128) for x in (system.poles, system.residues))
    all_of_them = (residues.unsqueeze(-1) * poles.unsqueeze(-1) ** t).real
    return [rows[r != 0] for rows, r in zip(all_of_them, residues, strict=True)]


def drops(rows: Tensor, share: float) -> int:
    """The largest number of modes, the weakest first, whose sum has so small a share."""
    rows = rows[rows.square().sum(-1).argsort()]
    total = rows.sum(0).square().sum()
    return max(k for k in range(len(rows)) if rows[:k].sum(0).square().sum() <= share * total)


@pytest.mark.pairs
@pytest.mark.parametrize("taps", [1, 2, 3, 63])
@pytest.mark.parametrize("share", [0.0, 1e-5, 1e-2, 0.5])
@pytest.mark.parametrize("name", KINDS)
def test_the_weakest_modes_of_every_channel_are_dropped(name: str, share: float, taps: int) -> None:
    filter = make(name, taps)
    d = filter(taps).d.detach()
    before = modes(filter, max(taps, 2))
    numbers = [drops(rows, share) if len(rows) else 0 for rows in before]
    (dropped,) = truncate_modes(nn.Sequential(filter), share)
    after = modes(filter, max(taps, 2))
    counts = [len(rows) for rows in after]
    assert counts == [len(rows) - n for rows, n in zip(before, numbers, strict=True)]
    assert (dropped.name, dropped.after) == ("0", sum(counts))
    assert dropped.before == sum(map(len, before))
    for old, new, number in zip(before, after, numbers, strict=True):
        kept = old.square().sum(-1).argsort()[number:].sort().values
        torch.testing.assert_close(new, old[kept], rtol=1e-5, atol=1e-7)
        error, norm = (new.sum(0) - old.sum(0)).norm(), old.sum(0).norm()
        assert float(error) <= share**0.5 * float(norm) + 1e-6
    if isinstance(filter, ModalFilter):
        torch.testing.assert_close(filter(taps).d, d)
    again = build(filter.config())
    again.load_state_dict(filter.state_dict())
    assert torch.equal(again(taps).impulse_response(taps), filter(taps).impulse_response(taps))


def test_modes_that_cancel_are_kept() -> None:
    filter = ModalFilter(1, 2, max_length=30)
    with torch.no_grad():
        filter.angle.fill_(0.3)
        filter.log_decay.copy_(torch.tensor([-2.0, -2.001]))
        filter.residues.copy_(torch.tensor([[100.0, 0], [-100.0, 0]]))
    truncate_modes(nn.Sequential(filter), 0.5)
    assert filter.orders == (2,)  # either mode alone is far from the small sum


def test_a_filter_without_energy_or_with_infinite_energy_keeps_its_modes() -> None:
    filter = ModalFilter(2, 3, max_length=10**6, bounded=False)
    with torch.no_grad():
        filter.residues[:3] = 1e-30
        filter.decay[3] = -0.1  # |λ| > 1
    truncate_modes(nn.Sequential(filter), 0.9)
    assert filter.orders[1] == 3
    silent = S4D(2, 8, 16)
    nn.init.zeros_(silent.C)
    truncate_modes(nn.Sequential(silent), 0.9)
    assert silent.state_size == 8


@pytest.mark.parametrize("name", ["modal", "modal_real", "s4d", "s4d_again"])
def test_an_optimizer_goes_on_as_if_the_dropped_modes_had_never_been(name: str) -> None:
    filter = make(name)
    model = nn.Sequential(filter)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    target = torch.randn(4, 50)

    def step(filter: Any, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        (filter(50).impulse_response(50) - target).square().sum().backward()
        optimizer.step()

    for _ in range(3):
        step(filter, optimizer)
    truncate_modes(model, 0.05, optimizer)
    # A fresh filter and optimizer that are given the kept weights and moments take the same steps.
    other = build(filter.config())
    other.load_state_dict(filter.state_dict())
    fresh = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.0)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameter in filter.parameters():
        held = optimizer.state[parameter]
        assert held["exp_avg"].shape == held["exp_avg_sq"].shape == parameter.shape
    for _ in range(3):
        step(filter, optimizer)
        step(other, fresh)
    for ours, theirs in zip(filter.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_moments_stay_with_their_modes() -> None:
    filter = make("s4d")
    model = nn.Sequential(filter)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    filter(50).impulse_response(50).square().sum().backward()
    optimizer.step()
    marked = {n: optimizer.state[p]["exp_avg"].clone() for n, p in filter.named_parameters()}
    values = {n: p.detach().clone() for n, p in filter.named_parameters()}
    truncate_modes(model, 0.05, optimizer)
    assert isinstance(filter, S4D) and filter.orders is not None and min(filter.orders) < 6
    for name, parameter in filter.named_parameters():
        if parameter.ndim < 2:
            assert torch.equal(optimizer.state[parameter]["exp_avg"], marked[name])
            continue
        for channel, order in enumerate(filter.orders):
            for mode in range(order):
                old = values[name][channel]
                place = [
                    k for k in range(len(old)) if torch.equal(old[k], parameter[channel, mode])
                ]
                moments = [marked[name][channel, k] for k in place]
                assert any(
                    torch.equal(optimizer.state[parameter]["exp_avg"][channel, mode], m)
                    for m in moments
                )


def test_a_truncated_model_is_saved_and_loaded(tmp_path: Path) -> None:
    config = GramianConfig(
        vocab_size=32,
        hidden_size=8,
        num_hidden_layers=3,
        mixers=["hyena", "long_convolution", "gated_linear_attention"],
        num_heads=2,
        filter=[{"type": "modal", "orders": 4}, {"type": "s4d", "state_size": 8}, None],
        max_position_embeddings=32,
    )
    config_before = copy.deepcopy(config)
    model = GramianForCausalLM(config).eval()
    ids = torch.randint(0, 32, (2, 20))
    dropped = truncate_modes(model, 0.02)
    assert sum(one.after for one in dropped) < sum(one.before for one in dropped) == 64
    model.save_pretrained(tmp_path)
    again = load(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)
        new = model.generate(ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(again.generate(ids, max_new_tokens=4, do_sample=False), new)
    assert model.state_bytes(1, 32) < GramianForCausalLM(config_before).state_bytes(1, 32)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"share must be at least 0 and below 1; got 1\.0"):
        truncate_modes(nn.Sequential(make("s4d")), 1.0)
    with pytest.raises(ValueError, match="modal filters and S4Ds; this Sequential has none"):
        truncate_modes(nn.Sequential(RTF(2, 4, 8)), 0.1)
    with pytest.raises(ValueError, match="a bool for each of 4 channels and 6 modes; got"):
        make("s4d").keep_modes(torch.ones(4, 5, dtype=torch.bool))
