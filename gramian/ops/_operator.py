"""Registration of operators with PyTorch, and of their derivatives.

This module replaces `torch.library.custom_op`, whose operators import `torch._dynamo` when they are
first called. That import costs two seconds and 80 MB even in programs that never compile. Moreover,
`register_autograd` of `torch.library` registers reverse mode only: forward-mode derivatives are
then silently zero, and the transforms of `torch.func` fail. An operator that is registered here has
both modes, or raises an error.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._functorch.eager_transforms import enable_inplace_requires_grad
from torch._functorch.utils import enable_single_level_autograd_function

from gramian.ops.derivatives import forward_mode_is_on, is_differentiated
from gramian.ops.processors import adapt_threads

__all__ = [
    "batch_first",
    "differentiable",
    "operator",
    "recorded_inside_transforms",
    "recording",
    "total",
]

_LIBRARY = torch.library.Library("gramian", "FRAGMENT")

_AFTER_AUTOGRAD = torch._C._after_autograd_keyset  # noqa: SLF001 (no public name)
_below_autograd = torch._C._AutoDispatchBelowAutograd  # noqa: SLF001 (no public name)
_transforms_are_active = torch._C._are_functorch_transforms_active  # noqa: SLF001 (no public name)
_forward_mode_is_enabled = torch._C._is_fwd_grad_enabled  # noqa: SLF001 (no public name)
_Function = torch.autograd.function._SingleLevelFunction  # noqa: SLF001 (no public name)
_compiled_autograd_key = torch.autograd.Function._compiled_autograd_key  # noqa: SLF001 (as above)
_enable_forward_mode = forward_ad._set_fwd_grad_enabled  # noqa: SLF001 (no public name)


@contextmanager
def recording() -> Iterator[None]:
    """Record operations for derivatives in the implementation of an operator, below autograd."""
    autograd = torch._C.DispatchKey.AutogradFunctionality  # noqa: SLF001 (no public name)
    with torch._C._SetExcludeDispatchKeyGuard(autograd, False), torch.enable_grad():  # noqa: SLF001
        yield


@contextmanager
def recorded_inside_transforms() -> Iterator[None]:
    """Let `requires_grad_` begin a graph of its own in a forward mode of `torch.func` too."""
    with enable_inplace_requires_grad(True):
        yield


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Register a function as the operator `gramian::name`.

    The annotations of the function define the operator's schema. The function must not change its
    arguments, and its results must not share memory with them. The operator computes in the
    precision of its arguments, even under autocast, which would otherwise compute matrix products
    in half precision. `differentiable` gives the operator derivatives. An operator without
    derivatives raises an error if an argument requires a gradient or has a tangent.
    """

    def register(function: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))

        @functools.wraps(function)
        def implementation(*arguments: Any) -> Any:
            adapt_threads()
            device = arguments[0].device.type
            if not torch.is_autocast_enabled(device):
                return function(*arguments)
            with torch.autocast(device, enabled=False):
                return function(*arguments)

        _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        return getattr(torch.ops.gramian, name).default

    return register


def differentiable(
    op: Any,
    *,
    setup: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
    backward: Callable[..., Any] | None = None,
    jvp: Callable[..., Any] | None = None,
) -> None:
    """Give an operator its derivatives.

    Without `backward` and `jvp`, the operator raises an error if derivatives are needed.

    Args:
        op: The operator, as returned by `operator`.
        setup: `setup(ctx, inputs, output)`, as in `torch.autograd.Function`.
        backward: `backward(ctx, *gradients)`, as in `torch.autograd.Function`. While
            `records_derivatives()` is true, it must consist of operations that are themselves
            differentiable.
        jvp: `jvp(inputs, tangents)` returns the tangents of the outputs. In `tangents`, None takes
            the place of an input without a tangent. The result is a tensor or a tuple as the
            outputs are, of the same dtypes, in which None means zero. The function must consist of
            operations that are themselves differentiable.
    """

    def compute(keyset: Any, inputs: Sequence[Any]) -> Any:
        with _below_autograd():
            return op.redispatch(keyset & _AFTER_AUTOGRAD, *inputs)

    def forward(ctx: Any, *inputs_and_context: Any) -> Any:
        *inputs, keyset, modes = inputs_and_context
        if modes is None:
            outputs = compute(keyset, inputs)
        else:
            with torch.set_grad_enabled(modes[0]), _enable_forward_mode(modes[1]):
                outputs = compute(keyset, inputs)
        assert setup is not None
        setup(ctx, tuple(inputs), outputs)
        if forward_mode_is_on():
            ctx.of_tangents = inputs, modes
        return outputs

    def reverse_mode(ctx: Any, *gradients: Any) -> Any:
        assert backward is not None
        answer = backward(ctx, *gradients)
        return *(answer if isinstance(answer, tuple) else (answer,)), None, None

    def forward_mode(ctx: Any, *tangents: Any) -> Any:
        assert jvp is not None
        inputs, modes = ctx.of_tangents
        del ctx.of_tangents
        if modes is None:
            return jvp(inputs, tangents[:-2])
        with _enable_forward_mode(modes[1]):
            primals = [
                forward_ad.unpack_dual(value).primal if isinstance(value, Tensor) else value
                for value in inputs
            ]
            return jvp(primals, tangents[:-2])

    recorded: Any = type(
        op.name().replace("::", "_"),
        (_Function,),
        {
            "forward": staticmethod(forward),
            "backward": staticmethod(reverse_mode),
            "jvp": staticmethod(forward_mode),
            "_compiled_autograd_key": staticmethod(_compiled_autograd_key),
        },
    )

    def dispatched(keyset: Any, *inputs: Any) -> Any:
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        if not any(map(is_differentiated, tensors)):
            return compute(keyset, inputs)
        if backward is None or jvp is None:
            raise NotImplementedError(f"{op.name()} has no derivatives: it is itself part of one.")
        if not _transforms_are_active():
            return recorded.apply(*inputs, keyset, None)
        # A dispatched operator sees one level of the transforms of torch.func: its arguments are
        # already unwrapped, and a `torch.autograd.Function` would unwrap them again. The operations
        # that it calls are differentiated at the outer levels, but not at this one.
        modes = torch.is_grad_enabled(), _forward_mode_is_enabled()
        with enable_single_level_autograd_function():
            return recorded.apply(*inputs, keyset, modes)

    _LIBRARY.impl(op.name().split("::")[1], dispatched, "Autograd", with_keyset=True)


def total(*terms: Tensor | None) -> Tensor | None:
    """Return the sum of the terms, in which None means zero."""
    given = [term for term in terms if term is not None]
    return sum(given[1:], given[0]) if given else None


def batch_first(tensor: Any, axis: int | None, size: int = 1) -> Any:
    """Move the mapped axis of a tensor to the front, as the vmap rule of an operator needs it.

    A tensor that is not mapped gets a first axis of size `size`. Other values are returned
    unchanged.
    """
    if not isinstance(tensor, Tensor):
        return tensor
    return tensor.expand(size, *tensor.shape) if axis is None else tensor.movedim(axis, 0)
