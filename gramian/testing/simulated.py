"""A device that is not the CPU, simulated in the memory of the CPU.

PyTorch leaves one type of device, PrivateUse1, to others. Here it gets the name "simulated". A
tensor on this device owns host memory that no operation on the CPU can reach. Every operation on it
passes PyTorch's own dispatcher, so that factories, copies, views, autograd and composite operations
behave as they do on a GPU. Only the last step differs: the operation computes on an alias of the
same memory on the CPU. Hence the simulation notices what a GPU would:

- A tensor on the CPU among the arguments is an error, unless it is a scalar or an index.
- What makes the host wait for the device is recorded: the reading of a value, a copy between the
  device and the CPU, and a result whose shape depends on values. The list follows
  `torch.cuda.set_sync_debug_mode`.
- In `without_float64`, a tensor in double precision is an error, as on Apple's GPUs.
"""
# ruff: noqa: SLF001 (PyTorch has no public names for what a device is made of)

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gramian.ops.devices import DEVICES_WITHOUT_FLOAT64, has_float64

__all__ = ["Wait", "recorded_waits", "simulated_device", "without_float64"]

_NAME = "simulated"
_PACKAGE = Path(__file__).parents[1]
_OWN = str(Path(__file__).parent)
_DOUBLE = (torch.float64, torch.complex128)
_PLAIN = (bool, int, float, complex, str, torch.dtype, torch.layout, torch.memory_format)
_CPU = torch.device("cpu")
_ON_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

# Operations for whose result the host waits on a GPU: a value, a shape, or a check of convergence.
_WAITING = frozenset(
    {
        "_linalg_check_errors",
        "_linalg_eigh",
        "_linalg_svd",
        "_local_scalar_dense",
        "_unique",
        "_unique2",
        "bincount",
        "equal",
        "histc",
        "linalg_eig",
        "linalg_eigvals",
        "linalg_lstsq",
        "masked_select",
        "multinomial",
        "nonzero",
        "unique_consecutive",
        "unique_dim",
    }
)
_INDEXING = frozenset({"_index_put_impl_", "_unsafe_index", "index", "index_put", "index_put_"})
# Operations that PyTorch defines for all devices at once, by means that a device in Python lacks.
_OF_ALL_DEVICES = ("conj_physical_",)
# Operations of which PyTorch takes back numbers that it passes in the place of tensors.
_ARITHMETIC = ("add", "div", "mul", "sub")


class Wait(NamedTuple):
    """One wait of the host for the device.

    Attributes:
        operation: name of the operation in PyTorch, or "copy to the CPU" or "copy from the CPU".
        place: innermost function of Gramian that asked for it, as "ops/scan.py:integer_power", or
            "" if none did.
    """

    operation: str
    place: str


class _Condition:
    """The lists that record waits, and what is registered with PyTorch: one for the process."""

    def __init__(self) -> None:
        self.ledgers: list[list[Wait]] = []
        self.libraries: list[torch.library.Library] = []


_condition = _Condition()
_lock = threading.Lock()


def simulated_device() -> torch.device:
    """Return the simulated device, which the first call sets up for the rest of the process.

    From then on, autograd runs in the thread that calls it. Its engine has threads for the devices
    that it knew when it first ran, and this one may be younger.

    Returns:
        `torch.device("simulated:0")`.

    Raises:
        RuntimeError: if this PyTorch cannot define a device in Python, or if another package has
            already defined the device that PyTorch leaves to others.
    """
    with _lock:
        if not _condition.libraries:
            _set_up()
    torch.autograd.set_multithreading_enabled(False)
    return torch.device(_NAME, 0)


@contextlib.contextmanager
def without_float64() -> Iterator[None]:
    """Let the simulated device have no double precision, as Apple's GPUs have none."""
    DEVICES_WITHOUT_FLOAT64.add(_NAME)
    try:
        yield
    finally:
        DEVICES_WITHOUT_FLOAT64.discard(_NAME)


@contextlib.contextmanager
def recorded_waits() -> Iterator[list[Wait]]:
    """Record every wait of the host for the simulated device.

    Yields:
        The list to which the waits are added.
    """
    ledger: list[Wait] = []
    _condition.ledgers.append(ledger)
    try:
        yield ledger
    finally:
        _condition.ledgers = [one for one in _condition.ledgers if one is not ledger]


