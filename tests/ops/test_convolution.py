"""Causal convolution against its definition, the Toeplitz matrix product in float64."""

import multiprocessing

import pytest
import torch
from torch import Tensor

from gramian.ops import bidirectional_convolution, causal_convolution
from gramian.ops._blocks import cut
from gramian.ops.online import OnlineConvolution

LENGTHS = [1, 2, 3, 63, 257, 1000]


def toeplitz_product(
    u: Tensor, kernel: Tensor, skip: Tensor | None, gate: Tensor | None, dim: int
) -> Tensor:
    """The definition: one shifted copy of u for each tap, in float64."""
    signal = u.double().movedim(dim, -1)
    length = signal.shape[-1]
    y = torch.zeros(
        (*torch.broadcast_shapes(signal.shape[:-1], kernel.shape[:-1]), length)
    ).double()
    for j in range(min(kernel.shape[-1], length)):
        y[..., j:] += kernel[..., j, None].double() * signal[..., : length - j]
    if skip is not None:
        y = y + skip.double()[..., None] * signal
    y = y.movedim(-1, dim)
    return y if gate is None else gate.double() * y


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.pairs
@pytest.mark.parametrize("taps", [1, 4, 63, 300, 1200])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_toeplitz_product(length: int, taps: int, dim: int, dtype: torch.dtype) -> None:
    u = draw(*((3, 5, length) if dim == -1 else (3, length, 5)), seed=length, dtype=dtype)
    kernel = draw(5, taps, seed=taps, dtype=dtype) / taps**0.5
    skip, gate = draw(5, seed=2, dtype=dtype), draw(*u.shape, seed=3, dtype=dtype)
    y = causal_convolution(u, kernel, skip=skip, gate=gate, dim=dim)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    expected = toeplitz_product(u, kernel, skip, gate, dim)
    assert y.dtype == dtype
    assert (y - expected).norm() <= tolerance * expected.norm()


@pytest.mark.pairs
@pytest.mark.parametrize("taps", [1, 2, 7, 16, 17, 32, 33])
@pytest.mark.parametrize("length", [6, 300, 700])
@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("gated", [False, True])
def test_few_taps_and_their_gradients_over_many_blocks(
    length: int, taps: int, dim: int, gated: bool
) -> None:
    shape = (2, 300, length) if dim == -1 else (2, length, 300)
    operands = [draw(*shape, seed=1), draw(300, taps, seed=2)]
    operands += [draw(*shape, seed=3)] if gated else []
    operands = [operand.requires_grad_() for operand in operands]
    gate = operands[2] if gated else None
    y = causal_convolution(*operands[:2], gate=gate, dim=dim)
    expected = toeplitz_product(*operands[:2], None, gate, dim)
    weights = draw(*shape, seed=4)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    made, wanted = (torch.autograd.grad((weights * x).sum(), operands) for x in (y, expected))
    for one, other in zip(made, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_few_taps_are_summed_in_single_precision(dim: int, dtype: torch.dtype) -> None:
    shape = (3, 5, 700) if dim == -1 else (3, 700, 5)
    u, kernel, gate = draw(*shape, seed=1, dtype=dtype), draw(5, 7, seed=2), draw(*shape, seed=3)
    gate = gate.to(dtype)
    y = causal_convolution(u, kernel.float(), gate=gate, dim=dim)
    expected = toeplitz_product(u, kernel.float(), None, gate, dim)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected.to(dtype).double(), rtol=1e-2, atol=1e-3)


def test_of_few_taps_a_sample_that_is_no_number_reaches_no_earlier_output() -> None:
    u = draw(2, 50, 3, seed=1)
    u[:, 20] = torch.nan
    y = causal_convolution(u, draw(3, 4, seed=2), dim=-2)
    assert y[:, :20].isfinite().all() and y[:, 20:24].isnan().all() and y[:, 24:].isfinite().all()


