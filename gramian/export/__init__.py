"""Export recurrences as ONNX or `torch.export` programs, one for steps and one for whole chunks.

The state is explicit: a program maps the input and the tensors of the state to the output and the
tensors of the next state. The caller passes the next state to the next call. No program contains
complex numbers or Fourier transforms. Whole chunks are processed in blocks, by matrix products.
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
