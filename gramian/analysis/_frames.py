"""Make frames of pandas from reports.

A *frame of states* has a row for each layer, head or channel, and position. A *frame of layers* has
a row for each layer. Both hold the reports of several models or texts, one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gramian._frames import import_pandas

if TYPE_CHECKING:
    from pandas import DataFrame

    from gramian.analysis._report import LayerState, StateReport

__all__ = ["layer_frame", "state_frame"]

_RANKS = ("stable_rank", "effective_rank")


def state_frame(reports: Sequence[StateReport], texts: Sequence[str] | None = None) -> DataFrame:
    """Return a frame with a row for each report, layer, head or channel, and position.

    The columns are `model`, `source`, `layer` (path), `mixer`, `kind`, `reader`, `channel`,
    `position`, `token` (the one after the position), `ess`, `error` (NaN if `ess` is exact), `tss`,
    `usable` (min(TSS, i, L - i)) and `in_use` (ESS / usable, NaN where nothing is usable). The mean
    of `in_use` over the rows of a layer is `LayerState.in_use`. Names are categorical, numbers of
    states are float32, and indices int64. If ranks of states were measured in one of the reports,
    the columns `stable_rank` and `effective_rank` follow, NaN in layers without them.

    Args:
        reports: The reports.
        texts: A name for the text of each report, which makes a first column `text`. None makes no
            such column.

    Raises:
        ImportError: if pandas is not installed.
        ValueError: if there is not one text for each report.
    """
    parts = [
        _states(report, layer, text)
        for report, text in _with_texts(reports, texts)
        for layer in report.layers
    ]
    names = ("text", "model", "source", "layer", "mixer", "kind", "reader", "token")
    return _frame(parts, names, without=_absent(reports, texts))


def layer_frame(reports: Sequence[StateReport], texts: Sequence[str] | None = None) -> DataFrame:
    """Return a frame with a row for each report and layer.

    The columns are `model`, `source`, `layer`, `mixer`, `kind`, `reader`, `channels` (measured
    heads or channels), `count` (all of them), `ess_mean`, `ess_max`, `ess_mean_error` (NaN if
    exact), `tss_mean`, `usable_mean` and `in_use` (NaN if nothing is usable). If ranks of states
    were measured, `stable_rank_mean` and `effective_rank_mean` follow.

    Args:
        reports: The reports.
        texts: As in `state_frame`.

    Raises:
        ImportError: if pandas is not installed.
        ValueError: if there is not one text for each report.
    """
    parts = [
        _layer(report, layer, text)
        for report, text in _with_texts(reports, texts)
        for layer in report.layers
    ]
    names = ("text", "model", "source", "layer", "mixer", "kind", "reader")
    return _frame(parts, names, without=_absent(reports, texts))


def _absent(reports: Sequence[StateReport], texts: Sequence[str] | None) -> tuple[str, ...]:
    """Return the columns that would be empty."""
    every = (layer for report in reports for layer in report.layers)
    ranked = any(layer.stable_rank is not None for layer in every)
    without = () if texts is not None else ("text",)
    return without if ranked else (*without, *_RANKS, *(f"{name}_mean" for name in _RANKS))


def _with_texts(
    reports: Sequence[StateReport], texts: Sequence[str] | None
) -> list[tuple[StateReport, str]]:
    """Return every report with the name of its text."""
    if texts is not None and len(texts) != len(reports):
        raise ValueError(f"{len(reports)} reports need as many texts; got {len(texts)}.")
    return list(zip(reports, texts or [""] * len(reports), strict=True))


def _about(report: StateReport, layer: LayerState, text: str) -> dict[str, Any]:
    """Return the columns that are the same in all rows of a layer."""
    return {
        "text": text,
        "model": report.model,
        "source": report.source,
        "layer": layer.name,
        "mixer": layer.mixer,
        "kind": layer.kind,
        "reader": layer.reader,
    }


def _states(report: StateReport, layer: LayerState, text: str) -> dict[str, Any]:
    """Return the columns of a layer's heads and positions."""
    channels, count = layer.ess.shape
    usable = layer.usable.numpy()
    share = np.where(usable > 0, layer.utilization.numpy(), np.nan)
    error = np.full_like(share, np.nan) if layer.error is None else layer.error.numpy()
    tokens = np.array([*report.tokens, ""], dtype=object)
    positions = np.array(report.positions, dtype=np.int64)
    size = channels * count
    return {
        **{k: np.full(size, v, dtype=object) for k, v in _about(report, layer, text).items()},
        "channel": np.repeat(np.array(layer.channels, dtype=np.int64), count),
        "position": np.tile(positions, channels),
        "token": np.tile(tokens[positions], channels),
        "ess": layer.ess.numpy().ravel(),
        "error": error.ravel(),
        "tss": layer.tss.numpy().ravel(),
        "usable": usable.ravel(),
        "in_use": share.ravel(),
        **{
            name: np.full_like(share, np.nan).ravel() if rank is None else rank.numpy().ravel()
            for name in _RANKS
            for rank in [getattr(layer, name)]
        },
    }


def _layer(report: StateReport, layer: LayerState, text: str) -> dict[str, Any]:
    """Return the columns of a layer as a whole."""
    share = layer.in_use
    about = _about(report, layer, text)
    numbers = {
        "ess_mean": layer.ess.double().mean(),
        "ess_max": layer.ess.max(),
        "ess_mean_error": np.nan if layer.mean_error is None else layer.mean_error,
        "tss_mean": layer.tss.double().mean(),
        "usable_mean": layer.usable.double().mean(),
        "in_use": np.nan if share is None else share,
        **{
            f"{name}_mean": np.nan if rank is None else rank.double().mean()
            for name in _RANKS
            for rank in [getattr(layer, name)]
        },
    }
    return {
        **{name: np.array([value], dtype=object) for name, value in about.items()},
        "channels": np.array([len(layer.channels)], dtype=np.int64),
        "count": np.array([layer.count], dtype=np.int64),
        **{name: np.array([float(value)]) for name, value in numbers.items()},
    }


def _frame(
    parts: Sequence[dict[str, Any]], names: Sequence[str], without: Sequence[str]
) -> DataFrame:
    """Join columns, of which `names` are categorical and `without` are left out."""
    pandas = import_pandas()
    kept = [column for column in (parts[0] if parts else ()) if column not in without]
    joined = {column: np.concatenate([part[column] for part in parts]) for column in kept}
    return pandas.DataFrame(
        {
            column: pandas.Categorical(values) if column in names else values
            for column, values in joined.items()
        }
    )
