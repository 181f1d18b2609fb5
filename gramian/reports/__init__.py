"""Figures: pictures of measurements that other floors made.

Every `plot_*` takes plain numbers and returns a `matplotlib.figure.Figure` that belongs to no
window or global state; `save_figure` writes it. Needs matplotlib (`pip install
"gramian[plots]"`).
"""

from gramian.reports._figures import (
    plot_bits_per_byte,
    plot_decoding_cost,
    plot_hankel_spectra,
    plot_training,
    save_figure,
)

__all__ = [
    "plot_bits_per_byte",
    "plot_decoding_cost",
    "plot_hankel_spectra",
    "plot_training",
    "save_figure",
]
