"""The figures of docs/results/benchmarks.md, computed from benchmarks/results/*.json.

Each section of the page has a list here, and each row of its table an entry, in the page's order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks._trained_filters_page import percent

RESULTS = Path(__file__).parents[2] / "benchmarks/results"

Results = dict[str, Any]


# The file of results (None where the run was not kept) and the figure that follows from them.
Row = tuple["str | None", Callable[[Results], str]]


def load(file: str) -> Results:
    results: Results = json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))
    return results


def kept(file: str) -> str | None:
    """The file of results, or None if it was not measured yet."""
    return file if (RESULTS / f"{file}.json").exists() else None


def machine(results: Results) -> str:
    """The machine of a row, as the page writes it."""
    found = results["machine"]
    processor = found["processor"].replace("(R)", "").removesuffix(" Processor")
    threads = found["threads"]
    return f"{processor}, {threads} thread{'s' if threads > 1 else ''}"


def spread(values: Iterable[float], form: str) -> str:
    """The smallest and the largest of some values, without repetition."""
    ordered = sorted(values)
    low, high = format(ordered[0], form), format(ordered[-1], form)
    return low if low == high else f"{low} to {high}"


# --- reduction ---------------------------------------------------------------------------------


def _speed(r: Results) -> str:
    speed = r["speed"]
    return (
        f"{speed['filters_per_second']:.0f} a second; pyMOR {speed['pymor_filters_per_second']:.2f}"
    )


def _against_pymor(r: Results) -> str:
    parts = [part for part in r["accuracy"].values() if isinstance(part, dict)]
    return f"at most {max(part['largest_ratio'] for part in parts):.3f}"


def _optimum(r: Results) -> str:
    return ", ".join(f"{r[taps]['refined']:.2f}" for taps in ("512", "1024", "2048"))


def _searched(r: Results) -> str:
    return ", ".join(f"{r[taps]['searched']:.2f}" for taps in ("512", "1024", "2048"))


def _closer(r: Results) -> str:
    return f"{r['share_with_smaller_error'] * r['filters']:.0f} of {r['filters']}"


def _descents(form: str, steps: int, rate: float = 3e-3) -> Callable[[Results], str]:
    """The mean relative errors of descents in a form, by order, or "not run"."""
    wanted = form, steps, rate

    def text(r: Results) -> str:
        errors = []
        for order in (4, 16, 64):
            found = [
                run["mean relative error"]
                for run in r["descents"]
                if (run["form"], run["steps"], run["learning rate"]) == wanted
                and run["order"] == order
            ]
            errors.append(f"{found[0]:.1e}".replace("e-0", "e-") if found else "not run")
        return ", ".join(errors)

    return text


def _reduced(r: Results) -> str:
    errors = [f"{run['mean relative error']:.1e}" for run in r["reduce"]]
    return ", ".join(error.replace("e-0", "e-") for error in errors)


def _smooth(r: Results) -> str:
    return ", ".join(f"{r[n]['relative_error']:.0e}".replace("e-0", "e-") for n in ("4", "8", "16"))


def _large(r: Results) -> str:
    run = r["49152"]
    return f"{run['filters_per_second']:.0f} a second, peak {run['peak_resident_gib']:.1f} GiB"


# --- layers and training steps -----------------------------------------------------------------


def _layer(other: str) -> Callable[[Results], str]:
    def text(r: Results) -> str:
        summary = r["summary"][other]
        return (
            f"{summary['speed-up, geometric mean']:.1f} times faster, "
            f"at most {summary['largest memory ratio']:.2f} of the memory"
        )

    return text


def _mean(pair: str) -> Callable[[Results], str]:
    def text(r: Results) -> str:
        ratios = {k: v for k, v in r["ratios"][pair].items() if k != "geometric mean"}
        mean = r["ratios"][pair]["geometric mean"]
        return f"{mean:.1f} times faster ({spread(ratios.values(), '.1f')})"

    return text


def _constant(r: Results) -> str:
    time, memory = (
        r["ratios"][f"RTF at the largest state over the smallest, {unit}"]
        for unit in ("milliseconds", "MiB")
    )
    return f"{time:.2f} of the time, {memory:.2f} of the memory"


def _recipes(side: str, prefix: str) -> Callable[[Results], str]:
    def text(r: Results) -> str:
        rows = [
            row
            for row in r["rows"]
            if row["recipe"].startswith(prefix) and row["side"] == side and "milliseconds" in row
        ]
        faster = spread((row["time over ours"] for row in rows), ".3g")
        memory = spread((1 / row["memory over ours"] for row in rows), ".2f")
        return f"{faster} times faster, {memory} of the memory"

    return text


def _failed(r: Results) -> str:
    failed = [row["recipe"] for row in r["rows"] if "milliseconds" not in row]
    return ", ".join(f"`{recipe}`" for recipe in failed)


def _selective(side: str) -> Callable[[Results], str]:
    def text(r: Results) -> str:
        rows = [row for row in r["rows"] if row["side"] == f"transformers, {side}"]
        faster = [row["time over ours"] for row in rows]
        low, high = (f"{x:.0f}" if x > 100 else f"{x:.1f}" for x in (min(faster), max(faster)))
        memory = spread((1 / row["memory over ours"] for row in rows), ".2f")
        return f"{low} to {high} times faster, {memory} of the memory"

    return text


def _prompts(r: Results) -> str:
    return ", ".join(f"{row['prefill over ours']:.2f}" for row in r["rows"])


def _tokens(r: Results) -> str:
    return spread((row["token over ours"] for row in r["rows"]), ".2f")


def _prompt_memory(r: Results) -> str:
    row = r["rows"][-1]
    return f"{row['gramian']:,.0f} MiB; vortex {row['vortex']:,.0f} MiB"


def _converting(r: Results) -> str:
    return (
        f"{r['growth MiB']:.0f} MiB; the file {r['file MiB']:.0f}, its largest layer "
        f"{r['largest layer MiB']:.0f}"
    )


def _packing(lengths: str) -> Callable[[Results], str]:
    return lambda r: spread((row["speed"] for row in r["rows"] if row["lengths"] == lengths), ".2f")


def _throughput(r: Results) -> str:
    names = {
        "bytes_multi_hyena": "bytes",
        "digits_rtf": "digits",
        "delay_rtf": "Delay",
        "mqar_multi_hyena": "MQAR",
    }
    ratios = {name: r["results"][case]["ratio by wall time"] for case, name in names.items()}
    return ", ".join(f"{ratio:.2f} ({name})" for name, ratio in ratios.items())


# --- generation --------------------------------------------------------------------------------


def _decoding(setting: str, cache: str) -> Callable[[Results], str]:
    def text(r: Results) -> str:
        ratios = r[setting][f"ratio_to_{cache}"]
        parts = []
        for key, name in (("hyena", "Hyena"), ("multi_hyena", "MultiHyena")):
            plain, compiled = (f"{ratios[f'{key}{mode}']:.2g}" for mode in ("", " compiled"))
            parts.append(f"{name} {plain} ({compiled})")
        return ", ".join(parts)

    return text


def _exact(r: Results) -> str:
    return ", ".join(
        f"{name} {r[key]['ratio']['distilled']:.1f}"
        for key, name in (("hyena", "Hyena"), ("multi_hyena", "MultiHyena"))
    )


def _million(r: Results) -> str:
    return f"{r['seconds']:.0f} s of the processor, peak {r['peak_gib']:.1f} GiB"


def _online(side: str) -> Callable[[Results], str]:
    return lambda r: f"{r['ratio_to_online'][side]:.0f} times faster"


def _future_fill(key: str) -> Callable[[Results], str]:
    def text(r: Results) -> str:
        ratios = (f"{case[key]:.1f}" for case in r["future_fill"].values())
        return f"{', '.join(ratios)} times as fast"

    return text


def _held(r: Results) -> str:
    cases = [case["bytes"] for case in r["future_fill"].values()]
    return ", ".join(f"{held['online'] / held['FutureFill']:.1f}" for held in cases)


def _forms(r: Results) -> str:
    lengths = sorted({row["length"] for row in r["rows"]})
    won = []
    for length in lengths:
        widths = [
            row["head_width"]
            for row in r["rows"]
            if row["length"] == length and row["fft_seconds"] < row["attention_seconds"]
        ]
        won.append(f"{max(widths)} at {length:,}")
    return ", ".join(won)


def _order(order: int) -> Callable[[Results], str]:
    def text(r: Results) -> str:
        (row,) = [row for row in r["orders"] if row["order"] == order]
        return f"{row['increase']:+.3%} (filters' error {row['relative error']['mean']:.2f})"

    return text


def _kept_taps(taps: int) -> Callable[[Results], str]:
    def text(r: Results) -> str:
        (row,) = [row for row in r["summary"]["taps"] if row["taps"] == taps]
        return percent(row["increase"])

    return text


def _needed_order(order: int, way: str = "unweighted") -> Callable[[Results], str]:
    def text(r: Results) -> str:
        (row,) = [row for row in r["summary"]["orders"] if row["order"] == order]
        return percent(row[way]["increase"])

    return text


def _spectral(name: str, tolerance: float) -> Callable[[Results], str]:
    def text(r: Results) -> str:
        rows = r["8192 taps"][name]
        (row,) = [row for row in rows if row["tolerance"] == tolerance]
        return f"{row['order']['mean']:.1f} on average, at most {row['order']['max']}"

    return text


def _penalized(weight: float, truncation: float = 0) -> Callable[[Results], str]:
    def text(r: Results) -> str:
        (run,) = [
            run
            for run in r["runs"]
            if (run["filter"], run["weight"], run["truncation"]) == ("s4d", weight, truncation)
        ]
        orders = ", ".join(
            f"{row['bits per byte']:.3f} at order {row['order']}" for row in run["orders"][:3]
        )
        norm = run["nuclear norm over largest singular value"]
        whole = f"{run['state bytes']:,} bytes, {run['bits per byte']:.3f} bits per byte"
        return f"Σσ/σ₁ {norm:.1f}; state of {whole}; {orders}"

    return text


def _saved(filter: str, way: str) -> Callable[[Results], str]:
    def text(r: Results) -> str:
        rows = r[filter]["saved state at equal divergence"][way]
        return ", ".join(f"{row['saved']:.0%} at order {row['order']:.1f}" for row in rows)

    return text


def _weighted_loss(filter: str, order: int) -> Callable[[Results], str]:
    def text(r: Results) -> str:
        (row,) = [row for row in r[filter]["orders"] if row["order"] == order]
        ways = ("unweighted", "by spectrum", "by text")
        return ", ".join(f"{row[way]['increase']:+.2%}" for way in ways)

    return text


def _shrunk(task: str, model: str, share: float) -> Callable[[Results], str]:
    """What every way of choosing states loses, before and after the recovery."""

    def text(r: Results) -> str:
        parts = []
        for when in ("before", "after"):
            (row,) = [
                c
                for c in r["comparisons"]
                if (c["task"], c["model"], c["share"], c["when"]) == (task, model, share, when)
            ]
            ways = ("shrink", "diagonal", "weights", "random")
            parts.append(", ".join(f"{row['worse'][way]:+.1%}" for way in ways))
        return "; after: ".join(parts)

    return text


def _pass(r: Results) -> str:
    seconds, added = r["seconds"], r["bytes added by the sums"] / 2**20
    return (
        f"{seconds['pass']:.0f} s, the model alone {seconds['model alone']:.0f} s; {added:.0f} MiB"
    )


def _random_poles(states: int) -> Callable[[Results], str]:
    def text(r: Results) -> str:
        rows = r["8192 taps"]["random poles"]
        (row,) = [row for row in rows if row["states"] == states]
        return f"{row['relative error']:.0e}"

    return text


def _switching(r: Results) -> str:
    return f"{min(row['within 1e-4'] for row in r['rows']):.0%}"


def _float32(r: Results) -> str:
    return f"{min(row['float32 companion within 1e-4'] for row in r['rows']):.0%}"


# --- effective state-size ----------------------------------------------------------------------


def _agreement(r: Results) -> str:
    errors = r["agreement"]["largest_error_relative_to_largest_value"].values()
    return f"{max(errors):.1e} of the largest"


def _recurrence(r: Results) -> str:
    return f"{r['recurrence']['ratio']:.0f} times faster"


def _attention(r: Results) -> str:
    run = r["attention"]["tokens_512"]
    error = f"{run['largest_relative_error']:.0e}".replace("e-0", "e-")
    return f"{run['seconds']:.0f} s, {run['peak_memory_gib']:.1f} GiB, within {error}"


def _attention_long(r: Results) -> str:
    return f"{r['attention']['tokens_1024']['ratio']:.1f} times faster"


def _application(r: Results) -> str:
    return ", ".join(f"{part['ratio']:.1f} ({name})" for name, part in r["application"].items())


def _limits(part: str, *names: str) -> Callable[[Results], str]:
    def text(r: Results) -> str:
        found = [r[part][name] for name in names] if names else [r[part]]
        return ", ".join(f"{one['ratio']:.2f}" for one in found)

    return text


def _contention(case: str) -> Callable[[Results], str]:
    def text(r: Results) -> str:
        found, summary = r["cases"][case], r["summary"][case]
        alone = found["quiet"]["one thread"]["median"]
        ratios = (
            found[condition][side]["median"] / alone
            for side in ("adaptive", "default")
            for condition in ("quiet", "busy")
        )
        quiet, busy, default_quiet, default_busy = (f"{ratio:.2f}" for ratio in ratios)
        slowest = f"{summary['slowest over median']:.1f}"
        return f"{quiet}, {busy} (slowest {slowest} times); default {default_quiet}, {default_busy}"

    return text


def _long_agreement(r: Results) -> str:
    run = r["agreement"]
    within = 100 * run["means_within_stated_error"]
    largest = 100 * run["largest_relative_error_of_means"]
    return f"{largest:.1f} % (within the stated error: {within:.0f} %)"


def _long_sizes(r: Results) -> str:
    run = r["agreement"]
    within = 100 * run["sizes_within_stated_error"]
    away = 100 * run["root_mean_square_relative_error_of_sizes"]
    return f"{away:.1f} % (within the stated error: {within:.0f} %)"


def _long_model(r: Results) -> str:
    run, whole = r["model"], ""
    if run["layers"] < run["layers_of_the_model"]:
        whole = f" for {run['layers']} of {run['layers_of_the_model']} layers"
    return f"{run['seconds']:,.0f} s{whole}, {run['peak_memory_gib']:.1f} GiB"


def _long_stated(r: Results) -> str:
    run = r["model"]
    if "largest_stated_relative_error_of_means" not in run:
        return "not measured yet"
    mean = 100 * run["largest_stated_relative_error_of_means"]
    return f"{mean:.1f} %, {100 * run['median_stated_relative_error_of_sizes']:.1f} %"


def _long_head(r: Results) -> str:
    runs = (r["head"][name] for name in ("rows_kept", "rows_computed_again"))
    kept, again = (
        f"{run['processor_seconds']:.0f} s, {run['additional_peak_memory_mib']:,.0f} MiB"
        for run in runs
    )
    return f"{kept} (rows kept); {again} (computed again for every product)"


def _wholly_read(r: Results) -> str:
    return f"{r['summary']['verdicts']['read']} of {r['summary']['types']}"


def _missing_or_wrong(r: Results) -> str:
    verdicts = r["summary"]["verdicts"]
    return str(verdicts["silent"] + verdicts["wrong"] + verdicts["raises"])


def _outcomes(r: Results) -> str:
    found = [row["outcome"] for row in r["trials"].values()]
    return ", ".join(str(found.count(outcome)) for outcome in ("works", "refused", "fails"))


def _served(key: str, form: str, unit: str = "") -> Callable[[Results], str]:
    def text(r: Results) -> str:
        rows = (r["rows"][f"{model}, 8 clients"] for model in ("original", "distilled", "GPT-2"))
        return ", ".join(f"{row[key]:{form}}{unit}" for row in rows)

    return text


def _largest(error: str) -> Callable[[Results], str]:
    return lambda r: f"{r['summary'][f'largest_{error}']:.0e}".replace("e-0", "e-")


def _modulation(part: str) -> Callable[[Results], str]:
    return lambda r: f"{r[part]['ratio']:.3f} (elsewhere {r[part]['control_ratio']:.3f})"


def _once_measured(text: Callable[[Results], str]) -> Callable[[Results], str]:
    return lambda r: text(r) if r else "not measured yet"


def _twins(mixer: str) -> Callable[[Results], str]:
    return _once_measured(
        lambda r: spread(
            (run["ratios"]["special"] for run in r["runs"] if run["mixer"] == mixer), ".3f"
        )
    )


def _fall_and_loss(r: Results) -> str:
    ranks = r["correlations"]["special"]
    return f"{ranks['recall']:.2f} and {ranks['perplexity']:.2f}"


def _hybrids(place: int | None, behind: bool) -> Callable[[Results], str]:
    """Accuracy of hybrids with attention at a place, behind a convolution or not."""

    def text(r: Results) -> str:
        runs = _of(r, place=place, convolution=behind)
        accuracy = spread((run["accuracy"] for run in runs), ".2f")
        if place is None:
            return accuracy
        sizes = spread((run["ess"][place - 1] for run in runs), ".1f")
        return f"{accuracy} (ESS of attention {sizes})"

    return text


def _hybrids_explained(mark: str) -> Callable[[Results], str]:
    return lambda r: f"{r['correlations'][mark]['all']:.2f}"


def _ranks(values: list[float]) -> list[float]:
    return [
        sum(other < value for other in values) + (values.count(value) - 1) / 2 for value in values
    ]


def _correlation(x: list[float], y: list[float]) -> float:
    n = len(x)
    mean_x, mean_y = sum(x) / n, sum(y) / n
    products = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    squares = (sum((a - mean_x) ** 2 for a in x), sum((b - mean_y) ** 2 for b in y))
    return products / math.sqrt(squares[0] * squares[1])


def _recall(size: str) -> Callable[[Results], str]:
    def text(r: Results) -> str:
        accuracy = [run["accuracy"] for run in r["runs"]]
        sizes = [run[size] / run["pairs"] for run in r["runs"]]
        ranks = _correlation(_ranks(sizes), _ranks(accuracy))
        return f"{ranks:.2f} (Pearson {_correlation(sizes, accuracy):.2f})"

    return text


def _growth(label: str) -> Callable[[Results], str]:
    def text(r: Results) -> str:
        means = []
        for state in (16, 64):
            sizes = [
                run["ess_before"]
                for run in r["runs"]
                if (run["label"], run["state"], run["steps"]) == (label, state, 0)
            ]
            means.append(f"{sum(sizes) / len(sizes):.1f}")
        return " to ".join(means)

    return text


def _normalized(r: Results) -> str:
    means = []
    for factor in (1 / 16, 1, 64):
        right = [run["accuracy"] for run in r["runs"] if run["normalization"] == factor]
        means.append(f"{sum(right) / len(right):.2f}")
    return ", ".join(means)


def _lifted(mixer: str) -> Callable[[Results], str]:
    def text(r: Results) -> str:
        means = []
        for penalty in (0.0, 0.1):
            right = [
                run["accuracy"]
                for run in r["runs"]
                if run["mixer"] == mixer and run["penalty"] == penalty
            ]
            means.append(f"{sum(right) / len(right):.2f}")
        return " to ".join(means)

    return text


def _teachers(r: Results) -> str:
    """Mean accuracy and mean ESS of the teachers, by pairs."""
    found = []
    for pairs in sorted({cell["pairs"] for cell in r["cells"]}):
        some = [cell["teacher"] for cell in r["cells"] if cell["pairs"] == pairs]
        right, ess = (sum(one[name] for one in some) / len(some) for name in ("accuracy", "ess"))
        found.append(f"{right:.2f} ({ess:.1f})")
    return ", ".join(found)


def _students(r: Results) -> str:
    sizes = ("16", "32", "64", "128")
    return ", ".join(f"{r['correlations'][size]['divergence']:.2f}" for size in sizes)


def _enough(r: Results) -> str:
    sides = (r["prediction"]["ess"][side] for side in ("at least", "below"))
    return " and ".join(f"{side['as good']} of {side['students']}" for side in sides)


def _of(results: Results, **chosen: Any) -> list[dict[str, Any]]:
    """The trainings with some settings."""
    found = [r for r in results["runs"] if all(r[name] == value for name, value in chosen.items())]
    assert found, chosen
    return found


def _average(results: Results, what: str, **chosen: Any) -> float:
    found = [run[what] for run in _of(results, **chosen)]
    return float(sum(found) / len(found))


def _explained(task: str, size: str) -> Callable[[Results], str]:
    return lambda r: _recall(size)({"runs": _of(r, task=task)})


def _explained_within(task: str, size: str) -> Callable[[Results], str]:
    """Rank correlations over the trainings of each number of items."""

    def text(r: Results) -> str:
        runs = _of(r, task=task)
        groups = [_of(r, task=task, pairs=n) for n in sorted({run["pairs"] for run in runs})]
        found = [
            _correlation(
                _ranks([run[size] for run in some]), _ranks([run["accuracy"] for run in some])
            )
            for some in groups
        ]
        return " and ".join(f"{value:.2f}" for value in found)

    return text


def _accuracy(**chosen: Any) -> Callable[[Results], str]:
    return lambda r: f"{_average(r, 'accuracy', **chosen):.2f}"


def _hard(mixer: str) -> Callable[[Results], str]:
    """ESS and accuracy of a mixer without the regularizer, on many pairs."""

    def text(r: Results) -> str:
        chosen = {"label": mixer, "pairs": 15, "penalty": 0.0}
        sizes = (_average(r, what, **chosen) for what in ("ess", "accuracy"))
        return "ESS {:.1f}, accuracy {:.2f}".format(*sizes)

    return text


def _best(mixer: str) -> Callable[[Results], str]:
    """The best mean accuracy over the regularizer's λ, with this λ."""

    def text(r: Results) -> str:
        penalties = {run["penalty"] for run in _of(r, label=mixer, pairs=15)} - {0.0}
        means = {
            penalty: _average(r, "accuracy", label=mixer, pairs=15, penalty=penalty)
            for penalty in penalties
        }
        best = max(means, key=means.__getitem__)
        return f"{means[best]:.2f} (λ = {best:g})"

    return text


