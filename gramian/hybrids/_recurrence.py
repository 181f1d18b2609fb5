r"""Replace attention heads by gated linear recurrences, beside a window of the last tokens.

A head whose queries q, keys k and values v have their positions already keeps n states:

    S_t = Λ S_{t-1} + φ(k_{t-w}) [v_{t-w}, 1]ᵀ,   Λ = diag(λ),   S (n × (M + 1)),
    [z_t, d_t] = ψ(q_t)ᵀ S_t + Σ_{s ∈ window} exp(σ q_t · k_s) [v_s, 1],   y_t = z_t / d_t.

This is linear attention with its denominator (arXiv 2006.16236, equations 16–20). Its features are
exponentials of linear maps, as in Hedgehog (arXiv 2402.04347): φ(k) = softmax(B k + b) and
ψ(q) = exp(A q + a). The last w tokens and the first m stay in the softmax, and share its
denominator with the states, as in LoLCATs (arXiv 2410.10254). Each state has a decay λ
in (0, 1]. Heads that share keys and values share B, b, λ and the memory S; A and a are their own.

The memory is n (M + 1) numbers for each of these groups, besides the w + m keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from gramian.analysis import Attended, AttentionCall, replace_attention, window_mask
from gramian.hybrids._replacement import Fitted, Replacement, register, window_words
from gramian.systems import working_dtype

__all__ = [
    "LEAST_DECAY",
    "LayerRecurrence",
    "Recurrence",
    "check_causal",
    "local_part",
    "stored_tokens",
    "tensors_of",
]

_BLOCK = 16  # steps; within a block decays are split at its middle, λ^(t-s) = λ^(t-8) λ^(8-s)
LEAST_DECAY = 1 / 64
"""The smallest decay, for which λ^(±8) is far from the ends of float32."""

Local = tuple[Tensor, Tensor]
"""Sums of the exponentials of a window times values and ones, (batch, H, L, M + 1), divided by the
largest exponential of each query; and the logarithms of these, (batch, H, L)."""


@dataclass(frozen=True)
class LayerRecurrence:
    """The recurrences of a layer of H heads, G of which share keys and values each.

    Attributes:
        query_map: A, (H, n, N).
        query_bias: a, (H, n).
        key_map: B, (H / G, n, N).
        key_bias: b, (H / G, n).
        decay: λ, (H / G, n), in [1/64, 1].
    """

    query_map: Tensor
    query_bias: Tensor
    key_map: Tensor
    key_bias: Tensor
    decay: Tensor

    def to(self, like: Tensor) -> LayerRecurrence:
        """Return the recurrences in the dtype and on the device of a tensor."""
        return LayerRecurrence(**{name: x.to(like) for name, x in vars(self).items()})

    def read(
        self, query: Tensor, key: Tensor, value: Tensor, local: Local, stored: Tensor, window: int
    ) -> Tensor:
        """Compute the outputs of whole sequences.

        Args:
            query: (batch, H, L, N).
            key: (batch, H / G, L, N).
            value: (batch, H / G, L, M).
            local: What `local_part` computes of the window.
            stored: Which tokens enter the states when they leave the window, (batch or 1, L).
            window: Number w of the last tokens that are in no state.

        Returns:
            (batch, H, L, M), in the dtype of the queries.
        """
        near, top = local
        batch, heads, length, _ = query.shape
        groups, states = self.decay.shape
        scores = query @ self.query_map.mT + self.query_bias[:, None]  # (batch, H, L, n)
        features = (key @ self.key_map.mT + self.key_bias[:, None]).softmax(-1)
        features = features * stored[:, None, :, None]
        features, value = (  # what has just left the window
            pad(x, (0, 0, window, 0))[..., :length, :] for x in (features, _with_ones(value))
        )
        largest = torch.maximum(scores.amax(-1), top)
        scores = (scores - largest[..., None]).exp()
        scores = scores.reshape(batch, groups, heads // groups, length, states)
        far = _decaying_sums(scores, features, value, self.decay).reshape(near.shape)
        sums = far + (top - largest).exp()[..., None] * near
        least = torch.finfo(sums.dtype).tiny  # rows of padding see nothing
        return sums[..., :-1] / sums[..., -1:].clamp_min(least)


def local_part(call: AttentionCall, window: int, sinks: int) -> Local:
    """Compute the sums over the window and the first tokens of a call of attention."""
    dtype = working_dtype(call.query)
    query, key, value = (x.to(dtype) for x in (call.query, call.key, call.value))
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).mT * call.scale
    seen = call.visible & window_mask(call, window, sinks)[:, None]
    if call.mask is not None and call.mask.dtype != torch.bool:
        scores = scores + torch.where(seen, call.mask, 0).to(dtype)  # biases of positions
    scores = torch.where(seen, scores, torch.finfo(dtype).min)
    top = scores.amax(-1)
    weights = (scores - top[..., None]).exp() * seen
    return weights @ _with_ones(value).repeat_interleave(group, 1), top


def _with_ones(value: Tensor) -> Tensor:
    """Return values with a column of ones, (…, M + 1)."""
    return torch.cat([value, torch.ones_like(value[..., :1])], -1)


def _decaying_sums(scores: Tensor, features: Tensor, value: Tensor, decay: Tensor) -> Tensor:
    """Compute `Σ_{s ≤ t} Σ_j scores_tj λ_j^(t-s) features_sj value_s` in blocks of steps.

    All terms are products of numbers that are not negative and of the values, so that no digits are
    lost where the decays are split.

    Args:
        scores: (batch, groups, G, L, n).
        features: (batch, groups, L, n).
        value: (batch, groups, L, M).
        decay: (groups, n).

    Returns:
        (batch, groups, G, L, M).
    """
    length, rest = scores.shape[-2], -scores.shape[-2] % _BLOCK
    scores, features, value = (
        pad(x, (0, 0, 0, rest)).unflatten(-2, (-1, _BLOCK)) for x in (scores, features, value)
    )  # (…, blocks, steps, n)
    step = torch.arange(_BLOCK, dtype=decay.dtype, device=decay.device)[:, None]
    log = decay.log()[:, None]  # (groups, 1, n)
    split = ((step - _BLOCK // 2) * log).exp()[:, None]  # (groups, 1, steps, n)
    maps = (scores * split[:, None]) @ (features / split).mT[:, :, None]
    within = maps.tril() @ value[:, :, None]
    added = (features * ((_BLOCK - 1 - step) * log).exp()[:, None]).mT @ value
    over = (_BLOCK * log).exp().mT  # (groups, n, 1)
    memory, memories = torch.zeros_like(added[:, :, 0]), []
    for block in added.unbind(2):
        memories.append(memory)  # (batch, groups, n, M)
        memory = over * memory + block
    before = torch.stack(memories, 2)[:, :, None]
    across = (scores * ((step + 1) * log).exp()[:, None, None]) @ before
    return (within + across).flatten(-3, -2)[..., :length, :]


@register("recurrence")
class Recurrence(Replacement):
    """A gated linear recurrence that was fitted to the head on a text, beside a window."""

    criterion = "recurrence"
    fitted = True

    def layer(self, path: str) -> LayerRecurrence:
        """Return the recurrences of a layer.

        Raises:
            ValueError: if the layer has none, or if their shapes are not those of recurrences.
        """
        names = LayerRecurrence.__dataclass_fields__
        found = {name: self.parameters.get(f"{path}/{name}") for name in names}
        missing = [name for name, x in found.items() if x is None]
        if missing:
            raise ValueError(
                f"the plan has no fitted recurrence of {path}; load a plan by HybridPlan.load, "
                "with its file of parameters beside it."
            )
        layer = LayerRecurrence(**found)  # type: ignore[arg-type]
        shape, groups = layer.query_map.shape, layer.key_map.shape[:1]
        expected = {
            "query_map": (*shape[:1], self.state, *shape[-1:]),
            "query_bias": (*shape[:1], self.state),
            "key_map": (*groups, self.state, *shape[-1:]),
            "key_bias": (*groups, self.state),
            "decay": (*groups, self.state),
        }
        for name, tensor in vars(layer).items():
            if tuple(tensor.shape) != expected[name]:
                raise ValueError(
                    f"{name} of {path} must have the shape {expected[name]}; got "
                    f"{tuple(tensor.shape)}."
                )
        return layer

    def applied(
        self, model: nn.Module, heads: Mapping[str, Sequence[int] | None]
    ) -> AbstractContextManager[None]:
        layers = {path: self.layer(path) for path in heads}

        def attend(call: AttentionCall) -> Attended:
            return self._attend(layers[call.path], call, heads[call.path])

        return replace_attention(model, dict.fromkeys(heads, attend))

    def _attend(
        self, layer: LayerRecurrence, call: AttentionCall, heads: Sequence[int] | None
    ) -> Attended:
        count, width = call.query.shape[1], call.query.shape[-1]
        given = len(layer.query_map), len(layer.key_map), layer.query_map.shape[-1]
        if given != (count, call.key.shape[1], width):
            raise ValueError(
                f"{call.path} has {count} heads of {width} features in {call.key.shape[1]} groups; "
                f"the recurrences are for {given[0]} of {given[2]} in {given[1]}."
            )
        check_causal(call)
        dtype = working_dtype(call.query)
        query, key, value = (x.to(dtype) for x in (call.query, call.key, call.value))
        local = local_part(call, self.window, self.sinks)
        y = layer.to(query).read(
            query, key, value, local, stored_tokens(call, self.sinks), self.window
        )
        y = y.transpose(1, 2).to(call.value.dtype)  # (batch, L, H, M)
        if heads is None:
            return y.contiguous(), None
        output = call.run(call.mask)[0].clone()
        for head in heads:
            call.check_head(head)
            output[:, :, head] = y[:, :, head]
        return output, None

    def description(self) -> str:
        states = (
            "a recurrence of 1 state"
            if self.state == 1
            else (f"a recurrence of {self.state} states")
        )
        return f"have {states} beside {window_words(self.window, self.sinks)}"

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        rows: Tensor,
        paths: Sequence[str],
        *,
        window: int,
        sinks: int,
        state: int,
        steps: int,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> Fitted:
        from gramian.hybrids._fitting import fit_recurrences

        return fit_recurrences(
            model,
            rows,
            paths,
            window=window,
            sinks=sinks,
            state=state,
            steps=steps,
            seed=seed,
            progress=progress,
        )


def stored_tokens(call: AttentionCall, sinks: int) -> Tensor:
    """Return which tokens enter the states, (batch or 1, L): the real ones after the first."""
    return call.real & (call.real.long().cumsum(-1) > sinks)


def check_causal(call: AttentionCall) -> None:
    """Raise a ValueError unless the queries of a call see all real tokens before them."""
    visible, real = call.visible, call.real
    length = visible.shape[-1]
    before = torch.ones(length, length, dtype=torch.bool, device=visible.device).tril()
    expected = before & real[:, None, None] & real[:, None, :, None]
    if not torch.equal(visible & real[:, None, :, None], expected.expand_as(visible)):
        raise ValueError(
            f"{call.path} cannot have a recurrence: its mask hides more than the future and "
            "padding."
        )
    starts = real[:, 1:] & ~real[:, :-1]
    if bool((starts.sum(-1) + real[:, 0] > 1).any()):
        raise ValueError(
            f"{call.path} cannot have a recurrence: there is padding between its real tokens."
        )


def tensors_of(path: str, layer: LayerRecurrence) -> Mapping[str, Tensor]:
    """Return the parameters of a layer by the names under which they are stored."""
    return {f"{path}/{name}": tensor for name, tensor in vars(layer).items()}
