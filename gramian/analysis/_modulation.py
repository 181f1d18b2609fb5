r"""Measure state modulation: whether ESS drops where a context ends, over several texts.

The position i after a delimiter is compared with positions nearby. The *ratio* is the ESS at i over
the mean ESS at i - d and i + d, for the distances d up to a reach at which both were measured and
neither follows a delimiter. Both sides have the same number of positions, so that a linear trend
cancels. A ratio below 1 means that ESS drops there (arXiv 2504.19561, section 5.2).

The ratio of a kind of delimiters is the mean over all of them in all texts. Its interval comes from
the bootstrap (Efron and Tibshirani 1993): texts are drawn with replacement, and the interval holds
the middle 95 % of the ratios of these samples. The control is the same ratio at all positions whose
own neighbors, too, are far from delimiters.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gramian._json import to_json

if TYPE_CHECKING:
    from gramian.analysis._collection import StateReports

__all__ = [
    "DelimiterModulation",
    "ModulationReport",
    "compared",
    "find_delimiters",
    "measure_modulation",
    "ratios",
    "special_tokens",
]

_LEVEL = 0.95
_SENTENCE = re.compile(r"[.!?…]+[\"'”’»)\]]*|[。！？．]+[”’」』）]*")
_CLOSES_ALONE = re.compile("[。！？．]")  # followed by no space
CONTROL = "elsewhere"
"""The name of the control, which no kind of delimiters has."""

Compared = list[tuple[int, list[int]]]
"""Columns of state-sizes: that of a position after a delimiter, and those that it is compared
with."""


@dataclass(frozen=True)
class DelimiterModulation:
    """The ratio of ESS after delimiters of one kind.

    Attributes:
        kind: "special", "newline", "sentence", the text of a delimiter, or "elsewhere".
        tokens: a mapping from the texts of the tokens to how many were compared.
        ratio: the mean ratio of the model's average ESS; NaN if none was compared.
        low: lower end of the interval at 95 %; NaN if fewer than two texts have such delimiters.
        high: upper end of the interval.
        counts: number of compared positions in each text.
        means: mean ratio in each text; NaN if nothing was compared there.
        heads: number of measured heads and channels.
        heads_below: number of heads and channels whose own mean ratio is below 1.
    """

    kind: str
    tokens: Mapping[str, int]
    ratio: float
    low: float
    high: float
    counts: tuple[int, ...]
    means: tuple[float, ...]
    heads: int
    heads_below: int

    @property
    def count(self) -> int:
        """The number of compared positions in all texts."""
        return sum(self.counts)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as values that JSON can hold."""
        return {
            "kind": self.kind,
            "tokens": dict(self.tokens),
            "count": self.count,
            "ratio": self.ratio,
            "low": self.low,
            "high": self.high,
            "counts": list(self.counts),
            "means": list(self.means),
            "heads": self.heads,
            "heads_below": self.heads_below,
        }


@dataclass(frozen=True)
class ModulationReport:
    """The modulation of one model's state at delimiters.

    Attributes:
        model: name of the model.
        kinds: the modulation at each kind of delimiters that occurs.
        control: the same ratio away from delimiters.
        average_ess: average ESS over all texts.
        texts: names of the texts.
        lengths: number of tokens of each text.
        measure: "entropy" or "tolerance".
        reach: largest distance of a compared position.
        resamples: number of bootstrap samples.
        seed: seed of the bootstrap.
    """

    model: str
    kinds: tuple[DelimiterModulation, ...]
    control: DelimiterModulation
    average_ess: float
    texts: tuple[str, ...]
    lengths: tuple[int, ...]
    measure: str
    reach: int
    resamples: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as values that JSON can hold."""
        return {
            "format": "gramian.modulation/1",
            "model": self.model,
            "measure": self.measure,
            "reach": self.reach,
            "level": _LEVEL,
            "resamples": self.resamples,
            "seed": self.seed,
            "average_ess": self.average_ess,
            "texts": list(self.texts),
            "lengths": list(self.lengths),
            "kinds": [one.to_dict() for one in self.kinds],
            "control": self.control.to_dict(),
        }

    def to_json(self, indent: int | None = None) -> str:
        """Return `to_dict` as JSON text. NaN becomes null."""
        return to_json(self.to_dict(), indent=indent)


def special_tokens(tokenizer: Any) -> set[str]:
    """Return the texts of a tokenizer's special tokens, such as the end of a text."""
    ids = set(getattr(tokenizer, "all_special_ids", None) or ())
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    ids |= {index for index, token in added.items() if getattr(token, "special", False)}
    return {tokenizer.decode([index]) for index in ids} - {""}


