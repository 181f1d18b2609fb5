"""Forward mode and torch.func through whole language models."""

import pytest
import torch
from torch.func import functional_call, grad, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from gramian.models import GramianConfig, GramianForCausalLM

KINDS = {
    "hyena": {"filter": {"type": "rtf", "state_size": 4, "initialization": "montel"}},
    "striped": {
        "mixers": ["hyena", "softmax_attention"],
        "filter": {"type": "implicit", "hidden": 8},
    },
    "recurrent": {"mixers": ["gated_delta_net", "s6"]},
    "multi_hyena": {"mixers": "multi_hyena", "filter": {"type": "s4", "state_size": 8}},
}


@pytest.mark.parametrize("enabled", [True, False], ids=["with a graph", "without"])
@pytest.mark.parametrize("kind", KINDS)
def test_slopes_of_logits(kind: str, enabled: bool) -> None:
    torch.manual_seed(0)
    config = GramianConfig(
        vocab_size=16,
        hidden_size=8,
        num_hidden_layers=2,
        num_heads=2,
        max_position_embeddings=16,
        use_cache=False,
        **KINDS[kind],
    )
    model = GramianForCausalLM(config).double().eval()
    tokens = torch.randint(16, (2, 10))
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    along = {name: torch.randn_like(p) for name, p in parameters.items()}

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = functional_call(model, parameters, (tokens,)).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    with sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(enabled):
        value, slope = jvp(loss, (parameters,), (along,))
        gradients = grad(loss)(parameters)
    plain = torch.autograd.grad(loss(dict(model.named_parameters())), list(model.parameters()))
    for gradient, expected in zip(gradients.values(), plain, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-10)
    reverse = sum((gradients[name] * along[name]).sum() for name in along)
    torch.testing.assert_close(slope, reverse, rtol=1e-8, atol=1e-10)

    step = 1e-6
    ends = [loss({n: p + s * along[n] for n, p in parameters.items()}) for s in (step, -step)]
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(value, loss(parameters))
