"""One traced graph for batches and sequences of every size, with padding on either side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch._dynamo.testing import CompileCounter
from torch.export import Dim
from torch.testing import assert_close

from gramian.models import GramianConfig, GramianForCausalLM, GramianForSequenceClassification

pytestmark = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.9"), reason="graphs of whole models need PyTorch 2.9"
)

MakeConfig = Callable[..., GramianConfig]
MakeTokens = Callable[[int, int], torch.Tensor]

FILTERS: dict[str, dict[str, Any]] = {
    "implicit": {"type": "implicit", "hidden": 16, "embedding_features": 5},
    "modal": {"type": "modal", "orders": 3},
    "explicit": {"type": "explicit", "taps": 9},
    "rtf": {"type": "rtf", "state_size": 4},
    "spectral": {"type": "spectral", "filters": 4},
    "s4": {"type": "s4", "state_size": 4},
}
KINDS: dict[str, dict[str, Any]] = {
    **{f"hyena/{name}": {"mixers": "hyena", "filter": filter} for name, filter in FILTERS.items()},
    "multi_hyena": {"mixers": "multi_hyena"},
    "long_convolution": {"mixers": "long_convolution", "block": "glu"},
    "attention": {"mixers": "softmax_attention", "attention": {"kv_heads": 1}},
    "window": {"mixers": "softmax_attention", "attention": {"kv_heads": 1, "window": 9}},
    "linear_attention": {"mixers": "linear_attention"},
    "gated_delta_net": {"mixers": "gated_delta_net"},
    "s6": {"mixers": "s6"},
}
SOME = ("hyena/rtf", "multi_hyena", "window", "linear_attention")
ROWS, LENGTH = 600, 512  # the longest sequences, and the length with which a graph is traced


@pytest.fixture(
    params=[name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in KINDS]
)
def model(request: pytest.FixtureRequest, make_config: MakeConfig) -> GramianForCausalLM:
    torch.manual_seed(8)
    settings = {"num_hidden_layers": 1, "max_position_embeddings": 1024} | KINDS[request.param]
    return GramianForCausalLM(make_config(**settings)).eval()


def padded(batch: int, length: int) -> torch.Tensor:
    """A mask with padding on the left of the first row and on the right of the last."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, : length // 4] = 0
    mask[-1, length - length // 3 :] = 0
    return mask


@torch.no_grad()
def agrees(graph: Any, model: Any, tokens: torch.Tensor, mask: torch.Tensor | None) -> None:
    inputs = {"input_ids": tokens} | ({} if mask is None else {"attention_mask": mask})
    traced, computed = graph(**inputs)[0], model(**inputs).logits
    if mask is not None and computed.ndim == 3:  # what is computed at padding is arbitrary
        traced, computed = traced[mask == 1], computed[mask == 1]
    assert_close(traced, computed, atol=1e-4, rtol=1e-4)


@pytest.mark.each
@pytest.mark.parametrize("masked", [False, True])
def test_export(model: GramianForCausalLM, make_tokens: MakeTokens, masked: bool) -> None:
    open_ = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    inputs, shapes = {"input_ids": make_tokens(2, LENGTH)}, {"input_ids": open_}
    if masked:
        inputs["attention_mask"] = torch.ones(2, LENGTH).long()  # nothing is hidden
        shapes["attention_mask"] = open_
    with torch.no_grad():
        graph = torch.export.export(model, (), inputs, dynamic_shapes=shapes).module()
    for batch, length in ((1, 1), (2, 2), (1, 7), (3, 40), (2, LENGTH), (2, ROWS), (1, 1024)):
        mask = padded(batch, length) if masked else None
        agrees(graph, model, make_tokens(batch, length), mask)


def test_export_of_a_classifier(make_config: MakeConfig, make_tokens: MakeTokens) -> None:
    torch.manual_seed(8)
    config = make_config(mixers=["hyena", "linear_attention"], num_labels=3)
    model = GramianForSequenceClassification(config).eval()
    open_ = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    inputs = {"input_ids": make_tokens(2, 17), "attention_mask": torch.ones(2, 17).long()}
    with torch.no_grad():
        graph = torch.export.export(
            model, (), inputs, dynamic_shapes=dict.fromkeys(inputs, open_)
        ).module()
    for batch, length in ((1, 7), (3, 33)):
        agrees(graph, model, make_tokens(batch, length), padded(batch, length))


def compares_losses(compiled: Any, model: Any, tokens: torch.Tensor, masked: bool) -> None:
    """Compare the losses and their gradients; the first row's padding is on the left."""
    inputs = {"input_ids": tokens, "labels": tokens}
    if masked:
        inputs["attention_mask"] = padded(*tokens.shape)
    parameters = [x for x in model.parameters() if x.requires_grad]
    losses = [one(**inputs).loss for one in (compiled, model)]
    assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-5)
    found, expected = (torch.autograd.grad(loss, parameters, allow_unused=True) for loss in losses)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_close(one, other, atol=1e-5, rtol=1e-3)


COMPILED = ("hyena/rtf", "linear_attention")


def compiled_kinds(*quick: str) -> list[Any]:
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in KINDS]


@pytest.fixture
def no_compiled_code() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("no_compiled_code")
@pytest.mark.parametrize("model", compiled_kinds(*COMPILED), indirect=True)
@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compile(model: GramianForCausalLM, make_tokens: MakeTokens, masked: bool) -> None:
    """A model that has never run is one graph for all sizes, and a second one in training."""
    graphs = CompileCounter()
    compiled = torch.compile(model, backend=graphs, dynamic=True, fullgraph=True)
    sizes = ((2, 12), (3, 40), (2, 65), (2, ROWS))
    for batch, length in sizes:
        mask = padded(batch, length) if masked else None
        agrees(compiled, model, make_tokens(batch, length), mask)
    assert graphs.frame_count == 1
    model.train()
    for size in sizes:
        compares_losses(compiled, model, make_tokens(*size), masked)
    assert graphs.frame_count == 2


@pytest.mark.slow
@pytest.mark.usefixtures("no_compiled_code")
@pytest.mark.parametrize("model", list(KINDS), indirect=True)
def test_compile_of_sizes_as_they_come(model: GramianForCausalLM, make_tokens: MakeTokens) -> None:
    """Without `dynamic`, the first graph has fixed sizes, and the second one serves all others."""
    graphs = CompileCounter()
    compiled = torch.compile(model.train(), backend=graphs, fullgraph=True)
    for size in ((2, 12), (3, 40), (2, 65), (4, ROWS)):
        compares_losses(compiled, model, make_tokens(*size), True)
    assert graphs.frame_count == 2


@pytest.mark.slow
@pytest.mark.usefixtures("no_compiled_code")
@pytest.mark.parametrize("model", ["hyena/rtf", "window", "gated_delta_net"], indirect=True)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_backward(
    model: GramianForCausalLM, make_tokens: MakeTokens, backend: str
) -> None:
    """The backward pass is a graph for all sizes too, down to one token."""
    compiled = torch.compile(model.train(), backend=backend, dynamic=True, fullgraph=True)
    for size in ((2, 12), (3, 40), (2, 2), (2, ROWS)):
        compares_losses(compiled, model, make_tokens(*size), True)
    with torch.no_grad():
        agrees(compiled, model.eval(), make_tokens(2, 1), None)