def _set_up() -> None:
    try:
        from torch.utils.backend_registration import (
            _setup_privateuseone_for_python_backend as define,
        )
    except ImportError as error:
        raise RuntimeError(
            f"a simulated device needs a newer PyTorch, such as 2.13; got {torch.__version__}."
        ) from error
    name = torch._C._get_privateuse1_backend_name()
    if name != "privateuseone":
        raise RuntimeError(
            f"a simulated device needs the place that the device {name!r} already takes in PyTorch."
        )
    define(_NAME, _Module())
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(_run, "PrivateUse1")
    aten = torch.library.Library("aten", "IMPL")
    for key in ("Conjugate", "Negative"):  # to resolve these bits is a copy, which resolves them
        aten.impl("_copy_from", torch.library.fallthrough_kernel, key)
    aten.impl("_copy_from", _copy, "PrivateUse1")
    for op in _OF_ALL_DEVICES:
        aten.impl(op, functools.partial(_run, getattr(torch.ops.aten, op).default), "PrivateUse1")
    _condition.libraries = [everything, aten]  # what they register goes when they do


class _Module:
    """What PyTorch asks of the module `torch.simulated`."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def get_rng_state(self, device: int | torch.device = 0) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: int | torch.device = 0) -> None:
        torch.set_rng_state(state)

    def manual_seed_all(self, seed: int) -> None:
        """Do nothing, because the device draws from the CPU's generator."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation of PyTorch, some of whose tensors are on the simulated device."""
    call = _Call(op)
    if call.name == "set_":  # which moves a tensor into another storage
        return op.redispatch(_ON_CPU, *args, **kwargs)
    inside = [call.enter(value) for value in args]
    named = {key: call.enter(value) for key, value in kwargs.items()}
    for place in call.numbers:
        if place < len(inside) and isinstance(inside[place], int | float | complex):
            inside[place] = torch.tensor(inside[place])
    _record(call.name, args)
    sizes = [alias.shape for _, alias in call.given]
    result = op(*inside, **named)
    for (tensor, alias), size in zip(call.given, sizes, strict=True):
        if alias.shape != size:  # an argument `out` of another shape
            _lay_out(tensor, alias, _storage(alias.untyped_storage()))
    return call.leave(result)


class _Call:
    """One operation, and the way of its arguments to the CPU and of its results back."""

    def __init__(self, op: Any) -> None:
        self.op = op
        self.name, self.numbers = _signature(op)
        self.given: list[tuple[Tensor, Tensor]] = []  # tensors of the device, and their aliases

    def enter(self, value: Any) -> Any:
        """Return an argument as the operation takes it on the CPU."""
        if isinstance(value, Tensor):
            if value.device.type != _NAME:
                self.check_cpu_tensor(value)
                return value
            _check_dtype(self.op, value)
            self.given.append((value, _alias(value)))
            return self.given[-1][1]
        if value is None or type(value) in _PLAIN:
            return value
        if isinstance(value, list):
            return [self.enter(one) for one in value]
        if isinstance(value, torch.device):
            return _CPU
        if isinstance(value, torch.Generator):
            raise RuntimeError(
                f"{self.op.name()}: expected a generator of {_NAME}; got one of {value.device}."
            )
        return value

    def leave(self, value: Any) -> Any:
        """Return a result as it is on the device."""
        if isinstance(value, tuple | list):
            return type(value)(self.leave(one) for one in value)
        if not isinstance(value, Tensor):
            return value
        for tensor, alias in self.given:
            if value is alias:
                return tensor
        home = value.untyped_storage()
        for tensor, alias in self.given:
            if home._cdata == alias.untyped_storage()._cdata:  # a view
                return _tensor(value, tensor.untyped_storage())
        made = _tensor(value, _storage(home))
        _check_dtype(self.op, made)
        return made

    def check_cpu_tensor(self, value: Tensor) -> None:
        """Raise a RuntimeError if a GPU would, for a tensor on the CPU among the arguments."""
        if value.ndim == 0 or value.is_meta:
            return
        if self.name in _INDEXING and value.dtype == torch.int64:
            _note("copy from the CPU")
            return
        raise RuntimeError(
            f"{self.op.name()}: expected all tensors on {_NAME}:0; got one of shape "
            f"{tuple(value.shape)} on {value.device}."
        )


