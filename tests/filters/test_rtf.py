"""RTF: stability by construction, exact numerators, and recurrences that are what was learned."""

from typing import Any

import numpy as np
import pytest
import scipy.signal
import torch

from gramian import TransferFunction, parameter_groups
from gramian.filters import RTF, build
from gramian.mixers import LongConvolution
from gramian.ops.reflection import step_up
from gramian.systems import LatticeRecurrence

STABILITIES = ["none", "montel", "schur"]


def randomised(stability: str, numerator: str = "truncated", **options: object) -> RTF:
    torch.manual_seed(0)
    arguments = {"channels": 6, "state_size": 8, "max_length": 100, "num_denominators": 3}
    initialization = "schur" if stability == "schur" else "montel"
    built = RTF(
        **{**arguments, **options},
        stability=stability,
        numerator=numerator,
        initialization=initialization,
    )
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.3 / built.state_size * torch.randn_like(parameter))
    return built


def lfilter(rtf: RTF, u: torch.Tensor) -> np.ndarray:
    """The exact transfer function, by scipy: only for numerator="exact"."""
    a = rtf.denominator().detach().double().repeat_interleave(2, 0).numpy()
    b, d = rtf.b.detach().double().numpy(), rtf.d.detach().double().numpy()
    rows = [
        scipy.signal.lfilter(np.r_[d[c], b[c] + d[c] * a[c]], np.r_[1, a[c]], u[:, c].numpy())
        for c in range(6)
    ]
    return np.stack(rows, 1)


@pytest.mark.parametrize("stability", ["montel", "schur"])
def test_no_parameters_are_unstable(stability: str) -> None:
    torch.manual_seed(0)
    rtf = RTF(32, 16, 100, stability=stability, initialization="montel")
    with torch.no_grad():
        for parameter in rtf.parameters():
            parameter.normal_(std=0.5)
    roots = [np.abs(np.roots(np.r_[1, a])).max() for a in rtf.denominator().detach().numpy()]
    assert max(roots) < 1
    np.testing.assert_allclose(rtf.spectral_radius(), roots, rtol=1e-6)
    assert rtf.poles().shape == (32, 16)
    assert float(rtf.reflection().abs().max()) < 1


def test_reflection_coefficients_tell_of_free_poles_outside() -> None:
    rtf = RTF(2, 2, 10)
    with torch.no_grad():
        rtf.a.copy_(torch.tensor([[0.0, -1.21], [0.0, -0.81]]))
    outside = (rtf.reflection().abs() >= 1).any(-1)
    assert outside.tolist() == [True, False]


@pytest.mark.parametrize("stability", STABILITIES)
def test_any_denominator_that_fits_is_loaded(stability: str) -> None:
    torch.manual_seed(1)
    rtf = RTF(4, 6, 50, num_denominators=2, stability=stability)
    a = 0.9 * (torch.rand(2, 6) - 0.5) / 3
    rtf.load_denominator(a)
    torch.testing.assert_close(rtf.denominator().float(), a, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"\(2, 6\)"):
        rtf.load_denominator(a[:1])
    wild = a.clone()
    wild[1] = torch.tensor([0, 0, 0, 0, 0, 1.1]) if stability != "none" else torch.nan
    before = rtf.denominator().clone()
    with pytest.raises(ValueError, match=f"denominator 1 .*{stability}"):
        rtf.load_denominator(wild)
    assert torch.equal(rtf.denominator(), before)


def test_a_stable_denominator_outside_of_montels_region_fits_into_schur() -> None:
    a = scipy.signal.butter(4, 0.1)[1]
    rtf = RTF(1, 4, 50, stability="schur")
    rtf.load_denominator(torch.from_numpy(a[1:])[None])
    torch.testing.assert_close(rtf.denominator(), torch.from_numpy(a[1:])[None], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="l1 norm"):
        RTF(1, 4, 50, stability="montel").load_denominator(torch.from_numpy(a[1:])[None])


@pytest.mark.parametrize("stability", STABILITIES)
def test_exact_numerator_is_the_transfer_function(stability: str) -> None:
    rtf = randomised(stability, "exact")
    u = torch.randn(300, 6, dtype=torch.float64)
    system = rtf()
    expected = lfilter(rtf, u)
    scale = np.abs(expected).max()
    y = system(u[:100].mT).mT
    np.testing.assert_allclose(y.detach(), expected[:100], rtol=0, atol=1e-8 * scale)
    recurrence = system.recurrence()
    assert recurrence.error < 1e-5
    y, state = recurrence.prefill(u[:150].mT)  # past max_length the rational function goes on
    rest, _ = system(u[150:].mT, state)
    whole = torch.cat([y, rest], -1).mT.detach()
    np.testing.assert_allclose(whole, expected, rtol=0, atol=1e-8 * scale)


