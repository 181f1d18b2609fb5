"""Every filter: configuration, casting, dtype, gradients; and the published kernels."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves

from gramian import FIR, Modal, TransferFunction, causal_convolution
from gramian.filters import RTF, Filter, ImplicitFilter, ModalFilter, build, register
from gramian.mixers import LongConvolution
from gramian.systems import DPLR
from gramian.testing import check_filter

CONFIGS = {
    "rtf": {"type": "rtf", "state_size": 5, "num_denominators": 2, "initialization": "montel"},
    "rtf_published": {
        "type": "rtf",
        "state_size": 5,
        "stability": "montel",
        "initialization": "uniform",
        "lr": 1e-4,
        "direct": "one",
        "weight_decay": 0.05,
        "optimizer_scope": "all",
    },
    "implicit": {"type": "implicit", "hidden": 16, "embedding_features": 5, "shift": 0.1},
    "implicit_published": {
        "type": "implicit",
        "hidden": 8,
        "embedding_features": 3,
        "normalized": True,
        "trainable_time": True,
        "train_frequency": False,
        "modulate": False,
        "bias": False,
        "lr": 1e-4,
    },
    "implicit_stored": {"type": "implicit", "hidden": 8, "stored_time": True},
    "modal": {"type": "modal", "orders": [0, 3, 1, 2]},
    "modal_free": {"type": "modal", "orders": [2, 0, 1, 1], "bounded": False},
    "modal_real": {"type": "modal", "orders": [0, 3, 1, 2], "real": True},
    "explicit": {"type": "explicit"},
    "explicit_shared": {"type": "explicit", "taps": 9, "groups": 2, "skip": True, "lr": 1e-4},
    "s4d": {"type": "s4d", "state_size": 6},
    "s4d_bilinear": {
        "type": "s4d",
        "state_size": 4,
        "initialization": "inv",
        "discretization": "bilinear",
        "dt_min": 0.01,
        "dt_max": 0.2,
        "lr": 1e-4,
    },
    "s4d_truncated": {"type": "s4d", "state_size": 6, "orders": [3, 1, 0, 2]},
    "spectral": {"type": "spectral", "filters": 6},
    "spectral_plain": {
        "type": "spectral",
        "filters": 3,
        "alternating": False,
        "bias": False,
        "lr": 1e-4,
    },
    "s4": {"type": "s4", "state_size": 6, "dt_max": 0.2, "lr": 1e-4},
}
SYSTEM_TYPES = {
    "rtf": TransferFunction,
    "implicit": FIR,
    "explicit": FIR,
    "spectral": FIR,
    "modal": Modal,
    "s4d": Modal,
    "s4": DPLR,
}


def make(name: str, max_length: int = 40) -> Filter:
    torch.manual_seed(0)
    return build(CONFIGS[name], channels=4, max_length=max_length)


def test_an_unknown_key_is_told_with_the_nearest():
    with pytest.raises(
        ValueError, match=r"unknown key of a filter 'rtf' 'state'. Did you mean 'state_s"
    ):
        build({"type": "rtf", "state": 4}, channels=4, max_length=8)
    with pytest.raises(ValueError, match=r"unknown filter type 'rft'. Did you mean 'rtf'"):
        build({"type": "rft"}, channels=4, max_length=8)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_conforms(name):
    check_filter(make(name))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_description_is_printed(name):
    assert type(make(name)).__name__ in repr(make(name))


@pytest.mark.parametrize("name", CONFIGS)
def test_makes_a_system_through_which_gradients_flow(name):
    made = make(name)
    system = made()
    assert isinstance(system, SYSTEM_TYPES[made.name])
    assert system.channel_shape == (4,)
    taps = system.impulse_response(40)
    assert torch.isfinite(taps).all()
    short = made(7).impulse_response(7)
    torch.testing.assert_close(short, taps[:, :7], rtol=1e-4, atol=1e-5)
    taps.square().sum().backward()
    for parameter_name, parameter in made.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert float(parameter.grad.abs().max()) > 0, parameter_name


@pytest.mark.parametrize("name", CONFIGS)
def test_half_precision_leaves_the_dynamics_alone(name):
    made = make(name)
    before = made().impulse_response(40)
    for cast in (torch.bfloat16, torch.float16):
        made.to(cast)
        assert all(p.dtype == torch.float32 for p in made.parameters())
        assert torch.equal(made().impulse_response(40), before)
    made.double()
    assert all(p.dtype == torch.float64 for p in made.parameters())
    torch.testing.assert_close(
        made().impulse_response(40).float(), before.float(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("max_length", [1, 2, 3, 63, 257])
def test_awkward_lengths(name, max_length):
    if name.startswith("rtf") and max_length <= 5:
        with pytest.raises(ValueError, match="state_size"):
            make(name, max_length)
        return
    assert make(name, max_length)().impulse_response(max_length).shape == (4, max_length)


def test_implicit_kernel_is_the_published_formula():
    """h_t = MLP(z_t) (exp(-|α| t) + shift), from scratch in float64."""
    length, channels = 50, 3
    torch.manual_seed(0)
    made = ImplicitFilter(
        channels, length, embedding_features=5, hidden=8, frequency=7.0, shift=0.2
    ).double()
    weights = {k: v.detach() for k, v in made.state_dict().items()}
    rows = []
    for i in range(length):
        t, w = i / (length - 1), 2 * math.pi * i / length
        bands = [1e-4, 1.0]
        z = [t] + [math.cos(f * w) for f in bands] + [-math.sin(f * w) for f in bands]
        x = torch.tensor(z, dtype=torch.float64)
        for layer in range(3):
            x = weights[f"layers.{layer}.weight"] @ x + weights[f"layers.{layer}.bias"]
            x = torch.sin(weights["frequency"] * x)
        slow, quick = (abs(math.log(1e-2) / f) for f in (1.5, 0.3))
        alpha = torch.linspace(slow, quick, channels, dtype=torch.float64)
        rows.append((weights["output.weight"] @ x) * (torch.exp(-alpha * t) + 0.2))
    expected = torch.stack(rows, -1)
    expected[:, 0] += weights["bias"]
    torch.testing.assert_close(made().kernel.detach(), expected, rtol=1e-5, atol=1e-6)


def test_implicit_normalisation_is_over_channels():
    made = make("implicit_published")
    total = made().kernel.abs().sum(0)
    torch.testing.assert_close(total, torch.ones_like(total))


def test_modal_filter_from_a_system_is_that_system():
    torch.manual_seed(0)
    radius = torch.tensor([[0.5, 0.999, 0.0], [0.1, 0.9, 0.7]], dtype=torch.float64)
    angle = torch.tensor([[0.0, torch.pi, 0.0], [0.3, -2.0, 3.0]], dtype=torch.float64)
    residues = torch.randn(2, 3, dtype=torch.complex128)
    residues[1, 2] = 0
    system = Modal(torch.polar(radius, angle), residues, torch.randn(2).double())
    made = ModalFilter.from_system(system, 100)
    assert made.orders == (3, 2)
    expected = system.impulse_response(1000)
    torch.testing.assert_close(made().impulse_response(1000).double(), expected, rtol=0, atol=1e-4)
    real = made().poles[0, :2]
    assert float(real.imag.abs().max()) < 1e-12  # real poles stay real
    unstable = Modal(torch.ones(1, 1) + 0j, torch.ones(1, 1) + 0j, torch.zeros(1))
    with pytest.raises(ValueError, match="inside the unit circle"):
        ModalFilter.from_system(unstable, 10)


def test_residues_make_up_for_the_rounding_of_poles():
    torch.manual_seed(0)
    length = 3000
    decay = 10 ** (-3 - 2 * torch.rand(6, 3, dtype=torch.float64))
    angle = math.pi * (0.2 + 0.75 * torch.rand(6, 3, dtype=torch.float64))
    residues = torch.randn(6, 3, dtype=torch.complex128)
    residues[2, 1:] = 0  # ragged orders
    system = Modal(torch.polar(1 - decay, angle), residues, torch.randn(6).double())
    kernel = system.impulse_response(length)
    plain, fitted = (
        (ModalFilter.from_system(system, length, kernel=k)().impulse_response(length) - kernel)
        .detach()
        .norm(dim=-1)
        for k in (None, kernel)
    )
    assert bool((fitted <= plain * (1 + 1e-6)).all())
    assert float(fitted.sum()) < 0.7 * float(plain.sum())
    with pytest.raises(ValueError, match="has shape"):
        ModalFilter.from_system(system, length, kernel=kernel[0])


def test_free_modal_filter_holds_poles_outside_of_the_unit_circle():
    torch.manual_seed(0)
    radius = torch.tensor([[1.01, 1.0, 0.99, 0.0]], dtype=torch.float64)
    angle = torch.tensor([[0.2, torch.pi, -1.0, 0.0]], dtype=torch.float64)
    residues = torch.randn(1, 4, dtype=torch.complex128)
    system = Modal(torch.polar(radius, angle), residues, torch.randn(1).double())
    made = ModalFilter.from_system(system, 100, bounded=False)
    expected = system.impulse_response(200)
    torch.testing.assert_close(
        made().impulse_response(200).double(), expected, rtol=1e-4, atol=1e-4
    )
    assert float(made().spectral_radius()) == pytest.approx(1.01, rel=1e-6)


def test_stored_time_is_part_of_the_weights_and_follows_them():
    made = make("implicit_stored")
    assert "features" in made.state_dict()
    assert "features" not in make("implicit").state_dict()
    changed = {name: value.clone() for name, value in made.state_dict().items()}
    changed["features"] += 0.01 * torch.randn_like(changed["features"])
    other = make("implicit_stored")
    other.load_state_dict(changed)
    assert not torch.allclose(other().kernel, made().kernel)
    assert not other.features.requires_grad


@pytest.mark.parametrize("initialization", ["zeros", "xavier", "montel"])
def test_rtf_initialisations(initialization):
    torch.manual_seed(0)
    made = RTF(64, 16, 128, initialization=initialization)
    bound = {"zeros": 0.0, "xavier": 0.25, "montel": 1 / 16}[initialization]
    largest = float(made.a.abs().max())
    assert largest <= bound
    assert largest >= 0.9 * bound
    if initialization == "montel":
        assert float(made().poles().abs().max()) < 1


def official() -> dict[str, torch.Tensor]:
    return load_file("tests/data/rtf_official.safetensors")


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).detach().norm() / expected.double().norm())


def test_published_causal_layer():
    data = official()
    channels, length = data["kernel"].shape
    made = RTF.from_official({"ab": data["ab"], "h_0": data["h_0"]}, length)
    assert made.num_denominators == 4
    assert made.channels == channels
    # The published code divides float32 spectra, which costs it digits: 1e-4 here. Its formula in
    # float64 is ours.
    ab = np.pad(data["ab"].double().numpy(), ((0, 0), (1, length - 7)))
    ab[:4, 0] = 1
    spectra = np.fft.rfft(ab)
    published = np.fft.irfft(spectra[4:] / spectra[:4].repeat(2, 0) + data["h_0"][:, None].numpy())
    torch.testing.assert_close(
        made().impulse_response(length).detach(), torch.from_numpy(published), rtol=0, atol=1e-11
    )
    kernel = made().impulse_response(length)
    assert relative(kernel, data["kernel"]) < 1e-4
    assert relative(LongConvolution(made)(data["input"]), data["output"]) < 1e-4
    y = causal_convolution(data["input"], data["kernel"], dim=-2)
    assert relative(y, data["output"]) < 1e-6
    # The recurrence computes the convolution, which the published one does not.
    recurrence = LongConvolution(made).recurrence()
    state = recurrence.initial_state(2)
    outputs = []
    for t in range(length):
        y_t, state = recurrence.step(data["input"][:, t], state)
        outputs.append(y_t)
    assert recurrence.forms == ("companion",)
    assert relative(torch.stack(outputs, 1), data["output"]) < 1e-4


def test_published_bidirectional_layer():
    """Tap j of the backward kernel acts at lag -(j + 1)."""
    data = official()
    u, expected = data["input"], data["bidirectional.output"]
    length, channels = u.shape[1:]
    layer = {"ab": data["bidirectional.ab"], "h_0": data["bidirectional.h_0"]}
    made = RTF.from_official(layer, length)
    assert made.channels == made.num_denominators == 2 * channels
    kernel = made().impulse_response(length).float()
    stored = torch.cat([kernel[:channels], kernel[channels:].flip(-1)], dim=-1)
    assert relative(stored, data["bidirectional.kernel"]) < 1e-3
    mixer = LongConvolution(made, bidirectional=True)
    assert relative(mixer(u), expected) < 1e-5
    # The published formula, one circular convolution of twice the length, in float64.
    ab = torch.nn.functional.pad(layer["ab"].double(), (1, length - 7))
    ab[: 2 * channels, 0] = 1
    spectra = torch.fft.rfft(ab)
    transfer = spectra[2 * channels :] / spectra[: 2 * channels] + layer["h_0"].double()[:, None]
    taps = torch.fft.irfft(transfer)
    both = torch.cat([taps[:channels], taps[channels:].flip(-1)], dim=-1)
    signal = torch.nn.functional.pad(u.double().mT, (0, length))
    published = torch.fft.irfft(torch.fft.rfft(both) * torch.fft.rfft(signal)).mT[:, :length]
    assert relative(mixer.double()(u.double()), published) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_published_layers_of_other_precision(dtype):
    data = official()
    layer = {key: data[key].to(dtype) for key in ("ab", "h_0")}
    made = RTF.from_official(layer, 64)
    assert made.a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(made.b.detach(), layer["ab"][4:].to(made.b.dtype))
    rebuilt = build(made.config())
    rebuilt.load_state_dict(made.state_dict())


def test_published_layers_with_a_constraint():
    """Denominators a / (‖a‖₁ + |scalar| + 1e-6), with the shared scalars of the layer."""
    data = official()
    scalar = torch.tensor([0.5, -2.0, 0.0, 0.01])
    made = RTF.from_official({"ab": data["ab"], "h_0": data["h_0"], "scalar": scalar}, 64).double()
    assert made.stability == "montel"
    a = data["ab"][:4].double()
    a = a / (a.abs().sum(-1) + scalar.double().abs() + 1e-6)[:, None]
    plain = {"ab": torch.cat([a, data["ab"][4:].double()]), "h_0": data["h_0"].double()}
    expected = RTF.from_official(plain, 64)().impulse_response(64)
    torch.testing.assert_close(made().impulse_response(64), expected)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"h_0": None}, "lacks h_0"),
        ({"scalar": torch.ones(3)}, r"scalar \(3,\)"),
        ({"bias": torch.ones(8)}, "also has bias"),
        ({"ab": None, "layer.ab": torch.ones(12, 6)}, "lacks ab and also has layer.ab"),
        ({"ab": torch.ones(8, 6)}, r"ab \(8, 6\), h_0 \(8,\)"),
        ({"ab": torch.ones(11, 6)}, "dividing the channels"),
        ({"ab": torch.ones(12)}, r"ab \(12,\)"),
        ({"h_0": torch.ones(8, 1)}, r"h_0 \(8, 1\)"),
        ({"ab": torch.ones(12, 64)}, "state_size"),
    ],
)
def test_layers_that_are_not_published_ones(change, match):
    data = official()
    layer = {"ab": data["ab"], "h_0": data["h_0"], **change}
    layer = {key: value for key, value in layer.items() if value is not None}
    with pytest.raises(ValueError, match=match) as caught:
        RTF.from_official(layer, 64)
    assert "\n" not in str(caught.value)


def test_registry():
    @register("constant-for-test")
    class Constant(Filter):
        def forward(self, length=None):
            return FIR(torch.ones(self.channels, self.max_length))

        def reset_parameters(self):
            pass

    made = build({"type": "constant-for-test"}, channels=2, max_length=3)
    assert isinstance(made, Constant)
    with pytest.raises(ValueError, match="already registered"):
        register("constant-for-test")(ImplicitFilter)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"type": "wavelet"}, "unknown filter type 'wavelet'"),
        ({}, "unknown filter type None"),
        ({"type": "rtf", "state_size": 4, "typo": 1}, "typo"),
        ({"type": "rtf"}, "state_size"),
        ({"type": "rtf", "state_size": 0}, "state_size"),
        ({"type": "rtf", "state_size": 4, "num_denominators": 3}, "num_denominators"),
        ({"type": "rtf", "state_size": 4, "initialization": "ones"}, "initialization"),
        ({"type": "rtf", "state_size": 4, "stability": "schurr"}, "stability"),
        ({"type": "rtf", "state_size": 4, "numerator": "whole"}, "numerator"),
        ({"type": "implicit", "embedding_features": 4}, "odd"),
        ({"type": "implicit", "hidden": 0}, "hidden"),
        ({"type": "modal", "orders": [1, 2]}, "orders"),
        ({"type": "modal", "orders": [1, 2, -1, 0]}, "orders"),
        ({"type": "modal", "orders": 2, "channels": 3}, "4 channels is needed"),
        ({"type": "modal", "orders": 2, "max_length": 0}, "max_length"),
        ({"type": "modal", "orders": 2, "lr": -1.0}, "lr must be .*got -1.0"),
        ({"type": "implicit", "lr": "slow"}, "lr must be .*got 'slow'"),
    ],
)
def test_bad_configurations_get_one_sentence(config, match):
    with pytest.raises(ValueError, match=match) as caught:
        build(config, channels=4, max_length=32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_system_holds_no_parameter_itself(name):
    """Sharding takes a parameter's memory away after `forward`; the system may still be used."""
    made = make(name)
    with torch.no_grad():
        system = made(40)
    storages = {tensor.untyped_storage().data_ptr() for tensor in made.parameters()}
    for leaf in tree_leaves(system):
        if isinstance(leaf, torch.Tensor):
            assert leaf.untyped_storage().data_ptr() not in storages