@pytest.mark.pairs
@pytest.mark.parametrize(
    "channels", [(), (1,), (6,), (3, 1), (3, 6), (2, 1, 1), (2, 1, 6), (2, 3, 6), (2, 3, 1)]
)
@pytest.mark.parametrize("dim", [-1, -2, 0, 1])
@pytest.mark.parametrize("save_spectra", [False, True])
def test_kernels_broadcast(channels: tuple[int, ...], dim: int, save_spectra: bool) -> None:
    shape = [2, 3, 6]
    shape.insert(dim % 4, 63)
    u = draw(*shape, seed=0).requires_grad_()
    kernel = draw(*channels, 20, seed=1).requires_grad_()
    skip, gate = draw(3, 6, seed=2).requires_grad_(), draw(*shape, seed=3).requires_grad_()
    inputs = (u, kernel, skip, gate)
    y = causal_convolution(u, kernel, skip=skip, gate=gate, dim=dim, save_spectra=save_spectra)
    expected = toeplitz_product(u, kernel, skip, gate, dim)
    torch.testing.assert_close(y, expected)
    g = draw(*shape, seed=4)
    torch.testing.assert_close(
        torch.autograd.grad(y, inputs, g), torch.autograd.grad(expected, inputs, g)
    )


def test_more_channels_in_the_kernel_enlarge_the_result() -> None:
    u, kernel = draw(2, 1, 63, seed=0), draw(5, 63, seed=1)
    y = causal_convolution(u, kernel)
    assert y.shape == (2, 5, 63)
    torch.testing.assert_close(y, toeplitz_product(u.expand(2, 5, 63), kernel, None, None, -1))


@pytest.mark.parametrize(
    ("batch", "channels", "length"), [(5, 70, 1000), (2, 130, 4099), (40, 3, 3001)]
)
@pytest.mark.parametrize("shared", [False, True])
def test_many_blocks_and_every_gradient(
    batch: int, channels: int, length: int, shared: bool
) -> None:
    """Sizes that are cut into many blocks, whose edges are not multiples of anything."""
    u = draw(batch, length, channels, seed=0, dtype=torch.float32).requires_grad_()
    kernel = draw(1 if shared else channels, length, seed=1, dtype=torch.float32) / length**0.5
    kernel.requires_grad_()
    g = draw(batch, length, channels, seed=2, dtype=torch.float32)
    y = causal_convolution(u, kernel, dim=-2)
    grads = torch.autograd.grad(y, (u, kernel), g)

    wide = 2 * length
    u_hat = torch.fft.rfft(u.detach().double(), n=wide, dim=1)
    g_hat = torch.fft.rfft(g.double(), n=wide, dim=1)
    h_hat = torch.fft.rfft(kernel.detach().double(), n=wide).T
    correlation = (g_hat * u_hat.conj()).sum(0)
    if shared:
        correlation = correlation.sum(-1, keepdim=True)
    expected = (
        torch.fft.irfft(u_hat * h_hat, n=wide, dim=1)[:, :length],
        torch.fft.irfft(g_hat * h_hat.conj(), n=wide, dim=1)[:, :length],
        torch.fft.irfft(correlation, n=wide, dim=0)[:length].T,
    )
    for result, reference in zip((y.detach(), *grads), expected, strict=True):
        assert (result - reference).norm() <= 1e-5 * reference.norm()


@pytest.mark.parametrize("dim", [-1, -2])
def test_memory_layout_is_that_of_the_input(dim: int) -> None:
    u = draw(2, 3, 64, 5, seed=0)
    for signal in (u, u.transpose(0, 1), u.permute(3, 0, 1, 2), u.permute(0, 3, 2, 1)):
        y = causal_convolution(signal, draw(7, seed=1), dim=dim)
        assert y.stride() == signal.stride()
        torch.testing.assert_close(y, toeplitz_product(signal, draw(7, seed=1), None, None, dim))


def test_a_slice_of_a_projection_is_taken_as_it_is() -> None:
    projected = draw(2, 63, 15, seed=0)
    value = projected[..., 5:10]
    kernel = draw(5, 63, seed=1)
    torch.testing.assert_close(
        causal_convolution(value, kernel, dim=-2),
        causal_convolution(value.contiguous(), kernel, dim=-2),
    )


@pytest.mark.pairs
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("save_spectra", [False, True])
@pytest.mark.parametrize("channels", [(3,), (1,), (2, 3)])
def test_gradcheck_and_gradgradcheck(
    gated: bool, save_spectra: bool, channels: tuple[int, ...]
) -> None:
    u, kernel = draw(2, 7, 3, seed=0), draw(*channels, 4, seed=1)
    skip, gate = draw(3, seed=2), draw(2, 7, 3, seed=3)
    inputs = [t.requires_grad_() for t in (u, kernel, skip, gate)[: 4 if gated else 3]]

    def convolve(u: Tensor, kernel: Tensor, skip: Tensor, gate: Tensor | None = None) -> Tensor:
        return causal_convolution(
            u, kernel, skip=skip, gate=gate, dim=-2, save_spectra=save_spectra
        )

    assert torch.autograd.gradcheck(convolve, inputs)
    # With more kernels in one random direction, in which all entries have part.
    assert torch.autograd.gradgradcheck(convolve, inputs, fast_mode=channels != (1,))


