"""One suite over every filter × mixer: parallel, chunked, recurrent and padded are one map."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from gramian.filters import ModalFilter, build
from gramian.mixers import (
    GLAS6,
    S6,
    GatedDeltaNet,
    GatedLinearAttention,
    Hyena,
    LinearAttention,
    LongConvolution,
    Mixer,
    MultiHyena,
    ShortConvolution,
    WeightedLinearAttention,
)
from gramian.mixers.multi_hyena import (
    convolved_outer_products,
    prefers_convolution,
    toeplitz_masked_attention,
)
from gramian.testing import check_mixer

WIDTH, MAX_LENGTH = 12, 70
FILTERS = {
    "rtf": {"type": "rtf", "state_size": 4, "initialization": "montel"},
    "rtf_schur": {
        "type": "rtf",
        "state_size": 4,
        "stability": "schur",
        "numerator": "exact",
        "initialization": "schur",
    },
    "implicit": {"type": "implicit", "hidden": 16},
    "modal": {"type": "modal", "orders": 3},
    "modal_free": {"type": "modal", "orders": 2, "bounded": False},
    "s4d": {"type": "s4d", "state_size": 8, "initialization": "lin"},
    "s4": {"type": "s4", "state_size": 8},
}
MIXERS = ["long_convolution", "hyena2", "hyena3", "hyena_mimo", "multi_hyena"]
RECURRENCES = {
    "linear_attention": lambda: LinearAttention(WIDTH, 3),
    "weighted_linear_attention": lambda: WeightedLinearAttention(WIDTH, 3, 6),
    "gated_linear_attention": lambda: GatedLinearAttention(WIDTH, 2, gate_rank=4),
    "retention": lambda: WeightedLinearAttention(WIDTH, 3, 4, head_gates=True, feature_size=6),
    "gated_by_head": lambda: GatedLinearAttention(WIDTH, 2, 3, head_gates=True, feature_size=5),
    "s6": lambda: S6(WIDTH, 5),
    "gla_s6": lambda: GLAS6(WIDTH, 3, 6, 5),
    "gated_delta_net": lambda: GatedDeltaNet(WIDTH, 2),
}


def make(mixer: str, filter_name: str) -> Mixer:
    torch.manual_seed(0)
    if mixer in RECURRENCES:
        return RECURRENCES[mixer]()
    config = FILTERS[filter_name]
    if mixer == "long_convolution":
        return LongConvolution(build(config, channels=WIDTH, max_length=MAX_LENGTH))
    if mixer == "multi_hyena":
        return MultiHyena(WIDTH, 3, config, max_length=MAX_LENGTH)
    if mixer == "hyena_mimo":
        return Hyena(WIDTH, config, max_length=MAX_LENGTH, mimo_size=7)
    return Hyena(WIDTH, config, max_length=MAX_LENGTH, order=int(mixer[-1]))


every = pytest.mark.parametrize("filter_name", FILTERS)
every_mixer = pytest.mark.parametrize("name", MIXERS)
every_kind = pytest.mark.parametrize("name", [*MIXERS, *RECURRENCES])
every_pair = pytest.mark.parametrize(
    ("name", "filter_name"),
    [*itertools.product(MIXERS, FILTERS), *((name, "none") for name in RECURRENCES)],
)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    error = float((actual - expected).detach().norm() / expected.detach().norm())
    assert error < tolerance, error


def naive(mixer: Mixer, x: torch.Tensor) -> torch.Tensor:
    """Each mixer's definition, with dense Toeplitz matrices and loops over time."""
    length = x.shape[1]
    if isinstance(mixer, LongConvolution):
        return (mixer.filter().matrix(length).to(x.dtype) @ x.mT.unsqueeze(-1)).squeeze(-1).mT
    z = mixer.in_proj(x)
    short = torch.zeros_like(z) + mixer.short.bias
    for j in range(mixer.short.taps):
        shifted = F.pad(z, (0, 0, j, 0))[:, :length]
        short = short + shifted * mixer.short.weight[:, j]
    if isinstance(mixer, MultiHyena):
        q, k, v = short.unflatten(-1, (3, mixer.heads, mixer.head_width)).unbind(2)
        h = mixer.filter().impulse_response(length).to(x.dtype)
        y = torch.zeros_like(v)
        for t in range(length):
            scores = (q[:, t : t + 1] * k[:, : t + 1]).sum(-1)  # (batch, t + 1, heads)
            weights = h[:, : t + 1].flip(-1).mT * scores  # h_(t-s) at s
            y[:, t] = (weights.unsqueeze(-1) * v[:, : t + 1]).sum(1)
        return mixer.out_proj(y.flatten(-2))
    assert isinstance(mixer, Hyena)
    *gates, value = short.chunk(mixer.order + 1, dim=-1)
    matrices = mixer.filter().matrix(length).to(x.dtype)
    for n, gate in enumerate(reversed(gates[1:])):
        # channel c (order - 1) + n belongs to gate n of channel c
        matrix = matrices[n :: mixer.order - 1]
        value = (matrix @ (gate * value).mT.unsqueeze(-1)).squeeze(-1).mT
    y = gates[0] * value
    if mixer.mimo is not None:
        norm, linear, _ = mixer.mimo
        y = norm.weight * y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        y = F.gelu(linear(y))
    return mixer.out_proj(y)


