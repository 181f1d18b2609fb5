r"""Leading singular values and vectors of many Hankel matrices at once.

Two Hankel matrices of the taps ``h_1 … h_{L-1}`` are in use:

- ``tail="zero"``: (L-1) × (L-1), the taps followed by zeros: the Hankel operator of the FIR system
  on its infinite horizon.
- ``tail="free"``: about L/2 × L/2, of taps alone.

A square Hankel matrix is symmetric, so its singular values are the moduli of its eigenvalues and
its eigenvectors are its singular vectors. The Lanczos iteration finds the leading ones, at both
ends of the spectrum, with one FFT product a step. The spectra of long filters are flat (σ_16 and
σ_17 often differ by less than 1%), which takes a Krylov method far fewer products than subspace
iteration. Orthogonality is kept by partial reorthogonalisation (H. D. Simon, "The Lanczos
algorithm with partial reorthogonalization", Math. Comp. 42, 1984), whose ω-recurrence estimates
when it is about to be lost. Short kernels are factored densely.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Protocol

import torch
from torch import Tensor

from gramian.ops._precision import full_precision
from gramian.ops.hankel import Hankel

__all__ = [
    "Spectrum",
    "Symmetric",
    "hankel_matrices",
    "hankel_singular_values",
    "lanczos_spectrum",
    "leading_spectrum",
]

_DENSE_SIZE = 160
"""Hankel matrices up to this size are factored densely."""

_RESIDUAL = 1e-2
"""Residual from which the span of the Ritz vectors gives the same reduction as the exact one."""

_SINGLE_RANGE = 1e-4
"""Singular values down to this fraction of the largest are found in single precision."""


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Leading singular values and left singular vectors of B Hankel matrices, float64.

    Args:
        values: (B, k), descending.
        vectors: (B, k, rows): one left singular vector a row.
        ritz: (B, K), K ≥ k, descending: the singular values of H compressed to the subspace that
            was searched, lowered by rounding errors: each is at most the true one of its rank.
    """

    values: Tensor
    vectors: Tensor
    ritz: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Tensor | slice) -> Spectrum:
        return Spectrum(self.values[index], self.vectors[index], self.ritz[index])

    def replace(self, where: Tensor, other: Spectrum) -> Spectrum:
        """This spectrum, but that of ``other`` where the mask ``where`` (B) is true."""
        width = max(self.ritz.shape[-1], other.ritz.shape[-1])
        pad = torch.nn.functional.pad
        ritz = pad(self.ritz, (0, width - self.ritz.shape[-1]))
        ritz[where] = pad(other.ritz, (0, width - other.ritz.shape[-1]))
        values, vectors = self.values.clone(), self.vectors.clone()
        values[where], vectors[where] = other.values, other.vectors
        return Spectrum(values, vectors, ritz)


def hankel_matrices(taps: Tensor, tail: str) -> Hankel:
    """The Hankel matrices of ``taps`` (B, L-1) = h_1 … h_{L-1}; see the module's docstring.

    With ``tail="free"`` and an even number of taps no square matrix holds all of them: a small
    matrix gets one more column, a large one leaves the last tap out.
    """
    count = taps.shape[-1]
    if tail == "zero":
        return Hankel(taps, count, count)
    rows = (count + 1) // 2
    columns = rows if _is_large(rows) else count + 1 - rows
    return Hankel(taps, rows, columns)


def _is_large(size: int) -> bool:
    return size > _DENSE_SIZE


def leading_spectrum(hankel: Hankel, count: int, guess: Tensor | None = None) -> Spectrum:
    """The ``count`` leading singular values and left singular vectors, or all if there are fewer.

    Args:
        hankel: (B, rows, columns) Hankel matrices of float64 sequences; square where large.
        count: Number of singular values, at least 1.
        guess: (B, at most rows): vectors near the span that is sought; the iteration from them
            takes about half the steps.
    """
    count = min(count, hankel.rows, hankel.columns)
    if not _is_large(hankel.rows) or 4 * count > hankel.rows:
        left, values, _ = torch.linalg.svd(hankel.matrix(), full_matrices=False)
        eps = torch.finfo(values.dtype).eps
        ritz = (values - 16 * eps * values[:, :1]).clamp(min=0)
        return Spectrum(values[:, :count], left.mT[:, :count].contiguous(), ritz)
    height = hankel.sequence.abs().amax(-1, keepdim=True)
    height = torch.where(height > 0, height, 1)
    # The range of float32 is short.
    unit = Hankel(hankel.sequence / height, hankel.rows, hankel.columns)
    spectrum = lanczos_spectrum(unit.to(torch.float32), count, guess=guess)
    steep = spectrum.values[:, -1] <= _SINGLE_RANGE * spectrum.values[:, 0]
    if bool(steep.any()):
        some = None if guess is None else guess[steep]
        spectrum = spectrum.replace(steep, lanczos_spectrum(unit[steep], count, guess=some))
    return Spectrum(spectrum.values * height, spectrum.vectors, spectrum.ritz * height)


