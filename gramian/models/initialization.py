"""Initialize the tensors of a loaded model that are in no file, and keep all other tensors.

transformers builds a model without memory, reads the tensors in the files, and then initializes
the other tensors, module by module. Its initializers skip tensors that were read. Code that writes
in place (`weight.data.normal_()`) does not skip them. If no code writes a tensor, its values are
arbitrary.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Keeping", "is_read", "own_tensors", "reset_unwritten"]


def is_read(part: Tensor | nn.Module) -> bool:
    """Return whether a tensor or module was read from a file, or will be tied to one that was."""
    return bool(getattr(part, "_is_hf_initialized", False))


class Keeping(TorchDispatchMode):
    """A context that, on exit, restores the tensors that were read from files.

    Within the context, code may write into any tensor. A tensor is copied only when code is about
    to write into it. Writes by numpy are not detected.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._read = [(*place, place[2].data) for place in _places(model) if is_read(place[2])]
        self._aliases = {_storage(alias): alias for *_, alias in self._read}
        # Quantizers initialize the modules that they make, and mark them as transformers does.
        modules = [module for module in model.modules() if not is_read(module)]
        self._unread = {
            _storage(tensor)
            for module in modules
            for *_, tensor in own_tensors(module)
            if not is_read(tensor)
        }
        self._values: dict[int, Tensor] = {}
        self._written: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        schema = func._schema  # noqa: SLF001 (operators have no public one)
        for index, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[index] if index < len(args) else kwargs.get(argument.name)
                for tensor in tree_leaves(given):
                    if isinstance(tensor, Tensor):
                        self._note(_storage(tensor))
        return func(*args, **kwargs)

    def _note(self, storage: int) -> None:
        if storage in self._aliases and storage not in self._values:
            self._values[storage] = self._aliases[storage].clone()
        self._written.add(storage)

    def unwritten(self, module: nn.Module) -> list[str]:
        """Return the names of a module's own tensors that were neither read nor written."""
        return [
            name
            for _, name, tensor in own_tensors(module)
            if tensor.numel()
            and not is_read(tensor)
            and _storage(tensor) in self._unread - self._written
        ]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        with torch.no_grad():
            for storage, values in self._values.items():
                self._aliases[storage].copy_(values)
        for place, name, tensor, alias in self._read:
            if place.get(name) is not tensor and not is_read(place.get(name, alias)):
                place[name] = tensor
            if _storage(tensor) != _storage(alias):
                tensor.data = alias


def reset_unwritten(model: nn.Module, keeping: Keeping) -> None:
    """Call `reset_parameters` on every module with a tensor that was neither read nor written.

    Raises:
        ValueError: if a tensor still has not been written afterwards.
    """
    left = []
    for path, module in model.named_modules():
        if keeping.unwritten(module):
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                with torch.no_grad():
                    reset()
            left += [f"{path}.{name}".lstrip(".") for name in keeping.unwritten(module)]
    if left:
        raise ValueError(
            f"{', '.join(left[:3])}{', …' if len(left) > 3 else ''}: not in the files, and nothing "
            "initializes what is not; fill it in _init_weights, in the module's reset_parameters, "
            "or save it."
        )


def own_tensors(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Yield the parameters and buffers of a module, without those of its submodules.

    Yields:
        The module's dictionary that holds the tensor, the tensor's name in it, and the tensor.
    """
    # torch's public iterators do not yield the dictionaries, which are needed to replace a tensor.
    for place in (module._parameters, module._buffers):  # noqa: SLF001 (see above)
        for name, tensor in place.items():
            if tensor is not None:
                yield place, name, tensor


def _places(model: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    for module in model.modules():
        yield from own_tensors(module)


def _storage(tensor: Tensor) -> int:
    """Return the identity of a tensor's memory, which all views of the tensor share."""
    storage = tensor.untyped_storage()
    return int(storage._cdata)  # noqa: SLF001 (data_ptr() is 0 for every tensor on meta)
