"""Run the whole demo, from reading the text to the last check."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text
from torch import Tensor

from gramian._json import to_json
from gramian._staging import staged_directory
from gramian.demo._report import Check, DemoReport, DemoSettings
from gramian.demo.measuring import (
    Agreement,
    Decoder,
    bits_per_byte,
    compare_greedy,
    cut_to_tap_zero,
    hankel_spectra,
    interleaved_seconds,
    median_ratio,
    recomputation_seconds,
)
from gramian.demo.text import BigramModel, Corpus, python_documentation
from gramian.demo.training import train
from gramian.distillation import DistillationReport, distill
from gramian.models import ByteTokenizer, GramianConfig, GramianForCausalLM, load
from gramian.ops import adaptive_threads
from gramian.reports import (
    plot_bits_per_byte,
    plot_decoding_cost,
    plot_hankel_spectra,
    save_figure,
)

__all__ = ["run_demo"]

REPORT = "demo.json"

# The limits of the demo's claims, all of which every run checks.
LEAST_GAIN_OF_LONG_FILTERS = 0.02  # bits per byte, relative
MOST_CHANGE_BY_DISTILLING = 0.001  # bits per byte, relative
MOST_MEAN_ORDER = 32
LOGIT_TIE = 1e-4
MOST_SLOWDOWN_WITH_CONTEXT = 1.1


def run_demo(
    output: str | Path, settings: DemoSettings | None = None, console: Console | None = None
) -> DemoReport:
    """Run the demo, and write its models, figures and numbers to a folder.

    The folder contains `original/` and `distilled/` (models with their tokenizer),
    `hankel_spectra.png`, `quality.png`, `cost.png` and `demo.json`. It is created after the last
    part of the demo, and replaces the output of an earlier run.

    Args:
        output: the folder.
        settings: settings of the demo; None uses the defaults.
        console: console on which progress and results are printed; None uses standard output.

    Raises:
        FileExistsError: if `output` exists and was not written by an earlier run.
        RuntimeError: if this Python lacks the text to train on.
    """
    output = Path(output)
    settings = DemoSettings() if settings is None else settings
    console = Console() if console is None else console
    replace = (output / REPORT).is_file()
    if output.exists() and not replace:
        raise FileExistsError(
            f"{output} exists and was not written by the demo; name another folder."
        )
    with staged_directory(output, replace=replace) as stage, adaptive_threads():
        report = _Demo(settings, stage, console).run()
        (stage / REPORT).write_text(to_json(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    _tell_files(console, output)
    _tell_checks(console, report)
    return report


class _Demo:
    """A run of the demo, with the parts in order, and the values that they share."""

    def __init__(self, settings: DemoSettings, stage: Path, console: Console) -> None:
        self.settings, self.stage, self.console = settings, stage, console
        self.seconds: dict[str, float] = {}

    def run(self) -> DemoReport:
        settings = self.settings
        torch.manual_seed(settings.seed)
        corpus = python_documentation()
        model = self._model()
        self._introduce(corpus, model)
        with self._part("training"):
            self._train(model, corpus)

        length = settings.training.length
        held_out = corpus.held_out[: len(corpus.held_out) // length * length].view(-1, length)
        with self._part("distillation"):
            distilled, distillation = self._distill(model)
        with self._part("quality"):
            quality = {
                "bigram model": BigramModel(corpus.train).bits_per_byte(held_out),
                "long filters cut to tap 0": bits_per_byte(cut_to_tap_zero(model), held_out),
                "original": bits_per_byte(model, held_out),
                "distilled": bits_per_byte(distilled, held_out),
            }
            self._tell_quality(quality, held_out)
        with self._part("text"):
            texts = self._write(model, distilled)
        with self._part("agreement"):
            agreement = self._agree(model)
        with self._part("cost"):
            times, sizes, slowdown = self._measure_cost(model, distilled, corpus)
            self._tell_cost(times, sizes)

        with self._part("figures"):
            spectra = hankel_spectra(model, length)
            orders = {f"layer {layer.layer}": list(layer.orders) for layer in distillation.layers}
            save_figure(plot_hankel_spectra(spectra, orders), self.stage / "hankel_spectra.png")
            save_figure(plot_bits_per_byte(quality), self.stage / "quality.png")
            save_figure(plot_decoding_cost(times, sizes), self.stage / "cost.png")
        return DemoReport(
            settings=settings,
            checks=_checks(settings, quality, distillation, agreement, slowdown),
            bits_per_byte=quality,
            distillation=distillation,
            agreement=agreement,
            milliseconds_per_token=times,
            state_bytes=sizes,
            texts=texts,
            seconds=self.seconds,
        )

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started

    def _model(self, taps: int | None = None) -> GramianForCausalLM:
        settings = self.settings
        config = GramianConfig(
            hidden_size=settings.hidden_size,
            num_hidden_layers=settings.layers,
            num_heads=settings.heads,
            mixers="multi_hyena",
            filter={"type": "implicit", "frequency": settings.frequency},
            max_position_embeddings=settings.training.length if taps is None else taps,
        )
        return GramianForCausalLM(config).eval()

    # --- the parts ------------------------------------------------------------------------------

    def _train(self, model: GramianForCausalLM, corpus: Corpus) -> None:
        steps = self.settings.training.steps
        with self._progress("{task.fields[loss]}") as progress:
            task = progress.add_task("Training", total=steps, loss="")
            smoothed = 0.0

            def show(done: int, loss: float) -> None:
                nonlocal smoothed
                smoothed = loss if done == 1 else 0.95 * smoothed + 0.05 * loss
                progress.update(task, completed=done, loss=f"{smoothed:.3f} bits per byte")
                if not self.console.is_terminal and done % max(1, steps // 10) == 0:
                    self.console.print(f"  step {done}/{steps}: {smoothed:.3f} bits per byte")

            train(model, corpus.train, self.settings.training, show)

    def _distill(self, model: GramianForCausalLM) -> tuple[GramianForCausalLM, DistillationReport]:
        """Distil, save both models, and return the distilled model, loaded from its folder."""
        with self._progress() as progress:
            task = progress.add_task("Distilling", total=None)
            distilled, report = distill(
                model,
                tol=self.settings.tol,
                progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
        self.console.print(report)
        self.console.print()
        for name, each in (("original", model), ("distilled", distilled)):
            each.save_pretrained(self.stage / name)
            ByteTokenizer().save_pretrained(self.stage / name)
        return load(self.stage / "distilled"), report

    def _write(self, model: GramianForCausalLM, distilled: GramianForCausalLM) -> dict[str, str]:
        texts = {}
        prompt = self._prompt()
        for name, each in (("original", model), ("distilled", distilled)):
            torch.manual_seed(self.settings.seed)
            ids = each.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=self.settings.written,
                do_sample=True,
                temperature=0.6,
                top_k=50,
            )
            new = ids[0, prompt.shape[1] :].tolist()
            texts[name] = bytes(i for i in new if i < 256).decode(errors="replace")
            shown = Text(self.settings.prompt, style="bold").append(texts[name], style="not bold")
            self.console.print(
                Panel(shown, title=f"written by the {name} model", title_align="left")
            )
        return texts

    def _agree(self, model: GramianForCausalLM) -> Agreement:
        tokens = self.settings.greedy_tokens
        with self._progress() as progress:
            task = progress.add_task("Recomputing greedy text", total=tokens)
            agreement = compare_greedy(
                model, self._prompt(), tokens, lambda done: progress.update(task, completed=done)
            )
        self.console.print(
            f"{agreement.tokens} greedy tokens of the original, by online convolution and by "
            f"recomputing everything at every token: {_sentence_of(agreement)}."
        )
        self.console.print()
        return agreement

    def _measure_cost(
        self, model: GramianForCausalLM, distilled: GramianForCausalLM, corpus: Corpus
    ) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, int]], float]:
        """Measure the costs of every method of generation at each context length.

        Returns:
            The milliseconds per token and the bytes of state, each as a mapping from methods of
            generation to mappings from context lengths to values. The third value is the distilled
            model's time per token at the longest context, divided by its time at the shortest.
        """
        settings = self.settings
        contexts = settings.contexts
        context = corpus.train[: max(contexts)].long().unsqueeze(0)  # (1, length)
        with self._progress() as progress:
            task = progress.add_task("Timing", total=settings.timed_rounds + 2)
            decoders = {n: Decoder(distilled, context[:, :n]) for n in contexts}
            sizes = {"distilled": {n: decoder.state_bytes for n, decoder in decoders.items()}}
            rounds = interleaved_seconds(
                decoders,
                tokens=settings.timed_tokens,
                rounds=settings.timed_rounds,
                on_round=lambda _: progress.advance(task),
            )
            times = {"distilled": {n: min(seconds) for n, seconds in rounds.items()}}
            slowdown = median_ratio(rounds[max(contexts)], rounds[min(contexts)])
            # Online convolution computes its largest block once in every cycle of steps, and a
            # cycle has as many steps as the filters have taps.
            decoders = {n: Decoder(model, context[:, :n]) for n in (min(contexts), max(contexts))}
            name = "original, online convolution"
            sizes[name] = {n: decoder.state_bytes for n, decoder in decoders.items()}
            rounds = interleaved_seconds(decoders, tokens=settings.training.length, rounds=1)
            times[name] = {n: min(seconds) for n, seconds in rounds.items()}
            progress.advance(task)
            name = "original, recomputing the context"
            times[name] = recomputation_seconds(model, context, contexts)
            progress.advance(task)
        sizes["filters as long as the context"] = {
            n: self._model(taps=n).state_bytes(1, n) for n in contexts
        }
        milliseconds = {
            name: {n: 1e3 * value for n, value in curve.items()} for name, curve in times.items()
        }
        return milliseconds, sizes, slowdown

    def _prompt(self) -> Tensor:
        return torch.tensor([list(self.settings.prompt.encode())])

    # --- the output -----------------------------------------------------------------------------

    def _progress(self, *fields: str) -> Progress:
        return Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            *(TextColumn(each) for each in fields),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def _introduce(self, corpus: Corpus, model: GramianForCausalLM) -> None:
        settings, training = self.settings, self.settings.training
        self.console.rule("Gramian: train, distil, generate in constant memory")
        self.console.print(
            f"Text: Python's own documentation, {len(corpus.train):,} bytes to train on and "
            f"{len(corpus.held_out):,} held out (no paragraph stands in both)."
        )
        self.console.print(
            f"Model: MultiHyena, {settings.layers} layers of width {settings.hidden_size}, "
            f"{settings.heads} heads each with a filter of {training.length} taps; "
            f"{model.num_parameters():,} parameters, {training.steps:,} steps of "
            f"{training.batch_size * training.length:,} bytes."
        )
        self.console.print()

    def _tell_quality(self, quality: dict[str, float], held_out: Tensor) -> None:
        table = Table(caption=f"on {held_out[:, 1:].numel():,} held-out bytes", caption_style="")
        table.add_column("model")
        table.add_column("bits per byte", justify="right")
        table.add_column("against the original", justify="right")
        for name, value in quality.items():
            change = 100 * (value / quality["original"] - 1)
            table.add_row(name, f"{value:.4f}", "" if name == "original" else f"{change:+.3f} %")
        self.console.print(table)
        self.console.print()

    def _tell_cost(
        self, times: dict[str, dict[int, float]], sizes: dict[str, dict[int, int]]
    ) -> None:
        mebibytes = {
            name: {n: value / 2**20 for n, value in curve.items()} for name, curve in sizes.items()
        }
        self.console.print(_by_context("milliseconds per token", times))
        self.console.print(_by_context("MiB carried from token to token", mebibytes))
        self.console.print()


def _checks(
    settings: DemoSettings,
    quality: dict[str, float],
    distillation: DistillationReport,
    agreement: Agreement,
    slowdown: float,
) -> tuple[Check, ...]:
    original = quality["original"]
    cost_of_cutting = quality["long filters cut to tap 0"] / original - 1
    change = quality["distilled"] / original - 1
    short, long = min(settings.contexts), max(settings.contexts)
    return (
        Check(
            "the network beats a bigram model on held-out bytes",
            original < quality["bigram model"],
            f"{original:.4f} against {quality['bigram model']:.4f} bits per byte",
        ),
        Check(
            f"cutting its long filters to tap 0 costs at least {LEAST_GAIN_OF_LONG_FILTERS:.0%}",
            cost_of_cutting >= LEAST_GAIN_OF_LONG_FILTERS,
            f"{cost_of_cutting:+.2%}",
        ),
        Check(
            f"distilling changes bits per byte by at most {MOST_CHANGE_BY_DISTILLING:.1%}",
            abs(change) <= MOST_CHANGE_BY_DISTILLING,
            f"{change:+.4%}",
        ),
        Check(
            f"the mean order of the distilled filters is at most {MOST_MEAN_ORDER}",
            distillation.mean_order <= MOST_MEAN_ORDER,
            f"{distillation.mean_order:.1f} (largest {max(distillation.orders)})",
        ),
        Check(
            f"{agreement.tokens} greedy tokens: online convolution = recomputation, up to ties",
            agreement.holds(LOGIT_TIE),
            _sentence_of(agreement),
        ),
        Check(
            f"a token at context {long:,} costs at most {MOST_SLOWDOWN_WITH_CONTEXT}x one at "
            f"{short:,}, distilled",
            slowdown <= MOST_SLOWDOWN_WITH_CONTEXT,
            f"{slowdown:.3f}x (median of {settings.timed_rounds} runs side by side)",
        ),
    )


def _sentence_of(agreement: Agreement) -> str:
    if agreement.first_difference is None:
        return f"all the same; logits within {agreement.max_logit_difference:.1e}"
    return (
        f"first difference at token {agreement.first_difference}, where the two best logits lie "
        f"{agreement.gap:.1e} apart; logits within {agreement.max_logit_difference:.1e} before"
    )


def _by_context(title: str, curves: dict[str, dict[int, float]]) -> Table:
    contexts = sorted({n for curve in curves.values() for n in curve})
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("context", justify="right")
    for name in curves:
        table.add_column(name, justify="right", max_width=20)
    for n in contexts:
        cells = (f"{curve[n]:,.2f}" if n in curve else "" for curve in curves.values())
        table.add_row(f"{n:,}", *cells)
    return table


def _tell_files(console: Console, output: Path) -> None:
    console.print(f"Written to {output}/:")
    for path in sorted(output.iterdir()):
        console.print(f"  {path.name}{'/' if path.is_dir() else ''}", highlight=False)
    console.print(
        f'Go on with: gramian generate {output}/distilled --prompt "A function is"', highlight=False
    )
    console.print()


def _tell_checks(console: Console, report: DemoReport) -> None:
    table = Table(title="Checks", title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column("claim")
    table.add_column("measured")
    for check in report.checks:
        mark = Text("pass", style="green") if check.passed else Text("FAIL", style="bold red")
        table.add_row(mark, check.claim, check.measured)
    console.print(table)
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in report.seconds.items())
    console.print(f"{sum(report.seconds.values()):.0f} s in all: {spent}.", highlight=False)