@pytest.mark.each
@every_pair
def test_every_pair_conforms(name, filter_name):
    check_mixer(make(name, filter_name))


@pytest.mark.pairs
@every
@every_mixer
@pytest.mark.parametrize("length", [1, 2, 3, 33])
def test_parallel_is_the_definition(name, filter_name, length):
    mixer = make(name, filter_name)
    x = torch.randn(2, length, WIDTH)
    with torch.no_grad():
        close(mixer(x), naive(mixer, x))


@pytest.mark.pairs
@every_pair
@pytest.mark.parametrize("length", [63, MAX_LENGTH])  # `check_mixer` takes short ones
def test_chunked_and_recurrent(name, filter_name, length):
    mixer = make(name, filter_name)
    x = torch.randn(2, length, WIDTH)
    expected = mixer(x)
    recurrence = mixer.recurrence()

    state = recurrence.initial_state(2)
    assert recurrence.state_bytes(2) == state.nbytes
    outputs = []
    for t in range(length):
        y, state = recurrence.step(x[:, t], state)
        outputs.append(y)
    close(torch.stack(outputs, 1), expected)

    cuts = sorted({0, length // 3, length // 2, length})
    state = recurrence.initial_state(2)
    outputs = []
    for n, (begin, end) in enumerate(itertools.pairwise(cuts)):
        chunk = x[:, begin:end]
        y, state = mixer(chunk, state) if n % 2 else recurrence.prefill(chunk, state)
        outputs.append(y)
    close(torch.cat(outputs, 1), expected)


@pytest.mark.each
@every_pair
def test_padding_leaves_no_trace(name, filter_name):
    """Left padding, right padding and a hole, in the parallel, chunked and recurrent modes."""
    mixer = make(name, filter_name)
    x = torch.randn(2, 40, WIDTH)
    pad, expected = 9, mixer(x)
    junk = 10 * torch.randn(2, pad, WIDTH)

    left = torch.cat([junk, x], 1)
    mask = torch.ones(2, pad + 40)
    mask[:, :pad] = 0
    for m in (mask, mask.bool(), mask.long()):
        close(mixer(left, mask=m)[:, pad:], expected)

    recurrence = mixer.recurrence()
    y, state = recurrence.prefill(left[:, :30], mask=mask[:, :30])
    close(y[:, pad:], expected[:, : 30 - pad])
    y, state = mixer(left[:, 30:40], state, mask=mask[:, 30:40])
    outputs = [y]
    for t in range(40, pad + 40):
        y, state = recurrence.step(left[:, t], state)
        outputs.append(y.unsqueeze(1))
    close(torch.cat(outputs, 1), expected[:, 30 - pad :])

    right = torch.cat([x, junk], 1)
    close(mixer(right, mask=mask.flip(1))[:, :40], expected)

    # rows of one batch padded differently
    mask[1] = 1
    both = torch.stack([left[0], torch.cat([junk, x], 1)[1]])
    y = mixer(both, mask=mask)
    close(y[:1, pad:], expected[:1])
    close(y[1:], mixer(both[1:]))


@pytest.mark.each
@every_pair
def test_gradients_through_the_state(name, filter_name):
    """Backpropagation through chunks equals backpropagation through the whole."""
    mixer = make(name, filter_name).double()
    x = torch.randn(2, 20, WIDTH, dtype=torch.float64)
    weight = torch.randn(2, 20, WIDTH, dtype=torch.float64)
    (mixer(x) * weight).sum().backward()
    expected = {n: p.grad.clone() for n, p in mixer.named_parameters()}
    mixer.zero_grad()
    state = mixer.recurrence().initial_state(2)
    outputs = []
    for begin, end in ((0, 7), (7, 8), (8, 20)):
        y, state = mixer(x[:, begin:end], state)
        outputs.append(y)
    (torch.cat(outputs, 1) * weight).sum().backward()
    for n, p in mixer.named_parameters():
        torch.testing.assert_close(p.grad, expected[n], rtol=1e-6, atol=1e-9)


@every_kind
def test_a_saved_state_continues_as_the_state_does(name, tmp_path):
    mixer = make(name, "implicit")
    x = torch.randn(2, 9, WIDTH)
    recurrence = mixer.recurrence()
    _, state = recurrence.prefill(x[:, :8], recurrence.initial_state(2))
    state.save(tmp_path / "state.pt")
    read = type(state).load(tmp_path / "state.pt")
    assert torch.equal(recurrence.step(x[:, 8], read)[0], recurrence.step(x[:, 8], state)[0])


@pytest.mark.each
@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, dtype):
    mixer = make(name, "implicit")
    x = torch.randn(2, 30, WIDTH)
    expected = mixer(x)
    mixer.to(dtype)
    y = mixer(x.to(dtype))
    assert y.dtype == dtype
    close(y.float(), expected, 5e-2)
    recurrence = mixer.recurrence()
    z, state = recurrence.prefill(x[:, :20].to(dtype))
    last, _ = recurrence.step(x[:, 20].to(dtype), state)
    assert z.dtype == last.dtype == dtype
    close(last.float(), expected[:, 20], 1e-1)


@every_kind
def test_autocast(name):
    mixer = make(name, "rtf")
    x = torch.randn(2, 30, WIDTH, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixer(x)
    close(y.float(), mixer(x), 5e-2)
    y.float().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


@every_mixer
def test_a_recurrence_is_a_snapshot(name):
    mixer = make(name, "modal")
    recurrence = mixer.recurrence()
    x = torch.randn(1, 20, WIDTH)
    before, _ = recurrence.prefill(x)
    assert not before.requires_grad
    with torch.no_grad():
        for parameter in mixer.filter.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(recurrence.prefill(x)[0], before)


def bidirectional(filter_name: str, **kwargs) -> LongConvolution:
    torch.manual_seed(0)
    made = build(FILTERS[filter_name], channels=2 * WIDTH, max_length=MAX_LENGTH)
    return LongConvolution(made, bidirectional=True, **kwargs)


@pytest.mark.each
@every
@pytest.mark.parametrize("length", [1, 2, 3, 33, MAX_LENGTH, 90])
def test_bidirectional_is_the_definition(filter_name, length):
    mixer = bidirectional(filter_name).double()
    x = torch.randn(2, length, WIDTH, dtype=torch.float64)
    taps = mixer.filter().impulse_response(length).double()
    h, g = taps[:WIDTH], taps[WIDTH:]
    lags = torch.arange(length).unsqueeze(1) - torch.arange(length)  # t - s
    matrix = torch.where(lags >= 0, h[:, lags.clamp_min(0)], g[:, (-lags - 1).clamp_min(0)])
    expected = torch.einsum("cts,bsc->btc", matrix, x)
    y = mixer(x)
    torch.testing.assert_close(y, expected)
    if length < 3:  # too short for every parameter to matter
        return
    got = torch.autograd.grad(y.square().sum(), list(mixer.parameters()))
    wanted = torch.autograd.grad(expected.square().sum(), list(mixer.parameters()))
    torch.testing.assert_close(got, wanted)


@every
def test_bidirectional_padding_leaves_no_trace(filter_name):
    mixer = bidirectional(filter_name)
    x, junk = torch.randn(2, 40, WIDTH), 10 * torch.randn(2, 9, WIDTH)
    expected = mixer(x)
    for order in ((junk, x, junk), (junk, x), (x, junk)):
        padded = torch.cat(order, 1)
        mask = torch.cat([torch.full(part.shape[:2], float(part is x)) for part in order], 1)
        begin = 9 if order[0] is junk else 0
        close(mixer(padded, mask=mask)[:, begin : begin + 40], expected)


def test_bidirectional_has_no_recurrence():
    mixer = bidirectional("rtf")
    x = torch.randn(2, 5, WIDTH)
    state = make("long_convolution", "rtf").recurrence().initial_state(2)
    for call in (mixer.recurrence, lambda: mixer(x, state)):
        with pytest.raises(ValueError, match="no recurrence and carries no state") as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        *((name, "kernel_dropout") for name in MIXERS),
        *((name, "input_dropout") for name in MIXERS if name.startswith("hyena")),
    ],
)
def test_dropout_is_for_whole_sequences_in_training(name, option):
    mixer = make(name, "implicit")
    x = torch.randn(2, 30, WIDTH)
    expected = mixer(x)
    state = mixer.recurrence().initial_state(2)
    assert mixer.config()[option] == 0.0
    setattr(mixer, option, 0.5)
    dropped = mixer(x)
    assert float((dropped - expected).detach().norm() / expected.detach().norm()) > 0.1
    assert not torch.equal(mixer(x), dropped)
    close(mixer(x, state)[0], expected)
    close(mixer.recurrence().prefill(x)[0], expected)
    mixer.eval()
    assert torch.equal(mixer(x), expected)


