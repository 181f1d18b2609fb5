"""Every operator in both modes of differentiation, twice, and under transforms of torch.func."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from gramian.ops import _operator, causal_convolution
from gramian.ops.convolution import bidirectional_convolution
from gramian.ops.diagonal_scan import apply_diagonal, diagonal_scan
from gramian.ops.feedback import feedback_kernel
from gramian.ops.krylov import krylov_product, krylov_sum
from gramian.ops.online import OnlineConvolution
from gramian.ops.opaque_recurrence import run_opaquely
from gramian.ops.packed import Linear, Packing, can_pack
from gramian.ops.polynomial import (
    evaluate_on_roots_of_unity,
    rational_impulse_response,
    rational_kernel,
)
from gramian.ops.recursion import all_pole_filter
from gramian.ops.reflection import step_down, step_up
from gramian.ops.vandermonde import vandermonde_product, vandermonde_transpose_product
from gramian.systems import TimeVarying

# What PyTorch maps in a loop is only slower.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

generator = torch.Generator()


def real(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=generator)


def poles(*shape: int) -> torch.Tensor:
    angle = 3 * torch.rand(*shape, dtype=torch.float64, generator=generator)
    return torch.polar(torch.rand(*shape, dtype=torch.float64, generator=generator), angle)


def residues(*shape: int) -> torch.Tensor:
    return torch.complex(real(*shape), real(*shape))


def online(kernel: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    convolution = OnlineConvolution(kernel)
    buffers = convolution.buffers(u.shape[:-1], u.dtype, u.device)
    first, buffers = convolution.extend(u[..., :3], buffers)
    second, _ = convolution.extend(u[..., 3:], buffers)
    return torch.cat([first, second], -1)


CASES = {  # what the function is not linear in comes last
    "convolution": lambda: (causal_convolution, real(2, 3, 5), real(3, 4)),
    "convolution, time in the middle": lambda: (
        lambda u, h: causal_convolution(u, h, dim=-2),
        real(2, 5, 3),
        real(1, 7),
    ),
    "convolution with a gate": lambda: (
        lambda u, h, gate: causal_convolution(u, h, gate=gate),
        real(2, 2, 4),
        real(2, 4),
        real(2, 2, 4),
    ),
    "convolution with gate and skip": lambda: (
        lambda u, h, s, gate: causal_convolution(u, h, skip=s, gate=gate, save_spectra=True),
        real(2, 3, 3),
        real(3, 3),
        real(3),
        real(2, 3, 3),
    ),
    "convolution with a skip of more channels": lambda: (
        lambda u, h, s: causal_convolution(u, h, skip=s),
        real(2, 3),
        real(3),
        real(2),
    ),
    "convolution of one sample": lambda: (causal_convolution, real(1, 1), real(1, 1)),
    "bidirectional": lambda: (bidirectional_convolution, real(2, 2, 5), real(2, 4), real(1, 3)),
    "online": lambda: (online, real(2, 4), real(1, 2, 7)),
    "diagonal scan": lambda: (
        lambda w, start, a: diagonal_scan(a, w, start),
        real(2, 5, 3),
        real(2, 3),
        real(2, 5, 3),
    ),
    "diagonal system": lambda: (
        apply_diagonal,
        *(real(2, 4, 2) for _ in range(3)),
        real(2, 4),
        real(2, 4),
        real(2, 2),
    ),
    "Vandermonde": lambda: (
        lambda c, p: vandermonde_product(p, c, 7),
        residues(2, 2, 3),
        poles(2, 3),
    ),
    "Vandermonde, one sample": lambda: (
        lambda c, p: vandermonde_product(p, c, 1),
        residues(2),
        poles(2),
    ),
    "Vandermonde, transposed": lambda: (
        lambda u, p: vandermonde_transpose_product(p, u),
        real(2, 2, 6),
        poles(2, 3),
    ),
    "rational kernel": lambda: (
        lambda b, d, a: rational_kernel(b, a, d, 8, length=6),
        real(2, 3),
        real(2),
        real(2, 2, scale=0.2),
    ),
    "rational kernel, one denominator": lambda: (
        lambda b, d, a: rational_kernel(b, a, d, 7, length=5),
        real(2, 2, 3),
        real(2),
        real(2, scale=0.2),
    ),
    "rational impulse response": lambda: (
        lambda b, d, a: rational_impulse_response(b, a, d, 5),
        real(1, 3),
        real(1),
        real(1, 3, scale=0.2),
    ),
    "roots of unity": lambda: (lambda c: evaluate_on_roots_of_unity(c, 5), real(2, 3)),
    "feedback": lambda: (feedback_kernel, real(2, 4, 5, scale=0.2)),
    "Krylov": lambda: (
        lambda c, x, A: krylov_product(c, A, x, 5),
        real(2, 3),
        real(2, 3),
        real(2, 3, 3, scale=0.3),
    ),
    "Krylov sum": lambda: (krylov_sum, real(2, 3, 3, scale=0.3), real(2, 3), real(2, 5)),
    "all-pole": lambda: (
        lambda u, past, a: all_pole_filter(a, u, past),
        real(2, 6),
        real(2, 3),
        real(2, 3, scale=0.3),
    ),
    "step up": lambda: (step_up, real(2, 3, scale=0.3)),
    "step down": lambda: (step_down, real(2, 3, scale=0.1)),
    "opaque recurrence": lambda: (
        lambda A, B, C, D, p, q, u, x: run_opaquely(A, B, C, D, p, q, u, x),
        *(real(1, 1, 3, 2, scale=0.5) for _ in range(3)),
        real(1, 1, 3),
        *(real(1, 1, 3, 2, scale=0.5) for _ in range(2)),
        real(1, 1, 3, 1),
        real(1, 1, 2, 1),
    ),
    "time-varying, diagonal": lambda: (
        lambda A, B, C, D, u: TimeVarying(A, B, C, D)(u),
        *(real(1, 5, 2, scale=0.5) for _ in range(3)),
        real(1, 5),
        real(1, 5),
    ),
    "time-varying, low rank": lambda: (
        lambda A, B, C, D, p, q, u: TimeVarying(A, B, C, D, p, q)(u),
        *(real(1, 5, 2, scale=0.5) for _ in range(3)),
        real(1, 5),
        *(real(1, 5, 2, scale=0.5) for _ in range(2)),
        real(1, 5),
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    generator.manual_seed(0)
    function, *inputs = CASES[request.param]()
    return function, tuple(inputs)


def has_irfft_twice_forward() -> bool:
    """Whether PyTorch differentiates its own FFT twice in forward mode, which 2.6 cannot do."""

    def energy(x: torch.Tensor) -> torch.Tensor:
        return torch.fft.irfft(2 * torch.fft.rfft(x, n=8), n=8).sin().sum()

    try:
        jacfwd(jacfwd(energy))(torch.ones(1, 4, dtype=torch.float64))
    except RuntimeError as error:
        if "MKL FFT error" not in str(error):
            raise
        return False
    return True


def flat(function, *inputs: torch.Tensor) -> torch.Tensor:
    """What the function returns, as one real vector."""
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    parts = [torch.view_as_real(y) if y.is_complex() else y for y in outputs]
    return torch.cat([part.flatten() for part in parts])


def test_both_modes_and_batches_of_them(case):
    function, inputs = case
    inputs = tuple(value.requires_grad_() for value in inputs)
    assert gradcheck(
        function,
        inputs,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


def test_derivatives_of_derivatives(case):
    function, inputs = case
    inputs = tuple(value.requires_grad_() for value in inputs)
    assert gradgradcheck(
        function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=True
    )


def test_transforms(case, request):
    function, inputs = case
    inputs = tuple(torch.view_as_real(x) if x.is_complex() else x for x in inputs)
    complex_inputs = [x.is_complex() for x in case[1]]

    def energy(*values: torch.Tensor) -> torch.Tensor:
        values = tuple(
            torch.view_as_complex(v) if c else v
            for v, c in zip(values, complex_inputs, strict=True)
        )
        return flat(function, *values).sin().sum()

    everything = tuple(range(len(inputs)))
    leaves = tuple(x.clone().requires_grad_() for x in inputs)
    expected = torch.autograd.grad(energy(*leaves), leaves)
    torch.testing.assert_close(grad(energy, everything)(*inputs), expected)
    _, pull = vjp(energy, *inputs)
    torch.testing.assert_close(pull(torch.ones((), dtype=torch.float64)), expected)

    torch.testing.assert_close(jacfwd(energy, everything)(*inputs), expected)
    torch.testing.assert_close(jacrev(energy, everything)(*inputs), expected)
    with torch.no_grad():  # forward mode needs no graph
        directions = tuple(torch.cos(torch.arange(x.numel())).reshape(x.shape) for x in inputs)
        directions = tuple(d.double() for d in directions)
        _, slope = jvp(energy, inputs, directions)
    total = sum((e * d).sum() for e, d in zip(expected, directions, strict=True))
    torch.testing.assert_close(slope, total)

    last = inputs[-1]

    def of_last(value: torch.Tensor) -> torch.Tensor:
        return energy(*inputs[:-1], value)

    nested = torch.autograd.functional.hessian(of_last, last)
    torch.testing.assert_close(hessian(of_last)(last), nested)  # forward over reverse
    if "online" not in request.node.name or has_irfft_twice_forward():
        torch.testing.assert_close(jacfwd(jacfwd(of_last))(last), nested)
    torch.testing.assert_close(jacrev(jacfwd(of_last))(last), nested)

    copies = torch.stack([last, 0.5 * last, -last])
    alone = torch.stack([grad(of_last)(copy) for copy in copies])
    torch.testing.assert_close(vmap(grad(of_last))(copies), alone)


@pytest.mark.parametrize("name", sorted(_operator._LIBRARY._op_defs))
def test_every_operator_has_derivatives_or_refuses(name):
    """Without a kernel of its own for this key, PyTorch would give zero in silence."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "Autograd")


