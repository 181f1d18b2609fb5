"""Write the tables of docs/results/distillation.md from the results of trained_filters.py."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks._pages import table

__all__ = ["blocks", "percent"]


def percent(value: dict[str, float]) -> str:
    """Write a mean share with its deviation over seeds."""
    return f"{value['mean']:+.2%} ± {100 * value['deviation']:.2f}"


def blocks(results: dict[str, Any]) -> dict[str, str]:
    """Return the tables of the page, by the names of their marks."""
    summary = results["summary"]
    orders = []
    for row in summary["orders"]:
        cells = [str(row["order"]), f"{row['lower bound']['mean']:.3f}"]
        for way in ("unweighted", "by text"):
            if way not in row:
                cells += ["–"] * 4
                continue
            found = row[way]
            perplexity = found["perplexity per byte"]
            cells += [
                f"{found['relative error']['mean']:.3f}",
                f"{perplexity['mean']:.3f} ± {perplexity['deviation']:.3f}",
                percent(found["increase"]),
                f"{found['divergence']['mean']:.1e}",
            ]
        orders.append(cells)
    whole = [2 ** run["bits per byte"] for run in results["runs"]]
    deviation = statistics.stdev(whole) if len(whole) > 1 else 0.0
    original = f"{statistics.fmean(whole):.3f} ± {deviation:.3f}"
    orders.append(["original", "–", "–", original, *["–"] * 6])
    falls = []
    for one in summary["falls"]["unweighted"]:
        cells = [f"{one['from']} to {one['to']}", percent(one["fall"])]
        others = [o for o in summary["falls"]["by text"] if o["from"] == one["from"]]
        falls.append([*cells, *([percent(o["fall"]) for o in others] or ["–"])])
    return {
        "taps": table(
            ("taps that are kept", *(str(row["taps"]) for row in summary["taps"])),
            [("loss", *(percent(row["increase"]) for row in summary["taps"]))],
        ),
        "orders": table(
            (
                "order",
                "bound",
                *("error", "perplexity per byte", "loss", "KL, bits"),
                *("error, by text", "perplexity, by text", "loss, by text", "KL, by text"),
            ),
            orders,
        ),
        "falls": table(("order", "fall of the loss", "fall of the loss, by text"), falls),
    }
