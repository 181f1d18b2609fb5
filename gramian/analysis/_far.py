"""Find the modules that mix only positions that are far apart.

Layers are examined on a short sequence (`gramian.analysis._mixing`). A shift by 70 positions mixes
nothing there. So the model runs once more on the text itself, and what mixes no positions of the
short sequence is tested again.
"""

from __future__ import annotations

from collections.abc import Set

from torch import nn

from gramian.analysis._inputs import ModelInputs, run_model
from gramian.analysis._mixing import Finder, Leftover
from gramian.analysis._tracing import Frame, Tracer

__all__ = ["far_mixers"]

_LONGEST = 1024
"""The largest number of tokens on which modules are tested."""


def far_mixers(
    tracer: Tracer, inputs: ModelInputs, planned: Set[nn.Module], short: int
) -> dict[str, str]:
    """Return the paths of modules that mix positions of a text, but not those of its beginning.

    The test reaches as far as the text, but no further than 1,024 tokens. It is one more run of the
    model, and one of every kind of its modules.

    Args:
        tracer: The tracer of the model.
        inputs: The whole text.
        planned: The modules that are known to mix positions. They are not tested.
        short: The number of positions on which the others mix none.

    Returns:
        The reason why each of these modules is not read, by its path.
    """
    sizes = {size for tensor in tracer.model.parameters() for size in tensor.shape}
    lengths = range(min(inputs.length, _LONGEST), short, -1)
    length = next((n for n in lengths if n not in sizes), 0)
    reasons: dict[str, str] = {}
    if not length:
        return reasons

    def visit(frame: Frame, found: Leftover) -> None:
        if frame.module not in planned:
            reasons[frame.path] = (
                f"it mixes tokens that are far apart: over {length} tokens, but not over {short}, "
                "on which layers are examined."
            )

    tracer.padding = 0
    finder = Finder(tracer, length, visit, planned.__contains__, lambda frame: False, quick=True)
    with finder.finding():
        run_model(tracer.model, inputs.first(length))
    return reasons
