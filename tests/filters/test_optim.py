"""Parameter groups: an exact partition, with what filters ask for and the field's habits."""

import json
import math
from typing import Any

import pytest
import torch
from torch import nn

import gramian
from gramian import parameter_groups
from gramian.filters import RTF, Filter, ImplicitFilter, ModalFilter
from gramian.mixers import Hyena, LongConvolution, MultiHyena

FILTERS = [
    RTF(4, 3, 16, num_denominators=2),
    ImplicitFilter(4, 16, hidden=8),
    ImplicitFilter(4, 16, hidden=8, trainable_time=True, lr=3e-4),
    ModalFilter(4, 2, 16),
    ModalFilter(4, 2, 16, lr=1e-4),
]


class Foreign(nn.Module):
    """Somebody else's model around our layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(
            [
                Hyena(8, {"type": "implicit", "hidden": 8, "lr": 3e-4}, max_length=16),
                MultiHyena(8, 2, {"type": "rtf", "state_size": 3}, max_length=16),
                LongConvolution(ModalFilter(8, 2, 16, lr=1e-4)),
                nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.RMSNorm(8)),
            ]
        )
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight


def options_of(model: nn.Module, **kwargs: Any) -> dict[str, dict[str, float]]:
    """Options by name of the parameter; fails where a parameter is in two groups or in none."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found: dict[str, dict[str, float]] = {}
    groups = parameter_groups(model, **{"lr": 1e-3, "weight_decay": 0.1, **kwargs})
    for group in groups:
        for parameter in group["params"]:
            assert names[parameter] not in found
            found[names[parameter]] = {k: v for k, v in group.items() if k != "params"}
    assert found.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    distinct = {tuple(sorted(options.items())) for options in found.values()}
    assert len(distinct) == len(groups)
    return found


@pytest.mark.parametrize("filter", FILTERS, ids=lambda f: f.name)
def test_hints_name_parameters_and_can_be_written_down(filter: Filter) -> None:
    hints = filter.optimizer_hints()
    assert hints
    assert hints.keys() <= dict(filter.named_parameters()).keys()
    assert json.loads(json.dumps(hints)) == hints
    hints.popitem()[1]["lr"] = 7.0  # a caller's to change
    assert all(options.get("lr") != 7.0 for options in filter.optimizer_hints().values())


def test_what_the_filters_ask_for() -> None:
    rtf, implicit, trained, modal, slow = FILTERS
    assert rtf.optimizer_hints() == {"a": {"weight_decay": 0.0}}
    for stability, dynamics in (("montel", {"a", "slack"}), ("schur", {"theta"})):
        assert RTF(4, 3, 16, stability=stability).optimizer_hints().keys() == dynamics
    assert {tuple(o.items()) for o in implicit.optimizer_hints().values()} == {
        (("weight_decay", 0.0),)
    }
    assert trained.optimizer_hints()["features"] == {"weight_decay": 0.0, "lr": 1e-5}
    assert trained.optimizer_hints()["output.weight"] == {"weight_decay": 0.0, "lr": 3e-4}
    assert trained.bias is not None and "bias" not in trained.optimizer_hints()
    for time_lr, hint in ((3e-4, {"lr": 3e-4}), (None, {})):
        same = ImplicitFilter(4, 16, hidden=8, trainable_time=True, time_lr=time_lr)
        assert same.optimizer_hints()["features"] == {"weight_decay": 0.0} | hint
    assert modal.optimizer_hints()["angle"] == {"weight_decay": 0.0}
    assert slow.optimizer_hints()["log_decay"] == {"weight_decay": 0.0, "lr": 1e-4}


def test_an_exact_partition_of_a_foreign_model() -> None:
    found = options_of(Foreign())
    plain, undecayed = {"lr": 1e-3, "weight_decay": 0.1}, {"lr": 1e-3, "weight_decay": 0.0}
    assert found["layers.0.in_proj.weight"] == plain
    assert found["layers.0.short.weight"] == plain
    assert found["layers.0.filter.output.weight"] == {"lr": 3e-4, "weight_decay": 0.0}
    assert found["layers.0.filter.bias"] == undecayed
    assert found["layers.1.filter.a"] == undecayed
    assert found["layers.1.filter.b"] == plain
    assert found["layers.2.filter.angle"] == {"lr": 1e-4, "weight_decay": 0.0}
    assert found["layers.2.filter.residues"] == plain
    assert found["layers.3.1.weight"] == plain
    for name in ("embedding.weight", "layers.0.in_proj.bias", "layers.3.0.weight"):
        assert found[name] == undecayed, name


