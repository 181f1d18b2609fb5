"""S4D and S4 against dense state spaces discretised by scipy, in double precision."""

import numpy as np
import pytest
import torch
from scipy import signal

from gramian.filters import S4, S4D, build
from gramian.filters._hippo import normal_plus_low_rank

SIZES = [2, 4, 64]


def hippo(n: int) -> tuple[np.ndarray, np.ndarray]:
    """HiPPO-LegS, entry by entry."""
    A, B = np.zeros((n, n)), np.sqrt(2 * np.arange(n) + 1)
    for i in range(n):
        A[i, i] = -(i + 1)
        for j in range(i):
            A[i, j] = -np.sqrt((2 * i + 1) * (2 * j + 1))
    return A, B


def sampled(A, B, C, D, dt, method, length: int) -> np.ndarray:
    """h_t = C Ā^t B̄ and D at t = 0: the papers' convention, in which C reads the new state.

    Only Ā and B̄ are scipy's; its C and D are those of another reading, for "bilinear" of another
    state.
    """
    n = len(A)
    Ad, Bd, _, _, _ = signal.cont2discrete((A, B[:, None], np.eye(n), np.zeros((n, 1))), dt, method)
    x, taps = Bd[:, 0], []
    for _ in range(length):
        taps.append(C @ x)
        x = Ad @ x
    taps[0] = taps[0] + D
    return np.array(taps)


def relative(actual: torch.Tensor, expected: np.ndarray) -> float:
    actual = actual.detach().double().numpy()
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def real_pairs(values: np.ndarray) -> np.ndarray:
    """The real matrix that acts on (Re x, Im x) as a diagonal complex one on x."""
    re, im = np.diag(values.real), np.diag(values.imag)
    return np.block([[re, -im], [im, re]])


