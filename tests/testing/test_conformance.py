"""The conformance suites refuse what is broken, in a sentence that says what is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("datasets")

from gramian import FIR, Modal
from gramian.filters import RTF, S4D, ImplicitFilter
from gramian.mixers import GatedLinearAttention, LinearAttention, LongConvolution
from gramian.tasks import Description, Document, GeneratedTask, register_reader
from gramian.tasks.documents import _READERS
from gramian.testing import check_filter, check_mixer, check_reader, check_system, check_task


def make_modal(kind: type[Modal] = Modal) -> Modal:
    generator = torch.Generator().manual_seed(0)
    poles = torch.polar(torch.tensor([[0.9, 0.5]]), torch.tensor([[0.3, 1.0]])).to(torch.complex128)
    residues = torch.randn(1, 2, dtype=torch.complex128, generator=generator)
    return kind(poles, residues, torch.ones(1, dtype=torch.float64))


class Louder(Modal):
    """A system whose convolution is 0.1% louder than its taps."""

    def _apply(self, u: Tensor) -> Tensor:
        return 1.001 * super()._apply(u)


class Forgetful(Modal):
    """A system that forgets 0.1% of the state from which it continues."""

    def apply_from(self, u: Tensor, state: Any) -> Any:
        return super().apply_from(u, state.map(lambda tensor: 0.999 * tensor))


class Detached(FIR):
    """A system whose output knows nothing of its taps."""

    def kernel_for(self, u: Tensor, length: int) -> Tensor:
        return super().kernel_for(u, length).detach()


def test_a_broken_system_is_refused() -> None:
    check_system(make_modal(), length=16)
    with pytest.raises(AssertionError, match=r"Louder: system\(u\) of 1 samples .*1.0e-03"):
        check_system(make_modal(Louder), length=16)
    with pytest.raises(AssertionError, match="Forgetful: chunks and steps must give the outputs"):
        check_system(make_modal(Forgetful), length=16)
    with pytest.raises(AssertionError, match="Detached: the derivative in tensor 0"):
        check_system(Detached(torch.ones(1, 4, dtype=torch.float64)), length=8)
    with pytest.raises(TypeError, match="takes a System; got int"):
        check_system(3)  # type: ignore[arg-type]


class Amnesiac(S4D):
    """A filter whose configuration leaves its state size out."""

    def config(self) -> dict[str, Any]:
        return {key: value for key, value in super().config().items() if key != "state_size"}


class Frozen(ImplicitFilter):
    """A filter through which no gradient reaches the bias."""

    def forward(self, length: int | None = None) -> FIR:
        self.bias.requires_grad_(False)
        system = super().forward(length)
        self.bias.requires_grad_(True)
        return system


class Halved(S4D):
    """A filter that a cast to half precision casts."""

    def _apply(self, function: Any, recurse: bool = True) -> Any:
        return torch.nn.Module._apply(self, function, recurse)


class Complex(S4D):
    """A filter that stores its poles."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.register_buffer("stored", torch.zeros(2, dtype=torch.complex64))


class Defaulting(ImplicitFilter):
    """A filter that stays in the default dtype."""

    def float(self) -> Any:
        return self


class Idle(ImplicitFilter):
    """A filter that takes its bias away again."""

    def forward(self, length: int | None = None) -> FIR:
        kernel = super().forward(length).kernel
        return FIR(kernel - self.bias.unsqueeze(-1) * torch.eye(1, kernel.shape[-1]).to(kernel))


def test_weights_of_zero_stop_no_gradient_for_good() -> None:
    """Behind a numerator of zeros, the denominator has no gradient until the first step."""
    filter = RTF(channels=4, state_size=2, max_length=16)
    check_filter(filter)
    check_mixer(LongConvolution(filter), length=9)
    assert not filter.b.any()


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        (Complex, {"state_size": 4}, "Complex: stored is complex, which is not to be stored"),
        (Defaulting, {"hidden": 4}, "Defaulting: .* must be in float32 where the default is bf"),
        (Idle, {"hidden": 4}, "Idle: the gradient of the parameter bias is zero everywhere"),
        (Amnesiac, {"state_size": 4}, r"Amnesiac: build\(config\(\)\) must make"),
        (Frozen, {"hidden": 4}, "Frozen: no gradient reaches the parameter bias"),
        (Halved, {"state_size": 4}, "Halved: the parameter .* must stay in float32"),
    ],
)
def test_a_broken_filter_is_refused(
    monkeypatch: pytest.MonkeyPatch, kind: Any, options: dict[str, Any], match: str
) -> None:
    monkeypatch.setitem(registry_of_filters(), kind.name, kind)
    with pytest.raises(AssertionError, match=match):
        check_filter(kind(channels=2, max_length=16, **options))


