r"""Leading singular values and vectors of many Hankel matrices at once.

There are two Hankel matrices of the taps `h_1 … h_{L-1}`:

- `tail="zero"` gives an (L-1) × (L-1) matrix of the taps, continued by zeros. It represents the
  Hankel operator of the FIR system on the infinite horizon.
- `tail="free"` gives a matrix of about L/2 × L/2 that contains taps only.

A square Hankel matrix is symmetric, so its singular values are the moduli of its eigenvalues, and
its eigenvectors are its singular vectors. A block Lanczos iteration (G. H. Golub, R. Underwood,
"The block Lanczos method for computing eigenvalues", 1977) finds the leading eigenvalues at both
ends of the spectrum. The spectra of long filters are flat: σ_16 and σ_17 often differ by less than
1%. For such spectra a Krylov method needs far fewer products than subspace iteration.

Every block is orthogonalized against all blocks before it, and its remaining inner products with
them are measured. So orthogonality is measured rather than estimated. A block of b vectors finds at
most b copies of a repeated value. Combs and delays have repeated values. If b values of a channel
are nearly equal, or if the channel has not converged, it is computed again. It is then computed
densely, or with a block of more vectors than the number of values sought. Short kernels are
factored densely from the start.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Protocol

import torch
from torch import Tensor

from gramian.ops.hankel import Hankel
from gramian.ops.precision import full_precision

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
"""If residuals are below this, the span of the Ritz vectors gives the same reduction as the exact
span."""

_BLOCK = 3
"""The number of vectors in a block. It is the largest multiplicity that is found without a second
search."""

_ALIKE = 1e-3
"""Relative distance below which singular values count as one repeated value."""

_ROUNDING = 64
"""Rounding errors of a Ritz value, in units of the last place of the largest value."""

_EQUAL = 3e-6
"""Relative distance below which single precision cannot separate singular vectors."""

_DENSE_PAIRS = 400
"""Matrices up to this size are factored densely if two singular values are that close."""

_GAP = 0.1
"""Relative distance between a leading singular value and those that a subspace lacks."""

_DENSE_AGAIN = 512
"""Matrices up to this size are factored densely if the iteration is inconclusive."""

_PASSES = 4
"""The largest number of times that a block is orthogonalized. In theory, two are enough."""

_SMALL_OVERLAP = 1e-2
"""Size of inner products that one more pass reduces to rounding errors."""

_SINGLE_RANGE = 1e-3
"""Singular values down to this fraction of the largest are computed in single precision."""


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Leading singular values and left singular vectors of B Hankel matrices, float64.

    Args:
        values: (B, k), descending: the singular values.
        vectors: (B, k, rows): one left singular vector in each row.
        ritz: (B, K), K ≥ k, descending: the singular values of H compressed to the subspace that
            was searched, minus rounding errors. So each is at most the true value of its rank.
    """

    values: Tensor
    vectors: Tensor
    ritz: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Tensor | slice) -> Spectrum:
        return Spectrum(self.values[index], self.vectors[index], self.ritz[index])

    def replace(self, where: Tensor, other: Spectrum) -> Spectrum:
        """Replace the spectra where the mask `where` (B) is true by the spectra `other`."""
        width = max(self.ritz.shape[-1], other.ritz.shape[-1])
        pad = torch.nn.functional.pad
        ritz = pad(self.ritz, (0, width - self.ritz.shape[-1]))
        ritz[where] = pad(other.ritz, (0, width - other.ritz.shape[-1]))
        values, vectors = self.values.clone(), self.vectors.clone()
        values[where], vectors[where] = other.values, other.vectors
        return Spectrum(values, vectors, ritz)