class Symmetric(Protocol):
    """A batch of symmetric matrices, known by their products."""

    rows: int

    @property
    def like(self) -> Tensor:
        """A tensor (B, …) of the batch, dtype and device of the matrices."""

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """(B, k, rows) to (B, k, rows)."""

    def __getitem__(self, index: Tensor) -> Symmetric: ...


def lanczos_spectrum(
    matrices: Symmetric,
    count: int,
    *,
    residual: float = _RESIDUAL,
    guess: Tensor | None = None,
    magnitude: Tensor | None = None,
) -> Spectrum:
    """As `leading_spectrum`, for symmetric matrices, in their own precision throughout.

    A Ritz pair is accepted when ‖H u - θ u‖ is at most ``residual`` times the smallest |θ|. The
    values and vectors are float64 in any case, the vectors orthonormal to float64. Products that
    are small differences of large terms carry the rounding errors of these: ``magnitude`` (B, 1)
    says how large they are.
    """
    batch, size = len(matrices.like), matrices.rows
    pending = torch.arange(batch, device=matrices.like.device)
    new = functools.partial(torch.empty, dtype=torch.float64, device=pending.device)
    values, vectors = new(batch, count), new(batch, count, size)
    ritz = new(batch, 0)
    limit = min(size, 8 * count + 128)
    lanczos = _Lanczos(matrices, limit, guess)
    if magnitude is not None:
        lanczos.scale = magnitude.to(lanczos.scale)
    steps = min(limit, 2 * count + (12 if guess is None else 2))
    while True:
        lanczos.extend(steps)
        found, weights, misfit = lanczos.ritz_pairs()
        done = (misfit[:, :count] <= residual * found[:, count - 1 : count]).all(-1)
        done |= steps == limit
        left = int(done.numel() - done.sum())
        if 2 * left <= done.numel():  # carry stragglers on alone only where it saves half the work
            where = pending[done]
            values[where] = found[done, :count].double()
            leading = weights[done, :, :count].mT
            basis = lanczos.basis[:, :steps]
            vectors[where] = torch.bmm(leading, basis[done] if left else basis).double()
            ritz = torch.nn.functional.pad(ritz, (0, steps - ritz.shape[-1]))
            ritz[where] = (found - 16 * lanczos.eps * found[:, :1]).clamp(min=0)[done].double()
            if not left:
                return Spectrum(values, _orthonormal(vectors), ritz)
            pending = pending[~done]
            lanczos = lanczos[~done]
        steps = min(limit, steps + max(16, steps // 3))


def _orthonormal(vectors: Tensor) -> Tensor:
    """Rows that are orthonormal to single precision, (B, k, size), made so to double precision."""
    factor = torch.linalg.cholesky(torch.bmm(vectors, vectors.mT))
    unit = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return torch.bmm(torch.linalg.solve_triangular(factor, unit, upper=False), vectors)


class _Lanczos:
    """Lanczos bases of a batch of symmetric matrices, extended on demand."""

    def __init__(self, matrices: Symmetric, limit: int, guess: Tensor | None) -> None:
        batch, size = len(matrices.like), matrices.rows
        new = matrices.like.new_zeros
        self.eps = torch.finfo(matrices.like.dtype).eps
        # The overlap of two vectors from which they are orthogonalised anew. Half the digits are
        # enough for the span of a flat spectrum; float64 is here for steep ones.
        self.lost = self.eps ** (0.7 if matrices.like.dtype == torch.float64 else 0.5)
        self.matrices = matrices
        self.steps = 0
        # Untouched memory costs nothing, so that there is no need to grow the basis.
        self.basis = matrices.like.new_empty(batch, limit, size)
        self.diagonal = new(batch, limit)
        self.coupling = new(batch, limit + 1)  # coupling_j lies between vectors j - 1 and j
        self.scale = new(batch, 1)  # estimates ‖H‖
        self.overlaps = new(batch, 0)  # estimates of vector j - 1 against all before it
        self.next_overlaps = new(batch, 1) + 1  # of vector j against all up to itself
        self.again = False  # vectors are orthogonalised in pairs
        self.generator = torch.Generator().manual_seed(0)
        start = self._noise(batch, size)
        if guess is not None:  # a little noise, so that what the guess lacks is found all the same
            start = 1e-3 * torch.nn.functional.normalize(start, dim=-1)
            guess = torch.nn.functional.pad(guess.to(start), (0, size - guess.shape[-1]))
            image = (matrices @ guess.unsqueeze(1)).squeeze(1)
            start = start + torch.nn.functional.normalize(image, dim=-1)
        self.next = torch.nn.functional.normalize(start, dim=-1)

    def _noise(self, *shape: int) -> Tensor:
        # The same numbers in every batch: what is found for a kernel does not depend on the others.
        noise = torch.randn(shape[-1], generator=self.generator, dtype=torch.float64)
        return noise.to(self.matrices.like).expand(shape)

    def __getitem__(self, index: Tensor) -> _Lanczos:
        picked = object.__new__(_Lanczos)
        picked.__dict__.update(self.__dict__)
        picked.basis = torch.empty_like(self.basis[: int(index.sum())])
        picked.basis[:, : self.steps] = self.basis[index, : self.steps]
        for name in (
            "matrices",
            "diagonal",
            "coupling",
            "scale",
            "overlaps",
            "next_overlaps",
            "next",
        ):
            setattr(picked, name, getattr(self, name)[index])
        return picked

    def extend(self, steps: int) -> None:
        """Grow the bases to ``steps`` vectors."""
        for j in range(self.steps, steps):
            vector, before = self.next, self.coupling[:, j : j + 1]
            self.basis[:, j] = vector
            image = (self.matrices @ vector.unsqueeze(1)).squeeze(1)
            if j:
                image.addcmul_(self.basis[:, j - 1], before, value=-1)
            alpha = torch.linalg.vecdot(image, vector).unsqueeze(-1)
            image.addcmul_(vector, alpha, value=-1)
            self.diagonal[:, j : j + 1] = alpha
            beta = torch.linalg.vector_norm(image, dim=-1, keepdim=True)
            self.scale = torch.maximum(self.scale, alpha.abs() + beta + before)
            self._take(j, image, beta)
        self.steps = steps

    def _take(self, j: int, image: Tensor, beta: Tensor) -> None:
        """Make the normalised ``image``, of length ``beta``, vector j + 1."""
        if j + 1 == self.matrices.rows:
            return  # the basis is complete, and the coupling to the next vector stays zero
        overlaps = self._estimated_overlaps(j, beta)
        lost = float(overlaps.abs().amax()) > self.lost
        coupling = beta
        if lost or self.again:
            basis = self.basis[:, : j + 1]
            image, beta = _orthogonalised(image, beta, basis)
            # Rounding errors alone are left where the basis spans an invariant subspace.
            ended = beta <= 64 * self.eps * self.scale
            coupling = torch.where(ended, 0, beta)
            if bool(ended.any()):  # go on from a fresh direction
                image = torch.where(ended, self._noise(*image.shape), image)
                beta = torch.linalg.vector_norm(image, dim=-1, keepdim=True)
                image, beta = _orthogonalised(image, beta, basis)
            overlaps = torch.full_like(overlaps, self.eps)
            self.again = lost and not self.again
        self.coupling[:, j + 1 : j + 2] = coupling
        self.next = image / beta
        self.overlaps = self.next_overlaps
        self.next_overlaps = torch.nn.functional.pad(overlaps, (0, 1), value=1.0)

    def _estimated_overlaps(self, j: int, beta: Tensor) -> Tensor:
        """Estimates of ⟨q_{j+1}, q_k⟩ for k = 0 … j (Simon 1984, the ω-recurrence)."""
        last, old = self.next_overlaps, self.overlaps  # (B, j + 1), (B, j)
        diagonal, coupling = self.diagonal, self.coupling
        change = coupling[:, 1 : j + 1] * last[:, 1:]
        change.addcmul_(diagonal[:, :j] - diagonal[:, j : j + 1], last[:, :-1])
        change.addcmul_(coupling[:, j : j + 1], old, value=-1)
        if j > 1:
            change[:, 1:].addcmul_(coupling[:, 1:j], last[:, : j - 1])
        tiny = torch.finfo(beta.dtype).tiny
        noise = self.eps * self.scale + tiny  # so that an image of zero counts as lost
        change += torch.copysign(noise, change)
        return torch.cat([change, noise], dim=-1) / beta.clamp(min=tiny)

    def ritz_pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """|θ| (B, K) descending, coordinates of the Ritz vectors (B, K, K), residuals (B, K)."""
        inner = self.coupling[:, 1 : self.steps]
        compressed = torch.diag_embed(self.diagonal[:, : self.steps])
        compressed += torch.diag_embed(inner, 1) + torch.diag_embed(inner, -1)
        theta, weights = torch.linalg.eigh(compressed)
        values, place = theta.abs().sort(dim=-1, descending=True)
        weights = weights.gather(-1, place.unsqueeze(-2).expand_as(weights))
        edge = self.coupling[:, self.steps : self.steps + 1]
        return values, weights, weights[:, -1].abs() * edge


def _orthogonalised(image: Tensor, length: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """``image`` (B, size) less its projection on the rows of ``basis``, and what length is left.

    A vector that loses much of its length has lost digits with it, and is projected again.
    """
    for _ in range(3):
        overlap = torch.bmm(image.unsqueeze(1), basis.mT)
        image = image - torch.bmm(overlap, basis).squeeze(1)
        left = torch.linalg.vector_norm(image, dim=-1, keepdim=True)
        if bool((left > 0.5 * length).all()):
            break
        length = left
    return image, left


@full_precision()
@torch.no_grad()
def hankel_singular_values(
    kernel: Tensor, count: int | None = None, *, tail: str = "zero"
) -> Tensor:
    """The leading Hankel singular values of kernels.

    Args:
        kernel: (*C, L), real floating point, L ≥ 2: taps h_0 … h_{L-1}; h_0 plays no part.
        count: How many; None: all of them, by a dense factorisation, O(L³) a kernel.
        tail: "zero": of the system whose kernel is zero past its end, on the infinite horizon.
            "free": of a square block of taps alone.

    Returns:
        (*C, count), or fewer if the matrices are smaller; float64, descending. Values below 1e-4
        of the largest, or of short kernels, or all of them, are accurate to rounding in float64;
        others to about 1e-6 of the largest.

    Raises:
        TypeError: if the kernel is not real floating point.
        ValueError: if it is too short or not finite, or another argument is out of range.
    """
    if not kernel.dtype.is_floating_point:
        raise TypeError(f"a kernel must be real floating point, got {kernel.dtype}.")
    if kernel.ndim == 0 or kernel.shape[-1] < 2 or kernel.numel() == 0:
        raise ValueError(
            f"a kernel has shape (*channels, at least 2 taps), got {tuple(kernel.shape)}."
        )
    if tail not in ("zero", "free"):
        raise ValueError(f"tail must be 'zero' or 'free', got {tail!r}.")
    if count is not None and count < 1:
        raise ValueError(f"count must be at least 1, got {count}.")
    bad = torch.nonzero(~kernel.isfinite().all(-1))
    if len(bad):
        where = f"channel {tuple(bad[0].tolist())}" if kernel.ndim > 1 else "the kernel"
        raise ValueError(f"{where} holds NaN or infinite taps; a spectrum needs finite ones.")
    taps = kernel.detach().double()[..., 1:]
    hankel = hankel_matrices(taps.reshape(-1, taps.shape[-1]), tail)
    if count is None:
        values = torch.linalg.svdvals(hankel.matrix())
    else:
        values = leading_spectrum(hankel, count).values
    return values.reshape(*taps.shape[:-1], values.shape[-1])