def _rank_correlation(what: str) -> Callable[[Results], str]:
    return lambda r: f"{r['rank correlations']['4'][what]:.2f}"


def _task(task: str, layer: str) -> Callable[[Results], str]:
    def text(r: Results) -> str:
        values = r["results"][task][layer]
        return f"{sum(values) / len(values):.3f}"

    return text


def _hybrid(part: str, size: int) -> Callable[[Results], str]:
    def text(r: Results) -> str:
        whole = r["tried"]["whole"]["losses"]

        def increase(criterion: str, seeds: Iterable[int] = (0,)) -> float:
            each = [
                (a - b) / n
                for seed in seeds
                for one in [r["tried"][f"{part} {size} {criterion} {seed}"]]
                for a, b, n in zip(one["losses"], whole, one["counts"], strict=False)
            ]
            return sum(each) / len(each)

        names = ("output", "realization", "state", "magnitude")
        return ", ".join(
            f"{value:+.3f}" for value in [*map(increase, names), increase("random", range(3))]
        )

    return text


def _fitted(criterion: str, forms: tuple[str, ...]) -> Callable[[Results], str]:
    def text(r: Results) -> str:
        whole = r["tried"]["whole"]["losses"]

        def increase(form: str) -> float:
            one = r["tried"][f"{form} 10 {criterion} 0"]
            each = [
                (a - b) / n for a, b, n in zip(one["losses"], whole, one["counts"], strict=True)
            ]
            return sum(each) / len(each)

        return ", ".join(f"{increase(form):+.3f}" for form in forms)

    return text


