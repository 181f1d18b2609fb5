"""Does it save state to weigh the errors of reduced filters by what the filters receive?

`distill` minimizes the l2 error of every kernel, as for white inputs. Let u be what a filter of a
Hyena receives on a text, and g the gate that follows it. An error e of the kernel changes the
gated output by `g_t Σ_j e_j u_{t-j}`, whose energy on the text is `eᵀ R e` with
`R_jk = Σ_t g_t² u_{t-j} u_{t-k}`. The benchmark trains two byte-level models on the text behind
Python's `help()`, and reduces their filters to several orders in three ways:

- unweighted: poles and residues of `gramian.reduce`;
- by spectrum: R is the autocorrelation of u, as its power spectrum gives it, without the gate;
- by text: R as above, which is exact on the calibration text.

The weighted reductions start from the unweighted one and from dominant modes of a larger reduction,
minimize `eᵀ R e` over poles and residues by the Levenberg-Marquardt method, and keep the better
result. The calibration text is from the training text. The loss and the divergence
KL(original ‖ reduced) of the predictions are measured on held-out bytes. The loss of small models
hardly depends on the order of their filters, and may be lower for reduced filters. So the state
that is saved at equal quality follows from the divergence, which is the expected increase of the
loss on what the original predicts, by interpolation over the order.

    python benchmarks/calibrated_reduction.py [--runs FOLDER] [--steps N] [--output PATH]

Trainings resume where an interrupted benchmark stopped.
"""

import argparse
import copy
import itertools
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gramian
from benchmarks._report import write
from benchmarks.ess_distillation import divergence
from benchmarks.hankel_training import LENGTH, trained
from gramian.demo.measuring import bits_per_byte
from gramian.demo.text import python_documentation
from gramian.filters import ModalFilter
from gramian.models import GramianForCausalLM
from gramian.systems import Modal

ORDERS = (2, 4, 8)
WAYS = ("unweighted", "by spectrum", "by text")
WINDOWS = 16
ITERATIONS = 30
BLOCKS = 32  # held-out windows on which divergences are measured