@pytest.mark.parametrize("n", [*SIZES, 256])
def test_normal_part_of_hippo(n):
    A, B = hippo(n)
    P = np.sqrt(np.arange(n) + 0.5)
    form = normal_plus_low_rank(n)
    eigenvalues = np.linalg.eigvals(A + np.outer(P, P))
    ordered = np.sort(eigenvalues.imag)[n // 2 :]
    np.testing.assert_allclose(eigenvalues.real, -0.5, atol=1e-9 * n)
    np.testing.assert_allclose(form.diagonal.imag.numpy(), ordered, rtol=1e-9)
    # A and B in any basis have the same moments B* A^k B (A scaled, so that powers stay small).
    diagonal, low, b = (np.concatenate([half, half.conj()]) for half in map(np.asarray, form))
    dense = np.diag(diagonal) - np.outer(low, low.conj())
    for k in range(6):
        moment = b.conj() @ np.linalg.matrix_power(dense / n**2, k) @ b
        expected = B @ np.linalg.matrix_power(A / n**2, k) @ B
        np.testing.assert_allclose(moment, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.pairs
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
@pytest.mark.parametrize("initialization", ["legs", "lin", "inv"])
def test_s4d_is_the_discretised_diagonal_system(initialization, discretization, n):
    torch.manual_seed(0)
    length = 1000
    made = S4D(5, n, length, initialization, discretization)
    taps = made().impulse_response(length)
    weights = {name: value.detach().double().numpy() for name, value in made.named_parameters()}
    A = -np.exp(weights["log_A_real"]) + 1j * weights["A_imag"]
    for c in range(5):
        B = np.concatenate([np.ones(n // 2), np.zeros(n // 2)])
        C = np.concatenate([2 * weights["C"][c, :, 0], -2 * weights["C"][c, :, 1]])
        expected = sampled(
            real_pairs(A[c]),
            B,
            C,
            weights["D"][c],
            np.exp(weights["log_dt"][c]),
            discretization,
            length,
        )
        assert relative(taps[c], expected) < 2e-6


@pytest.mark.parametrize("n", SIZES)
def test_s4_is_hippo_discretised(n):
    """At its initialisation: A and B in the original basis of HiPPO, entry by entry."""
    torch.manual_seed(0)
    length = 1000
    made = S4(5, n, length)
    A, B = hippo(n)
    P = np.sqrt(np.arange(n) + 0.5)
    skew = (A + np.outer(P, P) + 0.5 * np.eye(n)) / 1j
    V = np.linalg.eigh(skew)[1][:, n // 2 :]
    V = V / np.exp(1j * np.angle(V.conj().T @ P)).conj()  # the phases for which V* P is positive
    weights = {name: value.detach().double().numpy() for name, value in made.named_parameters()}
    taps = made().impulse_response(length)
    for c in range(5):
        half = weights["C"][c, :, 0] + 1j * weights["C"][c, :, 1]
        C = 2 * (half @ V.conj().T).real
        dt = np.exp(weights["log_dt"][c])
        expected = sampled(A, B, C, weights["D"][c], dt, "bilinear", length)
        assert relative(taps[c], expected) < 2e-6


@pytest.mark.parametrize("n", SIZES)
def test_s4_is_the_discretised_system_for_any_parameters(n):
    torch.manual_seed(0)
    length = 300
    made = S4(5, n, length)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    taps = made().impulse_response(length)
    dense = made().state_space().impulse_response(length)
    assert relative(taps, dense.detach().numpy()) < 2e-6
    assert float(made().state_space().spectral_radius().detach().max()) < 1
    weights = {name: value.detach().double().numpy() for name, value in made.named_parameters()}
    for c in range(5):
        P, B, C = ([1, 1j] @ weights[name][c].T for name in "PBC")
        diagonal = -np.exp(weights["log_A_real"][c]) + 1j * weights["A_imag"][c]
        A = real_pairs(diagonal) - np.outer(np.r_[P.real, P.imag], 2 * np.r_[P.real, P.imag])
        expected = sampled(
            A,
            np.r_[B.real, B.imag],
            2 * np.r_[C.real, -C.imag],
            weights["D"][c],
            np.exp(weights["log_dt"][c]),
            "bilinear",
            length,
        )
        assert relative(taps[c], expected) < 2e-6


@pytest.mark.parametrize("n", [2, 16])
def test_s4_gradients_against_the_dense_system(n):
    torch.manual_seed(0)
    made = S4(3, n, 200).double()
    weight = torch.randn(3, 200, dtype=torch.float64)
    parameters = list(made.parameters())
    taps, dense = made().impulse_response(200), made().state_space().impulse_response(200)
    actual = torch.autograd.grad((taps * weight).sum(), parameters)
    expected = torch.autograd.grad((dense * weight).sum(), parameters)
    for a, b in zip(actual, expected, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-7


def test_s4_kernel_does_not_depend_on_the_length_asked_for():
    torch.manual_seed(0)
    made = S4(3, 16, 1000)
    long = made().impulse_response(1000)
    for length in (1, 2, 63, 999):
        torch.testing.assert_close(made(length).impulse_response(length), long[:, :length])


def test_s4d_initial_spectra():
    n = 64
    k = np.arange(n // 2)
    spectra = {
        "legs": normal_plus_low_rank(n).diagonal.imag.numpy(),
        "lin": np.pi * k,
        "inv": n / np.pi * (n / (2 * k + 1) - 1),
    }
    for initialization, frequencies in spectra.items():
        made = S4D(3, n, 100, initialization, dt_min=0.01, dt_max=0.01)
        np.testing.assert_allclose(made.A_imag[1].detach().numpy(), frequencies, rtol=1e-6)
        np.testing.assert_allclose(made.log_A_real.exp().detach().numpy(), 0.5, rtol=1e-6)
        np.testing.assert_allclose(made.log_dt.exp().detach().numpy(), 0.01, rtol=1e-6)


def test_dynamics_near_the_circle_keep_their_precision():
    """A pole of 1 - 1e-6, over ten thousand steps, from parameters in single precision."""
    made = S4D(1, 2, 10_000, "lin")
    with torch.no_grad():
        made.log_dt.fill_(-6.0)
        made.log_A_real.fill_(-8.0)
        made.A_imag.fill_(300.0)
    taps = made().impulse_response(10_000)
    made.double()
    assert relative(taps[0], made().impulse_response(10_000)[0].detach().numpy()) < 1e-6


@pytest.mark.pairs
@pytest.mark.parametrize("kind", ["s4d", "s4"])
@pytest.mark.parametrize("length", [1, 2, 3, 63, 257, 1000])
@pytest.mark.parametrize("n", SIZES)
def test_recurrence_computes_the_convolution(kind, n, length):
    torch.manual_seed(0)
    made = build({"type": kind, "state_size": n}, channels=3, max_length=length)
    system = made()
    u = torch.randn(2, 3, length)
    expected = system(u)
    recurrence = system.recurrence()
    state = recurrence.initial_state((2, 3))
    outputs = []
    for t in range(length):
        y, state = recurrence.step(u[..., t], state)
        outputs.append(y)
    for actual in (torch.stack(outputs, -1), recurrence.prefill(u)[0]):
        assert float((actual - expected).detach().norm() / expected.detach().norm()) < 1e-5


@pytest.mark.parametrize("kind", ["s4d", "s4"])
def test_training_materialises_nothing_of_states_times_length(kind, largest_allocation):
    channels, n, length = 4, 64, 16_384
    made = build({"type": kind, "state_size": n}, channels=channels, max_length=length)
    with largest_allocation() as largest:
        made().impulse_response(length).square().sum().backward()
    # S4 holds the four kernels of its open loop in double precision, 8 numbers a tap.
    assert channels * length <= largest.bytes / 4 < channels * n * length / 4


@pytest.mark.parametrize("kind", ["s4d", "s4"])
def test_autocast_leaves_the_dynamics_alone(kind):
    made = build({"type": kind, "state_size": 8}, channels=3, max_length=100)
    parameters = list(made.parameters())
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            taps = made().impulse_response(100)
            results.append((taps, *torch.autograd.grad(taps.square().sum(), parameters)))
    for plain, cast in zip(*results, strict=True):
        assert torch.equal(plain, cast)


@pytest.mark.parametrize("kind", ["s4d", "s4"])
def test_optimizer_hints_name_parameters(kind):
    made = build({"type": kind, "state_size": 4, "lr": 2e-4}, channels=3, max_length=10)
    hints = made.optimizer_hints()
    assert hints["log_dt"] == {"lr": 2e-4, "weight_decay": 0.0}
    assert set(hints) < {name for name, _ in made.named_parameters()}
    assert "C" not in hints and "D" not in hints


@pytest.mark.parametrize("kind", ["s4d", "s4"])
def test_compiles_as_one_graph(kind):
    torch.manual_seed(0)
    made = build({"type": kind, "state_size": 4}, channels=3, max_length=20)

    def loss():
        return made().impulse_response(20).square().sum()

    value = torch.compile(loss, fullgraph=True, backend="aot_eager")()
    parameters = list(made.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(value, parameters), torch.autograd.grad(loss(), parameters)
    )


@pytest.mark.parametrize("kind", ["s4d", "s4"])
@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"typo": 5}, "typo"),
        ({"state_size": 5}, "even"),
        ({"state_size": 0}, "even"),
        ({"state_size": 2.0}, "even"),
        ({"initialization": "foul"}, "initialization"),
        ({"dt_min": 0.0}, "dt_min"),
        ({"dt_min": 1.0}, "dt_max"),
        ({"lr": 0.0}, "lr"),
    ],
)
def test_bad_arguments_get_one_sentence(kind, arguments, match):
    config: dict[str, object] = {"type": kind, "state_size": 4, **arguments}
    with pytest.raises(ValueError, match=match) as caught:
        build(config, channels=4, max_length=32)
    assert "\n" not in str(caught.value)
