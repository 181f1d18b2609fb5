"""Figures: pictures of measurements that other floors made.

Every `plot_*` takes plain numbers, or the report of a job, and returns a
`matplotlib.figure.Figure` that belongs to no window or global state; `save_figure` writes it. Needs
matplotlib (`pip install "gramian[plots]"`).
"""

from gramian.reports._figures import (
    plot_bits_per_byte,
    plot_decoding_cost,
    plot_distillation,
    plot_hankel_spectra,
    save_figure,
)

__all__ = [
    "plot_bits_per_byte",
    "plot_decoding_cost",
    "plot_distillation",
    "plot_hankel_spectra",
    "save_figure",
]
