"""Make figures of state-sizes, of distillation and of the cost of decoding.

Every function `plot_*` accepts plain numbers, or a report that another function of Gramian
returned. It returns a `matplotlib.figure.Figure`, which belongs to no window and no global state.
`save_figure` writes the figure to a file. Figures need matplotlib
(`pip install "gramian[plots]"`). `state_page` makes an interactive HTML page and needs no further
package. Figures of training are in `gramian.training`.
"""

from gramian._drawing import save_figure
from gramian.reports._figures import (
    plot_bits_per_byte,
    plot_decoding_cost,
    plot_distillation,
    plot_hankel_spectra,
)
from gramian.reports._modulation import plot_modulation
from gramian.reports._page import save_state_page, state_page
from gramian.reports._shrinkage import plot_shrinkage
from gramian.reports._spread import plot_state_spread
from gramian.reports._state import (
    plot_depth_comparison,
    plot_state_comparison,
    plot_state_curves,
    plot_state_map,
    plot_utilization,
)

__all__ = [
    "plot_bits_per_byte",
    "plot_decoding_cost",
    "plot_depth_comparison",
    "plot_distillation",
    "plot_hankel_spectra",
    "plot_modulation",
    "plot_shrinkage",
    "plot_state_comparison",
    "plot_state_curves",
    "plot_state_map",
    "plot_state_spread",
    "plot_utilization",
    "save_figure",
    "save_state_page",
    "state_page",
]