def find_delimiters(tokens: Sequence[str], special: Collection[str] = ()) -> dict[str, list[int]]:
    """Return the tokens of a text that are delimiters, by their kind.

    - "special": the special tokens.
    - "newline": tokens with a line feed, and spaces only beside it.
    - "sentence": tokens of the marks . ! ? … that may be followed by closing quotes or brackets, if
      the next token begins with a space, is a newline, or is special, or if there is none; and the
      marks 。！？ anywhere. So the point in 3.14 is none.

    Args:
        tokens: The texts of the tokens.
        special: The texts of special tokens; see `special_tokens`.

    Returns:
        A mapping from each kind that occurs to indices of tokens, ascending.
    """
    found: dict[str, list[int]] = {"special": [], "newline": [], "sentence": []}
    for i, token in enumerate(tokens):
        text = token.strip()
        following = tokens[i + 1] if i + 1 < len(tokens) else None
        if token in special:
            found["special"].append(i)
        elif "\n" in token and not text:
            found["newline"].append(i)
        elif _SENTENCE.fullmatch(text) and (
            following is None
            or following in special
            or following[:1].isspace()
            or "\n" in token
            or _CLOSES_ALONE.match(text)
        ):
            found["sentence"].append(i)
    return {kind: places for kind, places in found.items() if places}


def compared(
    positions: Sequence[int], after: Collection[int], avoid: Collection[int], reach: int
) -> Compared:
    """Return which columns of state-sizes are compared.

    Args:
        positions: The measured positions, one for each column.
        after: Positions after a delimiter.
        avoid: Positions with which nothing is compared.
        reach: Largest distance of the compared positions.

    Returns:
        For every position in `after` that was measured and has measured neighbors: its column, and
        the columns of its neighbors, on both sides alike.
    """
    column = {i: c for c, i in enumerate(positions)}
    found = []
    for i in sorted(after):
        pairs = [
            (column[i - d], column[i + d])
            for d in range(1, reach + 1)
            if {i - d, i + d} <= column.keys() and not {i - d, i + d} & {*avoid} and i - d > 0
        ]
        if pairs and i in column:
            found.append((column[i], [c for pair in pairs for c in pair]))
    return found


def ratios(sizes: Tensor, places: Compared) -> Tensor:
    """Return the ratios of state-sizes (…, P) at compared columns, (…, len(places)), float64.

    A ratio of nothing to nothing is 1.
    """
    sizes = sizes.double()
    each = [sizes[..., at] / sizes[..., around].mean(-1) for at, around in places]
    return torch.stack(each, -1).nan_to_num(1.0, posinf=1.0)


