"""Forward mode, reverse mode and central differences agree through filters and mixers."""

import itertools

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from gramian.filters import build
from gramian.mixers import (
    GLAS6,
    S6,
    Block,
    GatedDeltaNet,
    GatedLinearAttention,
    Hyena,
    LinearAttention,
    LinearRecurrence,
    LongConvolution,
    MultiHyena,
    SoftmaxAttention,
    WeightedLinearAttention,
)

WIDTH, LENGTH = 4, 7
FILTERS = {
    "rtf": {"type": "rtf", "state_size": 4, "initialization": "montel"},
    "rtf_schur": {
        "type": "rtf",
        "state_size": 4,
        "stability": "schur",
        "numerator": "exact",
        "initialization": "schur",
    },
    "implicit": {"type": "implicit", "hidden": 8},
    "modal": {"type": "modal", "orders": 3},
    "s4d": {"type": "s4d", "state_size": 8, "initialization": "lin"},
    "s4": {"type": "s4", "state_size": 8},
}
MODAL = FILTERS["modal"]
MIXERS = {
    **{name: lambda c=config: Hyena(WIDTH, c, LENGTH, 3) for name, config in FILTERS.items()},
    "multi_hyena": lambda: MultiHyena(WIDTH, 2, MODAL, LENGTH),
    "bidirectional": lambda: LongConvolution(
        build(MODAL, channels=2 * WIDTH, max_length=LENGTH), bidirectional=True
    ),
    "block": lambda: Block(WIDTH, MODAL, LENGTH),
    "attention": lambda: SoftmaxAttention(WIDTH, 2),
    "linear_attention": lambda: LinearAttention(WIDTH, 2),
    "weighted_linear_attention": lambda: WeightedLinearAttention(WIDTH, 2),
    "gated_linear_attention": lambda: GatedLinearAttention(WIDTH, 2, gate_rank=2),
    "mapped": lambda: WeightedLinearAttention(WIDTH, 2, 2, head_gates=True, feature_size=3),
    "s6": lambda: S6(WIDTH, 3),
    "gla_s6": lambda: GLAS6(WIDTH, 2, 2, 2),
    "gated_delta_net": lambda: GatedDeltaNet(WIDTH, 2),
}


def directions(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    return {name: torch.randn_like(value) for name, value in values.items()}


@pytest.fixture(autouse=True)
def attention_with_forward_mode():
    """PyTorch's fused attention refuses forward mode."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.mark.parametrize(
    "carried",
    [
        pytest.param(False, id="whole"),
        pytest.param(True, id="with a state", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", MIXERS)
def test_forward_reverse_and_differences(name, carried):
    torch.manual_seed(0)
    mixer = MIXERS[name]().double()
    if carried and name == "bidirectional":
        pytest.skip("it has no state")
    x, g = torch.randn(2, 2, LENGTH, WIDTH, dtype=torch.float64)
    state = mixer.recurrence().initial_state(2) if carried else None

    def value(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        if state is None:
            return (functional_call(mixer, parameters, (x,)) * g).sum()
        first, after = functional_call(mixer, parameters, (x[:, :3], state))
        second, _ = functional_call(mixer, parameters, (x[:, 3:], after))
        return (torch.cat([first, second], 1) * g).sum()

    parameters = {key: p.detach() for key, p in mixer.named_parameters()}
    along, along_x = directions(parameters), torch.randn_like(x)
    _, slope = jvp(value, (parameters, x), (along, along_x))

    gradients, of_x = grad(value, (0, 1))(parameters, x)
    reverse = sum((gradients[key] * along[key]).sum() for key in along) + (of_x * along_x).sum()
    torch.testing.assert_close(slope, reverse, rtol=1e-9, atol=1e-9)

    step = 1e-6
    ends = [
        value({key: p + s * along[key] for key, p in parameters.items()}, x + s * along_x)
        for s in (step, -step)
    ]
    difference = (ends[0] - ends[1]) / (2 * step)
    torch.testing.assert_close(slope, difference, rtol=2e-5, atol=2e-5)

    leaf = x.clone().requires_grad_()
    (plain,) = torch.autograd.grad(value(dict(mixer.named_parameters()), leaf), leaf)
    torch.testing.assert_close(of_x, plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rtf", "modal", "s4", "multi_hyena", "s6", "gated_delta_net"])
def test_gradients_of_each_sample(name):
    """``vmap(grad)``, what per-sample gradients are made with."""
    torch.manual_seed(0)
    mixer = MIXERS[name]().double()
    x, g = torch.randn(2, 3, LENGTH, WIDTH, dtype=torch.float64)
    parameters = {key: p.detach() for key, p in mixer.named_parameters()}

    def value(
        parameters: dict[str, torch.Tensor], x: torch.Tensor, g: torch.Tensor
    ) -> torch.Tensor:
        return (functional_call(mixer, parameters, (x.unsqueeze(0),)) * g).sum()

    together = vmap(grad(value), (None, 0, 0))(parameters, x, g)
    for k, key in itertools.product(range(3), parameters):
        alone = grad(value)(parameters, x[k], g[k])[key]
        torch.testing.assert_close(together[key][k], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["gated_linear_attention", "s6", "gated_delta_net", "multi_hyena"])
def test_what_is_recomputed_backward_has_gradients_under_func(name, monkeypatch):
    torch.manual_seed(0)
    mixer = MIXERS[name]().double()
    if isinstance(mixer, LinearRecurrence):  # stretches of 64 steps, the shortest
        monkeypatch.setattr(type(mixer), "_most_elements", lambda self, device: 1)
    else:
        monkeypatch.setattr("gramian.mixers.multi_hyena._SAVED_ELEMENTS", 0)
    length = 150
    x, g = torch.randn(2, 2, length, WIDTH, dtype=torch.float64)
    found = grad(lambda x: (mixer(x) * g).sum())(x)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad((mixer(leaf) * g).sum(), leaf)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