def _fit_errors(r: Results) -> str:
    def error(layer: Results, errors: list[float]) -> float:
        lost = math.hypot(*(a * b for a, b in zip(errors, layer["norms"], strict=True)))
        return lost / math.hypot(*layer["norms"])

    layers = r["plan"]["layers"]
    window = [error(layer, layer["output_errors"]) for layer in layers]
    fits = [error(layer, r["fits"]["both"]["errors"][layer["name"]]) for layer in layers]
    return f"{sum(window) / len(window):.2f}, {sum(fits) / len(fits):.2f}"


def _genomes(model: str, job: str) -> Callable[[Results], str]:
    def text(r: Results) -> str:
        peaks = [
            f"{row['peak_mib']:.0f}"
            for row in r["rows"]
            if (row["model"], row["job"]) == (model, job)
        ]
        return f"{' and '.join(peaks)} MiB"

    return text


def _exponents(r: Results) -> str:
    (found,) = r["exponents"].values()
    return f"{found['time']:.2f} (time), {found['memory']:.2f} (memory)"


def _lengths(work: str) -> Callable[[Results], str]:
    """The exponents of a kind of work, in the order of its layers."""

    def text(r: Results) -> str:
        found = [one for name, one in r["exponents"].items() if name.startswith(work)]
        times, memory = (
            ", ".join(f"{one[kind]:.2f}" for one in found) for kind in ("time", "memory")
        )
        return f"{times} (time); {memory} (memory)"

    return text