@torch.no_grad()
def received(model: GramianForCausalLM, windows: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the input of every filter and its gate, each (channels, windows, length)."""
    found = []

    def keep(mixer: Any, args: tuple[Tensor, ...]) -> None:
        (last, gate), value, _ = mixer.project(args[0], None, None)
        found.append(tuple(part.permute(2, 0, 1).double() for part in (gate * value, last)))

    hooks = [layer.mixer.register_forward_pre_hook(keep) for layer in model.base_model.layers]
    model(windows.long(), use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def by_text(u: Tensor, gate: Tensor) -> Tensor:
    """Return R of every channel, (channels, length, length), from signals of (…, length)."""
    length = u.shape[-1]
    weights = []
    for signals, gates in zip(u, gate, strict=True):
        rows = torch.nn.functional.pad(signals, (length - 1, 0)).unfold(-1, length, 1).flip(-1)
        rows = (rows * gates.unsqueeze(-1)).flatten(0, 1)  # (windows × length, length)
        weights.append(rows.mT @ rows)
    return torch.stack(weights)


def by_spectrum(u: Tensor, gate: Tensor) -> Tensor:
    """Return the autocorrelation matrices of signals, (channels, length, length)."""
    length = u.shape[-1]
    power = torch.fft.rfft(u, n=2 * length).abs().square().mean(1)
    correlation = torch.fft.irfft(power, n=2 * length)[:, :length]
    lag = torch.arange(length)
    return correlation[:, (lag - lag.unsqueeze(-1)).abs()]


def factor(weight: Tensor) -> Tensor:
    """Return W with `R ≈ Wᵀ W`, scaled to a trace of 1."""
    size = weight.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    eye = torch.eye(weight.shape[-1], dtype=weight.dtype)
    return torch.linalg.cholesky(weight / size + 1e-9 * eye).mT


class Fit:
    """Modal kernels with the parameters log decay, angle, residues and d, one row a channel."""

    def __init__(self, system: Modal, channels: Tensor) -> None:
        poles, residues = system.poles[channels], system.residues[channels]
        used = residues != 0
        poles = torch.where(used, poles, 0.5).to(torch.complex128)
        self.real = (poles.imag == 0) | ~used
        self.used = used
        decay = -poles.abs().clamp(1e-8, 1 - 1e-9).log()
        self.parameters = torch.cat(
            [
                decay.log(),
                poles.angle(),
                residues.real.double(),
                residues.imag.double(),
                system.d[channels].double().unsqueeze(-1),
            ],
            -1,
        )
        free = torch.cat([used, ~self.real, used, ~self.real], -1)
        self.free = torch.nn.functional.pad(free, (0, 1), value=True)

    def parts(self, parameters: Tensor) -> tuple[Tensor, ...]:
        modes = self.used.shape[-1]
        a, angle, re, im = parameters[:, :-1].split(modes, -1)
        decay = a.clamp(-20, 4).exp()
        return decay, angle, torch.complex(re, im), parameters[:, -1]

    def taps(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Return the kernels (C, L) and their Jacobians (C, L, parameters)."""
        decay, angle, r, d = self.parts(parameters)
        t = torch.arange(LENGTH - 1, dtype=torch.float64)
        log = torch.complex(-decay, angle).unsqueeze(-1)
        power = (log * t).exp()  # (C, m, L - 1)
        mode = r.unsqueeze(-1) * power
        grown = mode * t
        columns = [
            -decay.unsqueeze(-1) * grown.real,
            (1j * grown).real,
            power.real,
            -power.imag,
        ]
        jacobian = torch.cat(columns, 1) * self.free[:, :-1, None]
        jacobian = torch.nn.functional.pad(jacobian, (1, 0)).mT
        first = torch.zeros(len(d), LENGTH, 1, dtype=torch.float64)
        first[:, 0] = 1
        kernel = torch.cat([d.unsqueeze(-1), mode.real.sum(1)], -1)
        return kernel, torch.cat([jacobian, first], -1)

    def minimize(self, kernel: Tensor, W: Tensor) -> Tensor:
        """Minimize `‖W (h - ĥ)‖`, and return its final value for every channel."""
        damping = torch.full((len(kernel), 1), 1e-3, dtype=torch.float64)
        taps, jacobian = self.taps(self.parameters)
        error = torch.einsum("cij,cj->ci", W, kernel - taps)
        for _ in range(ITERATIONS):
            J = W @ jacobian
            normal, slope = J.mT @ J, torch.einsum("cip,ci->cp", J, error)
            scale = normal.diagonal(dim1=-2, dim2=-1).clamp_min(1e-30)
            damped = normal + torch.diag_embed(damping * scale + 1e-30)
            step = torch.linalg.solve(damped, slope)
            tried = self.parameters + step.nan_to_num(0).clamp(-1, 1) * self.free
            new_taps, new_jacobian = self.taps(tried)
            new_error = torch.einsum("cij,cj->ci", W, kernel - new_taps)
            better = (new_error.norm(dim=-1) < error.norm(dim=-1)).unsqueeze(-1)
            damping = torch.where(better, damping / 3, damping * 4).clamp(1e-12, 1e12)
            self.parameters = torch.where(better, tried, self.parameters)
            error = torch.where(better, new_error, error)
            jacobian = torch.where(better.unsqueeze(-1), new_jacobian, jacobian)
        return error.norm(dim=-1)

    def system(self) -> Modal:
        decay, angle, r, d = self.parts(self.parameters)
        radius = (-decay).exp()
        sine = torch.where(self.real, 0, angle.sin())
        poles = torch.complex(radius * angle.cos(), radius * sine)
        r = torch.where(self.used, r, 0)
        return Modal(torch.where(self.used, poles, 0), r, d)


def joined(first: Modal, second: Modal, choose: Tensor) -> Modal:
    """Take channels from the second system where `choose` is true."""
    width = max(first.poles.shape[-1], second.poles.shape[-1])
    pairs = []
    for name in ("poles", "residues"):
        one, two = (
            torch.nn.functional.pad(getattr(s, name), (0, width - s.poles.shape[-1]))
            for s in (first, second)
        )
        pairs.append(torch.where(choose.unsqueeze(-1), two, one))
    return Modal(*pairs, torch.where(choose, second.d, first.d))


def weighted(kernel: Tensor, order: int, W: Tensor, start: Modal, large: Modal) -> Modal:
    """Reduce kernels (C, L) to an order by minimizing `‖W (h - ĥ)‖`."""
    everything = torch.arange(len(kernel))
    best = Fit(start, everything)
    error = best.minimize(kernel, W)
    # Another start: the modes of a larger reduction with the largest weighted energy.
    t = torch.arange(LENGTH - 1, dtype=torch.float64)
    modes = (large.residues.unsqueeze(-1) * large.poles.unsqueeze(-1) ** t).real
    modes = torch.nn.functional.pad(modes, (1, 0))  # (C, m, L)
    energy = (modes @ W.mT).norm(dim=-1)
    cost = torch.where(large.residues != 0, 1 + (large.poles.imag != 0).long(), order + 1)
    kept, left = torch.zeros_like(cost, dtype=torch.bool), torch.full((len(kernel), 1), order)
    for slot in energy.argsort(dim=-1, descending=True).unbind(-1):
        slot = slot.unsqueeze(-1)
        fits = cost.gather(-1, slot) <= left
        left = left - torch.where(fits, cost.gather(-1, slot), 0)
        kept.scatter_(-1, slot, fits)
    other = Fit(Modal(large.poles, torch.where(kept, large.residues, 0), large.d), everything)
    second = other.minimize(kernel, W)
    return joined(best.system(), other.system(), second < error)


@torch.no_grad()
def curves(
    model: GramianForCausalLM, calibration: Tensor, windows: Tensor, orders: list[int]
) -> dict[str, Any]:
    """Measure the loss of a model whose filters are reduced in every way to every order."""
    kernels = [
        layer.mixer.filter(LENGTH).impulse_response(LENGTH).double()
        for layer in model.base_model.layers
    ]
    signals = received(model, calibration)
    factors = {
        "by spectrum": [factor(by_spectrum(*pair)) for pair in signals],
        "by text": [factor(by_text(*pair)) for pair in signals],
    }
    whole = bits_per_byte(model, windows)
    rows = []
    for order in orders:
        row: dict[str, Any] = {"order": order}
        plain, larger = (
            [gramian.reduce(kernel, order=n).system for kernel in kernels]
            for n in (order, order + 8)
        )
        for way in WAYS:
            small = copy.deepcopy(model)
            misses = []
            for index, layer in enumerate(small.base_model.layers):
                system = plain[index]
                if way in factors:
                    system = weighted(
                        kernels[index], order, factors[way][index], system, larger[index]
                    )
                layer.mixer.filter = ModalFilter.from_system(system, max_length=LENGTH)
                fitted = layer.mixer.filter(LENGTH).impulse_response(LENGTH).double()
                W = factors["by text"][index]
                error, size = (
                    (W @ x.unsqueeze(-1)).flatten(1).norm(dim=-1)
                    for x in (kernels[index] - fitted, kernels[index])
                )
                misses.append(float((error / size).mean()))
            loss = bits_per_byte(small.eval(), windows)
            row[way] = {
                "bits per byte": loss,
                "increase": loss / whole - 1,
                "divergence": divergence(model, small, windows[:BLOCKS]),
                "mean relative error on the calibration text": sum(misses) / len(misses),
            }
        rows.append(row)
        print(
            f"  order {order}: "
            + ", ".join(
                f"{way} {row[way]['increase']:+.3%}, KL {row[way]['divergence']:.2e}"
                for way in WAYS
            ),
            flush=True,
        )
    savings = {way: saved(rows, way) for way in WAYS[1:]}
    return {"bits per byte": whole, "orders": rows, "saved state at equal divergence": savings}


def saved(rows: list[dict[str, Any]], way: str) -> list[dict[str, float]]:
    """Return the share of the state that a way saves at equal divergence.

    For every order of the way, the unweighted order of the same divergence is interpolated: the
    logarithms of divergences, made monotonic, over the order. Where every unweighted order diverges
    more, the order of the way that has the divergence of this unweighted order is interpolated.
    """
    ours, theirs = (_points(rows, name) for name in (way, "unweighted"))
    found = []
    for row in rows:
        small = float(row["order"])
        large = _order_at(theirs, row[way]["divergence"])
        if large is None:
            large = small
            reached = _order_at(ours, row["unweighted"]["divergence"])
            if reached is None:
                continue
            small = reached
        found.append({"order": small, "unweighted order": large, "saved": 1 - small / large})
    return found


def _points(rows: list[dict[str, Any]], way: str) -> list[tuple[float, float]]:
    """Return the logarithms of divergences, made monotonic, and the orders."""
    lowest = itertools.accumulate((row[way]["divergence"] for row in rows), min)
    return [(math.log(value), row["order"]) for value, row in zip(lowest, rows, strict=True)]


def _order_at(points: list[tuple[float, float]], divergence: float) -> float | None:
    """Return the order at which a curve has a divergence, or None if it has it nowhere."""
    goal = math.log(divergence)
    for (high, below), (low, above) in itertools.pairwise(points):
        if low <= goal <= high and low < high:
            return below + (above - below) * (high - goal) / (high - low)
    return None


def main() -> None:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--orders", type=int, nargs="+", default=list(ORDERS))
    parser.add_argument(
        "--runs", type=Path, default=Path(tempfile.gettempdir()) / "gramian_hankel_training"
    )
    parser.add_argument(
        "--output", type=Path, default=here / "results" / "calibrated_reduction.json"
    )
    arguments = parser.parse_args()

    corpus = python_documentation()
    windows, training = (
        text[: len(text) // LENGTH * LENGTH].reshape(-1, LENGTH)
        for text in (corpus.held_out, corpus.train)
    )
    calibration = training[:: max(1, len(training) // WINDOWS)][:WINDOWS]
    results: dict[str, Any] = {
        "benchmark": "reduction weighted by what filters receive, against the unweighted one",
        "steps": arguments.steps,
        "taps": LENGTH,
        "calibration bytes": calibration.numel(),
        "held-out bytes": windows[: 2 * BLOCKS].numel(),
    }
    for filter in ("implicit", "s4d"):
        model = trained(filter, 0.0, 0.0, arguments.steps, arguments.runs)
        print(f"{filter}:", flush=True)
        results[filter] = curves(model, calibration, windows[: 2 * BLOCKS], arguments.orders)
        for way, shares in results[filter]["saved state at equal divergence"].items():
            print(f"  {way}: " + ", ".join(f"{s['order']:.1f}: {s['saved']:+.0%}" for s in shares))
    write(arguments.output, results)


if __name__ == "__main__":
    main()