def test_third_derivative() -> None:
    inputs = [draw(2, 5, seed=0).requires_grad_(), draw(2, 3, seed=1).requires_grad_()]

    def gradient(u: Tensor, kernel: Tensor) -> tuple[Tensor, ...]:
        y = causal_convolution(u, kernel)
        return torch.autograd.grad(y.pow(3).sum(), (u, kernel), create_graph=True)

    assert torch.autograd.gradgradcheck(gradient, inputs)


@pytest.mark.parametrize("wanted", ["u", "kernel", "gate", "skip"])
def test_one_gradient_alone_is_the_same(wanted: str) -> None:
    tensors = {
        "u": draw(2, 63, 5, seed=0),
        "kernel": draw(5, 63, seed=1),
        "gate": draw(2, 63, 5, seed=2),
        "skip": draw(5, seed=3),
    }
    for tensor in tensors.values():
        tensor.requires_grad_()
    causal_convolution(**tensors, dim=-2).square().sum().backward()
    alone = {name: t.detach().requires_grad_(name == wanted) for name, t in tensors.items()}
    causal_convolution(**alone, dim=-2).square().sum().backward()
    torch.testing.assert_close(alone[wanted].grad, tensors[wanted].grad)


# One program is traced for each of opcheck's own cases, which takes longer than all else: the other
# gradients that may be wanted are traced in one case, and checked without traces in every case.
UNTRACED = ("test_schema", "test_autograd_registration", "test_faketensor")
TRACED = (*UNTRACED, "test_aot_dispatch_dynamic")


@pytest.mark.each
@pytest.mark.parametrize(("dtype", "others"), [(torch.float64, UNTRACED), (torch.float32, TRACED)])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("save_spectra", [False, True])
@pytest.mark.parametrize("ahead", [0, 2])
def test_opcheck(
    dtype: torch.dtype, gated: bool, save_spectra: bool, ahead: int, others: tuple[str, ...]
) -> None:
    forward = torch.ops.gramian.causal_convolution.default
    backward = torch.ops.gramian.causal_convolution_backward.default
    u = draw(2, 9, 4, 3, seed=0, dtype=dtype).permute(0, 2, 3, 1).requires_grad_()
    kernel = draw(1, 4, 1, 5, seed=1, dtype=dtype).requires_grad_()
    gate = draw(2, 4, 3, 9, seed=2, dtype=dtype).requires_grad_() if gated else None
    torch.library.opcheck(forward, (u, kernel, gate, ahead, save_spectra))
    _, spectra = forward(u.detach(), kernel, gate, ahead, save_spectra)
    g = draw(2, 4, 3, 9, seed=3, dtype=dtype).requires_grad_()
    for needs, tests in (
        ([True, True, gated], TRACED),
        ([False, True, False], others),
        ([True, False, gated], others),
    ):
        operands = (g, u, kernel, gate, spectra.detach(), ahead, *needs)
        torch.library.opcheck(backward, operands, test_utils=tests)


def test_compiles_as_one_graph() -> None:
    def loss(u: Tensor, kernel: Tensor, gate: Tensor) -> Tensor:
        return causal_convolution(u, kernel, gate=gate, dim=-2).square().sum()

    inputs = [draw(2, 63, 5, seed=0), draw(5, 20, seed=1), draw(2, 63, 5, seed=2)]
    inputs = [t.requires_grad_() for t in inputs]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    value = compiled(*inputs)
    torch.testing.assert_close(value, loss(*inputs))
    torch.testing.assert_close(
        torch.autograd.grad(value, inputs), torch.autograd.grad(loss(*inputs), inputs)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, autocast: bool) -> None:
    u = draw(2, 1000, 5, seed=0, dtype=dtype).requires_grad_()
    kernel = (draw(5, 1000, seed=1, dtype=torch.float32) / 30).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = causal_convolution(u, kernel, dim=-2)
        y.float().square().sum().backward()
    expected = toeplitz_product(u.detach(), kernel.detach(), None, None, -2)
    assert y.dtype == u.grad.dtype == dtype and kernel.grad.dtype == torch.float32
    # only the result is rounded: half a unit in the last place, and float32's own error
    bound = torch.finfo(dtype).eps / 2 * expected.abs() + 1e-5 * expected.abs().max()
    assert ((y - expected).abs() <= bound).all()


