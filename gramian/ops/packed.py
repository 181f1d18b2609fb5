"""Linear layers that multiply few rows by a copy of their weights in another memory layout.

For each token, decoding multiplies a few rows by every weight of a model, so it takes as long as
reading the weights. On a CPU, oneDNN can read them from a packed layout of its own, which is faster
for few rows than the general matrix product (benchmarks/decoding.py measures whole models).

A copy is out of date as soon as the weight changes. Neither the address nor the version of a tensor
reveals that reliably, since fused optimizers, `.data` and numpy views write without changing
either. So copies are used only inside `Packing.generation`. The first use in a generation compares
the whole weight with the copy, by means of the product `W r` with a fixed random vector r. This
costs about as much as one step. Every later use compares the tensor object, its address, its
version and a few values.

On processors of AMD, oneDNN is also faster than PyTorch's general product when it reads the weight
as it is (benchmarks/striped_hyena2.py measures a whole model). This needs no copy, so it is done
wherever no derivatives are recorded.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gramian.ops.changes import Record
from gramian.ops.derivatives import records_derivatives

__all__ = ["Linear", "Packing", "can_pack"]

_MAX_ROWS = 64  # for more rows, a packed weight is hardly faster
_TURNED = range(2, 5)  # rows for which the general product of the transposes is faster than both
_LEAST_WORK = 2**19  # multiplications from which on oneDNN makes up for the cost of its call


class _Copy:
    """A packed copy of a weight, and the data that show whether the weight has changed."""

    def __init__(self, weight: Tensor) -> None:
        source = weight.detach()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(source)  # noqa: SLF001 (no public name)
        self.record = Record(weight)
        draw = torch.Generator().manual_seed(0)
        signs = torch.randint(2, (weight.shape[1],), generator=draw) * 2 - 1
        self._vector = signs * (1 + torch.rand(weight.shape[1], generator=draw))  # no small entry
        self._product = torch.mv(source, self._vector)

    def equals(self, weight: Tensor) -> bool:
        """Return whether the weight still has the product `W r` that it had when it was copied."""
        return torch.equal(torch.mv(weight.detach(), self._vector), self._product)


class Packing:
    """The packed copies of a model's weights, each of which is verified once per generation.

    Copies take as much memory as the weights. They are never saved, copied or pickled.
    """

    def __init__(self) -> None:
        self._copies: dict[nn.Module, tuple[_Copy, int]] = {}
        self._owners: weakref.WeakSet[Any] = weakref.WeakSet()
        self._generation = 0

    @contextmanager
    def generation(self, owner: Any, begins: bool) -> Iterator[None]:
        """Let `Linear` layers use packed copies of their weights for inputs with few rows.

        Args:
            owner: The object that the generation belongs to, such as a cache.
            begins: Whether a new generation begins because `owner` is empty. A generation also
                begins when an owner is used for the first time.
        """
        if begins or owner not in self._owners:
            self._owners.add(owner)
            self._generation += 1
        before, _current.packing = _current.packing, self
        try:
            yield
        finally:
            _current.packing = before

    def clear(self) -> None:
        """Delete all copies, which are made again when they are needed."""
        self._copies = {}

    def __len__(self) -> int:
        return len(self._copies)

    def weight_of(self, layer: nn.Module, weight: Tensor) -> Tensor:
        """Return the packed copy of the current weight of `layer`."""
        copy, checked = self._copies.get(layer, (None, 0))
        if copy is not None and copy.record.matches(weight):
            if checked == self._generation:
                return copy.packed
            if not copy.equals(weight):
                copy = None
        else:
            copy = None
        if copy is None:
            copy = _Copy(weight)
        self._copies[layer] = copy, self._generation
        return copy.packed

    def __deepcopy__(self, memo: dict[int, Any]) -> Packing:
        return Packing()

    def __reduce__(self) -> Any:
        return Packing, ()


class _Current(threading.local):
    """The packing of the generation that runs in this thread."""

    packing: Packing | None = None


_current = _Current()


class Linear(nn.Linear):
    """An `nn.Linear` that may call oneDNN, with the same results up to rounding.

    It does so in float32 on a CPU where no derivatives are recorded: with a packed copy of the
    weight if the input has few rows and `Packing.generation` is on, and else with the weight itself
    on processors on which that is faster.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            packing, weight = _current.packing, self.weight
            few = x.numel() <= _MAX_ROWS * self.in_features
            if packing is not None and few:
                if self._fits(x, weight) and not weight.is_inference():
                    return self._product(x, packing.weight_of(self, weight))
            elif (
                x.numel() * self.out_features >= _LEAST_WORK
                and _prefers_onednn()
                and self._fits(x, weight)
            ):
                rows = x.numel() // self.in_features
                return self._turned(x) if rows in _TURNED else self._product(x, weight)
        return super().forward(x)

    @property
    def qconfig(self) -> Any:
        """Absent, because torch.ao.quantization replaces no subclass of `nn.Linear`.

        Setting it, as `quantize_dynamic` and its relatives do, raises a TypeError. Without it, they
        would leave the layer as it is.
        """
        raise AttributeError("a linear layer of gramian has no qconfig.")

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        raise TypeError(
            "torch.ao.quantization does not replace the linear layers of gramian: use "
            "torchao.quantization.quantize_, or load the model with a TorchAoConfig."
        )

    def _turned(self, x: Tensor) -> Tensor:
        """Compute `(W xᵀ)ᵀ`, which the general product does faster for a few rows."""
        y = torch.mm(self.weight, x.reshape(-1, self.in_features).t()).t().contiguous()
        y = y if self.bias is None else y.add_(self.bias)
        return y.reshape(*x.shape[:-1], self.out_features)

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        apply = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001 (no public name)
        return apply(x, weight, self.bias, "none", [], "")

    def _fits(self, x: Tensor, weight: Tensor) -> bool:
        return (
            x.dtype == weight.dtype == torch.float32
            and x.device.type == weight.device.type == "cpu"
            and not records_derivatives()
            and not torch.is_autocast_enabled("cpu")
            and type(weight) is nn.Parameter
            and weight.is_contiguous()
            and not _is_observed(x)
        )


def _is_observed(x: Tensor) -> bool:
    """Return whether a transform, a trace or a mode follows the operations on a tensor."""
    core = torch._C  # noqa: SLF001 (no public name, of these three either)
    return (
        type(x) is not Tensor
        or core._are_functorch_transforms_active()  # noqa: SLF001
        or core._get_tracing_state() is not None  # noqa: SLF001
        or core._len_torch_dispatch_stack() > 0  # noqa: SLF001
    )


@functools.cache
def _prefers_onednn() -> bool:
    """Return whether oneDNN's product is faster than the general one on this processor.

    The general one is that of MKL, which takes slower ways on processors of AMD.
    """
    found = ""
    with suppress(OSError):
        found = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    return can_pack() and torch.backends.mkl.is_available() and "AuthenticAMD" in found


def can_pack() -> bool:
    """Return whether this build of PyTorch supports packing."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