@pytest.mark.parametrize("numerator", ["truncated", "exact"])
@pytest.mark.parametrize("stability", STABILITIES)
def test_every_form_steps_through_the_learned_kernel(stability: str, numerator: str) -> None:
    system = randomised(stability, numerator)()
    kernel = system.impulse_response(100).detach()
    forms = ["companion", "modal", "online"] + ["lattice"] * (stability == "schur")
    for form in forms:
        recurrence = system.recurrence(form)
        assert recurrence.form == form
        assert recurrence.error < (5e-3 if form == "modal" else 1e-5)
        state = recurrence.initial_state((6,))
        taps = []
        for t in range(100):
            y, state = recurrence.step(torch.full((6,), float(t == 0), dtype=torch.float64), state)
            taps.append(y)
        error = (torch.stack(taps, -1) - kernel).norm(dim=-1) / kernel.norm(dim=-1)
        assert float(error.max()) <= 1.01 * recurrence.error + 1e-7
    assert system.recurrence().form == "companion"


@pytest.mark.parametrize("form", ["companion", "lattice", "modal", "online"])
def test_prefill_chunks_and_steps_agree(form: str) -> None:
    system = randomised("schur")()
    recurrence = system.recurrence(form)
    u = torch.randn(2, 6, 90, dtype=torch.float64)
    state = recurrence.initial_state((2, 6))
    outputs = []
    for t in range(90):
        y, state = recurrence.step(u[..., t], state)
        outputs.append(y)
    stepped = torch.stack(outputs, -1)
    y, state = recurrence.prefill(u[..., :33])
    z, state = system(u[..., 33:60], state)
    w, _ = recurrence.prefill(u[..., 60:], state)
    chunked = torch.cat([y, z, w], -1)
    torch.testing.assert_close(chunked, stepped, rtol=0, atol=2e-5 * float(stepped.abs().max()))


def test_lattice_in_single_precision_where_coefficients_are_not() -> None:
    """Uniform reflection coefficients: the denominator rounded to float32 has poles outside."""
    torch.manual_seed(0)
    k = 0.9 * (2 * torch.rand(4, 64, dtype=torch.float64) - 1)
    a = step_up(k)
    rounded = a.float().double()
    none = torch.zeros_like(a)
    radii = TransferFunction(none, rounded, none[:, 0]).spectral_radius()
    assert bool((radii > 1).all())
    weights = torch.randn(4, 64, dtype=torch.float64) / 8
    rows = torch.zeros(4, 64, dtype=torch.float64)
    for m in range(64):
        rows[:, : m + 1] += weights[:, m : m + 1] * torch.cat(
            [step_up(k[:, :m]).flip(-1), torch.ones(4, 1, dtype=torch.float64)], -1
        )
    double = LatticeRecurrence(k, rows, none[:, 0], dtype=torch.float64)
    single = LatticeRecurrence(k, rows, none[:, 0])
    u = torch.randn(4, 2000, dtype=torch.float64)
    results = []
    for recurrence in (double, single):
        state, outputs = recurrence.initial_state((4,)), []
        for t in range(2000):
            y, state = recurrence.step(u[:, t], state)
            outputs.append(y)
        results.append(torch.stack(outputs, -1))
    error = (results[1] - results[0]).norm(dim=-1) / results[0].norm(dim=-1)
    assert float(error.max()) < 1e-4


def test_chain_goes_on_to_the_lattice_and_ends_with_the_taps() -> None:
    system = randomised("schur")()
    broken = TransferFunction(  # a numerator that does not belong to the taps
        system.b * 2, system.a, system.d, taps=system.taps, reflection=system.reflection
    )
    recurrence = broken.recurrence()
    assert recurrence.form in ("modal", "online")
    assert recurrence.error <= 1e-5
    assert broken.recurrence("companion").error > 0.1
    assert broken.recurrence("lattice").error > 0.1
    overflowing = TransferFunction(
        system.b, system.a * torch.inf, system.d, taps=system.taps, reflection=system.reflection
    )
    assert overflowing.recurrence("companion").error == torch.inf
    assert overflowing.recurrence().form == "lattice"