def test_everything_without_a_hint_decays_if_all_parameters_do() -> None:
    model, decayed = Foreign(), {"lr": 1e-3, "weight_decay": 0.1}
    hinted = {
        f"{path}.{name}": {"lr": 1e-3} | options
        for path, filter in model.named_modules()
        if isinstance(filter, Filter)
        for name, options in filter.optimizer_hints().items()
    }
    found = options_of(model, decay_all=True)
    assert found == {name: hinted.get(name, decayed) for name in found}
    assert found["layers.0.filter.bias"] == found["layers.3.0.bias"] == decayed
    assert found["embedding.weight"] == decayed
    assert options_of(model) != found


def test_a_filter_alone_is_a_model_too() -> None:
    found = options_of(RTF(4, 3, 16))
    assert found["a"]["weight_decay"] == 0.0
    assert found["b"]["weight_decay"] == 0.1


@pytest.mark.parametrize("embedding_first", [True, False])
def test_tied_parameters_count_once_and_are_embeddings(embedding_first: bool) -> None:
    embedding, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(*((embedding, head) if embedding_first else (head, embedding)))
    (group,) = parameter_groups(model, 1e-3, 0.1)
    assert group == {"params": [embedding.weight], "lr": 1e-3, "weight_decay": 0.0}


def test_one_filter_in_two_layers_counts_once() -> None:
    shared = RTF(4, 3, 16)
    model = nn.ModuleList([LongConvolution(shared), LongConvolution(shared)])
    assert sum(len(g["params"]) for g in parameter_groups(model, 1e-3, 0.1)) == 3


def test_frozen_parameters_are_left_out() -> None:
    model = Foreign()
    model.layers[1].requires_grad_(False)
    assert not any(name.startswith("layers.1.") for name in options_of(model))
    model.requires_grad_(False)
    assert parameter_groups(model, 1e-3, 0.1) == []


def test_what_adamw_makes_of_them() -> None:
    """With zero gradients, Adam's step is nothing and the decay is all that moves."""
    model = LongConvolution(RTF(4, 3, 16, initialization="montel"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = dict(model.named_parameters())
    for name in ("filter.a", "filter.d"):
        assert torch.equal(after[name], before[name])
    torch.testing.assert_close(after["filter.b"], before["filter.b"] * (1 - 0.1 * 0.5))
    # A hint's learning rate is the step that Adam takes first.
    model = LongConvolution(ModalFilter(4, 2, 16, lr=1e-4))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=0.1, weight_decay=0.0))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    scheduler.step()
    for name, parameter in model.named_parameters():
        step = 1e-4 if name in ("filter.angle", "filter.log_decay") else 0.1
        moved = float((before[name] - parameter.detach()).max())
        assert math.isclose(moved, step / 2, rel_tol=1e-2), name


def test_bad_input_gets_one_sentence() -> None:
    class Confused(RTF):
        def optimizer_hints(self) -> dict[str, dict[str, float]]:
            return {"poles": {"lr": 0.0}}

    model = nn.Linear(2, 2)
    one, other = ModalFilter(2, 1, 8, lr=1e-4), ModalFilter(2, 1, 8)
    other.angle = one.angle
    for call, error, match in (
        (lambda: parameter_groups([model], 1e-3, 0.1), TypeError, "module; got list"),
        (lambda: parameter_groups(model, -1.0, 0.1), ValueError, "lr must be .*got -1.0"),
        (lambda: parameter_groups(model, math.nan, 0.1), ValueError, "lr must be"),
        (lambda: parameter_groups(model, 1e-3, "no"), ValueError, "weight_decay .*got 'no'"),
        (
            lambda: parameter_groups(LongConvolution(Confused(4, 3, 16)), 1e-3, 0.1),
            ValueError,
            "hint for filter.poles, a parameter that it does not have",
        ),
        (
            lambda: parameter_groups(nn.ModuleList([one, other]), 1e-3, 0.1),
            ValueError,
            "different optimizer hints for 1.angle",
        ),
    ):
        with pytest.raises(error, match=match) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert gramian.parameter_groups is parameter_groups