def test_kernel_dropout_drops_taps_and_keeps_the_mean():
    mixer = LongConvolution(
        build(FILTERS["implicit"], channels=WIDTH, max_length=MAX_LENGTH), kernel_dropout=0.25
    )
    impulse = torch.zeros(1, MAX_LENGTH, WIDTH)
    impulse[:, 0] = 1
    taps = mixer.filter().kernel.mT.detach()
    mean = torch.zeros_like(taps)
    for _ in range(400):
        ratio = mixer(impulse)[0].detach() / taps
        kept = (ratio - 4 / 3).abs() < 1e-2
        dropped = ratio.abs() < 1e-2
        assert float((kept | dropped).float().mean()) > 0.9  # a tap near zero decides nothing
        mean += ratio.clamp(0, 4 / 3) / 400
    assert abs(float(mean.mean()) - 1) < 0.02


def test_input_dropout_drops_inputs_of_the_convolution_and_keeps_their_mean():
    taps = torch.zeros(WIDTH, MAX_LENGTH)
    taps[:, 2] = 1  # a delay of two steps, so that every output shows one input
    mixer = Hyena(WIDTH, {"type": "explicit"}, MAX_LENGTH, short_kernel=1, input_dropout=0.25)
    with torch.no_grad():
        mixer.filter.kernel.copy_(taps)
    mixer.out_proj = torch.nn.Identity()
    x = torch.randn(50, MAX_LENGTH, WIDTH)
    with torch.no_grad():
        dropped = mixer(x)[:, 2:]
        kept = mixer.eval()(x)[:, 2:]
    share = (dropped.abs() < 1e-3 * kept.abs()).float().mean()
    assert abs(float(share) - 0.25) < 0.02
    decided = (dropped - 4 / 3 * kept).abs() < 1e-3 * kept.abs() + 1e-5
    assert float(decided.float().mean()) > 0.7


