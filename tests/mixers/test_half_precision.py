"""Half precision: every form of every mixer against float64 with the same weights."""

import copy
import warnings

import pytest
import torch

from gramian.filters import ModalFilter, build
from gramian.mixers import (
    GLAS6,
    S6,
    Block,
    GatedDeltaNet,
    GatedLinearAttention,
    Hyena,
    LinearAttention,
    LongConvolution,
    Mixer,
    MultiHyena,
    SoftmaxAttention,
    WeightedLinearAttention,
)
from gramian.systems import Modal

WIDTH, LENGTH = 12, 9
MODAL = {"type": "modal", "orders": 3}
FILTERS = {  # one for each form of recurrence
    "companion": {"type": "rtf", "state_size": 4, "initialization": "montel"},
    "lattice": {
        "type": "rtf",
        "state_size": 4,
        "stability": "schur",
        "numerator": "exact",
        "initialization": "schur",
    },
    "online": {"type": "implicit", "hidden": 16},
    "modal": MODAL,
    "dplr": {"type": "s4", "state_size": 8},
}
MIXERS = {
    **{name: lambda c=config: Hyena(WIDTH, c, LENGTH, 3) for name, config in FILTERS.items()},
    "hyena": lambda: Hyena(WIDTH, MODAL, LENGTH),
    "hyena_mimo": lambda: Hyena(WIDTH, MODAL, LENGTH, mimo_size=7),
    "multi_hyena": lambda: MultiHyena(WIDTH, 3, MODAL, LENGTH),
    "multi_hyena_online": lambda: MultiHyena(WIDTH, 3, FILTERS["online"], LENGTH),
    "multi_hyena_narrow": lambda: MultiHyena(WIDTH, 12, MODAL, LENGTH),
    "long_convolution": lambda: LongConvolution(
        build(FILTERS["online"], channels=WIDTH, max_length=LENGTH)
    ),
    "block": lambda: Block(WIDTH, MODAL, LENGTH),
    "attention": lambda: SoftmaxAttention(WIDTH, 3, 1),
    "attention_window": lambda: SoftmaxAttention(WIDTH, 3, window=5),
    "linear_attention": lambda: LinearAttention(WIDTH, 3),
    "weighted_linear_attention": lambda: WeightedLinearAttention(WIDTH, 3, 6),
    "gated_linear_attention": lambda: GatedLinearAttention(WIDTH, 2, gate_rank=4),
    "mapped": lambda: GatedLinearAttention(WIDTH, 2, 3, head_gates=True, feature_size=5),
    "s6": lambda: S6(WIDTH, 5),
    "gla_s6": lambda: GLAS6(WIDTH, 3, 6, 5),
    "gated_delta_net": lambda: GatedDeltaNet(WIDTH, 2),
}
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}  # four roundings


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def dtype(request):
    return request.param


autocast = pytest.mark.parametrize("autocast", [False, True], ids=["cast", "autocast"])


def stepped(recurrence, x: torch.Tensor) -> torch.Tensor:
    state = recurrence.initial_state(len(x), dtype=x.dtype)
    outputs = []
    for x_t in x.unbind(1):
        y, state = recurrence.step(x_t, state)
        outputs.append(y)
    return torch.stack(outputs, 1)


@torch.no_grad()
def forms(mixer: Mixer, x: torch.Tensor, compiled: bool) -> dict[str, torch.Tensor]:
    """The outputs of one map, computed in every way that there is, compiled steps on demand."""
    recurrence = mixer.recurrence()
    cut = x.shape[1] // 2
    outputs = {"parallel": mixer(x)}
    for name, take in (("chunks", mixer), ("prefill", recurrence.prefill)):
        first, state = take(x[:, :cut], recurrence.initial_state(len(x)))
        second, state = take(x[:, cut:], state)
        outputs[name] = torch.cat([first, second], 1)
    outputs["steps"] = stepped(recurrence, x)
    if not compiled:
        return outputs
    mixer.compile_step(backend="eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "steps run uncompiled")
        outputs["compiled steps"] = stepped(recurrence, x)
    return outputs


SLOW = (
    "lattice",
    "hyena_mimo",
    "multi_hyena_narrow",
    "attention_window",
    "linear_attention",
    "weighted_linear_attention",
    "gla_s6",
)


def check(
    mixer: Mixer, x: torch.Tensor, dtype: torch.dtype, autocast: bool, compiled: bool
) -> None:
    """Every form in half precision against the whole sequence in float64."""
    half = copy.deepcopy(mixer) if autocast else copy.deepcopy(mixer).to(dtype)
    expected = copy.deepcopy(half).double()(x.to(dtype).double()).detach()
    with torch.autocast("cpu", dtype, enabled=autocast):
        outputs = forms(half, x.to(dtype).to(torch.float32 if autocast else dtype), compiled)
    for name, y in outputs.items():
        error = float((y.double() - expected).norm() / expected.norm())
        assert error < TOLERANCE[dtype], (name, error)


@pytest.mark.each
@autocast
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in MIXERS]
)
def test_every_form_is_the_map_in_double_precision(name, dtype, autocast):
    torch.manual_seed(0)
    mixer = MIXERS[name]().eval()
    # To trace steps takes most of the time: each mixer's are in both dtypes, and with autocast.
    compiled = autocast == (dtype == torch.bfloat16)
    check(mixer, torch.randn(2, LENGTH, WIDTH), dtype, autocast, compiled)