def _per_layer(r: Results) -> str:
    """What the peak grows by, over what the model does, and what it is for the largest model."""
    rows = [row for row in r["rows"] if row["axis"] == "layers"]
    first, last = rows[0], rows[-1]
    grown = last["model MiB"] - first["model MiB"]
    whole, own = ((last[kind] - first[kind]) / grown for kind in ("MiB", "MiB not mapped"))
    growth = f"{whole:.2f} (not mapped: {own:.2f}), at the end"
    above = (last["MiB"] - last["model MiB"]) / last["layer MiB"]
    if above < 0:
        return (
            f"{growth} {last['MiB'] / last['layer MiB']:.1f} layers of the model's {last['layers']}"
        )
    return f"{growth} {above:.1f} layers above the model"


def _stands(text: str) -> Callable[[Results], str]:
    """A figure whose run was not kept as JSON."""
    return lambda _: text


def _projected(kind: str, size: int) -> Callable[[Results], str]:
    def text(results: Results) -> str:
        row = results[kind][str(size)]
        return ", ".join(f"{row[way]['increase']:+.2%}" for way in ("coordinates", "projection"))

    return text


def _predicted(size: int) -> Callable[[Results], str]:
    def text(results: Results) -> str:
        row = results["mamba2"][str(size)]["coordinates"]
        cut, projected = (row[f"predicted errors of {x}"] for x in ("coordinates", "projections"))
        return f"{spread(cut, '.2f')}, {spread(projected, '.2f')}"

    return text