def test_past_max_length_a_rational_filter_goes_on_and_an_fir_is_zero():
    x = torch.randn(1, 3 * MAX_LENGTH, WIDTH)
    for filter_name in FILTERS:
        mixer = make("multi_hyena", filter_name)
        recurrence = mixer.recurrence()
        y, _ = recurrence.prefill(x)
        close(mixer(x), y)


@pytest.mark.parametrize("length", [1, 2, 3, 255, 257, 600])
@pytest.mark.parametrize("taps", [1, 5, 1000])
def test_the_two_forms_of_multi_hyena(length, taps):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, 4, dtype=torch.float64) for _ in range(3))
    kernel = torch.randn(3, taps, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v, kernel)]
    results = []
    for form in (toeplitz_masked_attention, convolved_outer_products):
        y = form(*inputs)
        results.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    for a, b in zip(*results, strict=True):
        close(a, b, 1e-10)


def test_masked_attention_recomputed_backward(monkeypatch):
    monkeypatch.setattr("gramian.mixers.multi_hyena._SAVED_ELEMENTS", 1)
    test_the_two_forms_of_multi_hyena(300, 50)


def test_long_inputs_take_the_cheaper_form(monkeypatch):
    """Heads of width 1 at length 600: the FFT form, with the same result."""
    taken = []

    def spy(*args):
        taken.append(True)
        return convolved_outer_products(*args)

    monkeypatch.setattr("gramian.mixers.multi_hyena.convolved_outer_products", spy)
    torch.manual_seed(0)
    mixer = MultiHyena(3, 3, FILTERS["implicit"], max_length=600)
    x = torch.randn(1, 600, 3)
    y = mixer(x)
    assert taken
    close(y, mixer.recurrence().prefill(x)[0])


