"""One of the processes of `test_sharding`: with FSDP2 it trains and generates as unsharded.

Run as `sharded.py RANK WORLD RENDEZVOUS CASES`; a difference ends it with an assertion.
"""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from gramian.filters import Filter
from gramian.models import GramianConfig, GramianForCausalLM

BATCH, LENGTH, VOCABULARY = 4, 21, 50


def shard(model: GramianForCausalLM, filters_apart: bool) -> None:
    """FSDP2 as its users apply it: every block, then the whole.

    A group of parameters has one dtype, so in half precision filters are groups of their own.
    """
    for module in model.modules():
        if filters_apart and isinstance(module, Filter):
            fully_shard(module)
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)


def train_step(model: GramianForCausalLM, tokens: Tensor) -> float:
    """One step of SGD, whose size keeps gradients comparable; returns the loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.train()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    model.eval()
    return loss.item()


def compare(rank: int, world: int, case: dict[str, Any], half: bool) -> None:
    """Compare what all processes compute together with what this one computes alone."""
    torch.manual_seed(3)
    whole = GramianForCausalLM(GramianConfig(vocab_size=VOCABULARY, **case))
    whole = whole.to(torch.bfloat16) if half else whole.double()
    sharded = deepcopy(whole)
    shard(sharded, filters_apart=half)
    for name, parameter in sharded.named_parameters():
        assert parameter.to_local().numel() < parameter.numel() or len(parameter) < world, name

    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH))
    prompt = torch.randint(VOCABULARY, (2, 9))
    before = {name: parameter.detach().clone() for name, parameter in whole.named_parameters()}
    for _ in range(1 if half else 2):  # the second step starts from what the first one wrote
        train_step(whole, tokens)
        train_step(sharded, tokens.chunk(world)[rank])
    after = dict(whole.named_parameters())
    for name, parameter in sharded.named_parameters():
        change = (after[name] - before[name]).norm()
        error = (parameter.full_tensor() - after[name]).norm()
        assert error <= (0.2 if half else 1e-9) * change, (name, float(error), float(change))

    with torch.no_grad():  # generation must agree to the token, so from the same weights
        for name, parameter in sharded.named_parameters():
            after[name].copy_(parameter.full_tensor())
    for settings in ({}, {"num_beams": 3}, {"prefill_chunk_size": 4}):
        fixed = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(
            sharded.generate(prompt, **fixed, **settings),
            whole.generate(prompt, **fixed, **settings),
        ), settings
    assert sharded.state_bytes(2, 17) == whole.state_bytes(2, 17)


def main(rank: int, world: int, rendezvous: str, cases: list[dict[str, Any]]) -> None:
    """Every case, in double and in half precision."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    for case in cases:
        for half in (False, True):
            print(case, half, flush=True)
            compare(rank, world, case, half)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))