def hankel_matrices(taps: Tensor, tail: str) -> Hankel:
    """Return the Hankel matrices of `taps` (B, L-1) = h_1 … h_{L-1}, as this module defines them.

    With `tail="free"` and an even number of taps, no square matrix holds all taps. So a small
    matrix gets one more column, and a large matrix omits the last tap.
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
    """Compute the leading singular values and left singular vectors, `count` or all if fewer exist.

    Args:
        hankel: B Hankel matrices (rows, columns) of float64 sequences. Large matrices must be
            square.
        count: The number of singular values, at least 1.
        guess: (B, k, at most rows): vectors near the wanted span. Starting from them takes at most
            half of the steps.
    """
    count = min(count, hankel.rows, hankel.columns)
    if not _is_large(hankel.rows) or 7 * count > hankel.rows:
        return _dense_spectrum(hankel.matrix(), count, torch.finfo(torch.float64).eps)
    height = hankel.sequence.abs().amax(-1, keepdim=True)
    height = torch.where(height > 0, height, 1)
    # The sequences are scaled, because the range of float32 is short.
    unit = Hankel(hankel.sequence / height, hankel.rows, hankel.columns)
    spectrum = lanczos_spectrum(unit.to(torch.float32), count, guess=guess, exact=unit)
    steep = spectrum.values[:, -1] <= _SINGLE_RANGE * spectrum.values[:, 0]
    if bool(steep.any()):
        spectrum = spectrum.replace(steep, lanczos_spectrum(unit[steep], count))
    return Spectrum(spectrum.values * height, spectrum.vectors, spectrum.ritz * height)


def _dense_spectrum(matrix: Tensor, count: int, eps: float) -> Spectrum:
    """Compute the spectrum of matrices (B, rows, columns), float64, that are accurate to `eps`."""
    if matrix.shape[-1] == matrix.shape[-2]:
        theta, vectors = torch.linalg.eigh(matrix)
        place = theta.abs().argsort(dim=-1, descending=True)
        values = theta.abs().gather(-1, place)
        vectors = vectors.mT.gather(1, place[:, :count, None].expand(-1, -1, matrix.shape[-1]))
    else:
        left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
        vectors = left.mT[:, :count].contiguous()
    noise = _ROUNDING * eps * values[:, :1]
    return Spectrum(values[:, :count], vectors, (values - noise).clamp(min=0))


class Symmetric(Protocol):
    """A batch of symmetric matrices that are known only by their products with vectors."""

    rows: int

    @property
    def like(self) -> Tensor:
        """Return a tensor (B, …) that has the batch dimension, dtype and device of the matrices."""

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """Multiply the matrices by k vectors each: vectors and result are (B, k, rows)."""

    def __getitem__(self, index: Tensor) -> Symmetric: ...


def lanczos_spectrum(
    matrices: Symmetric,
    count: int,
    *,
    residual: float = _RESIDUAL,
    guess: Tensor | None = None,
    magnitude: Tensor | None = None,
    block: int = _BLOCK,
    exact: Symmetric | None = None,
) -> Spectrum:
    """Compute the leading spectrum of symmetric matrices in the precision of the matrices.

    A Ritz pair is accepted when ‖H u - θ u‖ is at most `residual` times the smallest |θ|. If a
    value occurs more than `block` times, the iteration finds only `block` copies. The docstring of
    the module describes how repeated values are detected and computed again. The values and vectors
    are always float64, and the vectors are orthonormal in float64.

    Args:
        matrices: The matrices. Only their products with vectors are used.
        count: The number of singular values.
        residual: The largest accepted residual, relative to the smallest |θ|.
        guess: Vectors near the wanted span, as in `leading_spectrum`.
        magnitude: (B, 1): if the products are small differences of large terms, the size of these
            terms. Rounding errors are proportional to it.
        block: The number of vectors in a block.
        exact: The same matrices in the precision that a dense factorization uses.
    """
    batch, size = len(matrices.like), matrices.rows
    pending = torch.arange(batch, device=matrices.like.device)
    new = functools.partial(torch.empty, dtype=torch.float64, device=pending.device)
    values, vectors = new(batch, count), new(batch, count, size)
    ritz, doubtful = new(batch, 0), torch.zeros_like(pending, dtype=torch.bool)
    limit = min(size, max(8 * count + 128, 4 * block))
    if size <= _DENSE_AGAIN:
        limit = min(limit, 3 * size // 4)
    krylov = _BlockLanczos(matrices, block, limit, guess, magnitude)
    steps = (2 * count + 42 if guess is None else count + 19) + block - _BLOCK
    while True:
        krylov.extend(min(steps, limit))
        held = torch.nonzero(pending >= 0).flatten()
        theta, weights, misfit = krylov.ritz_pairs(held)
        noise = _ROUNDING * krylov.eps * krylov.scale[held]
        allowed = torch.maximum(residual * theta[:, count - 1 : count].abs(), noise)
        converged = (misfit[:, :count] <= allowed).all(-1)
        done = converged | (krylov.steps == limit)
        # A channel is finished when it has converged, regardless of the others in its batch.
        here = held[done]
        where = pending[here]
        if len(where):
            values[where] = theta[done, :count].abs().double()
            basis = krylov.basis[:, : krylov.steps]
            basis = basis if len(here) == len(basis) else basis[here]
            vectors[where] = torch.bmm(weights[done, :, :count].mT, basis).double()
            ritz = torch.nn.functional.pad(ritz, (0, krylov.steps - ritz.shape[-1]))
            ritz[where] = (theta.abs() - noise).clamp(min=0)[done].double()
            leading = theta[:, :count], misfit[:, :count], noise
            alike = _alike(*leading, block, _ALIKE)
            if size <= _DENSE_PAIRS and exact is not None:
                alike |= _alike(*leading, 2, _EQUAL)
            doubtful[where] = (alike | ~converged | krylov.lost[held])[done]
            pending[here] = -1
            left = len(held) - len(here)
            if not left:
                break
            if 2 * left <= len(pending):
                krylov, pending = krylov[pending >= 0], pending[pending >= 0]
        steps += max(12, steps // 8)
    spectrum = Spectrum(values, _orthonormal(vectors), ritz)
    if not bool(doubtful.any()):
        return spectrum
    if size <= _DENSE_AGAIN:
        some = (matrices if exact is None else exact)[doubtful]
        unit = torch.eye(size, dtype=some.like.dtype, device=pending.device)
        matrix = (some @ unit.expand(len(some.like), -1, -1)).double()
        eps = torch.finfo(some.like.dtype).eps
        return spectrum.replace(doubtful, _dense_spectrum((matrix + matrix.mT) / 2, count, eps))
    if block <= count:
        least = None if magnitude is None else magnitude[doubtful]
        again = lanczos_spectrum(
            matrices[doubtful], count, residual=residual, magnitude=least, block=count + _BLOCK
        )
        spectrum = spectrum.replace(doubtful, again)
    return spectrum


def _orthonormal(vectors: Tensor) -> Tensor:
    """Orthonormalize vectors (B, k, rows) that are already orthonormal to single precision."""
    factor, failed = torch.linalg.cholesky_ex(torch.bmm(vectors, vectors.mT))
    if bool((failed != 0).any()):
        return torch.linalg.qr(vectors.mT).Q.mT
    # For a triangle this small, inverting it is faster than solving with it.
    unit = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(factor, unit.expand_as(factor), upper=False)
    return torch.bmm(inverse, vectors)


class _BlockLanczos:
    """Orthonormal bases of the block Krylov spaces of a batch of symmetric matrices.

    Every vector is orthogonalized against all vectors before it. The compressed matrices come from
    actual inner products, not from a recurrence. If only rounding errors are left of a direction, a
    random direction replaces it.
    """

    def __init__(
        self,
        matrices: Symmetric,
        block: int,
        limit: int,
        guess: Tensor | None,
        magnitude: Tensor | None,
    ) -> None:
        like = matrices.like
        batch, size = len(like), matrices.rows
        self.eps = torch.finfo(like.dtype).eps
        self.matrices = matrices
        self.steps = 0
        # Memory that is not touched costs nothing, so the basis need not grow.
        self.basis = like.new_empty(batch, limit, size)
        self.compressed = like.new_zeros(batch, 0, 0)  # lower triangle
        self.edge = like.new_zeros(batch, block, block)  # Gram matrix of the residual block
        self.lost = torch.zeros(batch, dtype=torch.bool, device=like.device)  # lost orthogonality
        self.scale = like.new_zeros(batch, 1)  # a close lower bound of ‖H‖
        if magnitude is not None:
            self.scale = magnitude.to(like)
        start = matrices @ self._noise(block) if guess is None else self._noise(block)
        if guess is not None:  # a little noise helps to find directions that the guess lacks
            missing = -guess.shape[1] % block
            guess = torch.nn.functional.pad(guess.to(like), (0, 0, 0, missing))
            guess = guess.unflatten(1, (-1, block)).sum(1)
            image = matrices @ torch.nn.functional.pad(guess, (0, size - guess.shape[-1]))
            image = torch.nn.functional.normalize(image, dim=-1)
            start = 1e-3 * torch.nn.functional.normalize(start, dim=-1) + image
        self.next = torch.linalg.qr(start.mT).Q.mT

    def _noise(self, count: int) -> Tensor:
        # Every batch gets the same numbers, so that no result depends on other kernels.
        generator = torch.Generator().manual_seed(self.steps)
        noise = torch.randn(count, self.matrices.rows, generator=generator, dtype=torch.float64)
        noise = torch.nn.functional.normalize(noise, dim=-1)
        return noise.to(self.matrices.like).expand(len(self.basis), -1, -1)

    def __getitem__(self, index: Tensor) -> _BlockLanczos:
        picked = object.__new__(_BlockLanczos)
        picked.__dict__.update(self.__dict__)
        picked.basis = torch.empty_like(self.basis[: int(index.sum())])
        picked.basis[:, : self.steps] = self.basis[index, : self.steps]
        for name in ("matrices", "compressed", "edge", "scale", "lost", "next"):
            setattr(picked, name, getattr(self, name)[index])
        return picked

    def extend(self, steps: int) -> None:
        """Grow the bases to `steps` vectors or a few more."""
        more = steps + self.next.shape[1] - self.compressed.shape[-1]
        self.compressed = torch.nn.functional.pad(self.compressed, (0, more, 0, more))
        while self.steps < steps:
            first = self.steps
            self.steps = last = min(first + self.next.shape[1], self.basis.shape[1])
            here = self.next[:, : last - first]
            self.basis[:, first:last] = here
            image = self.matrices @ here
            self.scale = torch.maximum(self.scale, image.norm(dim=-1).amax(-1, keepdim=True))
            # H maps basis vectors further back into the present span: these products are zero.
            near = max(0, first - self.next.shape[1])
            self.compressed[:, first:last, near:last] = self._projected(image, near)
            self.edge = torch.bmm(image, image.mT)
            if last < self.matrices.rows:
                self.next = self._normalized(image)

    def _projected(self, vectors: Tensor, first: int) -> Tensor:
        """Subtract from vectors, in place, their projections on the basis vectors from `first` on.

        Returns:
            The inner products.
        """
        basis = self.basis[:, first : self.steps]
        overlap = torch.bmm(vectors, basis.mT)
        vectors.baddbmm_(overlap, basis, alpha=-1)
        return overlap

    def _normalized(self, image: Tensor) -> Tensor:
        """Return an orthonormal basis of the rows of `image`, orthogonal to all earlier vectors."""
        image = image[:, : self.matrices.rows - self.steps]
        q, r = torch.linalg.qr(image.mT)
        vectors = q.mT.contiguous()
        # The row shows how much of the whole image a direction holds; its diagonal entry alone may
        # be small.
        ended = r.norm(dim=-1) <= 64 * self.eps * self.scale
        if bool(ended.any()):
            vectors = torch.where(ended.unsqueeze(-1), self._noise(vectors.shape[1]), vectors)
        for _ in range(_PASSES):
            overlap = self._projected(vectors, 0).abs()
            if float(overlap.amax()) <= math.sqrt(self.eps):  # as orthonormal as before
                return vectors
            vectors = torch.linalg.qr(vectors.mT).Q.mT.contiguous()
            large = (overlap > _SMALL_OVERLAP).any(-1).any(-1)
            if not bool(large.any()):  # the rest is rounding
                break
        self.lost |= large
        return vectors

    def ritz_pairs(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the Ritz pairs of the channels `rows`.

        Returns:
            θ (B, K) with descending modulus, the coordinates of the Ritz vectors (B, K, K), and
            the residuals (B, K).
        """
        theta, weights = torch.linalg.eigh(self.compressed[rows, : self.steps, : self.steps])
        place = theta.abs().argsort(dim=-1, descending=True)
        weights = weights.gather(-1, place.unsqueeze(-2).expand_as(weights))
        last = weights[:, -self.edge.shape[-1] :]
        misfit = (last * torch.bmm(self.edge[rows], last)).sum(-2).clamp(min=0).sqrt()
        return theta.gather(-1, place), weights, misfit


