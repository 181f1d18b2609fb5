"""Write scores into a table, completely or not at all, and resume after an interruption.

Rows are written to `NAME.partial` beside the table. The first line of this file identifies the
call. A later call with the same arguments, files and weights skips the rows that are already in the
file. When all rows are written, they become the table.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch

from gramian._hashing import hash_file
from gramian._json import to_json
from gramian._staging import staged_file
from gramian.genomics._likelihood import LogLikelihood, language_model
from gramian.genomics._score import RecordScore, VariantScore, default_window, score
from gramian.models import GramianForCausalLM
from gramian.models.snapshots import fingerprint

__all__ = ["write_scores"]

FORMAT = "gramian-scores-1"


def write_scores(
    output: str | Path,
    model: GramianForCausalLM,
    records: str | Path,
    *,
    tokenizer: Any = None,
    variants: str | Path | None = None,
    intervals: str | Path | None = None,
    **options: Any,
) -> int:
    """Write the scores of a file into a tab-separated table, or complete an interrupted table.

    The row of a record contains its name, its length, the number of tokens that its score includes,
    and the total and mean log-likelihood in nats. The row of a variant contains chrom, pos, id,
    ref, alt, the window's start and end (from 0, half-open), the totals of reference and
    alternative, their difference, and the means of both. With `reverse_complement="average"` or
    `"both"`, all values are averaged over the strands. With `"both"`, a row also contains values of
    each strand. In names, a space replaces every tab.

    Args:
        output: path of the table, which must not exist yet. Until the table is complete, its rows
            are in `OUTPUT.partial`. A call with the same arguments, files and weights continues
            this file, and the table is then the same as that of an uninterrupted call.
        model: the language model.
        records: path of a FASTA file.
        tokenizer: the model's tokenizer.
        variants: path of a VCF file or a table of variants, or None.
        intervals: path of a BED file, or None.
        options: further arguments of `score`.

    Returns:
        The number of rows that were taken from an earlier call.

    Raises:
        FileExistsError: if the table exists.
        ValueError: if another call wrote the partial table, or if `score` raises this error.
    """
    target = Path(output)
    if target.exists():
        raise FileExistsError(f"{target} exists already; name a file that does not.")
    partial = target.with_name(f"{target.name}.partial")
    call = _describe(language_model(model), records, variants, intervals, options)
    both = options.get("reverse_complement") == "both"
    head = _columns(variants is not None, both)
    done = _resume(partial, call, target)
    results = score(
        model,
        records,
        tokenizer=tokenizer,
        variants=variants,
        intervals=intervals,
        skip=done,
        **options,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = not partial.exists()
    with partial.open("a", encoding="utf-8", newline="\n") as file:
        if fresh:
            file.write(f"{call}\n" + "\t".join(head) + "\n")
        for one in results:
            file.write("\t".join(_row(one, both)) + "\n")
            file.flush()
    with partial.open(encoding="utf-8", newline="\n") as file, staged_file(target) as stage:
        file.readline()
        with stage.open("w", encoding="utf-8", newline="\n") as table:
            table.writelines(file)
            table.flush()
            os.fsync(table.fileno())
    partial.unlink()
    return done


def _resume(partial: Path, call: str, target: Path) -> int:
    """Return the number of complete rows of an earlier call, and cut off an incomplete one.

    Raises:
        ValueError: if another call wrote the rows.
    """
    if not partial.exists():
        return 0
    size = rows = 0
    with partial.open("rb") as file:
        for number, line in enumerate(file):
            if not line.endswith(b"\n"):
                break
            if number == 0 and line.decode("utf-8", errors="replace").rstrip("\n") != call:
                raise ValueError(
                    f"{partial} belongs to another call (other files, weights or options); remove "
                    f"it, or write to another file than {target}."
                )
            rows += number >= 2
            size += len(line)
        complete = size > 0
    if not complete or rows == 0:
        partial.unlink()
        return 0
    with partial.open("r+b") as file:
        file.truncate(size)
    return rows


def _describe(
    model: GramianForCausalLM,
    records: str | Path,
    variants: str | Path | None,
    intervals: str | Path | None,
    options: dict[str, Any],
) -> str:
    """Return one line that describes everything that determines the rows of a call."""
    given = {name: value for name, value in options.items() if name != "progress"}
    if variants is not None and given.get("window") is None:
        given["window"] = default_window(model)
    files = {"records": records, "variants": variants, "intervals": intervals}
    weights = hashlib.sha256(fingerprint(model).encode())
    head: Any = model.get_output_embeddings()
    flat = head.weight.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // 4096)].to("cpu", torch.float64)
    weights.update(sample.numpy().tobytes())
    described = {
        "format": FORMAT,
        "weights": weights.hexdigest(),
        "device": next(model.parameters()).device.type,
        **{name: hash_file(file) for name, file in files.items() if file is not None},
        **given,
    }
    return to_json(described, sort_keys=True)


def _columns(of_variants: bool, both: bool) -> list[str]:
    if not of_variants:
        names = ["name", "length", "tokens", "total", "mean"]
        more = ["forward_total", "reverse_total", "forward_mean", "reverse_mean"]
    else:
        names = ["chrom", "pos", "id", "ref", "alt", "start", "end"]
        names += ["reference_total", "alternative_total", "difference"]
        names += ["reference_mean", "alternative_mean"]
        more = ["forward_difference", "reverse_difference"]
    return names + more if both else names


def _row(one: RecordScore | VariantScore, both: bool) -> list[str]:
    if isinstance(one, RecordScore):
        cells = [_cell(one.name), str(one.length), str(one.strands[0].tokens)]
        cells += _numbers(one.total, one.mean)
        if both:
            cells += _numbers(*(strand.total for strand in one.strands))
            cells += _numbers(*(strand.mean for strand in one.strands))
        return cells
    variant = one.variant
    cells = [_cell(variant.chrom), str(variant.pos), _cell(variant.id) or "."]
    cells += [variant.ref, variant.alt, str(one.start), str(one.end)]
    totals = [_average(strands, "total") for strands in (one.reference, one.alternative)]
    means = [_average(strands, "mean") for strands in (one.reference, one.alternative)]
    return cells + _numbers(*totals, one.difference, *means, *(one.differences if both else ()))


def _average(strands: tuple[LogLikelihood, ...], name: str) -> float:
    return sum(getattr(one, name) for one in strands) / len(strands)


def _numbers(*values: float) -> list[str]:
    return [f"{value:.6f}" for value in values]


def _cell(text: str) -> str:
    return " ".join(text.split("\t"))
