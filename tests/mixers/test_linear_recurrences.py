"""Linear recurrences against naive float64 loops: outputs, states, gradients, operators."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

import gramian
from gramian.mixers import (
    GLAS6,
    S6,
    GatedDeltaNet,
    GatedLinearAttention,
    LinearAttention,
    LinearRecurrence,
    LinearRecurrenceState,
    WeightedLinearAttention,
)

WIDTH = 8
KINDS: dict[str, Callable[[], LinearRecurrence]] = {
    "linear": lambda: LinearAttention(WIDTH, 2),
    "linear_elu": lambda: LinearAttention(WIDTH, 2, 3, 5, feature_map="elu", short_kernel=1),
    "linear_mapped": lambda: LinearAttention(WIDTH, 2, 3, 5, feature_map="silu", feature_size=6),
    "weighted": lambda: WeightedLinearAttention(WIDTH, 2, 5, temperature=2.0),
    "retention": lambda: WeightedLinearAttention(WIDTH, 2, 5, temperature=2.0, head_gates=True),
    "retention_mapped": lambda: WeightedLinearAttention(
        WIDTH, 2, 2, head_gates=True, temperature=2.0, feature_size=5
    ),
    "gated": lambda: GatedLinearAttention(WIDTH, 2, gate_rank=3, temperature=1.0),
    "gated_silu": lambda: GatedLinearAttention(WIDTH, 1, 6, 2, feature_map="silu"),
    "gated_head": lambda: GatedLinearAttention(WIDTH, 2, 3, head_gates=True, feature_size=4),
    "gated_mapped": lambda: GatedLinearAttention(WIDTH, 2, 5, feature_size=3),
    "s6": lambda: S6(WIDTH, 5, short_kernel=2),
    "s6_narrow": lambda: S6(WIDTH, 3, expand=1, step_rank=2),
    "gla_s6": lambda: GLAS6(WIDTH, 2, 7),
    "gla_s6_mapped": lambda: GLAS6(WIDTH, 2, 3, feature_map="elu", feature_size=7),
    "gla_s6_unnormalized": lambda: GLAS6(WIDTH, 2, normalization=1.0),
    "gated_delta_net": lambda: GatedDeltaNet(WIDTH, 2),
    "gated_delta_net_wide": lambda: GatedDeltaNet(WIDTH, 1, 9, 3, short_kernel=1),
}
every = pytest.mark.parametrize("kind", KINDS)


def make(kind: str) -> LinearRecurrence:
    torch.manual_seed(0)
    mixer = KINDS[kind]().double()
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if name.startswith("dynamics") or name.endswith("_map"):
                parameter.add_(0.5 * torch.randn_like(parameter))
    return mixer


def signal(*shape: int) -> Tensor:
    return torch.randn(*shape, WIDTH, dtype=torch.float64)


def convolved(mixer: LinearRecurrence, x: Tensor) -> tuple[Tensor, Tensor]:
    z, count = x @ mixer.in_proj.weight.mT, mixer.convolved
    weight = mixer.short.weight.flip(-1).unsqueeze(1)
    padded = F.pad(z[..., :count].mT, (mixer.short.taps - 1, 0))
    return F.conv1d(padded, weight, mixer.short.bias, groups=count).mT, z[..., count:]


def naive_s6(mixer: S6, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 2 of the paper, a loop over time."""
    mixed, gate = convolved(mixer, x)
    u, n, rank = mixed * torch.sigmoid(mixed), mixer.state_size, mixer.step_rank
    made = u @ mixer.x_proj.weight.mT
    low, B, C = made[..., :rank], made[..., rank : rank + n], made[..., rank + n :]
    dt = torch.log1p(torch.exp(low @ mixer.dt_proj.weight.mT + mixer.dynamics.dt_bias))
    rates = mixer.dynamics.A_log.exp()
    h, outputs = u.new_zeros(len(x), mixer.heads, n), []
    for t in range(x.shape[1]):
        step = dt[:, t, :, None]
        h = torch.exp(-step * rates) * h + step * B[:, t, None] * u[:, t, :, None]
        outputs.append((h * C[:, t, None]).sum(-1) + mixer.dynamics.D * u[:, t])
    inner = torch.stack(outputs, 1)
    y = (inner * gate * torch.sigmoid(gate)) @ mixer.out_proj.weight.mT
    return y, inner.mT.unsqueeze(-1), h.unsqueeze(-1)


