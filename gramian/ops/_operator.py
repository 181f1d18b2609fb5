"""Registration of operators with PyTorch.

The same as `torch.library.custom_op`, whose operators import `torch._dynamo` when they are first
called: two seconds and 80 MB that nobody needs who does not compile.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("gramian", "FRAGMENT")


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Makes a function the operator `gramian::name`.

    Its annotations are the operator's schema. It must not change its arguments, and its results
    must not share memory with them. It computes in the precision of its arguments, also where
    autocast would have matrix products in half precision.
    """

    def register(function: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))

        @functools.wraps(function)
        def implementation(*arguments: Any) -> Any:
            device = arguments[0].device.type
            if not torch.is_autocast_enabled(device):
                return function(*arguments)
            with torch.autocast(device, enabled=False):
                return function(*arguments)

        _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        return getattr(torch.ops.gramian, name).default

    return register