def measure_modulation(
    reports: StateReports,
    delimiters: str | Sequence[str] = "auto",
    *,
    special: Collection[str] = (),
    reach: int = 4,
    resamples: int = 2000,
    seed: int = 0,
) -> ModulationReport:
    """Measure the modulation of a model's state at delimiters over several texts.

    Args:
        reports: Reports from `analyze_texts`, measured at every position.
        delimiters: "auto" for those that `find_delimiters` finds in the tokens. Or texts: tokens
            that contain one of them are delimiters, and each text is a kind.
        special: Texts of the tokenizer's special tokens, for "auto"; see `special_tokens`.
        reach: Largest distance of the positions that are compared.
        resamples: Number of bootstrap samples.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: if `reach` or `resamples` is below 1, if no delimiter occurs, or if none has
            measured positions on both sides.
    """
    for name, value in (("reach", reach), ("resamples", resamples)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}.")
    lacking = next((report for report in reports if not report.layers), None)
    if lacking is not None:
        raise ValueError(f"no layer of {lacking.model} was read on {lacking.source}.")
    if isinstance(delimiters, str) and delimiters != "auto":
        delimiters = [delimiters]
    found = [_found(report.tokens, delimiters, special) for report in reports]
    kinds = list(dict.fromkeys(kind for one in found for kind in one))
    if not kinds:
        wanted = (
            "special tokens, newlines and ends of sentences"
            if isinstance(delimiters, str)
            else ", ".join(map(repr, delimiters))
        )
        raise ValueError(f"the {len(reports)} texts have no delimiters; looked for {wanted}.")
    after = [{i + 1 for places in one.values() for i in places} for one in found]
    measured = []
    for kind in kinds:
        own = [[i + 1 for i in one.get(kind, ())] for one in found]
        measured.append(_modulation(kind, reports, own, after, reach, resamples, seed))
    if not any(one.count for one in measured):
        raise ValueError(
            "no delimiter has measured positions on both sides; measure every position of texts "
            "that go on after their delimiters."
        )
    far = [
        [
            i
            for i in range(reach + 1, report.horizon - reach)
            if not avoid & set(range(i - reach, i + reach + 1))
        ]
        for report, avoid in zip(reports, after, strict=True)
    ]
    first = reports.reports[0]
    return ModulationReport(
        model=reports.model,
        kinds=tuple(one for one in measured if one.count),
        control=_modulation(CONTROL, reports, far, after, reach, resamples, seed),
        average_ess=reports.average().mean,
        texts=reports.names,
        lengths=tuple(report.horizon for report in reports),
        measure=first.measure,
        reach=reach,
        resamples=resamples,
        seed=seed,
    )


def _found(
    tokens: Sequence[str], delimiters: str | Sequence[str], special: Collection[str]
) -> dict[str, list[int]]:
    if isinstance(delimiters, str):
        return find_delimiters(tokens, special)
    found = {mark: [i for i, token in enumerate(tokens) if mark in token] for mark in delimiters}
    return {mark: places for mark, places in found.items() if places}


def _modulation(
    kind: str,
    reports: StateReports,
    after: Sequence[Sequence[int]],
    avoid: Sequence[Collection[int]],
    reach: int,
    resamples: int,
    seed: int,
) -> DelimiterModulation:
    """Return the modulation at the positions `after`, which is given for each text."""
    tokens: Counter[str] = Counter()
    sums, counts = [], []
    heads: list[Tensor] = []
    for report, wanted, near in zip(reports, after, avoid, strict=True):
        places = compared(report.positions, wanted, near, reach)
        counts.append(len(places))
        if not places:
            sums.append(0.0)
            continue
        if kind != CONTROL:
            tokens.update(report.tokens[report.positions[at] - 1] for at, _ in places)
        sums.append(float(ratios(report.average(over_positions=False), places).sum()))
        heads.append(torch.cat([ratios(layer.ess, places).sum(-1) for layer in report.layers]))
    total = sum(counts)
    same = len({len(one) for one in heads}) == 1
    own = torch.stack(heads).sum(0) / total if same else torch.empty(0)
    low, high = _interval(np.array(sums), np.array(counts), resamples, seed)
    return DelimiterModulation(
        kind=kind,
        tokens=dict(tokens.most_common()),
        ratio=sum(sums) / total if total else math.nan,
        low=low,
        high=high,
        counts=tuple(counts),
        means=tuple(s / n if n else math.nan for s, n in zip(sums, counts, strict=True)),
        heads=len(own),
        heads_below=int((own < 1).sum()),
    )


def _interval(
    sums: np.ndarray, counts: np.ndarray, resamples: int, seed: int
) -> tuple[float, float]:
    """Return the bootstrap interval of a ratio of sums over texts."""
    if int((counts > 0).sum()) < 2:
        return math.nan, math.nan
    draws = np.random.default_rng(seed).integers(0, len(sums), size=(resamples, len(sums)))
    numbers = counts[draws].sum(1)
    values = sums[draws].sum(1)[numbers > 0] / numbers[numbers > 0]
    tail = 50 * (1 - _LEVEL)
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)
