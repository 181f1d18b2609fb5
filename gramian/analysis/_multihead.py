"""Read the maps of `torch.nn.MultiheadAttention`, which one function of torch computes inside."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gramian.analysis._keeping import kept
from gramian.analysis._responses import TOLERANCE, Unreadable
from gramian.analysis._single import single_frame
from gramian.analysis._tracing import Call, Frame
from gramian.analysis._values import copied

__all__ = ["is_multihead", "multihead_call"]


def is_multihead(module: nn.Module) -> bool:
    """Return whether a module is torch's attention with several heads, with its own `forward`."""
    return (
        isinstance(module, nn.MultiheadAttention)
        and type(module).forward is nn.MultiheadAttention.forward
    )


@torch.no_grad()
def multihead_call(frame: Frame) -> Call:
    """Return a run of such a module as a call of an attention function of its values.

    The module runs again and returns the maps of its heads, with all the masks that it was given.
    The call is as in `read_attention`; its values are those of the heads. Half precision is widened
    to single precision.

    Args:
        frame: The run of the module.

    Raises:
        Unreadable: if the maps, applied to the values and projected, are not the module's output.
    """
    frame = single_frame(frame)
    module: Any = frame.module
    args, kwargs = copied(frame.inputs)
    bound = inspect.signature(nn.MultiheadAttention.forward).bind(module, *args, **kwargs)
    bound.arguments |= {"need_weights": True, "average_attn_weights": False}
    with kept(module):
        torch.set_rng_state(frame.random)
        output, weights = nn.MultiheadAttention.forward(*bound.args, **bound.kwargs)
    assert weights is not None
    output, value = (_batched(module, x) for x in (output, bound.arguments["value"]))
    values = _heads(module, value)  # (batch, heads, S, N)
    weights = weights.reshape(len(output), module.num_heads, output.shape[1], -1)
    if weights.shape[-1] != values.shape[-2]:
        raise Unreadable("it attends to more than the positions of its values.")

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Any:
        return (weights @ value).transpose(1, 2), weights

    result = attend(module, values, values, values)
    projected = module.out_proj(result[0].flatten(2))
    if not bool((projected - output).norm() <= TOLERANCE * output.norm()):
        raise Unreadable("its output is not its map applied to its values.")
    return Call(("module", "", 0), attend, ((module, values, values, values), {}), result)


def _batched(module: Any, x: Tensor) -> Tensor:
    """Return a sequence as (batch, L, size)."""
    if x.ndim == 2:
        return x[None]
    return x if module.batch_first else x.transpose(0, 1)


def _heads(module: Any, value: Tensor) -> Tensor:
    """Return the projected values of all heads, (batch, heads, S, N)."""
    size = module.embed_dim
    whole, bias = module.in_proj_weight, module.in_proj_bias
    weight = module.v_proj_weight if whole is None else whole[2 * size :]
    values = F.linear(value, weight, None if bias is None else bias[2 * size :])
    return values.unflatten(-1, (module.num_heads, module.head_dim)).transpose(1, 2)
