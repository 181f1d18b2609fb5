"""Every kernel compiles for GPUs of three kinds, which needs no GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# Compiling needs another process, because this one has chosen Triton's interpreter.
PROGRAM = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gramian.ops.kernels import _hyena_step, _selective_scan

KERNELS = {
    "forward": (_selective_scan.forward, {"CHUNK": 64, "CHANNELS": 32, "STATES": 16}),
    "backward": (_selective_scan.backward, {"CHUNK": 64, "CHANNELS": 32, "STATES": 16}),
    "step": (_hyena_step.step, {"TAPS": 3, "REAL": False, "CHANNELS": 64, "MODES": 16}),
    "real_step": (_hyena_step.step, {"TAPS": 4, "REAL": True, "CHANNELS": 64, "MODES": 16}),
}
SIZES = {"length", "channels", "states", "width", "count"}
backend, arch, threads = sys.argv[1:]
target = GPUTarget(backend, int(arch) if backend == "cuda" else arch, int(threads))
for name, (kernel, constants) in KERNELS.items():
    types = {one: "i32" if one in SIZES else "*fp32" for one in kernel.arg_names}
    if "step" in name:  # the activations of a model in half precision
        types |= {"z": "*bf16", "past": "*bf16", "y": "*bf16"}
    types |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=types, constexprs=constants)
    print(name, *triton.compile(source, target=target).asm)
"""
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles(target: str) -> None:
    backend, arch, threads = TARGETS[target]
    made = subprocess.run(
        [sys.executable, "-c", PROGRAM, backend, str(arch), str(threads)],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert made.returncode == 0, made.stderr
    binary = "cubin" if backend == "cuda" else "hsaco"
    compiled = {line.split()[0] for line in made.stdout.splitlines() if binary in line.split()}
    assert compiled == {"forward", "backward", "step", "real_step"}