def test_autocast_leaves_float64_alone() -> None:
    u, kernel = draw(2, 63, seed=0), draw(2, 63, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = causal_convolution(u, kernel)
    assert (y - toeplitz_product(u, kernel, None, None, -1)).abs().max() < 1e-12


@pytest.mark.parametrize("mapped", [(0, None), (None, 0), (0, 0)])
@pytest.mark.parametrize("save_spectra", [False, True])
def test_vmap(mapped: tuple[int | None, int | None], save_spectra: bool) -> None:
    u = draw(*((3,) if mapped[0] == 0 else ()), 2, 63, 5, seed=0).requires_grad_()
    kernel = draw(*((3,) if mapped[1] == 0 else ()), 5, 20, seed=1).requires_grad_()

    def convolve(u: Tensor, kernel: Tensor) -> Tensor:
        return causal_convolution(u, kernel, gate=u, dim=-2, save_spectra=save_spectra)

    y = torch.func.vmap(convolve, mapped)(u, kernel)
    one_by_one = torch.stack(
        [
            convolve(u[i] if mapped[0] == 0 else u, kernel[i] if mapped[1] == 0 else kernel)
            for i in range(3)
        ]
    )
    torch.testing.assert_close(y, one_by_one)
    g = draw(*y.shape, seed=2)
    torch.testing.assert_close(
        torch.autograd.grad(y, (u, kernel), g), torch.autograd.grad(one_by_one, (u, kernel), g)
    )


def test_vectorized_jacobian() -> None:
    inputs = (draw(3, 6, seed=0), draw(3, 4, seed=1))
    for vectorize in (False, True):
        of_u, of_kernel = torch.autograd.functional.jacobian(
            causal_convolution, inputs, vectorize=vectorize
        )
        for channel in range(3):
            assert (of_u[channel, :, channel].triu(1).abs() < 1e-12).all()  # causal
            column = of_u[channel, :, channel, 0]
            torch.testing.assert_close(column[:4], inputs[1][channel])
            torch.testing.assert_close(of_kernel[channel, :, channel, 0], inputs[0][channel])


def test_inference_mode(two_threads: None) -> None:
    u, kernel = draw(8, 4000, 20, seed=0), draw(20, 4000, seed=1)
    with torch.inference_mode():
        inside = causal_convolution(u, kernel, dim=-2)
    assert torch.equal(inside, causal_convolution(u, kernel, dim=-2))


def test_is_deterministic_with_several_threads(two_threads: None) -> None:
    u, g = draw(16, 3001, 3, seed=0), draw(16, 3001, 3, seed=1)
    kernel = draw(3001, seed=2).requires_grad_()
    results = [
        torch.autograd.grad(causal_convolution(u, kernel, dim=-2), kernel, g)[0] for _ in range(5)
    ]
    assert all(torch.equal(results[0], result) for result in results)


def test_number_of_threads_is_left_alone(two_threads: None) -> None:
    before = torch.get_num_threads()
    causal_convolution(draw(16, 3001, 3, seed=0), draw(3, 3001, seed=1), dim=-2)
    assert torch.get_num_threads() == before


def _convolve_in_child(u: Tensor, kernel: Tensor, queue: "multiprocessing.Queue[float]") -> None:
    torch.set_num_threads(1)  # as data loaders do: OpenMP's threads do not survive a fork either
    queue.put(float(causal_convolution(u, kernel, dim=-2)[-1, -1, -1]))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_works_in_a_forked_process(two_threads: None) -> None:
    """As in a data loader's worker: the threads of the parent do not exist there."""
    u, kernel = draw(16, 3001, 3, seed=0), draw(3, 3001, seed=1)
    expected = float(causal_convolution(u, kernel, dim=-2)[-1, -1, -1])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_convolve_in_child, args=(u, kernel, queue))
    child.start()
    try:
        assert queue.get(timeout=60) == pytest.approx(expected)
    finally:
        child.kill()
        child.join()