def test_what_is_part_of_a_derivative_refuses_another():
    g, p, c = real(1, 1, 4), poles(1, 2), residues(1, 1, 2)
    op = torch.ops.gramian.vandermonde_product_backward
    with pytest.raises(NotImplementedError, match="has no derivatives"):
        op(g.requires_grad_(), p, c)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(g.detach(), torch.ones_like(g))
        with pytest.raises(NotImplementedError, match="has no derivatives"):
            op(dual, p, c)


def test_gradients_without_a_graph_have_tangents():
    """The fused backward passes, which have no derivatives, are not taken in forward mode."""
    p, c = poles(2, 3), residues(2, 3)
    leaf = c.clone().requires_grad_()

    def of_pole(p: torch.Tensor) -> torch.Tensor:
        y = vandermonde_product(p, leaf, 6).square().sum()
        return torch.autograd.grad(y, leaf)[0]

    t = residues(2, 3)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(of_pole(forward_ad.make_dual(p, t))).tangent
    step = 1e-6
    expected = (of_pole(p + step * t) - of_pole(p - step * t)) / (2 * step)
    torch.testing.assert_close(tangent, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.slow  # it imports the compiler
def test_gradients_of_compiled_autograd():
    from torch._dynamo import compiled_autograd

    u, kernel = real(2, 3, 8).requires_grad_(), real(3, 8).requires_grad_()
    expected = torch.autograd.grad(causal_convolution(u, kernel).sin().sum(), (u, kernel))
    with compiled_autograd._enable(lambda graph: graph):
        causal_convolution(u, kernel).sin().sum().backward()
    torch.testing.assert_close((u.grad, kernel.grad), expected)


def test_packed_layers_have_tangents():
    layer, packing = Linear(8, 4), Packing()
    x, t = torch.randn(2, 3, 8)
    with torch.no_grad(), packing.generation(layer, begins=True):
        torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias)
        assert len(packing) == can_pack()
        _, tangent = jvp(layer, (x,), (t,))
        torch.testing.assert_close(tangent, t @ layer.weight.T)