@pytest.mark.parametrize("stability", STABILITIES)
@pytest.mark.parametrize("numerator", ["truncated", "exact"])
def test_truncated_backpropagation_through_time(stability: str, numerator: str) -> None:
    """Chunks with carried states give the whole sequence's outputs, and gradients that stop at the
    chunk where the state is detached and pass through it where not.
    """
    layer = LongConvolution(randomised(stability, numerator)).double()
    x = torch.randn(2, 90, 6, dtype=torch.float64)
    whole = layer(x)
    state = layer.recurrence().initial_state(2)
    outputs = []
    for chunk in x.split(30, dim=1):
        y, state = layer(chunk, state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=0, atol=1e-5)
    expected = torch.autograd.grad(whole.square().sum(), list(layer.parameters()))
    through = torch.autograd.grad(torch.cat(outputs, 1).square().sum(), list(layer.parameters()))
    for actual, reference in zip(through, expected, strict=True):
        assert (actual - reference).norm() < 1e-4 * reference.norm()
    cut = state.detach()
    assert all(not t.requires_grad for t in cut.long)


def test_gradients_reach_the_parameters_of_every_parametrisation() -> None:
    for stability in STABILITIES:
        for numerator in ("truncated", "exact"):
            rtf = randomised(stability, numerator, channels=2, num_denominators=1, max_length=12)
            rtf = rtf.double()
            parameters = dict(rtf.named_parameters())

            def taps(*values: torch.Tensor, rtf: RTF = rtf, names: tuple = tuple(parameters)):
                system = torch.func.functional_call(rtf, dict(zip(names, values, strict=True)))
                return system.impulse_response(10)

            assert torch.autograd.gradcheck(taps, tuple(parameters.values()), fast_mode=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stability": "routh"}, "'none', 'montel', 'schur'"),
        ({"numerator": "improper"}, "'truncated', 'exact'"),
        ({"initialization": "ones"}, "'zeros', 'xavier'"),
        ({"stability": "schur", "initialization": "xavier"}, "unstable"),
        ({"direct": "two"}, "direct must be one of 'normal', 'one'; got 'two'"),
        ({"optimizer_scope": "numerators"}, "optimizer_scope must be one of 'denominators', 'all'"),
        ({"direct_scale": 0.0}, "direct_scale must be .*; got 0.0"),
        ({"slack_initialization": "zero"}, "slack_initialization must be one of 'one', 'uniform'"),
        ({"slack_initialization": "uniform"}, 'only stability "montel" has a slack; got .*"none"'),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number of at least 0; got -0.1"),
        ({"weight_decay": "1e-2"}, "weight_decay must be a finite number .*; got '1e-2'"),
        ({"lr": "1e-3"}, "lr must be None or a learning rate .*; got '1e-3'"),
    ],
)
def test_bad_options_get_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        RTF(4, 4, 20, **options)
    assert "\n" not in str(caught.value)


def test_a_learning_rate_of_its_own() -> None:
    hints = RTF(4, 4, 20, stability="montel", lr=1e-4).optimizer_hints()
    assert hints == {name: {"weight_decay": 0.0, "lr": 1e-4} for name in ("a", "slack")}
    assert RTF(4, 4, 20).optimizer_hints() == {"a": {"weight_decay": 0.0}}


@pytest.mark.parametrize("stability", STABILITIES)
def test_the_scope_of_learning_rate_and_weight_decay(stability: str) -> None:
    rtf = RTF(4, 4, 20, stability=stability, weight_decay=0.05)
    names = {name for name, _ in rtf.named_parameters()}
    assert rtf.optimizer_hints() == {name: {"weight_decay": 0.05} for name in names - {"b", "d"}}
    whole = RTF(4, 4, 20, stability=stability, lr=2e-4, weight_decay=0.07, optimizer_scope="all")
    assert whole.optimizer_hints() == {
        name: {"weight_decay": 0.07, "lr": 2e-4} for name in names - {"slack"}
    }
    (group,) = parameter_groups(RTF(4, 4, 20, optimizer_scope="all"), lr=1.0, weight_decay=1.0)
    assert (group["lr"], group["weight_decay"]) == (1.0, 0.0)


