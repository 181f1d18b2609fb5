"""Recurrences outside of PyTorch: step and prefill as ONNX or `torch.export` programs.

The state is explicit: a program takes the input and the state's tensors and returns the output and
the new ones, so a loop feeds outputs back. No program holds a complex number or a Fourier
transform; whole chunks are taken by blocks of matrix products.
"""

from gramian.export._export import export_model, export_recurrence
from gramian.export._mixers import MixerProgram, register_program
from gramian.export._report import ExportReport
from gramian.export._runtime import ExportedModel, ExportedRecurrence

__all__ = [
    "ExportReport",
    "ExportedModel",
    "ExportedRecurrence",
    "MixerProgram",
    "export_model",
    "export_recurrence",
    "register_program",
]
