"""Export of recurrences: step and prefill as ONNX or `torch.export` programs.

The state is explicit: a program maps the input and the state's tensors to the output and the new
tensors, so a loop feeds these back. No program contains complex numbers or Fourier transforms;
whole chunks are processed by blocks of matrix products.
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
