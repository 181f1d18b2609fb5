"""Submodules come back in the mode in which they were, and TorchScript is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gramian._modules import in_mode
from gramian.filters import RTF
from gramian.mixers import Hyena


@pytest.mark.parametrize("training", [False, True])
def test_every_submodule_is_in_its_own_mode_again(training: bool) -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3)))
    model[1][0].eval()
    model[1].training = False
    before = [module.training for module in model.modules()]
    with in_mode(model, training=training):
        assert {module.training for module in model.modules()} == {training}
    assert [module.training for module in model.modules()] == before
    with pytest.raises(RuntimeError), in_mode(model, training=training):
        torch.zeros(2) @ torch.zeros(3)
    assert [module.training for module in model.modules()] == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["filter", "mixer", "model"])
def test_torchscript_is_refused_in_a_sentence(name: str) -> None:
    inputs = torch.zeros(1, 5, 4)
    if name == "model":
        models = pytest.importorskip("gramian.models")
        size = {"hidden_size": 4, "num_hidden_layers": 1, "num_heads": 1}
        module, inputs = (
            models.GramianForCausalLM(models.GramianConfig(**size)),
            inputs[..., 0].long(),
        )
    elif name == "mixer":
        module = Hyena(4, {"type": "implicit"}, max_length=8)
    else:
        module, inputs = RTF(4, 2, 8), torch.tensor(8)
    for around in (module, nn.Sequential(module)):
        for call in (torch.jit.script, lambda module: torch.jit.trace(module, (inputs,))):
            with pytest.raises(NotImplementedError) as error:
                call(around)
            assert str(error.value) == (
                f"{type(module).__name__} cannot be a TorchScript program: use torch.compile, "
                "torch.export or gramian.export."
            )