def test_prefill_in_parts_bounds_memory(monkeypatch):
    monkeypatch.setattr("gramian.mixers.multi_hyena._CHUNK_ELEMENTS", 1)
    mixer = make("multi_hyena", "modal")
    x = torch.randn(2, 200, WIDTH)
    close(mixer.recurrence().prefill(x)[0], mixer(x))


@pytest.mark.parametrize("taps", [1, 2, 3, 5])
def test_short_convolution(taps):
    torch.manual_seed(0)
    short = ShortConvolution(4, taps)
    x = torch.randn(2, 11, 4)
    weight = short.weight.flip(-1).unsqueeze(1)
    expected = F.conv1d(F.pad(x.mT, (taps - 1, 0)), weight, short.bias, groups=4).mT
    y, past = short(x)
    torch.testing.assert_close(y, expected)
    first, past = short(x[:, :4])
    one, past = short.step(x[:, 4], past)
    rest, _ = short(x[:, 5:], past)
    torch.testing.assert_close(torch.cat([first, one[:, None], rest], 1), expected)


@pytest.mark.parametrize("name", ["hyena2", "multi_hyena"])
def test_filters_are_replaceable(name):
    mixer = make(name, "rtf")
    channels = mixer.filter.channels
    mixer.filter = ModalFilter(channels, 2, MAX_LENGTH)
    x = torch.randn(1, 10, WIDTH)
    y, _ = mixer.recurrence().prefill(x)
    close(mixer(x), y)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: make("hyena2", "rtf")(torch.zeros(2, 5, 3)), ValueError, "width 12"),
        (lambda: make("hyena2", "rtf")(torch.zeros(2, 0, 12)), ValueError, "at least 1"),
        (lambda: make("hyena2", "rtf")(torch.zeros(5, 12)), ValueError, r"\(batch, length"),
        (
            lambda: make("multi_hyena", "rtf")(torch.zeros(2, 5, 12), mask=torch.ones(2, 4)),
            ValueError,
            "mask",
        ),
        (lambda: Hyena(12, FILTERS["rtf"], 32, order=1), ValueError, "at least 2"),
        (lambda: MultiHyena(12, 5, FILTERS["rtf"], 32), ValueError, "heads"),
        (lambda: Hyena(12, FILTERS["rtf"]), ValueError, "max_length"),
        (lambda: LongConvolution(torch.nn.Linear(2, 2)), TypeError, "Filter"),
        (
            lambda: LongConvolution(ModalFilter(3, 1, 8), bidirectional=True),
            ValueError,
            "two channels for each of its own; got 3",
        ),
        (
            lambda: LongConvolution(ModalFilter(3, 1, 8), kernel_dropout=1.0),
            ValueError,
            "kernel_dropout must be a probability.*got 1.0",
        ),
        (
            lambda: Hyena(12, FILTERS["rtf"], 32, kernel_dropout=-0.1),
            ValueError,
            "kernel_dropout",
        ),
        (
            lambda: Hyena(12, FILTERS["rtf"], 32, input_dropout=1.0),
            ValueError,
            "input_dropout must be a probability.*got 1.0",
        ),
        (
            lambda: MultiHyena(12, 3, FILTERS["rtf"], 32, kernel_dropout="much"),
            ValueError,
            "kernel_dropout .* got 'much'",
        ),
        (lambda: ShortConvolution(3, 0), ValueError, "tap"),
        (
            lambda: make("hyena2", "rtf").recurrence().initial_state((4,)),
            ValueError,
            "number of sequences",
        ),
    ],
)
def test_bad_input_gets_one_sentence(call, error, match):
    with pytest.raises(error, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [9, 400])
def test_multi_hyena_has_256_filters_for_768_channels(length: int) -> None:
    """As in RTF's section C.4: heads of width 3, by masked attention and by FFT."""
    torch.manual_seed(0)
    mixer = MultiHyena(768, 256, {"type": "modal", "orders": 4}, max_length=length)
    assert (mixer.head_width, mixer.filter.channels) == (3, 256)
    assert prefers_convolution(length, 3) == (length == 400)
    x = torch.randn(1, length, 768)
    with torch.no_grad():
        q, k, v, _ = mixer.project(x, None, None)
        operator = (q @ k.mT) * mixer.filter(length).matrix(length)  # (1, 256, length, length)
        expected = mixer.merge(operator @ v)
        torch.testing.assert_close(mixer(x), expected, atol=1e-5, rtol=1e-4)
        state = mixer.recurrence().initial_state(1)
    # 3 × 3 products in a head, each with the state of 4 pairs of poles.
    assert sum(part.numel() for (part,) in state.long) == 256 * 9 * 8
