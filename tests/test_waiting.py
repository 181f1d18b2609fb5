"""How long OpenMP's threads wait in a loop for each other is limited, unless the user chose it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def spins(code: str, **chosen: str) -> str:
    """Return the limit in the environment of a fresh process that runs the code."""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
    environment = {k: v for k, v in os.environ.items() if k not in names} | chosen
    command = f"{code}; import os; print(os.environ.get('GOMP_SPINCOUNT'))"
    process = subprocess.run(
        [sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True
    )
    return process.stdout.strip()


def test_threads_wait_briefly_if_gramian_is_imported_first() -> None:
    assert spins("import gramian") == "1000"


@pytest.mark.parametrize(
    ("name", "value"),
    [("GOMP_SPINCOUNT", "7"), ("OMP_WAIT_POLICY", "active"), ("KMP_BLOCKTIME", "5")],
)
def test_the_choice_of_the_user_stays(name: str, value: str) -> None:
    expected = value if name == "GOMP_SPINCOUNT" else "None"
    assert spins("import gramian", **{name: value}) == expected


def test_nothing_changes_after_torch_is_imported() -> None:
    assert spins("import sys; sys.modules['torch'] = sys; import gramian") == "None"
