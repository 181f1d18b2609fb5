"""Every kernel compiles for GPUs of three kinds, which needs no GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

KERNELS = {"forward", "backward", "step", "real_step", "convolve", "correlate"}

# Compiling needs another process, because this one has chosen Triton's interpreter.
PROGRAM = """
import sys
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gramian.ops.kernels import _causal_convolution, _hyena_step, _selective_scan
from gramian.ops.kernels.causal_convolution import _BLOCK, _options

KERNELS = {
    "forward": (_selective_scan.forward, {"CHUNK": 64, "CHANNELS": 32, "STATES": 16}),
    "backward": (_selective_scan.backward, {"CHUNK": 64, "CHANNELS": 32, "STATES": 16}),
    "step": (_hyena_step.step, {"TAPS": 3, "REAL": False, "CHANNELS": 64, "MODES": 16}),
    "real_step": (_hyena_step.step, {"TAPS": 4, "REAL": True, "CHANNELS": 64, "MODES": 16}),
}
SIZES = {"length", "channels", "states", "width", "count", "batch", "reach"}
backend, arch, threads = sys.argv[1:]
torch.version.hip = "6" if backend == "hip" else None
blocks = _options(_BLOCK, torch.float32)
warps = blocks.pop("num_warps")
flags = {"FACTOR": True, "GATE": True, "ADJOINT": True}
for name in ("convolve", "correlate"):
    kernel = getattr(_causal_convolution, name)
    constants = {k: v for k, v in (blocks | flags).items() if k in kernel.arg_names}
    KERNELS[name] = kernel, constants
target = GPUTarget(backend, int(arch) if backend == "cuda" else arch, int(threads))
for name, (kernel, constants) in KERNELS.items():
    types = {one: "i32" if one in SIZES else "*fp32" for one in kernel.arg_names}
    if "step" in name:  # the activations of a model in half precision
        types |= {"z": "*bf16", "past": "*bf16", "y": "*bf16"}
    if name in ("convolve", "correlate"):
        activations = ("x", "y", "g", "gate", "factor")
        types = {one: "i64" if one.endswith(("_row", "_channel", "_step")) else kind
                 for one, kind in types.items()}
        types |= {one: "*bf16" for one in activations if one in types}
    types |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=types, constexprs=constants)
    options = {"num_warps": warps} if name in ("convolve", "correlate") else {}
    made = triton.compile(source, target=target, options=options)
    print(name, made.metadata.shared, *made.asm)
"""
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
SHARED = {"sm_80": 163 * 2**10, "sm_90": 227 * 2**10, "gfx942": 64 * 2**10}
"""The largest number of bytes of memory that a group of threads may share on each GPU."""


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
    lines = [line.split() for line in made.stdout.splitlines()]
    compiled = {line[0]: int(line[1]) for line in lines if binary in line}
    assert compiled.keys() == KERNELS
    assert max(compiled.values()) <= SHARED[target]