def registry_of_filters() -> dict[str, Any]:
    from gramian.filters import _filter

    return _filter._REGISTRY


class Leaky(GatedLinearAttention):
    """A mixer whose chunks forget 1% of the state."""

    def mix_chunk(self, x: Tensor, state: Any, mask: Tensor | None) -> Any:
        return super().mix_chunk(x, state.map(lambda tensor: 0.99 * tensor), mask)


class Counting(LinearAttention):
    """A mixer to which padding is time."""

    def mix_whole(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = super().mix_whole(x, mask)
        return y * torch.arange(1, x.shape[1] + 1).to(y).unsqueeze(-1)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (Leaky, "Leaky: .* must give the outputs of the whole: the relative error is"),
        (Counting, r"Counting: padding \(left\) must leave no trace in outputs, row 1"),
    ],
)
def test_a_broken_mixer_is_refused(kind: Any, match: str, monkeypatch: Any) -> None:
    from gramian.mixers import MIXERS

    monkeypatch.setitem(MIXERS, kind.kind, kind)
    with pytest.raises(AssertionError, match=match):
        check_mixer(kind(4, 2).double(), length=9)


def test_the_operator_is_held_against_the_output() -> None:
    mixer = LinearAttention(4, 2).double()
    with pytest.raises(AssertionError, match=r"operator\(x\), applied to the values"):
        check_mixer(mixer, length=9, rebuild=lambda mixer, x, system: x)
    with pytest.raises(ValueError, match="length must be at least 8; got 7"):
        check_mixer(mixer, length=7)


@dataclass(frozen=True, kw_only=True)
class Coins(GeneratedTask):
    """Coins, and what came up last; or one of the ways to get it wrong."""

    wrong: str = ""

    def description(self) -> Description:
        return Description("classification", 16, vocab_size=2, num_labels=2)

    def row(self, random: np.random.Generator, split: str) -> dict[str, Any]:
        source = np.random.default_rng() if self.wrong == "seed" else random
        coins = source.integers(0, 2, size=17 if self.wrong == "length" else 16)
        label = {"class": 2, "layout": coins}.get(self.wrong, int(coins[-1]))
        return {"input_ids": coins, "labels": label}


def test_a_broken_task_is_refused() -> None:
    check_task(Coins())
    for wrong, match in (
        ("seed", "Coins: rows of train must be the same when they are read again"),
        ("length", "row 0 of train: it has 17 positions; the description says 1 to 16"),
        ("class", "row 0 of train: "),
        ("layout", r"Coins: labels must be of shape \(\)"),
    ):
        with pytest.raises(AssertionError, match=match):
            check_task(Coins(wrong=wrong))


def test_a_broken_reader_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gramian.tasks.documents._READERS", dict(_READERS))
    documents = [Document("one"), Document("two")]

    def read_blocks(blocks: Iterator[bytes], name: str, column: str) -> Iterator[Document]:
        yield from (Document(block.decode()) for block in blocks)

    def read_lines(blocks: Iterator[bytes], name: str, column: str) -> Iterator[Document]:
        yield from (Document(line.decode()) for line in b"".join(blocks).splitlines())

    register_reader(".lines")(read_lines)
    check_reader(read_lines, ".lines", b"one\ntwo\n", documents)
    with pytest.raises(AssertionError, match=r"blocks of 1 bytes must give 2 documents; got 8"):
        check_reader(read_blocks, ".lines", b"one\ntwo\n", documents)
    with pytest.raises(AssertionError, match="must be refused; got 1 documents"):
        check_reader(read_lines, ".lines", b"one\ntwo\n", documents, refused=b"three")