@pytest.mark.parametrize("own", [(1, 1, 1), (4, 1, 6), (1, 5, 1), (4, 5, 6)])
@pytest.mark.parametrize("elements", [1, 100, 10**6])
def test_blocks_cover_every_row_once(own: tuple[int, ...], elements: int) -> None:
    rows, shared = torch.zeros(4, 5, 6, 10), torch.zeros(*own, 3)
    largest, tasks = cut(rows, shared, 10, elements, 2)
    for task in tasks:
        for block in task.blocks:
            assert 1 <= rows[block].shape[:-1].numel() <= largest
            assert torch.broadcast_shapes(rows[block].shape[:-1], shared[task.shared].shape[:-1])
            rows[block] += 1
            shared[task.shared] = 1
    assert (rows == 1).all() and (shared == 1).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"u": torch.zeros(2, 0), "kernel": torch.zeros(3)}, ValueError, "empty"),
        ({"u": torch.zeros(2, 5), "kernel": torch.zeros(2, 0)}, ValueError, "no taps"),
        ({"u": torch.zeros(2, 5), "kernel": torch.zeros(3, 5)}, ValueError, "do not broadcast"),
        (
            {"u": torch.zeros(2, 5), "kernel": torch.zeros(5), "skip": torch.zeros(3)},
            ValueError,
            "do not broadcast",
        ),
        (
            {"u": torch.zeros(2, 5), "kernel": torch.zeros(5), "gate": torch.zeros(5)},
            ValueError,
            "gate",
        ),
        ({"u": torch.zeros(2, 5), "kernel": torch.zeros(5), "dim": 2}, ValueError, "dim=2"),
        ({"u": torch.tensor(1.0), "kernel": torch.zeros(5)}, ValueError, "dimension"),
        ({"u": torch.zeros(2, 5, dtype=torch.long), "kernel": torch.zeros(5)}, TypeError, "u must"),
        (
            {"u": torch.zeros(2, 5), "kernel": torch.zeros(5, dtype=torch.complex64)},
            TypeError,
            "kernel must",
        ),
    ],
)
def test_bad_input_is_one_clear_sentence(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        causal_convolution(**arguments)
    assert "\n" not in str(caught.value)


def test_no_channels_or_batch() -> None:
    assert causal_convolution(torch.zeros(0, 5, 7), torch.zeros(5, 7)).shape == (0, 5, 7)
    assert causal_convolution(torch.zeros(2, 0, 7), torch.zeros(0, 7)).shape == (2, 0, 7)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("taps", [3, 40])
@pytest.mark.parametrize("save_spectra", [False, True])
def test_the_gradient_over_an_empty_batch_is_zero(
    channels: int, taps: int, save_spectra: bool
) -> None:
    u, kernel = torch.zeros(0, 2, 50), torch.ones(channels, taps, requires_grad=True)
    y = causal_convolution(u, kernel, save_spectra=save_spectra)
    both = y + bidirectional_convolution(u, kernel, kernel)
    torch.use_deterministic_algorithms(True)  # fills memory that is not initialized with NaN
    try:
        both.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert kernel.grad is not None
    assert not kernel.grad.any()


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("size", [1.0, 1e8, 1e30])
def test_what_comes_later_is_seen_in_rounding_errors_only(dtype, dim, size) -> None:
    u = draw(2, 3, 257, seed=0, dtype=dtype)
    kernel, gate = draw(3, 400, seed=1, dtype=dtype), draw(2, 3, 257, seed=2, dtype=dtype)
    later = u.clone()
    later[0, 1, 200:] = size * draw(57, seed=3, dtype=dtype)
    before, after = (
        causal_convolution(x.transpose(-1, dim), kernel, gate=gate.transpose(-1, dim), dim=dim)
        for x in (u, later)
    )
    before, after = before.transpose(-1, dim), after.transpose(-1, dim)
    norms = later[0, 1].double().norm() * kernel[1].double().norm()
    seen = (after - before)[0, 1, :200].double()
    limit = 4 * torch.finfo(dtype).eps * norms * gate[0, 1, :200].abs()
    assert bool((seen.abs() <= limit).all())
    others = torch.ones(2, 3, dtype=torch.bool)
    others[0, 1] = False
    torch.testing.assert_close(after[others], before[others])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row_and_its_chunk(bad) -> None:
    u = draw(2, 3, 90, seed=0)
    kernel = draw(3, 40, seed=1)
    expected = causal_convolution(u, kernel)
    u[0, 1, 70] = bad
    y = causal_convolution(u, kernel)
    assert bool(y[0, 1, 70:].isnan().all())
    y[0, 1] = expected[0, 1]
    torch.testing.assert_close(y, expected)

    online = OnlineConvolution(kernel)
    first, buffers = online.extend(
        u[..., :60], online.buffers((2, 3), torch.float64, torch.device("cpu"))
    )
    torch.testing.assert_close(first, expected[..., :60])
    for t in range(60, 70):
        sample, buffers = online.step(u[..., t], buffers)
        torch.testing.assert_close(sample, expected[..., t])
