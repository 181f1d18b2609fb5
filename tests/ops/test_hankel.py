import pytest
import scipy.linalg
import torch

from gramian.ops.hankel import Hankel

SIZES = [(1, 1), (2, 3), (3, 2), (63, 1), (1, 63), (129, 129), (257, 500)]


@pytest.mark.parametrize(("rows", "columns"), SIZES)
@pytest.mark.parametrize("missing", [0, 1, 5])
def test_product_is_the_dense_one(rows, columns, missing):
    taps = max(1, rows + columns - 1 - missing)
    sequence = torch.randn(2, taps, dtype=torch.float64)
    hankel = Hankel(sequence, rows, columns)
    padded = torch.nn.functional.pad(sequence, (0, rows + columns - 1 - taps)).numpy()
    dense = torch.stack(
        [torch.from_numpy(scipy.linalg.hankel(h[:rows], h[rows - 1 :])) for h in padded]
    )
    vectors = torch.randn(2, 4, columns, dtype=torch.float64)
    torch.testing.assert_close(hankel.matrix(), dense)
    torch.testing.assert_close(hankel @ vectors, vectors @ dense.mT, atol=1e-11, rtol=1e-11)
    one = hankel[torch.tensor([1])]
    torch.testing.assert_close(
        one @ vectors[1:], vectors[1:] @ dense[1:].mT, atol=1e-11, rtol=1e-11
    )


def test_float32_products_are_float32_and_close():
    sequence = torch.randn(3, 400, dtype=torch.float64)
    vectors = torch.randn(3, 2, 200, dtype=torch.float64)
    exact = Hankel(sequence, 201, 200) @ vectors
    rounded = Hankel(sequence, 201, 200).to(torch.float32) @ vectors.float()
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded.double(), exact, atol=1e-4, rtol=1e-4)