def naive(mixer: LinearRecurrence, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, what the operator makes of the values, and the last memory."""
    if isinstance(mixer, S6):
        return naive_s6(mixer, x)
    assert isinstance(mixer, LinearAttention)
    mixed, rest = convolved(mixer, x)
    heads, n, N = mixer.heads, mixer.state_size, mixer.value_width
    features = mixer.feature_size
    if isinstance(mixer, GatedDeltaNet):
        mixed = mixed * torch.sigmoid(mixed)
    q, k, v = (
        part.unflatten(-1, (heads, -1))
        for part in mixed.split([heads * features, heads * features, heads * N], -1)
    )
    if isinstance(mixer, GatedDeltaNet):
        q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
    else:
        phi = {"identity": lambda u: u, "silu": F.silu, "elu": lambda u: F.elu(u) + 1}
        q, k = phi[mixer.feature_map](q), phi[mixer.feature_map](k)
        if mixer.key_map is not None:
            q = torch.einsum("blhf,hfn->blhn", q, mixer.query_map)
            k = torch.einsum("blhf,hfn->blhn", k, mixer.key_map)
    gates, out_gate = rest[..., : mixer.gate_features], rest[..., mixer.gate_features :]
    S, outputs = x.new_zeros(len(x), heads, n, N), []
    for t in range(x.shape[1]):
        key, value = k[:, t], v[:, t]
        decay: Any = torch.ones(heads, n, dtype=x.dtype)
        if isinstance(mixer, WeightedLinearAttention):
            decay = torch.sigmoid(mixer.dynamics.logits) ** (1 / mixer.dynamics.temperature)
        elif isinstance(mixer, GatedLinearAttention):
            logits = (gates[:, t] @ mixer.gate_proj.weight.mT).unflatten(-1, (heads, -1))
            logits = logits + mixer.dynamics.bias
            decay = torch.sigmoid(logits) ** (1 / mixer.dynamics.temperature)
        elif isinstance(mixer, GLAS6):
            dt = torch.log1p(torch.exp(gates[:, t] + mixer.dynamics.dt_bias))[..., None]
            c = mixer.dynamics.normalization
            decay, key = torch.exp(-dt * mixer.dynamics.A_log.exp() / c), dt * key
        elif isinstance(mixer, GatedDeltaNet):
            beta = torch.sigmoid(gates[:, t, :heads])[..., None]
            dt = torch.log1p(torch.exp(gates[:, t, heads:] + mixer.dynamics.dt_bias))
            decay = torch.exp(-mixer.dynamics.A_log.exp() * dt)[..., None]
            faded = decay[..., None] * S
            value = beta * (value - (key[..., None] * faded).sum(-2))
        S = decay[..., None] * S + key[..., None] * value[..., None, :]
        outputs.append((q[:, t, :, :, None] * S).sum(-2) / features**0.5)
    inner = torch.stack(outputs, 1)
    normed = inner / (inner.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
    y = (normed.flatten(-2) * out_gate * torch.sigmoid(out_gate)) @ mixer.out_proj.weight.mT
    return y, inner.transpose(1, 2), S


@pytest.mark.each
@every
@pytest.mark.parametrize("length", [1, 2, 3, 63, 257])
def test_outputs_states_and_gradients_are_the_loops(kind: str, length: int) -> None:
    mixer, x = make(kind), signal(2, length).requires_grad_()
    expected, _, memory = naive(mixer, x)
    weight, remembered = torch.randn_like(expected), torch.randn_like(memory)
    inputs = [x, *mixer.parameters()]

    def gradients(y: Tensor, S: Tensor) -> Any:
        loss = (y * weight).sum() + (S * remembered).sum()
        return torch.autograd.grad(loss, inputs, retain_graph=True, materialize_grads=True)

    wanted = gradients(expected, memory)
    assert all(length < 3 or gradient.abs().max() > 0 for gradient in wanted)
    assert_close(mixer(x), expected)
    state = mixer.recurrence().initial_state(2)
    cuts, outputs = sorted({0, length // 3, length // 2, length}), []
    for begin, end in itertools.pairwise(cuts):
        y, state = mixer(x[:, begin:end], state)
        outputs.append(y)
    assert isinstance(state, LinearRecurrenceState)
    assert_close(torch.cat(outputs, 1), expected)
    assert_close(state.memory, memory)
    for found in (gradients(torch.cat(outputs, 1), state.memory), gradients(mixer(x), memory)):
        assert_close(found, wanted, rtol=1e-6, atol=1e-8)


@every
@torch.no_grad()
def test_the_operator_acts_on_the_values(kind: str) -> None:
    mixer, x = make(kind), signal(2, 19)
    _, inner, _ = naive(mixer, x)
    system = mixer.operator(x)
    assert isinstance(system, gramian.TimeVarying)
    assert system.channel_shape == (2, mixer.heads) and system.order == mixer.state_size
    values = mixer.features(x, None, None)[1]
    assert_close(system.matrix(19) @ values, inner)
    sizes = gramian.effective_state_size(system, at=range(1, 19))
    positions = torch.arange(1, 19)
    bound = torch.minimum(positions, 19 - positions).clamp_max(mixer.state_size)
    assert ((sizes >= 1 - 1e-9) & (sizes <= bound + 1e-9)).all()


@every
def test_the_effective_state_size_has_gradients(kind: str) -> None:
    mixer, x = make(kind), signal(1, 12).requires_grad_()
    sizes = gramian.effective_state_size(mixer.operator(x), at=[3, 6])
    (gradient,) = torch.autograd.grad(sizes.sum(), [x])
    assert gradient.isfinite().all() and gradient.abs().max() > 1e-6
    step = 1e-5 * torch.randn_like(x)
    sides = [
        gramian.effective_state_size(mixer.operator((x + sign * step).detach()), at=[3, 6]).sum()
        for sign in (1, -1)
    ]
    assert_close((gradient * step).sum(), (sides[0] - sides[1]) / 2, rtol=1e-3, atol=1e-9)


@every
@torch.no_grad()
def test_padding_anywhere_leaves_the_memory_as_it_is(kind: str) -> None:
    mixer, recurrence = make(kind), make(kind).recurrence()
    x, junk = signal(2, 12), 10 * signal(2, 5)
    mask = torch.ones(2, 17)
    mask[:, :5] = 0
    left = torch.cat([junk, x], 1)
    assert_close(mixer(left, mask=mask)[:, 5:], mixer(x))
    assert_close(recurrence.prefill(left, mask=mask)[1], recurrence.prefill(x)[1])
    _, right = recurrence.prefill(torch.cat([x, junk], 1), mask=mask.flip(1))
    assert_close(right, recurrence.prefill(x)[1])
    part = mixer.operator(left, mask=mask)
    assert_close(part.steps(5, 17).matrix(), mixer.operator(x).matrix())
    assert not part.matrix()[..., 5:, :5].any()


@every
def test_long_sequences_are_taken_stretch_by_stretch(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixer, x = make(kind), signal(1, 150).requires_grad_()
    inputs = [x, *mixer.parameters()]
    whole = mixer(x)
    wanted = torch.autograd.grad(whole.square().sum(), inputs)
    monkeypatch.setattr(type(mixer), "_most_elements", lambda self, device: 1)
    parts = mixer(x)
    assert_close(parts, whole)
    assert_close(torch.autograd.grad(parts.square().sum(), inputs), wanted)


@every
@torch.no_grad()
def test_gates_that_close_are_exact_in_single_precision(kind: str) -> None:
    """Gates down to zero: nothing is divided by their product."""
    mixer, x = make(kind), signal(1, 100)
    for name, parameter in mixer.named_parameters():
        if name.endswith(("logits", "bias", "dt_bias")) and "dynamics" in name:
            parameter.fill_(500.0 if name.endswith("dt_bias") else -500.0)
    expected, _, memory = naive(mixer, x)
    assert expected.isfinite().all()
    single = mixer.float()
    y, state = single.recurrence().prefill(x.float())
    assert (y - expected).norm() < 1e-4 * expected.norm()
    assert (state.memory - memory).norm() < 1e-4 * memory.norm()


@every
@torch.no_grad()
def test_dynamics_and_memory_stay_in_single_precision(kind: str) -> None:
    mixer, x = make(kind).float(), torch.randn(2, 40, WIDTH)
    expected = mixer(x)
    mixer.to(torch.bfloat16)
    assert all(
        parameter.dtype == (torch.float32 if "dynamics" in name else torch.bfloat16)
        for name, parameter in mixer.named_parameters()
    )
    recurrence = mixer.recurrence()
    y, state = recurrence.prefill(x[:, :39].bfloat16())
    last, state = recurrence.step(x[:, 39].bfloat16(), state)
    assert y.dtype == last.dtype == state.short.dtype == torch.bfloat16
    assert state.memory.dtype == torch.float32
    assert (torch.cat([y, last[:, None]], 1) - expected).norm() < 5e-2 * expected.norm()


@every
@torch.no_grad()
def test_autocast_leaves_the_recurrence_in_single_precision(kind: str) -> None:
    mixer = make(kind).float()
    steps, values, _, _ = mixer.features(torch.randn(2, 40, WIDTH), None, None)
    memory = values.new_zeros(2, mixer.heads, mixer.state_size, mixer.value_width)
    expected = steps.run(values, memory)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(steps.run(values, memory), expected)


@torch.no_grad()
def test_s6_is_the_mixer_of_mamba() -> None:
    torch.manual_seed(0)
    config = MambaConfig(hidden_size=WIDTH, state_size=5, expand=2, conv_kernel=4, time_step_rank=3)
    theirs, ours = MambaMixer(config, 0), S6(WIDTH, 5, expand=2, step_rank=3)
    ours.in_proj.weight.copy_(theirs.in_proj.weight)
    ours.short.weight.copy_(theirs.conv1d.weight[:, 0].flip(-1))
    ours.short.bias.copy_(theirs.conv1d.bias)
    ours.x_proj.weight.copy_(theirs.x_proj.weight)
    ours.dt_proj.weight.copy_(theirs.dt_proj.weight)
    ours.dynamics.dt_bias.copy_(theirs.dt_proj.bias)
    ours.dynamics.A_log.copy_(theirs.A_log)
    ours.dynamics.D.copy_(theirs.D)
    ours.out_proj.weight.copy_(theirs.out_proj.weight)
    x = torch.randn(2, 30, WIDTH)
    assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_delta_rule_is_that_of_qwen3_next() -> None:
    mixer, x = make("gated_delta_net").float(), torch.randn(2, 30, WIDTH)
    mixed, rest = convolved(mixer, x)
    q, k, v = F.silu(mixed).unflatten(-1, (3, 2, 4)).unbind(2)
    beta, logits = rest[..., :4].chunk(2, -1)
    dynamics = mixer.dynamics
    g = -dynamics.A_log.exp() * F.softplus(logits + dynamics.dt_bias)
    theirs, memory = torch_recurrent_gated_delta_rule(
        q, k, v, g, beta.sigmoid(), None, True, use_qk_l2norm_in_kernel=True
    )
    ours = mixer.operator(x).matrix() @ v.transpose(1, 2)
    assert_close(ours.transpose(1, 2), theirs, rtol=1e-4, atol=1e-5)
    assert_close(mixer.recurrence().prefill(x)[1].memory, memory, rtol=1e-4, atol=1e-5)


def test_normalisation_spreads_the_rates_of_s6() -> None:
    for n in (4, 64):
        plain, spread = GLAS6(8, 1, n, 8, normalization=1.0), GLAS6(8, 1, n, 8)
        logits = torch.zeros(1, 1, 1)
        for mixer, slowest in ((plain, 1.0), (spread, 1 / n)):
            dt, gates = mixer.dynamics(logits)
            rates = -gates.log() / dt
            assert_close(rates.flatten(), slowest * torch.arange(1.0, n + 1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: LinearAttention(8, 3), "heads must divide the width 8; got 3"),
        (lambda: LinearAttention(8, 0), "heads must be an integer of at least 1; got 0"),
        (lambda: LinearAttention(8, 2, 0), "state_size must be an integer.*got 0"),
        (lambda: LinearAttention(8, 2, feature_map="relu"), "feature_map must be one of.*'relu'"),
        (lambda: WeightedLinearAttention(8, 2, temperature=0.0), "temperature must be positive"),
        (lambda: GatedLinearAttention(8, 2, gate_rank=0), "gate_rank must be an integer.*got 0"),
        (lambda: GatedLinearAttention(8, 2, temperature=-1.0), "temperature must be positive"),
        (lambda: S6(8, 0), "state_size must be an integer of at least 1; got 0"),
        (lambda: S6(8, expand=0), "expand must be an integer of at least 1; got 0"),
        (lambda: S6(8, step_rank=0), "step_rank must be an integer of at least 1; got 0"),
        (lambda: GLAS6(8, 2, normalization=0.0), "normalization must be positive or None; got 0"),
        (lambda: GatedDeltaNet(8, 5), "heads must divide the width 8; got 5"),
        (lambda: LinearAttention(8, 2).operator(torch.zeros(2, 8)), r"takes \(batch, length, 8\)"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()
