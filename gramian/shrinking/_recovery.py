r"""Recover what smaller states lost: train on the text towards the predictions of the original.

The objective is the divergence `KL(p ‖ q) = Σ_v p(v) log(p(v) / q(v))` from the original's
distribution p of the next token to that of the smaller model, q, averaged over the tokens
(knowledge distillation: Hinton, Vinyals and Dean, arXiv 1503.02531, with temperature 1). Training
adds `Σ ‖h − g‖² / Σ ‖h‖²`, where h are the last hidden states of the original, which its output
embeddings read, and g those of the smaller model (hints: Romero et al., arXiv 1412.6550).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from gramian._finetuning import finetune_briefly, held_out
from gramian._labels import IGNORED
from gramian.filters import parameter_groups
from gramian.ops.fp8 import FP8Linear
from gramian.shrinking._family import Layer
from gramian.shrinking._passes import window_scores
from gramian.shrinking._texts import Windows
from gramian.shrinking._trying import Small

__all__ = ["Recovery", "as_recovery", "check_windows", "recover", "recover_best"]

_RATES = {"full": 3e-4, "lora": 1e-3}


@dataclass(frozen=True)
class Recovery:
    """How a model is trained after its states have become smaller.

    The objective is the divergence from the original's predictions, plus the relative error of the
    last hidden states. AdamW trains without weight decay. The learning rate rises over a tenth of
    the steps and falls to zero along a cosine. No window is drawn again before every other one was.

    Args:
        steps: number of steps, at least 1.
        method: "full" trains all weights that require gradients. "lora" trains low-rank changes of
            the linear maps (LoRA: Hu et al., arXiv 2106.09685) with peft, and merges them.
        learning_rate: peak of the learning rate; by default 3e-4 for "full" and 1e-3 for "lora".
        batch: number of windows in each step.
        rank: rank of the changes of "lora".
        candidates: number of criteria, the best first, whose models are all trained. The one that
            is best afterwards is kept: an order of criteria before a recovery often is another one
            after it.

    Raises:
        ValueError: if a value is out of range.
    """

    steps: int
    method: str = "full"
    learning_rate: float | None = None
    batch: int = 8
    rank: int = 8
    candidates: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "rank", "candidates"):
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name} of a recovery must be at least 1; got {size!r}.")
        if self.method not in _RATES:
            raise ValueError(
                f"method of a recovery must be {' or '.join(_RATES)}; got {self.method!r}."
            )
        rate = self.learning_rate
        if rate is not None and not (isinstance(rate, int | float) and 0 < rate < math.inf):
            raise ValueError(
                f"learning_rate of a recovery must be a positive number; got {rate!r}."
            )

    @property
    def rate(self) -> float:
        """The peak of the learning rate."""
        return _RATES[self.method] if self.learning_rate is None else self.learning_rate


def as_recovery(recover: Recovery | int | None) -> Recovery | None:
    """Return the recovery that an argument means, which may be a number of steps.

    Raises:
        TypeError: if the argument is neither.
        ValueError: if the number of steps is below 1.
        ImportError: if the recovery needs peft, which is not installed.
    """
    if recover is None or isinstance(recover, Recovery):
        found = recover
    elif isinstance(recover, int) and not isinstance(recover, bool):
        found = Recovery(recover)
    else:
        raise TypeError(
            f"recover must be a number of steps or a Recovery; got {type(recover).__name__}."
        )
    if found is not None and found.method == "lora":
        from gramian.models.adapters import require_peft

        require_peft()
    return found


def check_windows(windows: Windows) -> None:
    """Raise a ValueError unless there are windows to train on and to hold out."""
    if len(windows) < 2:
        raise ValueError(
            "recovery needs at least two windows to choose by, one of which tells whether it "
            f"helped; got {len(windows)}."
        )


def recover_best(
    original: nn.Module,
    models: Sequence[Small],
    windows: Windows,
    recovery: Recovery,
    seed: int,
    measure: str,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[int, tuple[float, float]]:
    """Train smaller models in place, and find the best one on windows that none was trained on.

    Args:
        original: the original, in evaluation mode.
        models: the smaller models, each with coordinates of its own.
        windows: the windows, of which every tenth is held out.
        recovery: what to do.
        seed: seed of the recoveries.
        measure: "loss" or "accuracy", by which the models are compared.
        progress: a function that is called as `progress(steps done, all steps)`.

    Returns:
        The index of the best model, and its divergences as `recover` returns them. If no recovery
        helped, it is the first model.

    Raises:
        ValueError: as `recover` does.
    """
    total = recovery.steps * len(models)
    found: list[tuple[float, float]] = []
    for index, one in enumerate(models):

        def told(done: int, _: int, before: int = index * recovery.steps) -> None:
            if progress is not None:
                progress(before + done, total)

        cut = list(one.layers.values())
        found.append(recover(original, one.model, cut, windows, recovery, seed, told))
    helped = any(after < before for before, after in found)
    if len(models) == 1 or not helped:
        return 0, found[0]
    kept_out = windows[held_out(len(windows))]
    ranks = [window_scores(one.model, kept_out).rank(measure) for one in models]
    best = min(range(len(models)), key=ranks.__getitem__)
    return best, found[best]


def recover(
    original: nn.Module,
    small: Any,
    layers: Sequence[Layer],
    windows: Windows,
    recovery: Recovery,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[float, float]:
    """Train a smaller model in place towards the predictions of the original.

    Weights in half precision are trained in single precision, and rounded at the end. Every tenth
    window is held out, and the weights are restored if the divergence there does not fall.

    Args:
        original: the original, in evaluation mode.
        small: the smaller model.
        layers: its layers with recurrences.
        windows: at least two windows. If they are labelled, only the labels count.
        recovery: what to do.
        seed: seed of the choice of windows and of the initial values of LoRA.
        progress: a function that is called as `progress(steps done, all steps)`.

    Returns:
        The divergence on the held-out windows before and after, in nats.

    Raises:
        ValueError: if the model has no parameter that may be trained, or no linear map to change.
    """
    tensors = {**dict(small.named_parameters()), **dict(small.named_buffers())}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    trained = {name: parameter.requires_grad for name, parameter in small.named_parameters()}
    if not any(trained.values()):
        raise ValueError("recovery needs parameters that require gradients; got none.")
    small.float()
    net = _adapt(small, layers, recovery.rank, seed) if recovery.method == "lora" else small
    device = next(small.parameters()).device

    def objective(both: Tensor) -> Tensor:  # token ids and answers, (batch, 2, length)
        ids, answers = both.unbind(1)
        due = answers != IGNORED if windows.labelled else torch.ones_like(ids, dtype=torch.bool)
        with torch.no_grad():
            expected, target = _predict(original, original, ids, due)
        hidden, found = _predict(net, small, ids, due)
        divergence = kl_div(found, target, reduction="batchmean", log_target=True)
        if not net.training:  # the divergence alone is measured
            return divergence
        return divergence + (hidden - expected).square().sum() / expected.square().sum()

    before, after = finetune_briefly(
        net,
        torch.stack([windows.ids, windows.answers], 1).to(device),
        objective,
        parameter_groups(net, lr=recovery.rate, weight_decay=0.0),
        recovery.steps,
        batch=recovery.batch,
        seed=seed,
        progress=progress,
    )
    if net is not small:
        net.merge_and_unload()
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(trained[name])
        parameter.data = parameter.data.to(dtypes[name])
    for name, buffer in list(small.named_buffers()):
        buffer.data = buffer.data.to(dtypes[name])
    small.eval()
    return before, after


def _predict(net: Any, model: Any, ids: Tensor, due: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a model says of the tokens that count, in single precision.

    Args:
        net: the model, or what wraps it.
        model: the model, whose output embeddings read the last hidden states.
        ids: token ids, (batch, length).
        due: whether a token counts, (batch, length).

    Returns:
        The last hidden states, (count, width), and the logarithms of the probabilities, (count,
        vocabulary).
    """
    states: list[Tensor] = []
    embeddings = model.get_output_embeddings()
    handle = embeddings.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    try:
        logits = net(ids, use_cache=False).logits
    finally:
        handle.remove()
    return states[0][due].float(), log_softmax(logits[due].float(), -1)


def _adapt(model: Any, layers: Sequence[Layer], rank: int, seed: int) -> Any:
    """Wrap the linear maps of a model in low-rank changes, which alone are trained."""
    from peft import LoraConfig, get_peft_model

    targets = _linear_maps(model, layers)
    if not targets:
        raise ValueError("recovery by lora needs linear maps with weights of their own; got none.")
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def _linear_maps(model: Any, layers: Sequence[Layer]) -> list[str]:
    """Return the paths of the linear maps that low-rank changes can be merged into.

    A weight in several places is left out, since it would change in all of them, and so are the
    maps that fused kernels read without calling them. Frozen weights stay as they are.
    """
    places: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        places[id(parameter)] = places.get(id(parameter), 0) + 1
    fused = {f"{layer.path}.{name}" for layer in layers for name in layer.family.fused}
    output = model.get_output_embeddings()
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not isinstance(module, FP8Linear)  # a change would be rounded away
        and module is not output
        and path not in fused
        and places[id(module.weight)] == 1
        and module.weight.requires_grad
    ]
