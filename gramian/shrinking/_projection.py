"""Predict what projections of the states to each size would do, beside dropping coordinates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from gramian.shrinking._balancing import Gramians
from gramian.shrinking._choosing import Choices
from gramian.shrinking._family import Layer
from gramian.shrinking._passes import Importance, measure_importance
from gramian.shrinking._texts import Windows

__all__ = ["Prediction", "Projection", "empty_gramians", "predict"]


@dataclass(frozen=True)
class Projection:
    """What the oblique projection of a layer's states would do, at the number of states it has now.

    All figures are for the same tokens of the text: those by which coordinates were chosen, or the
    first 4,096 of them if states were not projected.

    Attributes:
        error: predicted error of the scan's outputs, for the coordinates of the balanced basis that
            the greedy elimination keeps.
        coordinates_error: the same for the greedy elimination of the model's own coordinates.
        bound: bound of the mean length of the error of the outputs of one head and token, relative
            to the root mean square of their length: the sum of the singular values of the dropped
            coordinates. `error` is the root mean square instead of the mean.
        singular_values: singular values of the balanced basis of each group, in descending order,
            likewise relative.
    """

    error: float
    coordinates_error: float
    bound: float
    singular_values: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Prediction:
    """The choices by coordinates and in balanced bases, measured on the same tokens.

    Attributes:
        coordinates: the choices by the model's own coordinates.
        balanced: the choices in the balanced bases.
    """

    coordinates: Choices
    balanced: Choices

    def at(self, layer: Layer, size: int) -> Projection:
        """Return what a projection of a layer to a number of states would do."""
        path, one = layer.path, self.balanced.importance[layer.path]
        assert one.basis is not None
        values = one.basis.singular_values
        whole = float(one.gram.sum()) / (one.basis.count * layer.shape.groups)
        unit = whole**0.5 if whole > 0 else 1.0
        dropped = self.balanced.orders[path][:, : layer.shape.states - size]
        return Projection(
            error=self.balanced.errors[path][size],
            coordinates_error=self.coordinates.errors[path][size],
            bound=float(values.gather(1, dropped).sum(1).mean()) / unit,
            singular_values=tuple(map(tuple, (values / unit).tolist())),
        )


def empty_gramians(layers: Sequence[Layer]) -> dict[str, Gramians]:
    """Return empty sums for the layers with scalar gates, by path."""
    own = (layer for layer in layers if layer.family.commutes(layer.module))
    return {layer.path: Gramians.of(layer.shape.groups, layer.shape.states) for layer in own}


def predict(
    model: nn.Module,
    layers: Sequence[Layer],
    windows: Windows,
    importance: Mapping[str, Importance],
    gramians: Mapping[str, Gramians],
    progress: Callable[[int], None] | None = None,
) -> Prediction | None:
    """Return the choices in the model's coordinates and in balanced bases on a text.

    Args:
        model: the model.
        layers: the layers; those without Gramians are left out.
        windows: the windows.
        importance: the importance of the states on these windows.
        gramians: the Gramians there.
        progress: a function that is called with the number of windows done.

    Returns:
        The choices; None if no layer has Gramians.
    """
    own = [layer for layer in layers if layer.path in gramians]
    if not own:
        return None
    bases = {layer.path: gramians[layer.path].balanced() for layer in own}
    balanced = measure_importance(model, own, windows, progress, bases)
    return Prediction(Choices.of(own, importance), Choices.of(own, balanced))
