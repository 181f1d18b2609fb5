r"""Products with batches of Hankel matrices by FFT.

The Hankel matrix of a sequence `g` has the entries `H_ij = g_{i+j}`. If `g_t = h_{t+1}` are the
Markov parameters of a system without its direct term, the matrix maps past inputs to future
outputs. The product with a vector is a correlation, `(H v)_i = Σ_j g_{i+j} v_j`, and takes O(N log
N) operations by FFT. A circular transform with one point per tap causes no wrap-around in the rows
of the matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gramian.ops.lengths import fft_length

__all__ = ["Hankel"]


class Hankel:
    """A batch of `rows` × `columns` Hankel matrices that are never formed.

    Args:
        sequence: (*B, T), real: the sequences g. Entries past the end of a sequence count as zero.
            Entries past rows + columns - 1 are not used.
        rows: The number of rows, at least 1.
        columns: The number of columns, at least 1.
    """

    def __init__(self, sequence: Tensor, rows: int, columns: int) -> None:
        used = rows + columns - 1
        self.sequence = sequence[..., :used]  # (*B, at most rows + columns - 1)
        self.rows = rows
        self.columns = columns
        self._points = fft_length(used, 1)
        self._spectrum = torch.fft.rfft(self.sequence, n=self._points).unsqueeze(-2)

    @property
    def like(self) -> Tensor:
        """Return a tensor that has the batch dimensions, dtype and device of the matrices."""
        return self.sequence

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """Compute `H v`, (*B, k, rows), for k vectors v of every matrix, (*B, k, columns)."""
        spectrum = torch.fft.rfft(vectors, n=self._points).conj_physical_()
        spectrum *= self._spectrum
        return torch.fft.irfft(spectrum, n=self._points)[..., : self.rows]

    def matrix(self) -> Tensor:
        """Return the matrices, (*B, rows, columns), as a view of the padded sequence."""
        missing = self.rows + self.columns - 1 - self.sequence.shape[-1]
        return torch.nn.functional.pad(self.sequence, (0, missing)).unfold(-1, self.columns, 1)

    def squared_norm(self) -> Tensor:
        """Compute `‖H‖_F²`, (*B), in which every tap counts as often as it occurs in H."""
        taps = self.sequence.shape[-1]
        place = torch.arange(1, taps + 1, device=self.sequence.device)
        used = self.rows + self.columns - 1
        count = torch.minimum(place, used + 1 - place).clamp(max=min(self.rows, self.columns))
        return (self.sequence.square() * count).sum(-1)

    def to(self, dtype: torch.dtype) -> Hankel:
        """Return the matrices in another precision."""
        return Hankel(self.sequence.to(dtype), self.rows, self.columns)

    def __getitem__(self, index: Tensor) -> Hankel:
        """Select matrices by `index` along the first batch dimension."""
        picked = object.__new__(Hankel)
        picked.__dict__.update(self.__dict__)
        picked.sequence = self.sequence[index]
        picked._spectrum = self._spectrum[index]
        return picked
