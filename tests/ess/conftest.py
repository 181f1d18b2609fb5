"""Random operators of every kind, and effective state-size by its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gramian import FIR, DenseOperator, Modal, StateSpace, TimeVarying, TransferFunction
from gramian.systems import DPLR, System, gated_convolution

TIME_VARYING = ["diagonal", "delta", "dense", "operator", "low_rank_operator", "gated"]
TIME_INVARIANT = ["modal", "real_modal", "state_space", "transfer_function", "dplr", "fir"]
SYSTEMS = TIME_VARYING + TIME_INVARIANT


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def attention(*shape: int, length: int, width: int = 8, sharpness: float = 1.0) -> torch.Tensor:
    """Causal softmax attention maps (*shape, length, length)."""
    q, k = torch.randn(2, *shape, length, width, dtype=torch.float64)
    scores = sharpness * q @ k.mT
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1)


def make(name: str, length: int, channels: tuple[int, ...] = (2,), order: int = 6) -> System:
    if name == "operator":
        return DenseOperator(attention(*channels, length=length))
    if name == "low_rank_operator":
        return DenseOperator(make("diagonal", length, channels, 3).matrix())
    d = torch.randn(channels, dtype=torch.float64)
    if name in TIME_INVARIANT:
        radius = 0.97 * torch.rand(*channels, order // 2, dtype=torch.float64).sqrt()
        poles = torch.polar(radius, torch.pi * torch.rand_like(radius))
        residues = torch.randn(*channels, order // 2, dtype=torch.complex128)
        if name == "modal":
            return Modal(poles, residues, d)
        if name == "real_modal":
            return Modal(poles.real + 0j, residues, d)
        if name == "fir":
            return FIR(torch.randn(*channels, 23, dtype=torch.float64))
        if name == "dplr":
            P, B, C = torch.randn(3, *channels, order // 2, dtype=torch.complex128) / 2
            q = P.conj() * (1 + poles) / 2
            p = P * (1 + poles) / 2 / (1 + (q * P).real.sum(-1, keepdim=True))
            return DPLR(poles, B, C, p, q, d)
        A = torch.randn(*channels, order, order, dtype=torch.float64)
        A = A * 0.95 / torch.linalg.eigvals(A).abs().amax(-1)[..., None, None]
        B, C = torch.randn(2, *channels, order, dtype=torch.float64)
        if name == "state_space":
            return StateSpace(A, B, C, d)
        a = torch.stack(
            [torch.from_numpy(np.poly(m.numpy()))[1:] for m in A.reshape(-1, order, order)]
        )
        return TransferFunction(B, a.reshape(*channels, order), d)
    if name == "gated":
        q, k = torch.randn(2, *channels, length, dtype=torch.float64)
        return gated_convolution(make("modal", length, channels, order), q, k)
    B, C = torch.randn(2, *channels, length, order, dtype=torch.float64)
    D = torch.randn(*channels, length, dtype=torch.float64)
    if name == "dense":
        A = torch.linalg.qr(torch.randn(*channels, length, order, order, dtype=torch.float64))[0]
        return TimeVarying(0.97 * A, B, C, D)
    if name == "diagonal":
        return TimeVarying(torch.rand_like(B) * 1.2 - 0.2, B, C, D)
    key = torch.nn.functional.normalize(B, dim=-1)
    beta = torch.rand(*channels, length, 1, dtype=torch.float64)
    return TimeVarying(torch.ones_like(B), key, C, D, -beta * key, key)


def spectra(T: torch.Tensor, positions: list[int]) -> list[np.ndarray]:
    """Singular values of ``T[i:, :i]`` of one matrix, by numpy."""
    matrix = T.double().numpy()
    return [
        np.linalg.svd(matrix[i:, :i], compute_uv=False) if i else np.zeros(0) for i in positions
    ]


def entropy_by_definition(T: torch.Tensor, positions: list[int]) -> np.ndarray:
    sizes = []
    for values in spectra(T, positions):
        p = values / values.sum() if values.size and values.sum() > 0 else np.zeros(0)
        p = p[p > 1e-15]
        sizes.append(np.exp(-(p * np.log(p)).sum()) if p.size else 0.0)
    return np.array(sizes)