def test_a_direct_term_of_one() -> None:
    torch.manual_seed(0)
    rtf = RTF(64, 4, 20, direct="one")
    impulse = torch.zeros(64, 20, dtype=torch.float64)
    impulse[:, 0] = 1
    torch.testing.assert_close(rtf().impulse_response(20), impulse)
    torch.manual_seed(0)
    drawn = RTF(64, 4, 20)
    assert 0.7 < float(drawn.d.detach().std()) < 1.3
    with torch.no_grad():
        rtf.d.zero_()
    rtf.reset_parameters()
    assert bool((rtf.d == 1).all())


@pytest.mark.parametrize("numerator", ["truncated", "exact"])
def test_a_scaled_direct_term(numerator: str) -> None:
    """As in the published Hyena-RTF, where h_0 is in the kernel and is the layer's bias too."""
    torch.manual_seed(0)
    plain = RTF(4, 4, 20, numerator=numerator, stability="montel", initialization="montel")
    twice = RTF(4, 4, 20, numerator=numerator, stability="montel", direct_scale=2.0)
    twice.load_state_dict(plain.state_dict())
    expected = plain().impulse_response(20)
    expected[:, 0] += plain.d
    torch.testing.assert_close(twice().impulse_response(20), expected)
    torch.testing.assert_close(twice.direct_term(), 2 * plain.d)


def test_a_scaled_direct_term_is_resampled() -> None:
    torch.manual_seed(0)
    once = RTF(4, 3, 40, stability="schur", initialization="schur")
    twice = RTF(4, 3, 40, stability="schur", direct_scale=2.0)
    twice.load_state_dict(once.state_dict() | {"d": once.d.detach() / 2})
    once.resample(2)
    twice.resample(2)
    torch.testing.assert_close(twice().impulse_response(40), once().impulse_response(40))


def test_a_slack_that_starts_uniform() -> None:
    torch.manual_seed(0)
    rtf = RTF(
        256, 4, 20, stability="montel", initialization="montel", slack_initialization="uniform"
    )
    slack, theta = rtf.slack.detach(), rtf.a.detach()
    assert 0 <= float(slack.min()) < 0.05 and 0.95 < float(slack.max()) <= 1
    assert float(theta.abs().max()) <= 1 / 4  # the drawn numbers themselves, as published
    expected = theta / (theta.abs().sum(-1) + slack + 1e-6)[:, None]
    torch.testing.assert_close(rtf.denominator().detach(), expected.double())


@pytest.mark.parametrize("stability", STABILITIES)
def test_uniform_coefficients_under_montels_bound(stability: str) -> None:
    torch.manual_seed(0)
    rtf = RTF(64, 16, 100, stability=stability, initialization="uniform")
    a, b = rtf.denominator().detach(), rtf.b.detach()
    assert bool((a > 0).all())
    # By symmetry, s is 1/17 of ‖θ‖₁ + s on average.
    remaining = 1 - a.sum(-1)
    assert 0 < float(remaining.min()) < float(remaining.max()) < 1 / 4
    assert abs(float(remaining.mean()) - 1 / 17) < 0.01
    assert float(rtf.spectral_radius().max()) < 1
    assert 0 <= float(b.min()) < 0.01
    assert 0.99 < float(b.max()) <= 1
    assert abs(float(b.mean()) - 0.5) < 0.05
    if stability == "montel":
        for drawn in (rtf.a, rtf.slack):
            assert 0 <= float(drawn.min()) < float(drawn.max()) <= 1
            assert abs(float(drawn.mean()) - 0.5) < 0.15


def test_an_older_configuration_means_what_it_did() -> None:
    new = {"direct", "weight_decay", "optimizer_scope"}
    config = RTF(4, 4, 20, lr=1e-3).config()
    older = {name: value for name, value in config.items() if name not in new}
    made = build(older)
    assert made.config() == config
    assert made.optimizer_hints() == {"a": {"weight_decay": 0.0, "lr": 1e-3}}
    given = {"direct": "one", "weight_decay": 0.05, "optimizer_scope": "all"}
    assert build(older | given).config() == config | given


def test_something_else_in_place_of_a_state() -> None:
    layer = LongConvolution(RTF(4, 4, 20))
    with pytest.raises(TypeError, match="mask=") as caught:
        layer(torch.zeros(2, 5, 4), torch.ones(2, 5))
    assert "\n" not in str(caught.value)