def _alike(theta: Tensor, misfit: Tensor, noise: Tensor, block: int, close: float) -> Tensor:
    """Return a mask (B) of the channels where `block` leading Ritz values (B, k) coincide.

    Values coincide if their relative distance is below `close`, or too small for their residuals to
    resolve. Only values above the noise (B, 1) count.
    """
    if block > theta.shape[-1]:
        return torch.zeros_like(theta[:, 0], dtype=torch.bool)
    theta, place = theta.sort(dim=-1)
    misfit = misfit.gather(-1, place)
    first, last = theta[:, : theta.shape[-1] + 1 - block], theta[:, block - 1 :]
    size = torch.maximum(first.abs(), last.abs())
    # The error of a Ritz value is its squared residual divided by the gap to the missing values.
    inside = misfit.unfold(-1, block, 1).amax(-1).square() / size.clamp(min=1e-30)
    width = close * size
    if close == _ALIKE:
        width = width + inside / _GAP
    return ((last - first <= width) & (size > noise)).any(-1)


@full_precision()
@torch.no_grad()
def hankel_singular_values(
    kernel: Tensor, count: int | None = None, *, tail: str = "zero"
) -> Tensor:
    """Compute the leading Hankel singular values of kernels.

    Args:
        kernel: (*C, L), real floating point, L ≥ 2: the taps h_0 … h_{L-1}; h_0 is not used.
        count: The number of values. None means all values, which are computed by a dense
            factorization in O(L³) operations per kernel.
        tail: "zero" gives the values on the infinite horizon, where the kernel continues with
            zeros. "free" gives the values of a square block that contains taps only.

    Returns:
        (*C, count), float64, descending, or fewer values if the matrices are smaller. If all values
        are requested, or if the kernel is short, the values are accurate to rounding. For long
        kernels and values above a millionth of the largest, the relative error of the leading
        values is about 1e-4. The relative error of the last value of a flat spectrum is about two
        percent.

    Raises:
        TypeError: if the kernel is not real floating point.
        ValueError: if the kernel is too short or not finite, or if another argument is out of
            range.
    """
    if not kernel.dtype.is_floating_point:
        raise TypeError(f"a kernel must be real floating point; got {kernel.dtype}.")
    if kernel.ndim == 0 or kernel.shape[-1] < 2 or kernel.numel() == 0:
        raise ValueError(
            f"a kernel has shape (*channels, at least 2 taps); got {tuple(kernel.shape)}."
        )
    if tail not in ("zero", "free"):
        raise ValueError(f"tail must be 'zero' or 'free'; got {tail!r}.")
    if count is not None and count < 1:
        raise ValueError(f"count must be at least 1; got {count}.")
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