def with_large_values(name: str, scale: float = 600.0) -> Mixer:
    """Products of values, or of keys and values, beyond 65,504, and an outer gate that brings them
    back.
    """
    torch.manual_seed(0)
    mixer = MIXERS[name]()
    factors = torch.ones(mixer.in_proj.weight.shape[0])
    factors[:WIDTH] = 1 / scale
    factors[-2 * WIDTH :] = scale
    with torch.no_grad():
        mixer.in_proj.weight.mul_(factors[:, None])
        mixer.in_proj.bias.mul_(factors)
        mixer.short.bias.zero_()
    return mixer


LARGE = [*FILTERS, "hyena", "multi_hyena", "multi_hyena_online", "multi_hyena_narrow"]


@pytest.mark.pairs
@autocast
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in LARGE]
)
def test_products_beyond_float16_that_the_gate_brings_back(name, dtype, autocast):
    compiled = dtype == torch.float16 and autocast  # beyond float16, and cast in every step
    check(with_large_values(name), torch.randn(2, LENGTH, WIDTH), dtype, autocast, compiled)


@pytest.mark.parametrize("length", [9, 700])  # attention with a mask, and convolved products
@pytest.mark.parametrize("name", ["multi_hyena_narrow", "hyena", "modal"])
def test_gradients_through_products_beyond_float16(name, length):
    mixer = with_large_values(name)
    x, g = torch.randn(2, 1, length, WIDTH)
    g = 1e-3 * g  # or gradients, which are in half precision under autocast, pass it too
    parameter = mixer.in_proj.bias
    (expected,) = torch.autograd.grad(mixer(x), parameter, g)
    with torch.autocast("cpu", torch.float16):
        y = mixer(x)
    (actual,) = torch.autograd.grad(y, parameter, g.to(y.dtype))
    for part in range(0, len(expected), WIDTH):  # gates, keys and values differ by scales
        rows = slice(part, part + WIDTH)
        assert (actual[rows] - expected[rows]).norm() < 1e-2 * expected[rows].norm()


@pytest.mark.parametrize("kind", ["hyena", "multi_hyena"])
def test_a_memory_that_grows_beyond_float16(kind):
    """A pole of 0.9999 sums 20,000 inputs to 10⁵ and more before a gate of 0.01."""
    count = 4 if kind == "hyena" else 2
    one = torch.ones(count, 1, dtype=torch.complex128)
    slow = Modal(0.9999 * one, one, torch.zeros(count, dtype=torch.float64))
    slow_filter = ModalFilter.from_system(slow, 20_000)
    if kind == "hyena":
        mixer = Hyena(4, slow_filter, short_kernel=1)
    else:
        mixer = MultiHyena(4, 2, slow_filter, short_kernel=1)
    with torch.no_grad():
        mixer.in_proj.weight.zero_()
        mixer.in_proj.bias.copy_(torch.tensor([0.01] * 4 + [4.0] * 8))
        mixer.short.weight.fill_(1)
        mixer.short.bias.zero_()
        mixer.out_proj.weight.copy_(torch.eye(4))
        mixer.out_proj.bias.zero_()
        x = torch.zeros(1, 20_000, 4)
        expected = mixer(x)
        mixer.half()
        x = x.half()
        recurrence = mixer.recurrence()
        outputs = {"parallel": mixer(x)}
        outputs["chunk"], _ = mixer(x, recurrence.initial_state(1))
        outputs["prefill"], state = recurrence.prefill(x)
        following, _ = recurrence.step(x[:, 0], state)
    for name, y in outputs.items():
        assert (y - expected).abs().max() < 2e-3 * expected.max(), name
    assert 1000 < outputs["prefill"][:, -1].min() <= following.min() < 65_504


@autocast
@pytest.mark.parametrize("name", ["modal", "multi_hyena", "multi_hyena_online", "attention"])
def test_operators_are_made_in_single_precision(name, autocast):
    torch.manual_seed(0)
    mixer = MIXERS[name]().eval()
    x = torch.randn(1, LENGTH, WIDTH).half()
    half = copy.deepcopy(mixer) if autocast else copy.deepcopy(mixer).half()
    expected = copy.deepcopy(half).double().operator(x.double()).matrix(LENGTH)
    with torch.no_grad(), torch.autocast("cpu", torch.float16, enabled=autocast):
        operator = half.operator(x.float() if autocast else x)
    matrix = operator.matrix(LENGTH)
    assert operator.dtype in (torch.float32, torch.float64)
    assert (matrix - expected).norm() < 4e-3 * expected.norm()
