"""The residual block: its formula, every mode one map, masks, dropout and batch statistics."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from gramian import parameter_groups
from gramian.filters import RTF, ModalFilter, build
from gramian.mixers import Block, Hyena, LongConvolution, Mixer, MultiHyena
from gramian.testing import check_mixer

WIDTH, MAX_LENGTH = 6, 40
FILTER: dict[str, Any] = {"type": "modal", "orders": 2}
MIXERS: dict[str, Callable[[], Mixer]] = {
    "long_convolution": lambda: LongConvolution(ModalFilter(WIDTH, 2, MAX_LENGTH)),
    "hyena": lambda: Hyena(WIDTH, {"type": "implicit", "hidden": 8}, MAX_LENGTH, order=3),
    "multi_hyena": lambda: MultiHyena(WIDTH, 2, {"type": "rtf", "state_size": 3}, MAX_LENGTH),
}
norms = pytest.mark.parametrize("norm", ["layer", "rms", "batch"])
orders = pytest.mark.parametrize("prenorm", [True, False])


def make(mixer: Any = None, **kwargs: Any) -> Block:
    torch.manual_seed(0)
    given = FILTER if mixer is None else mixer
    block = Block(WIDTH, given, MAX_LENGTH, **kwargs).double()
    with torch.no_grad():  # away from an identity
        for name, tensor in [*block.norm.named_parameters(), *block.norm.named_buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + (0.5 if name != "bias" else 0.0))
    return block.eval()


@pytest.mark.each
@norms
@orders
@pytest.mark.parametrize("kind", MIXERS)
def test_every_block_conforms(kind: str, norm: str, prenorm: bool) -> None:
    check_mixer(make(MIXERS[kind](), norm=norm, prenorm=prenorm))


def signal(batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(batch, length, WIDTH, generator=generator, dtype=torch.float64)


@pytest.mark.pairs
@norms
@orders
@pytest.mark.parametrize("glu", [True, False])
@torch.no_grad()
def test_is_the_formula(norm: str, prenorm: bool, glu: bool) -> None:
    block, x = make(norm=norm, prenorm=prenorm, glu=glu), signal(2, 20)

    def normed(z: torch.Tensor) -> torch.Tensor:
        if norm == "batch":
            return block.norm(z.mT).mT
        return block.norm(z)

    inner = F.gelu(block.mixer(normed(x) if prenorm else x))
    out = inner @ block.linear.weight.mT + block.linear.bias
    if glu:
        out = out[..., :WIDTH] * out[..., WIDTH:].sigmoid()
    expected = x + out
    assert_close(block(x), expected if prenorm else normed(expected))


@pytest.mark.pairs
@norms
@orders
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("length", [1, 3, 33])
@torch.no_grad()
def test_parallel_equals_chunked_equals_recurrent(
    norm: str, prenorm: bool, mixer: str, length: int
) -> None:
    block, x = make(MIXERS[mixer](), norm=norm, prenorm=prenorm), signal(2, length)
    expected = block(x)
    recurrence = block.recurrence()
    state, outputs = recurrence.initial_state(2), []
    assert recurrence.state_bytes(2) == state.nbytes
    for t in range(length):
        y, state = recurrence.step(x[:, t], state)
        outputs.append(y)
    assert_close(torch.stack(outputs, 1), expected)

    state, outputs = recurrence.initial_state(2), []
    cuts = sorted({0, length // 3, length // 2, length})
    for n, (begin, end) in enumerate(itertools.pairwise(cuts)):
        part = x[:, begin:end]
        y, state = block(part, state) if n % 2 else recurrence.prefill(part, state)
        outputs.append(y)
    assert_close(torch.cat(outputs, 1), expected)


@pytest.mark.pairs
@norms
@orders
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_padding_leaves_no_trace(
    norm: str, prenorm: bool, bidirectional: bool, training: bool
) -> None:
    """Neither in the outputs nor in the statistics of a batch norm."""
    x, junk = signal(2, 20), 10 * signal(2, 7)
    block = make(norm=norm, prenorm=prenorm, bidirectional=bidirectional).train(training)
    before = {name: buffer.clone() for name, buffer in block.named_buffers()}
    expected = block(x)
    wanted = {name: buffer.clone() for name, buffer in block.named_buffers()}
    for order in ((junk, x, junk), (junk, x), (x, junk)):
        block.load_state_dict({**block.state_dict(), **before}, strict=False)
        padded = torch.cat(order, 1)
        mask = torch.cat([torch.full(part.shape[:2], float(part is x)) for part in order], 1)
        begin = 7 if order[0] is junk else 0
        for kind in (mask, mask.bool(), mask.long()):
            block.load_state_dict({**block.state_dict(), **before}, strict=False)
            assert_close(block(padded, mask=kind)[:, begin : begin + 20], expected)
        assert_close({n: b.clone() for n, b in block.named_buffers()}, wanted)


def test_batch_statistics_are_those_of_the_real_tokens() -> None:
    block, x = make(norm="batch").train(), signal(2, 9)
    mask = torch.ones(2, 9)
    mask[0, :4] = 0
    before = block.norm.running_mean.clone()
    block(x, mask=mask)
    mean = x[mask.bool()].mean(0)
    assert_close(block.norm.running_mean, 0.9 * before + 0.1 * mean)
    for whole in (None, torch.ones(2, 9)):
        before = block.norm.running_mean.clone()
        block(x, mask=whole)
        assert_close(block.norm.running_mean, 0.9 * before + 0.1 * x.mean((0, 1)))
    for one, mask in ((x[:1], torch.eye(9)[:1]), (x[:1, :1], None)):
        with pytest.raises(ValueError, match=r"at least two real tokens .* got 1 in a batch"):
            block(one, mask=mask)


@norms
def test_a_batch_norm_in_training_carries_a_state_with_its_running_statistics(norm: str) -> None:
    block, x = make(norm=norm, dropout=0.5), signal(2, 12)
    expected = block(x)
    block.train()
    y, _ = block(x, block.recurrence().initial_state(2))
    assert_close(y, expected)
    assert_close(block.recurrence().prefill(x)[0], expected.detach())


@pytest.mark.parametrize("tied", [False, True])
def test_dropout(tied: bool) -> None:
    block, x = make(dropout=0.5, tied_dropout=tied), signal(4, 30)
    expected = block(x)
    block.train()
    added = (block(x) - x).detach()
    dropped = added == 0
    assert 0.3 < float(dropped.float().mean()) < 0.7
    along = dropped.float().mean(1)  # of a channel of a sequence
    assert bool(((along == 0) | (along == 1)).all()) is tied
    assert torch.equal(block.eval()(x), expected)


def test_kernel_dropout_and_directions_reach_the_mixer() -> None:
    block = make(bidirectional=True, kernel_dropout=0.25)
    assert isinstance(block.mixer, LongConvolution)
    assert block.mixer.bidirectional
    assert block.mixer.kernel_dropout == 0.25
    assert block.mixer.filter.channels == 2 * WIDTH
    with pytest.raises(ValueError, match="no recurrence"):
        block.recurrence()
    filter = RTF(WIDTH, 3, MAX_LENGTH)
    assert make(filter).mixer.filter is filter


@norms
@orders
def test_every_parameter_learns(norm: str, prenorm: bool) -> None:
    block = make(norm=norm, prenorm=prenorm).train()
    block(signal(3, 30)).square().sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


@norms
def test_half_precision_and_autocast(norm: str) -> None:
    block, x = make(norm=norm), signal(2, 20)
    expected = block(x)
    block.float().train(norm == "layer")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block(x.float())
    assert (y.double() - expected).norm() < 0.05 * expected.norm()
    block.to(torch.bfloat16)
    y = block(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y.double() - expected).norm() < 0.05 * expected.norm()


def test_in_a_foreign_model() -> None:
    """Blocks in somebody's nn.Sequential learn to tell where a sequence's one impulse was."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(1, 16),
        Block(16, {"type": "rtf", "state_size": 8}, 32, norm="batch", bidirectional=True),
        Block(16, {"type": "rtf", "state_size": 8}, 32, norm="layer", prenorm=False),
        nn.Linear(16, 2),
    )
    x = torch.eye(32).unsqueeze(-1)
    labels = (torch.arange(32) >= 16).long()
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2, weight_decay=0.01))
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x)[:, -1], labels)
        loss.backward()
        optimizer.step()
    assert float((model(x)[:, -1].argmax(-1) == labels).float().mean()) > 0.95


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: Block(6, FILTER, 40, norm="group"), "norm must be one of 'layer', 'rms', 'batch'"),
        (lambda: Block(6, FILTER, 40, dropout=1.5), "dropout must be a probability"),
        (lambda: Block(6, FILTER), "max_length"),
        (lambda: Block(6, {"type": "unheard"}, 40), "unknown filter type 'unheard'"),
        (lambda: Block(8, MIXERS["hyena"]()), "width 8 is needed; got one of 6"),
        (lambda: Block(6, build(FILTER, channels=5, max_length=9)), "6 channels is needed"),
        (lambda: Block(6, MIXERS["hyena"](), bidirectional=True), "given a Hyena, which has its"),
        (lambda: make()(torch.zeros(2, 5, 3)), "width 6"),
        (lambda: make()(torch.zeros(2, 5, 6), mask=torch.ones(2, 4)), "mask"),
    ],
)
def test_bad_input_gets_one_sentence(call: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_what_is_no_mixer_is_named() -> None:
    with pytest.raises(TypeError, match=r"a mixer, a filter or its configuration .* got Linear"):
        Block(6, nn.Linear(6, 6))