FIGURES: dict[str, list[Row]] = {
    "Reduction": [
        ("reduction", _speed),
        ("reduction", _against_pymor),
        ("reduction_large", _large),
        ("reduction_optimum", _optimum),
        ("reduction_optimum", _searched),
        ("reduction_gradient", _closer),
        ("reduction_gradient", lambda r: f"{r['ratio_of_times']:.0f} times faster"),
        (
            "reduction_gradient",
            lambda r: (
                f"{r['published_formulation']['extrapolated_ratio_of_times']:,.0f} times faster"
            ),
        ),
        ("reduction_smooth", _smooth),
    ],
    "Gradient distillation": [
        ("gradient_distillation", _reduced),
        ("gradient_distillation", _descents("modal", 200_000, 1e-4)),
        ("gradient_distillation", _descents("rational", 200_000, 1e-4)),
        ("gradient_distillation", _descents("modal", 20_000)),
        ("gradient_distillation", _descents("rational", 20_000)),
        ("gradient_distillation", _descents("rational, stable", 20_000)),
    ],
    "One RTF layer": [
        ("convolution_layer", _layer("published computation")),
        ("convolution_layer", _layer("published file")),
    ],
    "Layers against length and state": [
        ("layers", _mean("RTF here over the published RTF")),
        ("layers", _mean("RTF here over the published S4, state 64")),
        ("layers", _mean("S4D here over the published S4D")),
        ("layers", _mean("S4 here over the published S4")),
        ("layers", _constant),
    ],
    "Whole models": [
        ("training_step", _recipes("RTF, published", "lra")),
        ("training_step", _recipes("S4, published", "lra")),
        ("training_step", _recipes("RTF, published", "speech")),
        ("training_step", _recipes("RTF, published", "wikitext103_hyena_rtf")),
        ("training_step", _recipes("S4, published", "wikitext103_hyena_rtf")),
        ("training_step", _failed),
    ],
    "S6 in training": [
        ("selective_scan", _selective("scan of mambapy")),
        ("selective_scan", _selective("loop over time")),
    ],
    "Generation": [
        ("decoding_transformer", _decoding("batch 16, context 4096", "dynamic")),
        ("decoding_transformer", _decoding("batch 16, context 4096", "static")),
        ("decoding_transformer", _decoding("batch 1, context 512", "dynamic")),
        ("decoding_exact", _exact),
        ("decoding_trained", lambda r: f"{r['ratio']['distilled']:.1f}"),
        (None, _stands("2.2")),
        (None, _stands("1.2")),
        ("decoding_million", _million),
    ],
    "StripedHyena 2": [
        ("striped_hyena2_time", _prompts),
        ("striped_hyena2_time", _tokens),
        ("striped_hyena2_memory", _prompt_memory),
        ("striped_hyena2_convert", _converting),
    ],
    "Distance from the limit": [
        ("limits", _limits("convolution", "1024", "4096", "16384")),
        ("limits", _limits("decoding", "hyena, batch 1")),
        ("limits", _limits("decoding", "multi_hyena, batch 1", "multi_hyena, batch 64")),
        ("limits", _limits("ess")),
        ("limits", _limits("reduction")),
    ],
    "Other processes": [
        ("contention", _contention(case))
        for case in ("layer 1024", "layer 4096", "demo step", "decode", "reduce", "analyze")
    ],
    "Online convolution": [
        ("online_convolution", _online("FFT recomputation")),
        ("online_convolution", _online("dot product")),
        ("online_convolution", _future_fill("ratio")),
        ("online_convolution", _future_fill("ratio_of_dot_product")),
        ("online_convolution", _held),
    ],
    "Quality against order": [
        ("distillation_order", _order(4)),
        ("distillation_order", _order(16)),
        ("distillation_order", _order(64)),
    ],
    "Order against loss": [
        ("trained_filters", _kept_taps(8)),
        ("trained_filters", _needed_order(1)),
        ("trained_filters", _needed_order(2)),
        ("trained_filters", _needed_order(2, "by text")),
        ("trained_filters", _needed_order(4)),
        ("trained_filters", _needed_order(16)),
        ("trained_filters", _needed_order(64)),
    ],
    "Trained to be small": [
        ("hankel_training", _penalized(0)),
        ("hankel_training", _penalized(1e-2)),
        ("hankel_training", _penalized(1e-2, 1e-3)),
    ],
    "Spectral filters": [
        ("spectral_filters", _spectral("each filter alone", 1e-3)),
        ("spectral_filters", _spectral("random coefficients", 1e-2)),
        ("spectral_filters", _spectral("random coefficients", 1e-3)),
        ("spectral_filters", _spectral("random coefficients", 1e-4)),
        ("spectral_filters", _random_poles(100)),
        ("spectral_filters", _random_poles(200)),
    ],
    "Weighted reduction": [
        ("calibrated_reduction", _saved("implicit", "by spectrum")),
        ("calibrated_reduction", _saved("implicit", "by text")),
        ("calibrated_reduction", _saved("s4d", "by spectrum")),
        ("calibrated_reduction", _saved("s4d", "by text")),
        ("calibrated_reduction", _weighted_loss("implicit", 4)),
        ("calibrated_reduction", _weighted_loss("s4d", 4)),
    ],
    "Projected states": [
        *(
            ("state_projection", _projected(kind, size))
            for kind in ("linear_attention", "gated_linear_attention")
            for size in (16, 8, 4)
        ),
        ("state_projection", _predicted(16)),
    ],
    "Smaller states of recurrences": [
        *(
            ("shrink", _shrunk(task, model, share))
            for task in ("text", "recall")
            for model in ("Mamba2", "Gated DeltaNet", "GLA")
            for share in (0.5, 0.25)
        ),
        ("shrink", lambda r: f"{r['wall seconds'] / 60:.0f} minutes"),
        ("shrink_cost", _pass),
    ],
    "Packed rows": [
        ("packing", _packing("alike")),
        ("packing", _packing("uneven")),
        ("packing", _packing("long and short")),
    ],
    "The trainer": [
        ("trainer_throughput", _throughput),
    ],
    "Training at equal state": [
        ("training", _task("Delay", "RTF, none")),
        ("training", _task("Delay", "S4D")),
        ("training", _task("Delay", "S4")),
    ],
    "Recurrences of rational filters": [
        ("switching", _switching),
        ("switching", _float32),
    ],
    "Forms of MultiHyena": [
        ("forms", _forms),
    ],
    "Effective state-size": [
        ("ess_agreement", _agreement),
        ("ess_recurrence", _recurrence),
        ("ess_attention", _attention),
        ("ess_attention", _attention_long),
        ("ess_application", _application),
    ],
    "Coverage of architectures": [
        ("coverage", _wholly_read),
        ("coverage", _missing_or_wrong),
        ("coverage", _largest("error")),
        ("coverage", _largest("size_error")),
        ("coverage", _largest("output_error")),
    ],
    "Other tools": [
        ("ecosystem_loading", _outcomes),
        ("ecosystem_serving", _outcomes),
    ],
    "Serving": [
        ("serving", _served("requests a second", ".1f")),
        ("serving", _served("processor seconds a request", ".2f", " s")),
    ],
    "Long contexts": [
        ("long_context_agreement", _long_agreement),
        ("long_context_agreement", _long_sizes),
        ("long_context_model", _long_model),
        ("long_context_model", _long_stated),
        ("long_context_head", _long_head),
    ],
    "Memory at delimiters": [
        ("state_modulation", _modulation("documents")),
        ("state_modulation", _modulation("sentences")),
        *((kept("state_modulation_twins"), _twins(mixer)) for mixer in ("SA", "GLA", "WLA", "LA")),
        (kept("state_modulation_twins"), _once_measured(_fall_and_loss)),
    ],
    "Attention's place in a hybrid": [
        *(
            ("hybrid_topology", _hybrids(place, behind))
            for behind in (False, True)
            for place in (1, 2, 3, 4, None)
        ),
        ("hybrid_topology", _hybrids_explained("topology")),
        ("hybrid_topology", _hybrids_explained("topology behind a convolution")),
    ],
    "Memory and recall": [
        ("ess_effects_recall", _recall("ess")),
        ("ess_effects_recall", _recall("tss")),
        ("ess_effects_state", _growth("S6")),
        ("ess_effects_state", _growth("GLA")),
        ("ess_effects_state", _growth("GLA-S6, c = 1")),
        ("ess_effects_state", _growth("GLA-S6, c = n")),
        ("ess_effects_normalization", _normalized),
        ("ess_effects_regularizer", _lifted("GLA")),
    ],
    "Memory on three tasks": [
        ("ess_tasks", _explained("copying", "ess")),
        ("ess_tasks", _explained("copying", "tss")),
        ("ess_tasks", _explained("compression", "ess")),
        ("ess_tasks", _explained("compression", "tss")),
        ("ess_tasks", _explained_within("compression", "ess")),
        ("ess_tasks", _explained_within("compression", "tss")),
    ],
    "S6 and recall": [
        ("ess_s6", _accuracy(label="S6", layers=1, rate=3e-3)),
        ("ess_s6", _accuracy(label="S6", layers=1, rate=1e-2)),
        ("ess_s6", _accuracy(label="GLA")),
        ("ess_s6", _accuracy(label="GLA-S6, c = n")),
    ],
    "Memory in hard recall": [
        ("ess_collapse", _hard("LA")),
        ("ess_collapse", _hard("GLA")),
        ("ess_collapse", _hard("WLA")),
        ("ess_collapse", _best("GLA")),
        ("ess_collapse", _best("WLA")),
    ],
    "Memory and distillation": [
        ("ess_distillation", _rank_correlation("error")),
        ("ess_distillation", _rank_correlation("divergence")),
        ("ess_distillation", _rank_correlation("increase")),
    ],
    "Memory of teachers and students": [
        ("ess_students", _teachers),
        ("ess_students", _students),
        ("ess_students", lambda r: f"{r['correlations']['all']['divergence']:.2f}"),
        ("ess_students", lambda r: f"{r['correlations']['all, per state']['divergence']:.2f}"),
        ("ess_students", _enough),
    ],
    "Planning hybrids": [
        ("planning", _hybrid("layers", 10)),
        ("planning", _hybrid("heads", 45)),
        ("planning", _hybrid("recurrences", 10)),
    ],
    "Fitted recurrences": [
        ("fitted_recurrences", _fit_errors),
        ("fitted_recurrences", _fitted("own", ("window", "both", "short window"))),
    ],
    "Genomes": [
        ("genomes", _genomes(model, job))
        for job in ("mean", "none", "score")
        for model in ("HyenaDNA", "StripedHyena")
    ],
    "Growth": [
        ("growth_length", _lengths("training step")),
        ("growth_length", _lengths("prefill")),
        ("growth_length", _lengths("reduction")),
        ("growth_filters", _exponents),
        ("growth_distill", _per_layer),
        ("growth_analyze", _per_layer),
        ("growth_convert", _per_layer),
    ],
}