@functools.cache
def _signature(op: Any) -> tuple[str, list[int]]:
    """Return an operation's name, and the places where PyTorch passes numbers as tensors."""
    name = op.name().split("::")[1].split(".")[0]
    if name.rstrip("_") in _ARITHMETIC:
        return name, []
    return name, [n for n, one in enumerate(op._schema.arguments) if str(one.type) == "Tensor"]


def _check_dtype(op: Any, value: Tensor) -> None:
    if value.dtype in _DOUBLE and not has_float64(value.device):
        raise TypeError(f"{op.name()}: this device has no tensors in {value.dtype}.")


def _copy(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy between the devices, or on the simulated one."""
    for value in (source, target):
        if value.device.type == _NAME:
            _check_dtype(torch.ops.aten._copy_from.default, value)
    if source.device != target.device and not non_blocking:
        _note("copy to the CPU" if target.device.type == "cpu" else "copy from the CPU")
    _alias(target).copy_(_alias(source))
    return target


def _record(name: str, args: tuple[Any, ...]) -> None:
    if not _condition.ledgers:
        return
    if name in _WAITING or (name == "repeat_interleave" and not isinstance(args[-1], int)):
        _note(name)
    elif name == "_index_put_impl_" and args[2].numel() != 1 and _has_mask(args[1]):
        _note("index_put_")  # a single value fills by the mask


def _has_mask(indices: list[Tensor | None]) -> bool:
    return any(index is not None and index.dtype == torch.bool for index in indices)


def _note(operation: str) -> None:
    if _condition.ledgers:
        wait = Wait(operation, _place())
        for ledger in _condition.ledgers:
            ledger.append(wait)


def _place() -> str:
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(str(_PACKAGE)) and not file.startswith(_OWN):
            where = Path(file).relative_to(_PACKAGE).as_posix()
            name = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)  # from Python 3.11 on
            return f"{where}:{name.replace('.<locals>', '')}"
        frame = frame.f_back
    return ""


def _alias(tensor: Tensor) -> Tensor:
    """Return the tensor on the CPU that shares the memory of a tensor of the device."""
    if tensor.device.type != _NAME:
        return tensor
    host = tensor.untyped_storage().host  # type: ignore[attr-defined]
    alias = torch.empty(0, dtype=tensor.dtype)
    alias.set_(host, tensor.storage_offset(), tensor.size(), tensor.stride())
    return _like(alias, tensor)


def _storage(host: torch.UntypedStorage) -> Any:
    """Return a storage of the device that lies in the memory of one on the CPU, and keeps it."""
    make = torch._C._construct_storage_from_data_pointer
    storage: Any = make(host.data_ptr(), torch.device(_NAME, 0), host.nbytes())
    storage.host = host  # the storage's object lives as long as its memory is in use
    storage.clone = lambda: _storage(host.clone())  # its own would ask for an allocator
    return storage


def _tensor(value: Tensor, storage: Any) -> Tensor:
    """Return the tensor of the device that is laid out in `storage` as `value` is in its own."""
    tensor = torch._C._acc.create_empty_tensor((0,), value.dtype)
    _lay_out(tensor, value, storage)
    return _like(tensor, value)


def _lay_out(tensor: Tensor, value: Tensor, storage: Any) -> None:
    """Let a tensor of the device lie in `storage` as `value` lies in its own."""
    layout = value.storage_offset(), value.size(), value.stride()
    torch.ops.aten.set_.source_Storage_storage_offset.redispatch(_ON_CPU, tensor, storage, *layout)


def _like(made: Tensor, value: Tensor) -> Tensor:
    """Set whether the tensor is read as its conjugate or its negative."""
    if value.is_conj():
        torch._C._set_conj(made, True)
    if value.is_neg():
        torch._C._set_neg(made, True)
    return made
