"""Turn the rows of `benchmarks/coverage.py` into its results and the page about them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from benchmarks._pages import fill_marks, plain, table

VERDICTS = ("read", "in part", "named", "silent", "wrong", "raises", "not causal", "not built")


def compact(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with one entry for all layers of one class that were read in one way."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for layer in row.get("layers", []):
        key = (layer["mixer"], layer["kind"], layer["reader"])
        groups.setdefault(key, []).append(layer)
    mixers = [
        {
            "mixer": mixer,
            "kind": kind,
            "reader": reader,
            "layers": len(layers),
            "operators": sum(layer["operators"] for layer in layers),
            "checked": sum("error" in layer for layer in layers),
            **{
                key: max(found)
                for key in ("error", "independent_size_error", "size_error")
                if (found := [layer[key] for layer in layers if key in layer])
            },
        }
        for (mixer, kind, reader), layers in groups.items()
    ]
    kept = {key: value for key, value in row.items() if key not in ("layers", "unread", "silent")}
    return {**kept, "mixers": mixers}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return counts and largest errors over all rows, which `compact` returned."""
    mixers = [mixer for row in rows for mixer in row["mixers"]]

    def largest(entries: list[dict[str, Any]], key: str) -> float:
        return max((entry[key] for entry in entries if key in entry), default=0.0)

    readers: Counter[str] = Counter()
    for mixer in mixers:
        readers[mixer["reader"]] += mixer["layers"]
    return {
        "types": len(rows),
        "verdicts": {
            verdict: sum(row["verdict"] == verdict for row in rows) for verdict in VERDICTS
        },
        "readers": dict(sorted(readers.items())),
        "layers": sum(mixer["layers"] for mixer in mixers),
        "checked": sum(mixer["checked"] for mixer in mixers),
        "largest_error": largest(mixers, "error"),
        "largest_size_error": largest(mixers, "size_error"),
        "largest_independent_size_error": largest(mixers, "independent_size_error"),
        "largest_output_error": largest(rows, "output_error"),
    }


def blocks(results: dict[str, Any]) -> dict[str, str]:
    """Return the Markdown of every part of the page that follows from the results, by its name."""
    total = results["summary"]
    counts = total["verdicts"]
    readers = ", ".join(f"{count:,} by {name}" for name, count in total["readers"].items())
    figures = [
        (f"types that transformers {results['transformers']} has", f"{total['types']:,}"),
        *((f"types {_VERDICTS[verdict]}", f"{count:,}") for verdict, count in counts.items()),
        ("mixers that are measured", f"{total['layers']:,} ({readers})"),
        ("mixers whose operators were obtained independently", f"{total['checked']:,}"),
        ("largest error of an operator", digits(total["largest_error"])),
        ("largest error of a state-size", digits(total["largest_size_error"])),
        (
            "largest error of a state-size against independent operators",
            digits(total["largest_independent_size_error"]),
        ),
        ("largest difference of outputs", digits(total["largest_output_error"])),
    ]
    others = [
        f"- {row['type']} ({row['verdict']}): {plain(row['reason'])}"
        for row in results["rows"]
        if row["verdict"] != "read"
    ]
    return {
        "summary": table(("", "figure"), figures),
        "others": "\n".join(others) or "There are none.",
        "types": table(_HEAD, [_line(row) for row in results["rows"]]),
    }


def fill(text: str, results: dict[str, Any]) -> str:
    """Return a page with the parts that follow from the results put between their marks.

    Raises:
        ValueError: if the page lacks a mark.
    """
    return fill_marks(text, blocks(results))


_VERDICTS = {
    "read": "that are wholly read",
    "in part": "read in part, with the rest named",
    "named": "of which all mixers are named and none is read",
    "silent": "of which a mixer is neither read nor named",
    "wrong": "with a wrong operator, state-size or output",
    "raises": "on which the analysis raises an error",
    "not causal": "that look ahead on a plain text, and are refused",
    "not built": "that were not built",
}
_HEAD = ("type", "verdict", "mixers (reader)", "operators", "state-sizes", "outputs", "seconds")


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells of a row. `_HEAD` has their headings."""
    errors = [mixer["error"] for mixer in row["mixers"] if "error" in mixer]
    sizes = [mixer["size_error"] for mixer in row["mixers"]]
    return (
        row["type"],
        row["verdict"],
        ", ".join(f"{mixer['mixer']} ({mixer['reader']})" for mixer in row["mixers"]),
        digits(max(errors, default=None)),
        digits(max(sizes, default=None)),
        digits(row.get("output_error")),
        f"{row['analysis_seconds']:.1f}" if "analysis_seconds" in row else "",
    )


def digits(value: float | None) -> str:
    """Return an error with one digit; nothing for None."""
    if value is None:
        return ""
    return f"{value:.0e}".replace("e-0", "e-").replace("e+00", "") if value else "0"
